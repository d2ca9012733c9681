"""Capture of real class definitions: exact on other values and other batch sizes, module names kept."""

from __future__ import annotations

import pytest
import torch

from qgraph.capture import trace
from qgraph.capture.values.variants import varied
from qgraph.capture.verification.compare import first_difference
from qgraph.capture.verification.process import reproducible
from qgraph.ir.node_info import graph_info, info
from tests.capture.architectures import ARCHITECTURES, Architecture

transformers = pytest.importorskip("transformers", reason="needs the extra 'zoo': pip install qgraph-fx[zoo]")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_capture_is_exact(architecture: Architecture) -> None:
    torch.manual_seed(0)
    model = architecture.build(transformers).eval()
    example = architecture.example()
    gm = trace(model, example, waive=architecture.waive)
    assert graph_info(gm).batch_fixed is None
    paths = {path for path, _ in model.named_modules()}
    modules = [node for node in gm.graph.nodes if node.op == "call_module" and node.target != "_input_guard"]
    assert modules
    assert all(node.target in paths for node in modules)
    assert all(info(node).source is not None for node in modules)
    for seed, batch in ((5, 1), (6, 2), (7, 5)):
        inputs = {name: tensor[:1].repeat(batch, *[1] * (tensor.dim() - 1)) for name, tensor in example.items()}
        if "attention_mask" not in inputs:
            inputs = varied(inputs, seed)
        with reproducible():
            assert first_difference(model(**inputs), gm(**inputs)) is None

"""Frozen graphs on LiteRT's reference kernels.

A frozen graph is translated operator by operator into a TFLite model with exactly its scales, zero points and codes.
Values keep torch's layout; operators that want channels last stand between two TRANSPOSE, which move codes only.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import fx

from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, tensor_at
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import DEQUANT_STUB, FAKE_QUANT, GUARD, ITEM
from tests.conformance import tflite_model
from tests.conformance.litert_model import Model
from tests.conformance.litert_operators import EMITTERS

SUPPORTED = frozenset(EMITTERS)


def available() -> str | None:
    """Why this engine cannot be used; None if it can."""
    return None if importlib.util.find_spec("ai_edge_litert") else "ai-edge-litert is not installed"


def run(frozen: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Codes of every site on the engine, by site name."""
    model = Model(frozen, inputs)
    for node in frozen.graph.nodes:
        _translate(model, node)
    data = tflite_model.build(list(model.tensors.values()), model.ops, list(model.feeds), model.ops[-1].outputs)
    found = tflite_model.run(data, model.feeds)
    return {site: torch.from_numpy(found[name].copy()) for site, name in model.sites.items()}


def _translate(model: Model, node: fx.Node) -> None:
    """Adds what computes one node."""
    op = info(node).op
    if node.op == "placeholder":
        data = model.inputs[len(model.feeds)].numpy()
        model.values[node] = model.tensor(data.shape, "float32")
        model.feeds[model.values[node]] = data
    elif node.op == "get_attr":
        model.values[node] = model.constant(tensor_at(model.gm, str(node.target)).detach().numpy())
    elif op in (FAKE_QUANT, DEQUANT_STUB):
        model.values[node] = model.values[node.all_input_nodes[0]]
    elif op is ITEM:
        model.values[node] = model.values[node.all_input_nodes[0]][node.args[1]]
    elif op is not GUARD and op.kind is not OpKind.OUTPUT:
        assert info(node).float_reason is None, f"{node} is not computed in integers: {info(node).float_reason}"
        model.values[node] = EMITTERS[op.name](model, node, bind(node))
        if isinstance(model.values[node], str):
            model.sites[info(node).site] = model.values[node]

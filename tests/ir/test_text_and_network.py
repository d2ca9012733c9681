"""The text form, golden for every stage; the networkx view and its questions."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import torch
from torch import fx

from qgraph.capture import trace
from qgraph.ir.network import cone, dominators, sources_of, to_networkx
from qgraph.ir.text import print_graph
from qgraph.pipeline import Pipeline
from qgraph.quantization import QConfig, calibrate, convert, prepare
from tests.support.models import Attention, Residual, image


def integer_graph(model: torch.nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Fixed scales print the same on every machine."""
    prepared = prepare(model, example, QConfig(fixed_scale=0.125))
    calibrate(prepared, [example], progress=False)
    return convert(prepared)


def test_captured(golden: Callable[[str], None]) -> None:
    golden(print_graph(trace(Residual().eval(), image()), source=False))


def test_captured_with_source() -> None:
    text = print_graph(trace(Residual().eval(), image()))
    assert "models.py:" in text
    assert str(torch.__file__) not in text


def test_fused(golden: Callable[[str], None]) -> None:
    gm = trace(Residual().eval(), image())
    golden(print_graph(Pipeline.parse("canonicalize,fuse-conv-bn-add-relu").run(gm).gm, source=False))


def test_prepared(golden: Callable[[str], None]) -> None:
    golden(print_graph(prepare(Residual().eval(), image()), source=False))


def test_prepared_attention(golden: Callable[[str], None]) -> None:
    golden(print_graph(prepare(Attention().eval(), torch.randn(2, 5, 8)), source=False))


def test_values_can_be_left_out() -> None:
    text = print_graph(trace(Residual().eval(), image()), values=False, source=False)
    assert "f32" not in text


def test_integer(golden: Callable[[str], None]) -> None:
    golden(print_graph(integer_graph(Residual().eval(), image()), source=False))


def test_the_text_is_stable() -> None:
    model, example = Residual().eval(), image()
    assert print_graph(prepare(model, example)) == print_graph(prepare(model, example))


def test_network() -> None:
    gm = trace(Residual().eval(), image())
    network = to_networkx(gm)
    assert nx.is_directed_acyclic_graph(network)
    assert network.nodes["conv1"]["op"] == "conv2d"
    assert network.nodes["conv1"]["kind"] == "matmul"
    assert [network.nodes[name]["position"] for name in network] == list(range(len(network)))
    assert "fc" in cone(network, "bn1")
    assert "fc" not in sources_of(network, "bn1")
    assert sources_of(network, "conv1") == {"x", "stem", "conv1"}
    assert dominators(network, "x")["generated_add_0"] == "stem", "both branches begin there"

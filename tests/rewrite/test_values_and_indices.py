"""Pairs of values and indices become two operators; every spelling means the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.ir.node_info import info
from qgraph.ir.op import OpKind
from qgraph.pipeline import CheckLevel, Pipeline
from tests.support.models import Forward


def canonical(function: Callable[..., Any], *inputs: torch.Tensor, **children: Any) -> fx.GraphModule:
    model = Forward(lambda m, *given: function(m, *given), **children).eval()
    gm = Pipeline.parse("canonicalize").run(qgraph.trace(model, inputs), checks=CheckLevel.NUMERICS).gm
    for result, expected in zip(_tensors(gm(*inputs)), _tensors(model(*inputs)), strict=True):
        assert torch.equal(result, expected)
    return gm


def _tensors(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def ops(gm: fx.GraphModule) -> list[str]:
    left_out = (OpKind.INPUT, OpKind.OUTPUT, OpKind.STRUCTURE, OpKind.CONSTANT)
    return [info(node).op.name for node in gm.graph.nodes if info(node).op.kind not in left_out]


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x.max(), ["amax"]),
        (lambda m, x: torch.min(x), ["amin"]),
        (lambda m, x: x.max(1)[0], ["amax"]),
        (lambda m, x: torch.max(x, x.flip(1)), ["flip", "maximum"]),
        (lambda m, x: x.min(other=x.flip(1)), ["flip", "minimum"]),
        (lambda m, x: torch.min(x, dim=-1, keepdim=True).values, ["amin"]),
        (lambda m, x: x.max(dim=1).indices, ["argmax", "squeeze"]),
        (lambda m, x: tuple(torch.max(x, 1)), ["argmax", "take_along_dim", "squeeze", "squeeze"]),
        (lambda m, x: tuple(torch.min(x, 1, True)), ["argmin", "take_along_dim"]),
        (lambda m, x: tuple(torch.topk(x, 2)), ["top_indices", "take_along_dim"]),
        (lambda m, x: x.topk(3, 1, False, True).values, ["top_indices", "take_along_dim"]),
        (lambda m, x: tuple(x.sort(1, descending=True)), ["argsort", "take_along_dim"]),
        (lambda m, x: torch.sort(x, dim=0, stable=True).indices, ["argsort"]),
        (lambda m, x: torch.argsort(x, 1), ["argsort"]),
        (lambda m, x: x.argsort(dim=1, stable=True), ["argsort"]),
    ],
)
def test_spellings(function: Callable[..., Any], expected: list[str]) -> None:
    assert sorted(ops(canonical(function, X))) == sorted(expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x > 0).min(1).values,
        lambda m, x: (x > 0).long().max(1)[0],
        lambda m, x: x.double().topk(2).values,
    ],
)
def test_what_means_something_else_computes_what_it_did(function: Callable[..., Any]) -> None:
    assert not {"amax", "argmax", "top_indices", "take_along_dim"} & set(ops(canonical(function, X)))


def test_sites_keep_their_names() -> None:
    gm = canonical(lambda m, x: tuple(x.max(1)), X)
    sites = [info(node).site for node in gm.graph.nodes if info(node).op.name == "squeeze"]
    assert sorted(sites) == ["_generated_max_0[0]", "_generated_max_0[1]"]


def test_an_embedding_reads_the_module_s_table() -> None:
    table = nn.Embedding(7, 3, padding_idx=0)
    gm = canonical(lambda m, i: m.table(i) + m.table(i + 1), torch.tensor([[0, 5]]), table=table)
    assert ops(gm).count("embedding") == 2
    assert [str(node.target) for node in gm.graph.find_nodes(op="get_attr")] == ["table.weight"]
    assert [name for name, _ in gm.named_parameters()] == ["table.weight"]


@pytest.mark.parametrize("kind", [nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d])
def test_padding_modules_are_pads(kind: type[nn.Module]) -> None:
    gm = canonical(lambda m, x: m.pad(x), X, pad=kind((2, 1)))
    (node,) = [node for node in gm.graph.nodes if info(node).op.name == "pad"]
    assert node.kwargs["mode"] in ("reflect", "replicate", "circular")


def test_grids_and_linspaces_are_constants() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 5), torch.arange(6.0), indexing="ij")
        return x + rows * columns

    gm = Pipeline.parse("fold-constants,canonicalize").run(qgraph.trace(Forward(forward).eval(), (X,))).gm
    assert ops(gm) == ["add"]

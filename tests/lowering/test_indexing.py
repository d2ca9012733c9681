"""Indices, tables and positions: what runs in integers, in which formats, and what is refused and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph.analysis import compare_sites
from qgraph.errors import QuantizationError
from qgraph.ir.node_info import graph_info, info
from qgraph.lowering.sampling import _in_integers, _table
from qgraph.quantization import (
    FakeQuantState,
    ModuleNameQconfigSetter,
    QConfig,
    calibrate,
    convert,
    prepare,
    set_fake_quantize,
)
from qgraph.simulator import Simulator
from tests.support.deformable import DeformableAttention, SelectingDecoder
from tests.support.models import Forward

Data = Callable[[int], tuple[torch.Tensor, ...]]


def road(model: nn.Module, data: Data, *setters: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    prepared = prepare(model.eval(), data(2), *setters)
    calibrate(prepared, [data(8) for _ in range(4)], progress=False)
    return prepared, convert(prepared)


def images(*shape: int) -> Data:
    return lambda batch: (torch.randn(batch, *shape),)


def islands(gm: fx.GraphModule) -> list[str]:
    return [note for note in graph_info(gm).notes if note.startswith("float:")]


def node_at(gm: fx.GraphModule, site: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if info(node).site == site and node.op != "output")


# --- whole models --------------------------------------------------------------------------------------------------


def deformable_inputs(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 5, 16), torch.rand(batch, 5, 2, 2), torch.randn(batch, 60, 16)


@pytest.fixture(scope="module")
def deformable() -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    return road(DeformableAttention(), deformable_inputs)


def test_deformable_attention_runs_in_integers(deformable: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    prepared, integer = deformable
    assert islands(integer) == []
    inputs = deformable_inputs(6)
    for site in compare_sites(prepared, integer, inputs):
        largest = 40 if site.op in ("exp", "reciprocal") else 1
        assert site.largest <= largest, site
        # Positions and weights of 11 bits move int8 samples next to a tie only.
        assert site.unexplained <= (0.01 * site.elements if site.op == "grid_sample" else site.elements), site
    simulated, reference = Simulator(integer)(*inputs), prepared(*inputs)
    assert (simulated - reference).abs().max() <= 0.02 * reference.abs().max()
    assert torch.equal(simulated, integer(*inputs))


def test_what_computes_positions_has_16_bits(deformable: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    _, integer = deformable
    formats = {info(node).site: str(info(node).qparams.qtype) for node in integer.graph.nodes if info(node).qparams}
    assert formats["offsets"] == formats["reference.quant"] == "int16"
    assert formats["value"] == formats["weights"] == "int8"
    assert {formats[site] for site in formats if site.endswith(".positions")} == {"int32"}


def test_selected_queries_run_in_integers() -> None:
    torch.manual_seed(0)
    prepared, integer = road(SelectingDecoder(), images(60, 16))
    assert islands(integer) == []
    x = torch.randn(16, 60, 16)
    # Equal scores are many in int8: both sides choose the same tokens, or nothing downstream would agree.
    assert all(site.unexplained == 0 for site in compare_sites(prepared, integer, (x,)))
    scores, boxes, best = Simulator(integer)(x)
    assert best.dtype is torch.int64
    assert torch.equal(best, prepared(x)[2])
    assert scores.shape == (16, 4, 5)
    assert boxes.shape == (16, 4, 4)


# --- order of equal values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "select",
    [
        lambda x: x.topk(4, dim=1).indices,
        lambda x: x.topk(4, dim=1, largest=False, sorted=False).indices,
        lambda x: x.sort(dim=1, descending=True).indices,
        lambda x: x.argsort(1),
        lambda x: x.max(1).indices,
        lambda x: x.argmin(1),
    ],
)
def test_equal_codes_are_taken_in_order(select: Callable[[torch.Tensor], torch.Tensor]) -> None:
    prepared, integer = road(Forward(lambda m, x: select(x)), images(40))
    x = torch.randint(-2, 3, (8, 40)).float()
    chosen = Simulator(integer)(x)
    assert torch.equal(chosen, prepared(x)), "fake quantization breaks ties as the integers do"
    codes = x.gather(1, chosen.reshape(8, -1))
    ties = codes[:, 1:] == codes[:, :-1]
    assert bool((chosen.reshape(8, -1)[:, 1:] > chosen.reshape(8, -1)[:, :-1])[ties].all())


def test_calibration_orders_as_the_float_model() -> None:
    prepared = prepare(Forward(lambda m, x: x.topk(3, dim=1).indices).eval(), images(40)(2))
    set_fake_quantize(prepared, FakeQuantState.CALIBRATION)
    x = torch.zeros(4, 40)
    assert torch.equal(prepared(x), x.topk(3, dim=1).indices)


# --- embeddings ----------------------------------------------------------------------------------------------------


def test_the_table_of_an_embedding_is_a_weight() -> None:
    model = Forward(lambda m, i: m.out(m.table(i)), table=nn.Embedding(7, 4), out=nn.Linear(4, 3))
    indices = torch.randint(7, (2, 5))
    _, integer = road(model, lambda batch: (torch.randint(7, (batch, 5)),), QConfig(output="int16"))
    assert islands(integer) == []
    table = model.table.weight
    found = info(node_at(integer, "table")).qparams
    assert str(found.qtype) == "int8", "the weight's format, not the activation's"
    assert torch.equal(found.scale, table.abs().max() / 128)
    run = Simulator(integer).run(indices, record=True)
    codes = torch.clamp(torch.round(table[indices] * (1 / found.scale)), -128, 127)
    assert torch.equal(run.values["table"].float(), codes)


def test_an_embedding_learns() -> None:
    model = Forward(lambda m, i: m.table(i), table=nn.Embedding(7, 4))
    prepared, _ = road(model, lambda batch: (torch.randint(7, (batch, 5)),))
    set_fake_quantize(prepared, FakeQuantState.QAT)
    prepared(torch.tensor([[1, 1, 2, 3, 3]])).sum().backward()
    [(name, table)] = prepared.named_parameters()
    assert name == "table.weight"
    assert table.grad[:, 0].tolist() == [0, 2, 1, 2, 0, 0, 0]


def test_an_embedding_that_renormalizes_its_table_stays_in_float() -> None:
    model = Forward(lambda m, x: m.table(x.argmax(1)) + 1, table=nn.Embedding(6, 4, max_norm=9.0))
    prepared = prepare(model.eval(), torch.randn(2, 6), waive=("state",))
    assert any("max_norm" in note or "in place" in note for note in islands(prepared)), islands(prepared)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.prod(1), "fits no accumulator"),
        (lambda x: x.logsumexp(1), "amax, exp, sum and log"),
        (lambda x: x.argmax(), "searches the whole batch"),
        (lambda x: x.cumsum(1, dtype=torch.float64).float(), "computes in torch.float64"),
        (lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), mode="bicubic", align_corners=False), "'bicubic'"),
        (lambda x: F.grid_sample(x[:, None], x[:, None, :3].permute(0, 1, 3, 4, 2), align_corners=False), "volumes"),
    ],
)
def test_reasons(function: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    prepared = prepare(Forward(lambda m, x: function(x.relu())).eval(), torch.randn(2, 3, 4, 4))
    assert any(reason in note for note in islands(prepared)), islands(prepared)


def test_a_grid_of_8_bits_is_refused() -> None:
    model = Forward(
        lambda m, x: F.grid_sample(x, m.tanh(x[:, :2]).permute(0, 2, 3, 1), align_corners=False), tanh=nn.Tanh()
    )
    setters = [ModuleNameQconfigSetter({"tanh": QConfig(output="int8")})]
    with pytest.raises(QuantizationError, match="int16 -> int8"):
        prepare(model.eval(), torch.randn(2, 3, 4, 4), setters)


# --- tables of weights ---------------------------------------------------------------------------------------------

MODES = [
    ("linear", False, False),
    ("linear", False, True),
    ("bicubic", False, False),
    ("bicubic", False, True),
    ("bilinear", True, False),
    ("bicubic", True, False),
    ("bicubic", True, True),
]


@pytest.mark.parametrize(("mode", "antialias", "align"), MODES)
@pytest.mark.parametrize(("size_in", "size_out"), [(7, 12), (12, 5), (9, 9), (1, 4), (6, 1), (30, 7)])
def test_weights_are_those_of_torch(mode: str, antialias: bool, align: bool, size_in: int, size_out: int) -> None:
    """The real weights: torch's resizing of every unit impulse."""
    impulses = torch.eye(size_in).reshape(size_in, 1, 1, size_in)
    if mode == "linear":
        expected = F.interpolate(impulses[:, 0], size_out, mode=mode, align_corners=align).reshape(size_in, size_out)
    else:
        flat = impulses.expand(-1, -1, 4, -1)
        resized = F.interpolate(flat, (4, size_out), mode=mode, align_corners=align, antialias=antialias)
        expected = resized[:, 0, 0]
    indices, weights = _table(mode, antialias, size_in, size_out, size_in / size_out, align)
    actual = torch.zeros(size_in, size_out, dtype=torch.float64).scatter_add(0, indices, weights)
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("mode", "antialias", "align"), MODES)
def test_integer_weights_sum_to_one(mode: str, antialias: bool, align: bool) -> None:
    for size_in, size_out in ((7, 12), (12, 5), (30, 7), (3, 50)):
        for bits in (11, 7):
            table = _in_integers(*_table(mode, antialias, size_in, size_out, size_in / size_out, align), bits)
            assert table.dtype is torch.int64
            assert torch.equal(table[1].sum(0), torch.full((size_out,), 1 << bits))

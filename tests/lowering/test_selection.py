"""Masks between codes: where they come from, what they choose, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from qgraph.analysis import compare_sites
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info
from qgraph.lowering.selection import threshold
from qgraph.numerics import QParams, dequantize, qint8, qint16, quint8
from qgraph.quantization import QConfig, calibrate, convert, prepare
from qgraph.simulator import Simulator
from tests.numerics.exact import long, single
from tests.support.models import Forward

SHAPE = (2, 3, 4, 5)


def road(forward: Callable[..., Any], *inputs: torch.Tensor, **children: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    examples = inputs or (torch.randn(SHAPE),)
    gm = prepare(Forward(forward, **children).eval(), examples, QConfig(output=qint8))
    calibrate(gm, [examples], progress=False)
    return gm, convert(gm)


def names(gm: fx.GraphModule) -> list[str]:
    return [name for node in gm.graph.nodes if (name := integer_name(node.target) or info(node).op.name)]


def islands(gm: fx.GraphModule) -> list[str]:
    return [note for note in graph_info(gm).notes if note.startswith("float:")]


# --- comparisons with a number -------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["gt", "ge", "lt", "le", "eq", "ne"])
@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.25, 0.7])
@pytest.mark.parametrize(("qtype", "zero"), [(qint8, 0), (qint8, -7), (quint8, 130), (qint16, 0)])
def test_thresholds_are_where_float32_has_them(relation: str, scale: float, qtype: Any, zero: int) -> None:
    qparams = QParams(single(scale), qtype, long(zero))
    codes = torch.arange(qtype.qmin, qtype.qmax + 1)
    reals = dequantize(codes, qparams)
    holds = getattr(torch, relation)
    on_grid = [reals[3].item(), reals[-1].item(), reals[0].item(), 0.0]
    for number in (*on_grid, 0.3, -0.7000001, 1e9, -1e9, 3 * scale):
        code = threshold(relation, number, qparams)
        assert torch.equal(holds(codes, code), holds(reals, number)), number


# --- masks in graphs -----------------------------------------------------------------------------------------------


def test_a_mask_has_no_scale_and_no_stub() -> None:
    prepared, integer = road(lambda m, x: torch.where((x > 0.2) & ~(x > 1.0), x.relu(), x * 0.37))
    assert islands(integer) == []
    for gm in (prepared, integer):
        masks = [node for node in gm.graph.nodes if str(info(node).value).startswith("bool")]
        assert len(masks) == 4
        for mask in masks:
            assert info(mask).qparams is None
            assert info(mask).plan is None
            assert all(info(user).op.kind != "stub" for user in mask.users)
    assert names(integer).count("compare") == 2
    assert names(integer).count("quantize") == names(integer).count("dequantize") == 1


def test_a_mask_may_be_an_input_or_a_result() -> None:
    x, mask = torch.randn(SHAPE), torch.rand(SHAPE) > 0.5
    _, integer = road(lambda m, x, mask: (x.relu().masked_fill(mask, 0.0), mask, x > 0.5), x, mask)
    assert islands(integer) == []
    filled, same, larger = integer(x, mask)
    assert torch.equal(same, mask)
    assert larger.dtype is torch.bool
    assert torch.equal(filled == 0, mask | (integer(x, torch.zeros_like(mask))[0] == 0))


def test_integers_beside_codes_are_no_islands() -> None:
    x, ids = torch.randn(2, 6), torch.arange(12).reshape(2, 6)
    _, integer = road(lambda m, x, ids: torch.where((ids % 3 == 0).logical_not(), x.relu(), x), x, ids)
    assert islands(integer) == []
    assert "compare" not in names(integer), "integers are compared as they are"


def test_what_floats_compare_stays_float() -> None:
    gm, integer = road(lambda m, x: torch.where(torch.cumprod(x, 1) > 0, x.relu(), x))
    assert [note for note in islands(integer) if "cumprod" in note]
    assert "compare" not in names(integer)
    x = torch.randn(SHAPE)
    assert all(site.largest <= 1 for site in compare_sites(gm, integer, (x,)))


def test_compared_codes_of_two_scales() -> None:
    """Products of 31 bits put no pair of codes on the wrong side that is further apart than one part in 2^30."""
    _, integer = road(lambda m, x: (x.relu() * 0.731, x.sigmoid(), x.relu() * 0.731 >= x.sigmoid()))
    one, two, mask = integer(torch.randn(SHAPE))
    apart = (one - two).abs() > 1e-6
    assert bool(apart.any())
    assert torch.equal(mask[apart], (one >= two)[apart])


@pytest.mark.parametrize("fill", [float("-inf"), -1e9, torch.finfo(torch.float32).min, -1e4])
def test_a_fill_below_everything_loses_every_comparison(fill: float) -> None:
    prepared, integer = road(
        lambda m, x: x.masked_fill(m.mask, fill).flatten(1).amax(-1), mask=torch.rand(SHAPE[1:]) > 0.3
    )
    assert islands(integer) == []
    scales = [info(node).qparams.scale.item() for node in integer.graph.nodes if info(node).qparams is not None]
    assert max(scales) < 0.1, "the fill entered no range"
    x = torch.randn(SHAPE)
    assert torch.equal(integer(x), prepared(x))


def test_a_fill_above_everything() -> None:
    prepared, integer = road(lambda m, x: torch.where(x > 0, x, float("inf")) < 0.5)
    assert islands(integer) == []
    x = torch.randn(SHAPE)
    mask = Simulator(integer)(x)
    assert torch.equal(mask, prepared(x))
    assert 0 < int(mask.sum()) < mask.numel()


def test_zero_is_filled_in_at_the_scale_of_the_operand() -> None:
    prepared, integer = road(lambda m, x: torch.where(x > 0.3, x, 0.0))
    assert "requantize" not in names(integer)
    x = torch.randn(SHAPE)
    assert torch.equal(integer(x), prepared(x))


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m, x: x.masked_fill(x > 0, float("-inf")) + x, "its fill -inf has no code"),
        (lambda m, x: torch.where(x > 0, x, -1e9), "its fill -1000000000.0 has no code"),
        (lambda m, x: x.masked_fill(x > 0, -1e9).reshape(-1, 5) * 2.0, "reads more than its order"),
        (lambda m, x: x.masked_fill(x > 0, float("nan")), "it fills in nan"),
        (lambda m, x: x.masked_fill(x > 0, x.sum()), "its fill is computed in the forward"),
        (lambda m, x: x > float("nan"), "it compares with nan"),
        (lambda m, x: torch.where(x > 0, 1.0, 2.0), "it chooses between numbers"),
        (lambda m, x: x ** x.relu(), "both computed in the forward"),
        (lambda m, x: x ** float("inf"), "it computes with inf"),
        (lambda m, x: nn.functional.prelu(x, x.mean((0, 2, 3))), "its slopes are computed in the forward"),
        (lambda m, x: x // 2.0, "no integer form of operator.floordiv"),
        (lambda m, x: x % 2.0, "no integer form of .remainder"),
    ],
)
def test_refusals(forward: Callable[..., Any], words: str) -> None:
    gm = prepare(Forward(lambda m, x: (x.sigmoid(), forward(m, x.relu()))).eval(), torch.randn(SHAPE))
    reasons = [info(node).float_reason or "" for node in gm.graph.nodes]
    assert any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize("channels", [1, 3])
def test_prelu_of_every_code(channels: int) -> None:
    """Against the real function, rounded: the only rounding is that of the result."""
    slopes = nn.PReLU(channels)
    nn.init.uniform_(slopes.weight, -2.0, 2.0)
    prepared, integer = road(lambda m, x: m.p(x), torch.linspace(-1, 1, 3 * 256).reshape(1, 256, 3).mT, p=slopes)
    for site in compare_sites(prepared, integer, (torch.linspace(-1, 1, 3 * 256).reshape(1, 256, 3).mT,)):
        assert site.unexplained == 0
    assert names(integer).count("prelu") == 1

"""check_consistency: counts over batches, and the right cause for differences made on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.analysis import Cause, check_consistency, compare_sites
from qgraph.errors import StateError, UserError
from qgraph.numerics import Arithmetic, parse_arithmetic
from qgraph.quantization import FakeQuantState, calibrate, convert, get_qconfig, prepare, set_fake_quantize
from qgraph.targets import Target, get_target
from tests.support.models import Attention, Forward, Residual, image


def with_words(**words: str) -> Target:
    """bpu with other arithmetic."""
    bpu = get_target("bpu")
    arithmetic: dict[str, Arithmetic] = {**bpu.arithmetic, **{k: parse_arithmetic(v) for k, v in words.items()}}
    return replace(bpu, name="other", arithmetic=arithmetic)


def road(model: nn.Module, x: torch.Tensor, setter: Any = None, target: Any = "bpu") -> Any:
    prepared = prepare(model.eval(), x, setter, target=target)
    calibrate(prepared, [x], progress=False)
    return prepared, convert(prepared)


def found(graphs: tuple[fx.GraphModule, fx.GraphModule], x: torch.Tensor, site: str) -> dict[Cause, int]:
    report = check_consistency(*graphs, [x])
    return dict(next(entry for entry in report.sites if entry.site == site).causes)


def test_counts_add_up_over_batches() -> None:
    graphs = road(Attention(), torch.randn(2, 5, 8))
    batches = [torch.randn(2, 5, 8) for _ in range(3)]
    report = check_consistency(*graphs, iter(batches))
    each = [compare_sites(*graphs, (x,)) for x in batches]
    assert report.batches == 3
    assert [site.site for site in report.sites] == [site.site for site in each[0]]
    for i, site in enumerate(report.sites):
        assert site.elements == sum(sites[i].elements for sites in each)
        assert site.differing == sum(sites[i].differing for sites in each) == sum(site.causes.values())
        assert site.largest == max(sites[i].largest for sites in each)
    assert report.differing == sum(site.differing for site in report.sites)
    assert f"{report.differing} of {report.elements} codes differ over 3 batch(es)" in report.table()
    assert check_consistency(*graphs, batches, num_steps=1).batches == 1
    assert len(report.table(everything=True).splitlines()) == len(report.sites) + 3


def test_sums_beyond_float32() -> None:
    """The last linear keeps its accumulator: float32 cannot even write it down."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8192, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(64, 8192) + 0.5)
    x = torch.rand(4, 8192) + 0.5
    graphs = road(model, x)
    assert set(found(graphs, x, "0")) == {Cause.ACCUMULATION}
    report = check_consistency(*graphs, [x])
    assert report.needs_float64 == ("0",)
    assert "accumulation beyond 2^24" in report.table()


def test_float32_next_to_a_tie() -> None:
    """A product of two int16 codes has 30 bits, float32 holds 24 of them."""
    torch.manual_seed(0)
    model, x = Forward(lambda _, x: x.relu() * x), torch.randn(1000, 64)
    graphs = road(model, x, get_qconfig(out_dtype="int16"))
    assert found(graphs, x, "_generated_mul_0")[Cause.FLOAT32] > 0


def test_a_coarse_table() -> None:
    x = torch.linspace(-8, 8, 4096)[:, None]
    bpu = get_target("bpu")
    coarse = replace(bpu, name="coarse", tables={**bpu.tables, "int16": 16})
    graphs = road(nn.Sequential(nn.Sigmoid()), x, get_qconfig(out_dtype="int16"), coarse)
    assert set(found(graphs, x, "0")) == {Cause.TABLE}
    assert check_consistency(*graphs, [x]).needs_float64 == ()


def test_an_accumulator_that_does_not_hold_the_sum() -> None:
    torch.manual_seed(0)
    target = with_words(product="int16:wrap/fixed_point:24:half_even")
    x = torch.rand(16, 64)
    model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(8, 64))
    assert found(road(model, x, target=target), x, "0")[Cause.OVERFLOW] > 100


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("int32:wrap/fixed_point_two:31:half_up:half_away", Cause.DOUBLE_ROUNDING),
        ("int32:wrap/fixed_point:24:half_up", Cause.TIES),
        ("int32:wrap/fixed_point:6:half_even", Cause.FACTOR),
    ],
)
def test_what_the_word_does(word: str, cause: Cause) -> None:
    """The mean of two codes at the same scale lies on a tie half of the time; a third does not."""
    window = 3 if cause is Cause.FACTOR else 2
    x = torch.randint(-128, 128, (64, 3, 12), dtype=torch.float32) / 128
    x[0, 0, 0] = -1.0
    setter = qgraph.ModuleNameQconfigSetter({"0": get_qconfig(fix_scale=1 / 128)})
    graphs = road(nn.Sequential(nn.AvgPool1d(window)), x, setter, with_words(product=word))
    causes = found(graphs, x, "0")
    assert set(causes) == {cause}
    assert causes[cause] > 50


def test_wrong_use() -> None:
    prepared, integer = road(Residual(), image())
    with pytest.raises(UserError, match="no data"):
        check_consistency(prepared, integer, [])
    with pytest.raises(UserError, match="needs a prepared graph"):
        check_consistency(integer, integer, [image()])
    set_fake_quantize(prepared, FakeQuantState.QAT, ["conv2"])
    with pytest.raises(StateError, match="conv2 is in state"):
        check_consistency(prepared, integer, [image()])


def test_data_that_yields_no_batches_is_refused() -> None:
    x = torch.randn(2, 4)
    prepared, integer = road(nn.Sequential(nn.Linear(4, 3)), x)
    for data in (x, None):
        with pytest.raises(UserError, match="it must yield batches"):
            check_consistency(prepared, integer, data)  # type: ignore[arg-type]

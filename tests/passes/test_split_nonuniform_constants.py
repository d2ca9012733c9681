"""split-nonuniform-constants: found by estimated error, cut into the fewest groups, re-joined after the consumer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qgraph import QuantStub
from qgraph.errors import UserError
from qgraph.ir.op_table import CAT, DIV, MUL, QUANT_STUB
from qgraph.pipeline import Pipeline
from qgraph.quantization import calibrate, convert, prepare, prepare_pipeline
from qgraph.simulator import Simulator
from tests.passes.models import before_and_after, check_all, check_values
from tests.support.models import Forward
from tests.support.passes import count_ops, nodes_of, refusal_with, run_passes

SPLIT = "canonicalize,split-nonuniform-constants"
WIDTH = 16


def frequencies() -> torch.Tensor:
    """Divisors of a sine position encoding, `[16]`: 1 to about 3162."""
    return 10000.0 ** (2 * (torch.arange(WIDTH) // 2) / WIDTH)


def encoding() -> nn.Module:
    return Forward(lambda m, x: (x[..., None] / m.dim_t).relu(), dim_t=frequencies()).eval()


def stubbed() -> nn.Module:
    return Forward(
        lambda m, x: (m.quant(x)[..., None] / m.quant_dim_t(m.dim_t)).relu(),
        dim_t=frequencies(),
        quant=QuantStub(),
        quant_dim_t=QuantStub(),
    ).eval()


def positions() -> torch.Tensor:
    return torch.rand(2, 5) * 6


@pytest.mark.parametrize("build", [encoding, stubbed])
def test_golden(build: Callable[[], nn.Module], golden: Callable[[str], None]) -> None:
    model, x = build(), positions()
    golden(before_and_after(model, x, run_passes(model, x, SPLIT)))


@pytest.mark.parametrize("build", [encoding, stubbed])
def test_exact_and_idempotent(build: Callable[[], nn.Module]) -> None:
    model, x = build(), positions()
    result = run_passes(model, x, SPLIT)
    assert count_ops(result.gm)["cat"] == 1
    assert len(nodes_of(result.gm, DIV)) == 2
    check_all(model, result, x, SPLIT)


def test_the_error_of_a_stubbed_divisor_goes_away() -> None:
    model, x = stubbed(), positions()
    errors = {}
    for name, passes in {"whole": prepare_pipeline().remove("split-nonuniform-constants"), "split": None}.items():
        prepared = prepare(model, x, pipeline=passes)
        calibrate(prepared, [x], progress=False)
        errors[name] = (Simulator(convert(prepared))(x) - model(x)).abs().max().item()
    step = 6 / 128
    assert errors["whole"] > 20 * step, "small divisors round to zero or to far from themselves"
    assert errors["split"] < 2 * step


def test_a_bare_divisor_is_judged_as_the_reciprocal_it_becomes() -> None:
    model, x = encoding(), positions()
    assert count_ops(prepare(model, x))["cat"] == 0, "1 / c is rounded, which costs less than half a step"
    prepared = prepare(model, x)
    calibrate(prepared, [x], progress=False)
    assert (Simulator(convert(prepared))(x) - model(x)).abs().max().item() < 2 * 6 / 128


def test_one_stub_read_by_two_consumers() -> None:
    def forward(m, x, y):
        divisor = m.quant_divisor(m.divisor)
        return torch.cat([m.quant(x)[..., None] / divisor, m.quant(y)[..., None] / divisor], -1)

    model = Forward(forward, divisor=frequencies(), quant=QuantStub(), quant_divisor=QuantStub())
    example = (positions(), positions())
    result = run_passes(model, example, SPLIT)
    assert len(nodes_of(result.gm, DIV)) == 4
    assert len(nodes_of(result.gm, QUANT_STUB)) == 6, "two inputs, two groups for each consumer; the whole is gone"
    check_all(model, result, example, SPLIT)


def test_constant_on_the_left_and_products() -> None:
    wide = torch.tensor([1e-3, 2e-3, 1.0, 100.0])
    model = Forward(lambda m, x: m.c / (x.abs() + 1) + x * m.c, c=wide)
    x = torch.randn(3, 4) * torch.tensor([1e5, 1e5, 1e2, 1.0])
    result = run_passes(model, x, SPLIT)
    assert len(nodes_of(result.gm, MUL)) > 1, "x is large where the factor is small"
    assert len(nodes_of(result.gm, DIV)) == 1, "the quotient is small where the constant is: nothing is lost"
    check_values(model, result.gm, x)


def test_a_broadcast_operand_is_not_sliced() -> None:
    model = Forward(lambda m, x: x / m.c, c=frequencies())
    x = torch.rand(5, 1)
    result = run_passes(model, x, SPLIT)
    assert count_ops(result.gm)["slice"] == 0
    check_values(model, result.gm, x)


def test_along_an_inner_dimension() -> None:
    model = Forward(lambda m, x: x / m.c, c=frequencies().reshape(WIDTH, 1, 1))
    x = torch.rand(2, WIDTH, 3, 4)
    result = run_passes(model, x, SPLIT)
    (joined,) = nodes_of(result.gm, CAT)
    assert joined.kwargs["dim"] == -3
    check_all(model, result, x, SPLIT)


@pytest.mark.parametrize(
    ("forward", "constants"),
    [
        (lambda m, x: x / m.c, {"c": torch.linspace(1, 2, 8)}),
        (lambda m, x: x / m.c, {"c": torch.tensor([7.0])}),
        (lambda m, x: torch.div(x, m.c, rounding_mode="floor"), {"c": frequencies()[:8]}),
        (lambda m, x: torch.add(x, m.c, alpha=2), {"c": frequencies()[:8]}),
        (lambda m, x: x / 10000.0, {}),
        (lambda m, x: x.long() * m.c, {"c": torch.tensor([1, 10, 100, 1000, 1, 1, 1, 1])}),
        (lambda m, x: m.q(m.c) + x, {"c": frequencies()[:8], "q": QuantStub(scale=50.0)}),
    ],
    ids=["uniform", "one element", "rounding", "alpha", "number", "integers", "fixed scale"],
)
def test_left_alone(forward: Callable[..., torch.Tensor], constants: dict[str, torch.Tensor]) -> None:
    result = run_passes(Forward(forward, **constants), torch.rand(4, 8), SPLIT)
    assert count_ops(result.gm)["cat"] == 0
    assert [one for one in result.refusals if one.rule == "split-nonuniform-constants"] == []


def test_refused_where_several_dimensions_vary() -> None:
    model = Forward(lambda m, x: x / m.c, c=torch.outer(torch.tensor([1.0, 1000.0]), frequencies()))
    result = run_passes(model, torch.rand(2, WIDTH), SPLIT)
    assert refusal_with(result, "varies along several dimensions").source is not None
    assert count_ops(result.gm)["cat"] == 0


def test_refused_where_too_many_groups_are_needed() -> None:
    model = Forward(lambda m, x: x / m.c, c=frequencies())
    result = run_passes(model, torch.rand(2, WIDTH), "canonicalize,split-nonuniform-constants{most_groups=1}")
    refusal_with(result, "needs more than 1 groups")
    assert count_ops(result.gm)["cat"] == 0


def test_the_tolerance_decides_the_number_of_groups() -> None:
    model, x = encoding(), positions()
    counts = []
    for tolerance in (0.5, 4.0, 100.0):
        result = run_passes(model, x, f"canonicalize,split-nonuniform-constants{{tolerance={tolerance}}}")
        counts.append(len(nodes_of(result.gm, DIV)))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="tolerance"):
        Pipeline.parse("split-nonuniform-constants{tolerence=1}")

"""Scales at the edge: what is no scale is refused, ratios too large or too small saturate or vanish, as documented."""

from __future__ import annotations

import pytest
import torch

from qgraph.errors import QuantizationError
from qgraph.simulator import Simulator
from qgraph.targets import get_target
from tests.conformance import engine_bpu
from tests.conformance.build import Built, Case, build
from tests.conformance.compare import compare, kernel_sets
from tests.conformance.program import Program, Step
from tests.conformance.values import Values

CODES = [-128.0, -3.0, -1.0, 0.0, 1.0, 3.0, 127.0]


def linear(source: float, weight: float, result: float, bias: float | None = None) -> Case:
    """`y = w * x`: one weight of code 1."""
    step = Step("s0", "linear", "self.s0({0})", ("x0",), f"nn.Linear(1, 1, bias={bias is not None})")
    return case(step, {"x0.quant": source, "s0.weight": weight, "s0": result}, bias)


def add(source: float, result: float) -> Case:
    """`y = x + x`."""
    step = Step("s0", "add", "{0} + {0}", ("x0",))
    return case(step, {"x0.quant": source, "_generated_add_0": result}, None)


def case(step: Step, scales: dict[str, float], bias: float | None) -> Case:
    values = Values({site: ([scale], 0) for site, scale in scales.items()})
    values.weights["s0.weight"] = torch.ones(1, 1, dtype=torch.int64)
    if bias is not None:
        values.biases["s0.bias"] = torch.tensor([bias])
    codes = torch.tensor(CODES, dtype=torch.float64)
    values.inputs["x0"] = (codes * scales["x0.quant"]).to(torch.float32).reshape(-1, 1)
    # The result is read by another call, so that it is no high-precision output.
    tail = Step("s1", "cat", "torch.cat([{0}, {0}], 1)", ("s0",))
    program = Program({"x0": (len(CODES), 1)}, (step, tail))
    return Case(get_target("bpu"), program, {}, ("int8", "int8"), values, "scales")


def result(built: Built, site: str) -> list[int]:
    """Codes of a site, equal in all kernel sets and for the oracle."""
    found = compare(built, kernel_sets(), engine_bpu)
    assert not found.mismatches
    run = Simulator(built.integer, kernels="reference").run(*built.inputs, record=True)
    codes: list[int] = run.values[site][:, 0].tolist()
    return codes


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e-40, 2.0**-149])
@pytest.mark.parametrize("site", ["x0.quant", "s0.weight", "s0"])
def test_what_is_no_scale_is_refused(site: str, scale: float) -> None:
    wrong = linear(1.0, 1.0, 1.0)
    wrong.values.scales[site] = ([scale], 0)
    wrong.values.inputs["x0"] = torch.ones(len(CODES), 1)
    with pytest.raises(QuantizationError, match="not finite and positive"):
        build(wrong)


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-100, 1.0, 2.0**100])
def test_extreme_scales_of_equal_size_keep_codes(scale: float) -> None:
    assert result(build(linear(scale, 1.0, scale)), "s0") == CODES


@pytest.mark.parametrize("exponent", [7, 20, 24, 28, 30])
def test_large_ratios_saturate(exponent: int) -> None:
    built = build(linear(2.0**exponent, 1.0, 1.0))
    assert result(built, "s0") == [-128, -128, -128, 0, 127, 127, 127]


@pytest.mark.parametrize("exponent", [31, 40, 90])
def test_ratios_no_multiplier_holds_saturate_or_are_refused(exponent: int) -> None:
    """A product is stored with the largest multiplier; a sum has no such form."""
    built = build(linear(2.0**exponent, 1.0, 1.0))
    assert result(built, "s0") == [-128, -128, -128, 0, 127, 127, 127]
    with pytest.raises(QuantizationError, match=r"a rescaling factor is 2\*\*31 or more"):
        build(add(2.0**exponent, 1.0))


@pytest.mark.parametrize("exponent", [9, 40, 62, 63, 100])
def test_small_ratios_vanish(exponent: int) -> None:
    assert result(build(linear(2.0**-exponent, 1.0, 1.0)), "s0") == [0] * len(CODES)
    assert result(build(add(2.0 ** -(exponent + 1), 1.0)), "_generated_add_0") == [0] * len(CODES)


def test_a_product_of_scales_below_float32_is_exact() -> None:
    """`sx * sw` is a float64 product: far below the smallest float32 it still gives the right factor."""
    assert result(build(linear(2.0**-100, 2.0**-100, 2.0**-120)), "s0") == [0] * len(CODES)
    assert result(build(linear(2.0**-60, 2.0**-60, 2.0**-120)), "s0") == CODES


@pytest.mark.parametrize("bias", [3e38, -3e38])
def test_a_bias_beyond_the_accumulator_saturates(bias: float) -> None:
    """The bias saturates at 32 bits; what is added to it wraps, as the accumulator of this target does."""
    built = build(linear(1.0, 1.0, 2.0**24, bias))
    sums = [int(code) + ((1 << 31) - 1 if bias > 0 else -(1 << 31)) for code in CODES]
    wrapped = [(value + (1 << 31)) % (1 << 32) - (1 << 31) for value in sums]
    expected = [max(min(round(value / 2**24), 127), -128) for value in wrapped]
    assert result(built, "s0") == expected

"""Every kernel against the oracle: equal bits, equal counts, no tolerance."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qgraph.errors import UserError
from qgraph.simulator.reference import KERNELS
from qgraph.simulator.trace import KernelTrace
from tests.oracle.arithmetic import Counts
from tests.oracle.operators import OPERATORS
from tests.simulator.cases import CASES, ROUNDINGS, STORAGE, Case, Draw, array_of, ask_oracle, drawn

FAST = range(120)
SLOW = range(1000, 3000)
INT8 = {"low": -128, "high": 127, "format": "int8"}
INT32 = {"low": -(2**31), "high": 2**31 - 1, "format": "int32"}
ARITHMETIC = sorted(
    {"requantize", "conv", "linear", "matmul", "add", "mul", "resize_bilinear"}
    | {"avg_pool", "adaptive_avg_pool", "reduce_sum", "cumsum", "fold", "resize", "sample_bilinear", "prelu"}
)
ACCUMULATING = sorted(set(ARITHMETIC) - {"requantize", "add"})


def result_dtype(case: Case) -> torch.dtype:
    if "format" in case.options:
        return STORAGE[case.options["format"]]
    first, second = case.arguments[0], case.arguments[-1]
    assert first is not None
    assert second is not None
    return {
        "dequantize": torch.float32,
        "compare": torch.bool,
        "lookup": second.dtype,
        "lookup_steps": second.dtype,
        "lookup_two": second.dtype,
        "arg_extreme": torch.int64,
        "order": torch.int64,
    }.get(case.operator, first.dtype)


def check(case: Case, expected: np.ndarray | None = None, counts: Counts | None = None) -> None:
    """Runs the kernel and compares values, dtype, shape and counts."""
    if expected is None or counts is None:
        expected, counts = ask_oracle(case)
    trace = KernelTrace()
    result = KERNELS[case.operator](*case.arguments, **case.options, trace=trace)
    assert (tuple(result.shape), result.dtype) == (expected.shape, result_dtype(case)), case
    values = array_of(result)
    differing = [position for position in np.ndindex(expected.shape) if values[position] != expected[position]]
    first = [(position, values[position], expected[position]) for position in differing[:3]]
    assert not differing, f"{len(differing)} differ, first (where, kernel, oracle): {first}\n{case}"
    assert (trace.saturated, trace.overflowed) == (counts.saturated, counts.overflowed), case


# --- random cases --------------------------------------------------------------------------------------------------


def test_every_kernel_has_an_oracle_and_cases() -> None:
    assert set(OPERATORS) == set(KERNELS)
    assert set(CASES) == set(KERNELS)


@pytest.mark.parametrize("seed", FAST)
@pytest.mark.parametrize("operator", sorted(CASES))
def test_kernel_equals_oracle(operator: str, seed: int) -> None:
    case, expected, counts = drawn(operator, seed)
    check(case, expected, counts)


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(CASES))
def test_kernel_equals_oracle_in_many_cases(operator: str) -> None:
    for seed in SLOW:
        case, expected, counts = drawn(operator, seed)
        check(case, expected, counts)


@pytest.mark.parametrize("operator", ARITHMETIC)
def test_the_cases_look_for_trouble(operator: str) -> None:
    """Ties of every rounding, both ends of the formats, accumulators that do not hold their sums, all forms."""
    met: Counter[str] = Counter()
    for seed in FAST:
        case, expected, counts = drawn(operator, seed)
        met["overflow"] += counts.overflowed > 0
        met["below"] += counts.saturated > 0 and case.options["low"] in expected
        met["above"] += counts.saturated > 0 and case.options["high"] in expected
        rule, *_, rounding = case.options["arithmetic"].split("/")[1].split(":")
        met[rule] += 1
        met[rounding] += any(not np.array_equal(expected, other) for other in with_other_roundings(case))
    wanted = {"below", "above", "fixed_point", "power_of_two", "float", *ROUNDINGS}
    wanted |= set() if operator == "add" else {"fixed_point_two"}
    wanted |= {"overflow"} if operator in ACCUMULATING else set()
    assert not {name for name in wanted if not met[name]}, met


def with_other_roundings(case: Case) -> list[np.ndarray]:
    word = case.options["arithmetic"]
    start = word.rsplit(":", 1)[0]
    others = [f"{start}:{name}" for name in ROUNDINGS if f"{start}:{name}" != word]
    return [
        ask_oracle(Case(case.operator, case.arguments, {**case.options, "arithmetic": other}))[0] for other in others
    ]


# --- one number at a time, shrinking to the smallest failure -----------------------------------------------------

OUTPUTS = st.sampled_from(
    [
        {"format": "int8", "low": -128, "high": 127},
        {"format": "int8", "low": 0, "high": 90},
        {"format": "int16", "low": -32768, "high": 32767},
        {"format": "int16", "low": 0, "high": 32767},
        {"format": "int32", "low": -(2**31), "high": 2**31 - 1},
    ]
)
ROUNDING = st.sampled_from(ROUNDINGS)
RULES = st.one_of(
    st.builds("fixed_point:{}:{}".format, st.sampled_from([8, 16, 24, 31]), ROUNDING),
    st.builds("power_of_two:{}".format, ROUNDING),
)
SINGLE_RULES = st.one_of(RULES, st.builds("fixed_point_two:31:{}:{}".format, ROUNDING, ROUNDING))
CODES = st.lists(st.one_of(st.integers(-9, 9), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=8)
MULTIPLIERS = st.one_of(
    st.integers(-9, 9),
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.builds(lambda n, k: (2 * n + 1) << k, st.integers(-4, 4), st.integers(0, 27)),
)
SHIFTS = st.integers(0, 62)
SEARCH = settings(derandomize=True, deadline=None, max_examples=200)


def scalar(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def int32(*codes: int) -> torch.Tensor:
    return torch.tensor(codes, dtype=torch.int32)


def check_if_narrow(case: Case) -> None:
    expected, counts = ask_oracle(case)
    assume(counts.widest <= 63)
    check(case, expected, counts)


@SEARCH
@given(codes=CODES, rule=SINGLE_RULES, multiplier=MULTIPLIERS, shift=SHIFTS, output=OUTPUTS)
def test_one_term(codes: list[int], rule: str, multiplier: int, shift: int, output: dict[str, Any]) -> None:
    x = torch.tensor(codes, dtype=torch.int32)
    word = {"arithmetic": f"int32:wrap/{rule}", **output}
    check_if_narrow(Case("requantize", (x, scalar(multiplier), scalar(shift), None), word))


@SEARCH
@given(
    codes=CODES, rule=RULES, multiplier=MULTIPLIERS, offset=st.integers(-(2**62), 2**62), shift=SHIFTS, output=OUTPUTS
)
def test_one_term_and_an_offset(
    codes: list[int], rule: str, multiplier: int, offset: int, shift: int, output: dict[str, Any]
) -> None:
    x = torch.tensor(codes, dtype=torch.int32)
    word = {"arithmetic": f"int32:wrap/{rule}", **output}
    check_if_narrow(Case("requantize", (x, scalar(multiplier), scalar(shift), scalar(offset)), word))


@SEARCH
@given(x=CODES, y=CODES, rule=RULES, mx=MULTIPLIERS, my=MULTIPLIERS, shift=SHIFTS, output=OUTPUTS)
def test_two_terms(x: list[int], y: list[int], rule: str, mx: int, my: int, shift: int, output: dict[str, Any]) -> None:
    left, right = (torch.tensor(codes[: min(len(x), len(y))], dtype=torch.int32) for codes in (x, y))
    word = {"arithmetic": f"int32:wrap/{rule}", **output}
    check_if_narrow(Case("add", (left, right, scalar(mx), scalar(my), scalar(shift)), word))


@SEARCH
@given(
    codes=CODES,
    factor=st.floats(-(2.0**31), 2.0**31, width=32),
    rounding=ROUNDING,
    output=OUTPUTS,
)
def test_one_term_in_float(codes: list[int], factor: float, rounding: str, output: dict[str, Any]) -> None:
    x = torch.tensor(codes, dtype=torch.int32)
    word = {"arithmetic": f"int32:wrap/float:{rounding}", **output}
    check_if_narrow(Case("requantize", (x, torch.tensor(factor), None, None), word))


@SEARCH
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8),
    scale=st.floats(2.0**-60, 2.0**60, width=32),
    name=st.sampled_from(["int8", "int16"]),
)
def test_quantize(values: list[float], scale: float, name: str) -> None:
    check(Case("quantize", (torch.tensor(values), torch.tensor(scale)), {"format": name}))


RELATIONS = st.sampled_from(["gt", "ge", "lt", "le", "eq", "ne"])


@SEARCH
@given(
    codes=CODES, rule=SINGLE_RULES, up=MULTIPLIERS, down=MULTIPLIERS, shifts=st.tuples(SHIFTS, SHIFTS), output=OUTPUTS
)
def test_two_slopes(
    codes: list[int], rule: str, up: int, down: int, shifts: tuple[int, int], output: dict[str, Any]
) -> None:
    x = torch.tensor(codes, dtype=torch.int32)
    word = {"arithmetic": f"int32:wrap/{rule}", **output}
    check_if_narrow(Case("prelu", (x, scalar(up), scalar(shifts[0]), scalar(down), scalar(shifts[1])), word))


@SEARCH
@given(x=CODES, y=CODES, mx=st.integers(0, 2**31 - 1), my=st.integers(0, 2**31 - 1), relation=RELATIONS)
def test_compared_products(x: list[int], y: list[int], mx: int, my: int, relation: str) -> None:
    left, right = (torch.tensor(codes[: min(len(x), len(y))], dtype=torch.int32) for codes in (x, y))
    check(Case("compare", (left, right, scalar(mx), scalar(my)), {"relation": relation}))
    check(Case("compare", (left, left, scalar(mx), scalar(mx)), {"relation": relation}))


# --- whole ranges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("multiplier", "shift"), [(1, 1), (3, 2), (-5, 3), (1, 0), (7, 1), (2**24 - 1, 25)])
def test_every_int8_code(rounding: str, multiplier: int, shift: int) -> None:
    x = torch.arange(-128, 128, dtype=torch.int8)
    word = {"arithmetic": f"int32:wrap/fixed_point:24:{rounding}", "low": -128, "high": 127, "format": "int8"}
    check(Case("requantize", (x, scalar(multiplier), scalar(shift), None), word))


@pytest.mark.parametrize("first", ROUNDINGS)
@pytest.mark.parametrize("second", ROUNDINGS)
@pytest.mark.parametrize(("multiplier", "shift"), [(2**30, 32), (2**30, 31), (3 * 2**29, 33), (-(2**30), 33), (5, 3)])
def test_every_pair_of_roundings(first: str, second: str, multiplier: int, shift: int) -> None:
    x = torch.arange(-128, 128, dtype=torch.int8)
    word = {"arithmetic": f"int32:wrap/fixed_point_two:31:{first}:{second}", "low": -128, "high": 127, "format": "int8"}
    check(Case("requantize", (x, scalar(multiplier), scalar(shift), None), word))


@pytest.mark.parametrize("intervals", [1, 16, 128, None])
@pytest.mark.parametrize("target", ["int8", "int16", "int32"])
def test_every_int8_code_in_tables(intervals: int | None, target: str) -> None:
    generator = torch.Generator().manual_seed(intervals or 0)
    limits = torch.iinfo(STORAGE[target])
    size = 256 if intervals is None else intervals + 1
    table = torch.randint(limits.min, limits.max + 1, [size], generator=generator).to(STORAGE[target])
    check(Case("lookup", (torch.arange(-128, 128, dtype=torch.int8), table), {"source": "int8"}))


def test_int16_table_of_bpu() -> None:
    """4096 intervals of 16 codes: all residues, both ends."""
    table = ((torch.arange(4097) * 7919) % 65536 - 32768).to(torch.int16)
    ends = [*range(-32768, -32768 + 40), *range(-24, 24), *range(32767 - 40, 32768)]
    check(Case("lookup", (torch.tensor(ends, dtype=torch.int16), table), {"source": "int16"}))


def test_padding_never_wins() -> None:
    x = torch.full((1, 1, 2, 2), -128, dtype=torch.int8)
    window = {"kernel_size": [2, 2], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "ceil_mode": False}
    check(Case("max_pool", (x,), window))


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
def test_exact_sum_enters_the_accumulator_once(overflow: str) -> None:
    """Partial sums leave int32 and come back: neither wraps, neither saturates, nothing is counted."""
    x = torch.tensor([[-32768, -32768, -32768, -32768]], dtype=torch.int16)
    weight = torch.tensor([[-32768, -32768, 32767, 32767]], dtype=torch.int16)
    options = {"arithmetic": f"int32:{overflow}/fixed_point:24:half_even", "low": -(2**31), "high": 2**31 - 1}
    case = Case("linear", (x, weight, None, None, None, None, None), {**options, "format": "int32"})
    expected, counts = ask_oracle(case)
    assert (expected.item(), counts.overflowed) == (65536, 0)
    check(case)


@pytest.mark.parametrize("length", [520, 1030, 4100])
@pytest.mark.parametrize(("x_format", "weight_format"), [("int8", "int8"), ("int16", "int8"), ("int16", "int16")])
@pytest.mark.parametrize("kind", ["lowest", "ends", "uniform"])
def test_long_sums(length: int, x_format: str, weight_format: str, kind: str) -> None:
    """Sums past 2^24 and 2^31, odd so that no narrower arithmetic holds them."""
    draw = Draw(f"{length}-{x_format}-{weight_format}-{kind}")
    x, weight = (
        torch.tensor([draw.code(name, kind) for _ in range(length - 1)] + [1], dtype=STORAGE[name])
        for name in (x_format, weight_format)
    )
    word = {"arithmetic": "int39:wrap/fixed_point:24:half_even", **INT32}
    check(Case("matmul", (x, weight, None, None), word))
    check(Case("matmul", (x, weight, scalar(3), scalar(14)), word))
    nothing = (None,) * 5
    check(Case("linear", (x[None], weight[None], *nothing), word))
    geometry: dict[str, Any] = {"stride": [1], "padding": [0], "dilation": [1], "output_padding": [0]}
    geometry |= {"transposed": False, "groups": 1}
    check(Case("conv", (x[None, :, None], weight[None, :, None], *nothing), {**geometry, **word}))
    check(Case("conv", (x[None, None], weight[None, None], *nothing), {**geometry, **word}))
    check(Case("conv", (x[None, :, None], weight[:, None, None], *nothing), {**geometry, "transposed": True, **word}))
    check(Case("reduce_sum", (x, scalar(1), scalar(0)), {"dims": [0], "keepdim": False, **word}))
    check(Case("adaptive_avg_pool", (x[None], scalar(1), scalar(0)), {"output_size": [1], **word}))


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
def test_bias_takes_part_in_the_overflow(overflow: str) -> None:
    x = torch.tensor([[1], [0], [-1]], dtype=torch.int8)
    weight = torch.tensor([[1], [1]], dtype=torch.int8)
    bias = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    options = {"arithmetic": f"int32:{overflow}/fixed_point:24:half_even", "low": -128, "high": 127, "format": "int8"}
    case = Case("linear", (x, weight, bias, None, scalar(1), scalar(24), None), options)
    assert ask_oracle(case)[1].overflowed == 2
    check(case)


@pytest.mark.parametrize(
    ("low", "high", "saturated"), [(-128, 127, 4), (0, 127, 2), (-128, 90, 2), (0, 90, 0), (-127, 127, 2)]
)
def test_saturation_counts_only_where_no_bound_stands(low: int, high: int, saturated: int) -> None:
    x = torch.tensor([-300, -129, -128, 0, 127, 128, 300], dtype=torch.int16)
    options = {"arithmetic": "int32:wrap/fixed_point:24:half_even", "low": low, "high": high, "format": "int8"}
    case = Case("requantize", (x, scalar(1), scalar(0), None), options)
    assert ask_oracle(case)[1].saturated == saturated
    check(case)


@pytest.mark.parametrize("code", [2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31), 33554434 + 1])
def test_float_rounds_the_accumulator_first(code: int) -> None:
    options = {"arithmetic": "int32:wrap/float:half_even", "low": -(2**31), "high": 2**31 - 1, "format": "int32"}
    check(Case("requantize", (torch.tensor([code], dtype=torch.int32), torch.tensor(1.0), None, None), options))
    check(Case("dequantize", (torch.tensor([code], dtype=torch.int32), torch.tensor(0.1)), {"axis": 0}))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("divisor", [3, 6, 10, 14, 22, 49, 98])
def test_float_product_is_rounded_to_single(rounding: str, divisor: int) -> None:
    """Factors near `1 / divisor`, whose products become ties and whole numbers only in float32."""
    x = torch.arange(-128, 128, dtype=torch.int8)
    options = {"arithmetic": f"int32:wrap/float:{rounding}", **INT8}
    check(Case("requantize", (x, torch.tensor(1 / divisor), None, None), options))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("small", [2.0**-24, -(2.0**-25), 2.0**-30, 1 / 3])
def test_float_sum_is_rounded_to_single(rounding: str, small: float) -> None:
    """The second term is lost, or moves a tie, in the float32 sum."""
    x = torch.arange(-128, 128, dtype=torch.int8)
    y = torch.full_like(x, 3)
    options = {"arithmetic": f"int64:wrap/float:{rounding}", **INT8}
    factors = torch.tensor(0.5), torch.tensor(small)
    check(Case("add", (x, y, *factors, None), options))
    ones = torch.ones(1, 1, dtype=torch.int8)
    residual = (None, y[:, None], factors[0], None, factors[1])
    check(Case("linear", (x[:, None], ones, *residual), options))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("offset", [0.0, 0.5, -0.5, 1 / 3, 2.0**24 + 2, 100.0])
def test_float_with_an_offset(rounding: str, offset: float) -> None:
    """The offset is a float32 too, added last and rounded like every other sum."""
    x = torch.arange(-128, 128, dtype=torch.int8)
    options = {"arithmetic": f"int64:wrap/float:{rounding}", **INT8}
    for factor in (0.5, 0.50000006, 1 / 3):
        check(Case("requantize", (x, torch.tensor(factor), None, torch.tensor(offset)), options))


# --- the ends of the register ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "multiplier", "shift"), [(2**30, 2**30, 28), (-(2**31), 2**31 - 1, 30), (5, 1, 0)])
def test_two_steps_of_a_factor_above_one(code: int, multiplier: int, shift: int) -> None:
    options = {"arithmetic": "int32:wrap/fixed_point_two:31:half_even:half_even", **INT8}
    check(Case("requantize", (int32(code), scalar(multiplier), scalar(shift), None), options))


@pytest.mark.parametrize("factor", [2.0**62, 2.0**63, -(2.0**63), 3.0e38, -3.0e38])
def test_float_products_beyond_64_bits_saturate(factor: float) -> None:
    options = {"arithmetic": "int32:wrap/float:half_even", **INT8}
    check(Case("requantize", (int32(-2, -1, 0, 1, 2, 1000), torch.tensor(factor), None, None), options))


@pytest.mark.parametrize("offset", [2**62, -(2**62), 0])
@pytest.mark.parametrize("multiplier", [2**31 - 1, -(2**31) + 1])
@pytest.mark.parametrize("shift", [0, 31, 62])
def test_largest_terms(offset: int, multiplier: int, shift: int) -> None:
    options = {"arithmetic": "int32:wrap/fixed_point:31:half_even", **INT8}
    codes = int32(2**31 - 1, 1, 0, -(2**31))
    check(Case("requantize", (codes, scalar(multiplier), scalar(shift), scalar(offset)), options))
    check(Case("add", (codes, codes, scalar(multiplier), scalar(multiplier), scalar(shift)), options))
    check(Case("mul", (codes, codes, scalar(multiplier), scalar(shift)), options))


def test_products_of_wide_codes_are_refused() -> None:
    """Four products of int32 codes leave 64 bits; no target hands them to a product."""
    x = int32(*[-(2**31)] * 4)
    options = {"arithmetic": "int32:saturate/fixed_point:31:half_even", **INT32}
    with pytest.raises(UserError, match="int32"):
        KERNELS["matmul"](x, x, None, None, **options)


@pytest.mark.parametrize("word", ["int48:wrap/fixed_point:24:floor", "int33:saturate/fixed_point:31:floor"])
def test_words_whose_products_may_not_fit_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="64-bit register"):
        KERNELS["requantize"](int32(1), scalar(1), scalar(0), None, arithmetic=word, **INT8)


@pytest.mark.parametrize("value", [2.0**31, 2.0**31 - 128, 2.0**31 + 256, -(2.0**31), -(2.0**31) - 256])
def test_counts_of_quantize_to_int32(value: float) -> None:
    check(Case("quantize", (torch.tensor([value]), torch.tensor(1.0)), {"format": "int32"}))


@pytest.mark.parametrize("name", STORAGE)
def test_quantize_of_what_is_no_number(name: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    check(Case("quantize", (x, torch.tensor(0.5)), {"format": name}))


@pytest.mark.parametrize("entries", [16, 18, 255, 258, 513])
def test_tables_of_another_size_are_refused(entries: int) -> None:
    x = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(UserError, match="intervals"):
        KERNELS["lookup"](x, torch.zeros(entries, dtype=torch.int8), source="int8")

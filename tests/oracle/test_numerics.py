"""The numbers made when a graph is lowered, against the oracle: factors, bias codes, tables."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import numerics
from tests.oracle.arithmetic import encode, encode_sum, parse_format
from tests.oracle.operators import bias_code, table_entries

BITS = (8, 16, 24, 31)
SEARCH = settings(derandomize=True, deadline=None, max_examples=300)


def factors_of(bits: int) -> st.SearchStrategy[float]:
    """Real factors whose shift is not negative: powers of two, their neighbours, tiny ones, any."""
    largest = 2.0**bits * (1 - 2.0**-bits)
    powers = st.integers(-80, bits - 1).map(lambda exponent: 2.0**exponent)
    below = powers.map(lambda power: math.nextafter(power, 0.0))
    ties = st.builds(
        lambda m, e: (m + 0.5) * 2.0**e, st.integers(1 << (bits - 1), (1 << bits) - 1), st.integers(-70, -1)
    )
    magnitude = st.one_of(powers, below, ties, st.floats(2.0**-80, largest), st.just(0.0))
    return st.builds(
        lambda value, sign: value * sign, magnitude.filter(lambda value: value < largest), st.sampled_from([1, -1])
    )


@pytest.mark.parametrize("bits", BITS)
def test_encoding_of_a_factor(bits: int) -> None:
    @SEARCH
    @given(factors_of(bits))
    def holds(factor: float) -> None:
        stored = numerics.encode_fixed_point(torch.tensor(factor, dtype=torch.float64), bits)
        assert stored.shift is not None
        assert (stored.multiplier.item(), stored.shift.item()) == encode(factor, bits)

    holds()


@pytest.mark.parametrize("bits", BITS)
def test_encoding_of_a_sum(bits: int) -> None:
    @SEARCH
    @given(st.lists(factors_of(bits), min_size=2, max_size=3))
    def holds(factors: list[float]) -> None:
        stored = numerics.encode_common_shift(torch.tensor(factors, dtype=torch.float64), bits)
        assert stored.shift is not None
        assert (stored.multiplier.tolist(), stored.shift.item()) == encode_sum(factors, bits)

    holds()


def test_bias_codes() -> None:
    draw = random.Random(0)
    for _ in range(300):
        input_scale, weight_scale = (float(np.float32(10.0 ** draw.uniform(-6, 1))) for _ in range(2))
        step = input_scale * weight_scale
        bias = draw.choice(
            [draw.gauss(0, 1), (draw.randint(-9, 9) + 0.5) * step, draw.choice([-1, 1]) * 2.0**31 * step]
        )
        bias = float(np.float32(bias))
        codes = numerics.bias_codes(torch.tensor([bias]), torch.tensor([step], dtype=torch.float64))
        assert codes.tolist() == [bias_code(bias, input_scale, weight_scale)], (bias, input_scale, weight_scale)


def reciprocal(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1 / x


FUNCTIONS: dict[str, tuple[Callable[[float], float], Callable[[torch.Tensor], torch.Tensor]]] = {
    "reciprocal": (reciprocal, torch.reciprocal),
    "square": (lambda x: x * x, torch.square),
    "huge": (lambda x: x * 1e300, lambda x: x * 1e300),
    "root": (lambda x: math.sqrt(x) if x >= 0 else math.nan, torch.sqrt),
    "half": (lambda x: x * 0.5, lambda x: x * 0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("source", "intervals"), [("int8", None), ("int8", 16), ("int16", 256), ("int16", 4096)])
@pytest.mark.parametrize("target", ["int8", "int16"])
@pytest.mark.parametrize(("source_scale", "target_scale"), [(1.0, 1.0), (0.0123, 0.0571), (1 / 3, 0.0009)])
def test_tables(
    name: str, source: str, intervals: int | None, target: str, source_scale: float, target_scale: float
) -> None:
    plain, vectorized = FUNCTIONS[name]
    table = numerics.build_table(
        vectorized,
        numerics.qparams_from_scale(source_scale, numerics.parse_qtype(source)),
        numerics.qparams_from_scale(target_scale, numerics.parse_qtype(target)),
        entries=intervals,
    )
    scales = [float(np.float32(scale)) for scale in (source_scale, target_scale)]
    expected = table_entries(plain, parse_format(source), intervals, scales[0], parse_format(target), scales[1])
    assert table.tolist() == expected

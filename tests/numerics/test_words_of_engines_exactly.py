"""The words of existing engines against exact fractions: rescaling and sums, ties and ends preferred."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from qgraph.numerics.engine_sums import ENGINE_SUMS, Zeros
from qgraph.numerics.engines import ENGINE_RULES, OneDnn
from qgraph.numerics.factor import Factor
from qgraph.simulator.reference import KERNELS
from tests.oracle import engines

COUNT = 120
FORMATS = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}


def accumulators(draw: random.Random, bits: int) -> list[int]:
    top = (1 << (bits - 1)) - 1
    ends = [0, 1, -1, top, -top - 1, top - 1, (1 << 24) + 1, -(1 << 24) - 1]
    return ends + [draw.randint(-(1 << n), 1 << n) for n in (draw.randint(1, bits - 2) for _ in range(COUNT))]


def drawn_factors(draw: random.Random, largest: float) -> list[float]:
    """Few bits, all bits, near one and near the smallest."""
    exact = [(2 * draw.randint(0, 4) + 1) * 2.0 ** -draw.randint(1, 12) for _ in range(12)]
    free = [draw.uniform(0.5, 1) * 2.0 ** -draw.randint(0, 34) for _ in range(12)]
    near = [1.0, 0.5, 1 - 2.0**-33, 0.5 - 2.0**-34, 2.0**-32, 2.0**-33, 1.5, 3.0]
    return [factor for factor in exact + free + near if factor <= largest]


Oracle = Callable[[int, float, int], int]
SINGLES: dict[str, Oracle] = {
    "mlas_mul": lambda acc, m, z: engines.mlas_mul(acc, engines.single(m), z),
    "fbgemm": lambda acc, m, z: engines.fbgemm(acc, engines.single(m), z),
    "gemmlowp": lambda acc, m, z: engines.gemmlowp(acc, *engines.quantize_multiplier(Fraction(m)), z),
    "tflite_int64": lambda acc, m, z: engines.tflite_int64(acc, Fraction(m), z),
    "tflite_double": lambda acc, m, z: engines.tflite_double(acc, Fraction(m), z),
}


@pytest.mark.parametrize("word", SINGLES)
def test_one_term(word: str) -> None:
    draw = random.Random(word)
    rule = ENGINE_RULES[word]
    bits = min(rule.accumulator_bits, 40 if word == "tflite_int64" else 32)
    for factor in drawn_factors(draw, 4.0 if word != "tflite_int64" else 1.0):
        values, zero = accumulators(draw, bits), draw.choice([0, 1, -128, 127, 77, 255])
        stored = rule.encode(torch.tensor(factor, dtype=torch.float64))
        got = rule.apply(torch.tensor(values), stored, zero).tolist()
        assert got == [SINGLES[word](value, factor, zero) for value in values], f"{word} by {factor} at {zero}"


@pytest.mark.parametrize("word", SINGLES)
def test_kernels_rescale_by_the_word(word: str) -> None:
    """The same through a reference kernel, with its clamp."""
    draw = random.Random(word)
    rule = ENGINE_RULES[word]
    for factor in drawn_factors(draw, 1.0):
        values, zero = accumulators(draw, 32), draw.choice([0, 3, -128, 127])
        stored = rule.encode(torch.tensor(factor, dtype=torch.float64))
        x = torch.tensor(values, dtype=torch.int32)
        options = {"low": -100, "high": 127, "format": "int8", "zero": zero, "arithmetic": f"int32:wrap/{word}"}
        got = KERNELS["requantize"](x, stored.multiplier, stored.shift, None, **options).tolist()
        assert got == [min(max(SINGLES[word](value, factor, zero), -100), 127) for value in values]


def test_fbgemm_adds_its_bias_in_float() -> None:
    draw = random.Random(1)
    for factor in drawn_factors(draw, 4.0):
        values, bias = accumulators(draw, 32), draw.choice([0.5, -0.5, 1 / 3, 1e6 + 0.25])
        stored = ENGINE_RULES["fbgemm"].encode(torch.tensor(factor, dtype=torch.float64))
        got = ENGINE_RULES["fbgemm"].apply(torch.tensor(values), stored, 7, torch.tensor(bias)).tolist()
        single = engines.single
        assert got == [engines.fbgemm(value, single(factor), 7, single(bias)) for value in values]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bias", [None, 0.25, -1 / 3])
def test_onednn(bias: float | None, linear: bool) -> None:
    draw = random.Random(2)
    rule = OneDnn()
    for _ in range(30):
        scales = [draw.choice([draw.uniform(0.1, 4), 2.0 ** -draw.randint(0, 9), 0.75]) for _ in range(3)]
        values = accumulators(draw, 32)
        stored = rule.stages(*(torch.tensor(scale, dtype=torch.float32) for scale in scales), linear=linear)
        source, weight, result = (engines.single(scale) for scale in scales)
        factors = engines.onednn_factors(source, weight, result, linear=linear)
        assert [Fraction(factor) for factor in stored.tolist()] == list(factors)
        given = None if bias is None else torch.tensor(bias)
        got = rule.apply(torch.tensor(values), Factor(stored, None), 5, given).tolist()
        real = None if bias is None else engines.single(bias)
        assert got == [engines.onednn(value, factors, 5, real) for value in values]


# --- sums ----------------------------------------------------------------------------------------------------------


def sum_case(draw: random.Random, name: str) -> tuple[list[list[int]], list[float], list[int]]:
    """Codes of x and y, scales of x, y and the result, zero points of the three; 150 elements."""
    info = torch.iinfo(FORMATS[name])
    ends = [info.min, info.max, 0, 1]
    codes = [[draw.choice([draw.choice(ends), draw.randint(info.min, info.max)]) for _ in range(150)] for _ in range(2)]
    scales = [draw.choice([draw.choice([1.0, 0.5, 0.75, 1.25, 3.0]), draw.uniform(0.01, 4)]) for _ in range(3)]
    zeros = [
        0 if name == "int16" else draw.choice([info.min, info.max, 3, draw.randint(info.min, info.max)]) for _ in scales
    ]
    return codes, scales, zeros


@pytest.mark.parametrize(("word", "name"), [("mlas_add", "uint8"), ("mlas_add", "int8"), ("aten_add", "uint8")])
def test_sums(word: str, name: str) -> None:
    draw = random.Random(f"{word} {name}")
    for _ in range(25):
        codes, scales, zeros = sum_case(draw, name)
        got = computed(word, name, codes, scales, zeros, 1).tolist()
        exact = [engines.single(scale) for scale in scales]
        sides = [[(code, exact[i], zeros[i]) for code in codes[i]] for i in range(2)]
        if word == "mlas_add":
            expected = [engines.mlas_add(x, y, exact[2], zeros[2]) for x, y in zip(*sides, strict=True)]
        else:
            whole = len(codes[0]) // 64 * 64
            expected = [
                engines.aten_add(x, y, exact[2], zeros[2], vector=i < whole)
                for i, (x, y) in enumerate(zip(*sides, strict=True))
            ]
        assert got == expected, f"{word}: {scales}, {zeros}"


@pytest.mark.parametrize("name", ["int8", "int16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_tflite(name: str, sign: int) -> None:
    draw = random.Random(f"{name} {sign}")
    for _ in range(25):
        codes, scales, zeros = sum_case(draw, name)
        scales[2] = max(scales) * draw.choice([1.0, 0.5, 2.0])  # the engine's last factor stays below one
        got = computed("tflite_add", name, codes, scales, zeros, sign).tolist()
        exact = [engines.single(scale) for scale in scales]
        bits = 16 if name == "int16" else 8
        expected = [
            engines.tflite_add(
                (x, exact[0], zeros[0]), (y, exact[1], zeros[1]), exact[2], zeros[2], bits=bits, sign=sign
            )
            for x, y in zip(*codes, strict=True)
        ]
        assert got == expected, f"{scales}, {zeros}"


def computed(
    word: str, name: str, codes: list[list[int]], scales: list[float], zeros: list[int], sign: int
) -> torch.Tensor:
    rule = ENGINE_SUMS[word]
    single = [torch.tensor(scale, dtype=torch.float32) for scale in scales]
    stored = rule.encode(single[0], single[1], single[2], float(sign), 16 if name == "int16" else 8)
    x, y = (torch.tensor(part, dtype=FORMATS[name]) for part in codes)
    return rule.add(x, y, stored, Zeros(*zeros))

"""Fast kernels compute the bits and counts of the reference kernels: with numba, without it, without 8-bit kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qgraph.numerics import parse_arithmetic, qint8, qint16, qint32
from qgraph.numerics.engine_sums import ENGINE_SUMS
from qgraph.simulator.fast import KERNELS
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.fast.probe import exact_kinds
from qgraph.simulator.fast.sums import convolution_sums
from qgraph.simulator.kernel import Operand
from tests.simulator.cases import CASES, Draw
from tests.simulator.fast import compare

EVEN24 = "int32:wrap/fixed_point:24:half_even"
EVEN31 = "int32:wrap/fixed_point:31:half_even"
WORDS = (
    EVEN24,
    EVEN31,
    "int32:wrap/fixed_point:31:half_up",
    "int32:saturate/fixed_point:16:half_away",
    "int32:wrap/fixed_point:24:floor",
    "int32:wrap/fixed_point_two:31:half_up:half_away",
    "int32:wrap/float:half_even",
    "int32:wrap/float:half_away",
)
ENGINE_WORDS = ("int32:wrap/gemmlowp", "int48:wrap/tflite_int64", "int32:wrap/fbgemm", "int53:wrap/tflite_double")
BOUNDS = {"int8": (qint8.qmin, qint8.qmax), "int16": (qint16.qmin, qint16.qmax)}


@pytest.fixture(params=["all", "without numba", "without int8"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "without int8":
        monkeypatch.setenv("QGRAPH_INT8", "0")
    if request.param != "all":
        monkeypatch.setenv("QGRAPH_NUMBA", "0")
    elif loops() is None:
        pytest.skip("numba is not installed")
    for cache in (loops, exact_kinds):
        cache.cache_clear()
    yield request.param
    for cache in (loops, exact_kinds):
        cache.cache_clear()


@pytest.mark.parametrize("operator", sorted(KERNELS))
def test_drawn_cases(operator: str, machine: str) -> None:
    """The cases of the oracle's tests: ties, extremes, narrow accumulators, odd layouts."""
    prepared = 0
    for seed in range(25):
        case = CASES[operator](Draw(f"fast-{operator}-{seed}"))
        for whole in (True, False):
            prepared += compare(operator, case.arguments, case.options, whole=whole) is None
    assert prepared >= 5, "hardly any case has a fast form"


# --- products ------------------------------------------------------------------------------------------------------


def codes(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.int8, low: int | None = None) -> torch.Tensor:
    """Codes of a dtype: random, or extreme in different ways."""
    limits = torch.iinfo(dtype)
    low = limits.min if low is None else low
    if kind == "random":
        return torch.randint(low, limits.max + 1, shape).to(dtype)
    if kind == "ends":
        return torch.where(torch.rand(shape) < 0.5, low, limits.max).to(dtype)
    return torch.full(shape, low if kind == "lowest" else limits.max, dtype=dtype)


def factors(word: str, count: int, scale: float, terms: int = 1) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    rule: Any = parse_arithmetic(word).rule
    reals = (torch.rand(terms, count).double() + 0.5) * scale
    if terms > 1:
        encoded = rule.encode_sum(reals)
        return list(encoded.multiplier.unbind(0)), encoded.shift
    encoded = rule.encode(reals[0])
    return [encoded.multiplier], encoded.shift


def options(word: str, format: str = "int8", relu: bool = False, **more: int) -> dict[str, Any]:
    low, high = BOUNDS[format]
    return {"arithmetic": word, "low": 0 if relu else low, "high": high, "format": format, **more}


def convolution(
    size: tuple[int, int, int, int],
    weight: torch.Tensor,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int],
    word: str,
    kind: str = "random",
    dtype: torch.dtype = torch.int8,
    *,
    residual: bool = False,
    layout: torch.memory_format = torch.channels_last,
    low: int | None = None,
    bias_bits: int = 14,
    scale: float = 1.0,
    **more: Any,
) -> str | None:
    stride, padding, dilation, groups = geometry
    x = codes(size, kind, dtype, low).contiguous(memory_format=layout)
    out, terms = weight.shape[0], weight[0].numel()
    multipliers, shift = factors(word, out, 0.7 * scale / max(terms, 1) ** 0.5 / 128, 1 + residual)
    bias = torch.randint(-(2**bias_bits), 2**bias_bits, (out,)).to(torch.int32)
    made = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups)
    other = codes(tuple(made.shape), "random") if residual else None
    args = (x, weight, bias, other, multipliers[0], shift, multipliers[1] if residual else None)
    shape = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation), "output_padding": [0, 0]}
    return compare("conv", args, {**shape, "transposed": False, "groups": groups, **options(word, **more)}, whole=False)


@pytest.mark.parametrize("kind", ["random", "ends", "lowest", "highest"])
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "geometry"),
    [
        (16, 24, (3, 3), ((1, 1), (1, 1), (1, 1), 1)),
        (64, 32, (1, 1), ((1, 1), (0, 0), (1, 1), 1)),
        (64, 32, (1, 1), ((2, 3), (0, 0), (1, 1), 1)),
        (32, 32, (3, 3), ((2, 2), (1, 1), (1, 1), 32)),
        (32, 64, (3, 5), ((2, 1), (1, 2), (1, 1), 4)),
        (3, 16, (7, 7), ((2, 2), (3, 3), (1, 1), 1)),
        (16, 8, (3, 3), ((1, 1), (2, 2), (2, 2), 1)),
        (912, 8, (3, 3), ((1, 1), (1, 1), (1, 1), 1)),  # 8208 products: beyond 2**24
        (8192, 6, (1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ],
)
def test_convolutions(channels: int, out: int, kernel: tuple[int, int], geometry: Any, kind: str, machine: str) -> None:
    torch.manual_seed(0)
    weight = codes((out, channels // geometry[3], *kernel), kind if kind == "random" else "ends")
    for batch, layout in ((1, torch.channels_last), (3, torch.contiguous_format)):
        assert convolution((batch, channels, 7, 9), weight, geometry, EVEN24, kind, layout=layout) is None
    assert convolution((2, channels, 6, 8), weight, geometry, EVEN24, kind, format="int16") is None
    if machine == "all":
        assert convolution((2, channels, 6, 8), weight, geometry, EVEN24, kind, residual=True) is None


@pytest.mark.parametrize("word", WORDS)
def test_sums_beyond_float32_that_saturate(word: str, machine: str) -> None:
    """The bias brings some of them back, and factors are as small as saturation allows, or smaller."""
    torch.manual_seed(12)
    weight, geometry = codes((8, 480, 3, 3), "highest"), ((1, 1), (1, 1), (1, 1), 1)
    for scale in (1.0, 1 / 4, 1 / 8, 1 / 16, 1 / 64):
        for kind in ("random", "ends", "lowest", "highest"):
            for more in ({}, {"relu": True, "low": 0}, {"residual": "two" not in word}):
                size = (1, 480, 3, 4)
                assert convolution(size, weight, geometry, word, kind, bias_bits=23, scale=scale, **more) is None


@pytest.mark.parametrize("word", [*WORDS, *ENGINE_WORDS])
def test_words_of_products(word: str, machine: str) -> None:
    torch.manual_seed(1)
    weight, geometry = codes((20, 8, 3, 3), "random"), ((1, 1), (1, 1), (1, 1), 1)
    for more in ({}, {"relu": True}, {"x_zero": 3, "zero": -5}, {"format": "int16"}):
        assert convolution((2, 8, 6, 5), weight, geometry, word, **more) is None, more
    if word in WORDS and "two" not in word:
        assert convolution((2, 8, 6, 5), weight, geometry, word, residual=True, residual_zero=7) is None


def test_unsigned_codes(machine: str) -> None:
    torch.manual_seed(2)
    weight, geometry = codes((20, 8, 3, 3), "ends"), ((1, 1), (1, 1), (1, 1), 1)
    assert convolution((2, 8, 6, 5), weight, geometry, EVEN24, "ends", torch.uint8, x_zero=131) is None
    assert convolution((2, 8, 6, 5), weight, geometry, EVEN24, "ends", low=0) is None, "int8 after relu"


@pytest.mark.parametrize("low", [None, 0])
def test_convolutions_of_16_bits(low: int | None, machine: str) -> None:
    """Both bytes apart, in one call where no code is negative; sums beyond 32 bits wrap."""
    torch.manual_seed(3)
    for kind in ("random", "ends"):
        for channels, groups, bits in ((8, 1, 14), (8, 8, 14), (8, 1, 30), (600, 1, 14)):
            weight, geometry = codes((16, channels // groups, 3, 3), kind), ((1, 1), (1, 1), (1, 1), groups)
            size, more = (2, channels, 6, 5), {"format": "int16", "bias_bits": bits}
            assert convolution(size, weight, geometry, EVEN24, kind, torch.int16, low=low, **more) is None


@pytest.mark.parametrize("terms", [1, 2, 64, 1040, 1041, 8192])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_linear(terms: int, dtype: torch.dtype, machine: str) -> None:
    torch.manual_seed(4)
    for kind in ("random", "ends"):
        x, weight = codes((2, 5, terms), kind, dtype), codes((33, terms), kind)
        (multiplier,), shift = factors(EVEN24, 33, 1e-3)
        bias = torch.randint(-(2**20), 2**20, (33,)).to(torch.int32)
        for zero in (0, 9):
            args = (x, weight, bias, None, multiplier, shift, None)
            reason = compare("linear", args, options("int48:wrap/fixed_point:15:half_even", "int16", x_zero=zero))
            assert reason is None
            raw = {"arithmetic": EVEN24, "low": qint32.qmin, "high": qint32.qmax, "format": "int32", "x_zero": zero}
            assert compare("linear", (x, weight, bias, None, None, None, None), raw, whole=False) in (
                None,
                "sums may leave the accumulator of 32 bits",
            )


@pytest.mark.parametrize("terms", [1, 3, 64, 197])
def test_matmul(terms: int, machine: str) -> None:
    torch.manual_seed(5)
    multiplier, shift = (value.reshape(()) for value in (factors(EVEN24, 1, 1e-3)[0][0], factors(EVEN24, 1, 1e-3)[1]))
    for left, right in (((3, 4, 7), (3, 4)), ((7,), (2,)), ((1, 5), (3, 1))):
        for dtype in (torch.int8, torch.int16):
            x, y = codes((*left, terms), "ends", dtype), codes((*right, terms, 6), "random")
            for other in (y, y.mT.contiguous().mT, y.expand(*y.shape)):
                args = (x, other, multiplier, shift)
                assert compare("matmul", args, options("int34:wrap/fixed_point:24:half_even")) is None
                assert (
                    compare("matmul", args, options("int34:wrap/fixed_point:24:half_even", x_zero=1, y_zero=-2)) is None
                )


# --- ties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
def test_accumulators_around_every_step(word: str, machine: str) -> None:
    """int32 codes on both sides of every tie of int8 results, for many factors."""
    torch.manual_seed(6)
    ties = torch.arange(-140, 140, dtype=torch.float64) + 0.5
    for factor in [*(torch.rand(40).double() * 2.0 ** torch.randint(-14, 1, (40,))).tolist(), 0.25, 0.75, 2.0**-9]:
        encoded = parse_arithmetic(word).rule.encode(torch.tensor(factor, dtype=torch.float64))  # type: ignore[union-attr]
        near = (ties / factor).round().clamp(-(2**23), 2**23)
        x = torch.cat([near + step for step in (-1, 0, 1)]).to(torch.int32)
        assert compare("requantize", (x, encoded.multiplier, encoded.shift, None), options(word), whole=False) is None


def test_products_of_54_bits(machine: str) -> None:
    """int16 products times 24 bits: the last bit does not fit float64, and decides next to ties."""
    torch.manual_seed(7)
    x = codes((4096,), "ends", torch.int16)
    x[::3] = torch.randint(-32768, -32000, x[::3].shape).to(torch.int16)
    y = x.flip(0).contiguous()
    for shift in (36, 37, 38, 39, 40, 44):
        for _ in range(8):
            multiplier = torch.randint(2**23, 2**24, ()) | 1
            args = (x, y, multiplier, torch.tensor(shift))
            assert compare("mul", args, options("int34:wrap/fixed_point:24:half_even", "int16")) is None


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ((2, 197, 24), (2, 197, 1)),
        ((2, 5, 24), (24,)),
        ((2, 5, 24), (1, 5, 24)),
        ((1, 5, 24), (3, 5, 24)),
        ((3, 1, 1), (3, 5, 24)),
        ((2, 8, 4, 4), (2, 8, 1, 1)),
        ((2, 8, 4, 4), (2, 8, 4, 4)),
        ((), (7,)),
        ((3000,), (3000,)),
    ],
)
def test_broadcasting(x: tuple[int, ...], y: tuple[int, ...], machine: str) -> None:
    torch.manual_seed(8)
    for word in (EVEN31, "int32:wrap/float:half_even", "int32:wrap/fixed_point:31:half_up"):
        (first, second), shift = factors(word, 1, 0.7, 2)
        scalars = [None if value is None else value.reshape(()) for value in (first, second, shift)]
        for kinds in ((torch.int8, torch.int16), (torch.int16, torch.int8)):
            a, b = codes(x, "random", kinds[0]), codes(y, "ends", kinds[1])
            assert compare("add", (a, b, *scalars), options(word, "int16", x_zero=3, zero=-2)) is None
            single = parse_arithmetic(word).rule.encode(torch.tensor(1e-3).double())  # type: ignore[union-attr]
            assert compare("mul", (a, b, single.multiplier, single.shift), options(word, y_zero=5)) is None
            if a.dim() == 4:
                last = a.contiguous(memory_format=torch.channels_last)
                assert compare("add", (last, b, *scalars), options(word, "int16")) is None


@pytest.mark.parametrize("name", sorted(ENGINE_SUMS))
def test_sums_of_engines(name: str, machine: str) -> None:
    """All pairs of codes, whole vectors and rests, broadcasting, ratios that leave 32 bits."""
    torch.manual_seed(14)
    rule = ENGINE_SUMS[name]
    shapes = [((65536,), (65536,)), ((3, 5, 7), (3, 5, 7)), ((2, 6, 5, 3), (2, 6, 5, 3)), ((1,), (1,))]
    shapes += [((2, 6, 5, 3), (6, 1, 1)), ((4, 1), (4, 9)), ((), (9,)), ((2, 3, 4, 8), (2, 3, 4, 1))]
    for x_shape, y_shape in shapes:
        if x_shape != y_shape and not rule.broadcasts:
            continue
        for kinds in ((torch.uint8, torch.uint8), (torch.int8, torch.uint8)):
            x, y = (codes(shape, "random", dtype) for shape, dtype in zip((x_shape, y_shape), kinds, strict=True))
            if x_shape == (65536,):
                x, y = torch.arange(65536).to(kinds[0]), (torch.arange(65536) >> 8).to(kinds[1])
            beyond = [] if name == "tflite_add" else [(3e8, 1.0, 2e-1)]  # LiteRT refuses such scales
            for scales in ((0.011, 0.017, 0.02), (0.25, 0.5, 0.5), *beyond):
                encoded = rule.encode(*(torch.tensor(scale) for scale in scales), 1.0, 8)
                args = (x, y, encoded.x, encoded.y, encoded.shift, encoded.result)
                zeros = {"x_zero": 3, "y_zero": -7, "zero": 5}
                for more in (zeros, {**zeros, "relu": True}):
                    assert compare("add", args, options(f"int32:wrap/{name}", **more)) is None
                if x.dim() == 4:
                    last = x.contiguous(memory_format=torch.channels_last)
                    assert compare("add", (last, *args[1:]), options(f"int32:wrap/{name}", **zeros)) is None


def test_offsets_along_channels(machine: str) -> None:
    torch.manual_seed(9)
    for shape, lead in (((2, 197, 24), (24,)), ((2, 24, 5, 5), (24, 1, 1))):
        (multiplier,), _ = factors(EVEN31, 24, 0.4)
        args = (
            codes(shape, "random", torch.int16),
            multiplier.reshape(lead),
            torch.full(lead, 32),
            torch.randint(-(2**38), 2**38, lead),
        )
        assert compare("requantize", args, options(EVEN31)) is None


def test_tables(machine: str) -> None:
    torch.manual_seed(10)
    for source, size in (("int8", 256), ("int8", 17), ("int16", 65536), ("int16", 4097)):
        for result in (torch.int8, torch.int16):
            table, dtype = codes((size,), "random", result), getattr(torch, source)
            for shape in ((7,), (2, 3, 4, 6), (256,)):
                assert compare("lookup", (codes(shape, "random", dtype), table), {"source": source}) is None
                x = codes((2, 6, 4, 3), "random", dtype).permute(0, 3, 1, 2)
                assert compare("lookup", (x, table), {"source": source}) is None


def test_large_batches_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(11)
    monkeypatch.setattr("qgraph.simulator.fast.products.TILE", 64)
    monkeypatch.setattr("qgraph.simulator.fast.sums.TILE", 64)
    for kernel, geometry in (((3, 3), ((1, 1), (1, 1), (1, 1), 1)), ((1, 1), ((1, 1), (0, 0), (1, 1), 1))):
        weight = codes((20, 8, *kernel), "random")
        for residual in (False, True):
            assert convolution((5, 8, 6, 5), weight, geometry, EVEN24, residual=residual) is None


def test_float_convolutions_with_a_result_one_column_wide() -> None:
    """oneDNN computes wrong float32 sums of one channel on two threads."""
    torch.manual_seed(13)
    torch.set_num_threads(2)
    weight = codes((1, 1, 3, 3), "random") // 8
    operand = Operand(torch.int16, (2, 1, 2, 3), qint16.qmin, qint16.qmax)
    geometry = {"stride": [1, 2], "padding": [1, 0], "dilation": [1, 1], "groups": 1}
    sums = convolution_sums(operand, weight, None, 0, geometry)
    for _ in range(4):
        x = codes((2, 2, 2, 3), "random", torch.int16)[:, 0:1]
        exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, (1, 2), (1, 0))
        assert torch.equal(sums(x).double(), exact)


def test_convolutions_with_a_result_one_column_wide(machine: str) -> None:
    """oneDNN's 8-bit kernels compute wrong sums there."""
    torch.manual_seed(12)
    for kernel, stride, padding, dilation, width in (
        ((3, 3), (1, 2), (1, 0), (1, 1), 3),
        ((2, 2), (1, 2), (1, 0), (1, 1), 3),
        ((2, 5), (1, 3), (1, 1), (1, 1), 5),
        ((5, 3), (1, 2), (2, 1), (1, 1), 2),
        ((5, 5), (1, 2), (0, 0), (1, 1), 5),
    ):
        for groups, inputs, out in ((6, 6, 12), (16, 16, 48), (1, 1, 2), (1, 1, 1), (1, 3, 8)):
            weight = codes((out, inputs // groups, *kernel), "random")
            assert convolution((3, inputs, 8, width), weight, (stride, padding, dilation, groups), EVEN24) is None

"""Rescaling as existing engines do it, step by step; found by experiment and checked against the engines in the tests.

Each rule is one word of the arithmetic (`int32:wrap/gemmlowp`). `acc` is the accumulator, `z` the zero point of the
result, `fl` one float32 rounding, `rhe` rounds half to even, `int32()` converts as x86 does, `sat32()` saturates.

    mlas_mul        onnxruntime QLinearMul
        int32(rhe(fl(fl(fl(acc) * m) + z)))
    fbgemm          torch, fbgemm; b is the bias in steps of the accumulator, float32
        int32(rhe(fl(fl(fl(acc) + b) * m))) + z
    onednn          torch, oneDNN; b is the real bias
        sat32(rhe(fl(fl(t * my) + z))), t = fl(fl(fl(fl(acc) * mx) * mw) + b)
    gemmlowp        LiteRT, 32-bit accumulators
        rdbp(srdhm(wrap(acc * 2**max(s, 0)), M), max(-s, 0)) + z
    tflite_int64    LiteRT, 64-bit accumulators
        wrap((acc * M16 + 2**(14 - s)) >> (15 - s)) + z
    tflite_double   LiteRT fully connected; m in float64
        int32(half_away(acc * m)) + z
    tflite_mean     LiteRT MEAN of n elements; gemmlowp with M and s of the ratio of scales changed to
        e = min(floor(log2 n), 32, 31 + s), M = (M << e) // n, s = s - e
    tflite_average  LiteRT AVERAGE_POOL_2D and RESIZE_BILINEAR; acc sums raw codes, whose scale is kept
        sign(acc) * ((abs(acc) + n // 2) // n)
srdhm(a, M) = (a * M + 2**30) >> 31, rdbp(x, e) rounds x / 2**e half away from zero (gemmlowp's fixedpoint.h).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from qgraph.errors import QuantizationError
from qgraph.numerics.factor import Factor
from qgraph.numerics.float_steps import round_half_away, to_int32, whole32, wrap32

_MULTIPLIER_BITS = 31
_SMALLEST_SHIFT = -31


class EngineRule(ABC):
    """One engine's rescaling of one term.

    Attributes:
        name: the word.
        accumulator_bits: widest accumulator it is exact for.
        largest: the largest real factor it stores.
        saturates: whether larger factors saturate results; else what the engine does with them is not defined.
    """

    name: ClassVar[str]
    accumulator_bits: ClassVar[int] = 64
    largest: ClassVar[float] = float(1 << 31) * (1 - torch.finfo(torch.float32).eps)
    saturates: ClassVar[bool] = True

    def encode(self, factor: torch.Tensor) -> Factor:
        """What the engine stores for a real factor (float64, any shape, finite).

        Raises:
            QuantizationError: a factor is not finite or too large.
        """
        if not bool(torch.isfinite(factor).all()):
            raise QuantizationError("a rescaling factor is not finite")
        if bool((factor.abs() > self.largest).any()):
            raise QuantizationError(
                f"a rescaling factor is above {self.largest:g}",
                why="the scale of the result is far smaller than the scale of what it is computed from",
                fix="look at the calibrated ranges around this op",
            )
        return self._stored(factor.double())

    def _stored(self, factor: torch.Tensor) -> Factor:
        return Factor(factor.to(torch.float32), None)

    @abstractmethod
    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rescaled accumulator (int64, any shape) at a zero point, unsaturated int64; `bias` is float32 or None."""

    def __str__(self) -> str:
        return self.name


class MlasMul(EngineRule):
    """onnxruntime's QLinearMul: the zero point enters before rounding."""

    name = "mlas_mul"

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        return to_int32(torch.round(accumulator.to(torch.float32) * factor.multiplier + float(zero)))


class Fbgemm(EngineRule):
    """fbgemm's requantization of products; the float bias counts in steps of the accumulator."""

    name = "fbgemm"

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        held = accumulator.to(torch.float32)
        if bias is not None:
            held = held + bias
        return to_int32(torch.round(held * factor.multiplier)) + zero


class OneDnn(EngineRule):
    """oneDNN's: scale of the input, of the weight, bias in reals, then the result's scale and zero point.

    The stored multiplier is `[3, C]` (or `[3]`): the factors of input, weight and result.
    """

    name = "onednn"

    def stages(self, source: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, *, linear: bool) -> torch.Tensor:
        """What is stored for the scales (float32) of input, weight `[C]` and result; float32 `[3, C]`.

        torch hands scales over as reciprocals, which rounds them twice; those of a linear's weight too.
        """
        held = 1.0 / (1.0 / weight) if linear else weight
        return torch.stack(torch.broadcast_tensors(_rounded_twice(source), held, 1.0 / _rounded_twice(result)))

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        source, weight, result = factor.multiplier.unbind(0)
        real = accumulator.to(torch.float32) * source * weight
        if bias is not None:
            real = real + bias
        return whole32(real * result + float(zero))


def _rounded_twice(scale: torch.Tensor) -> torch.Tensor:
    """`fl(1 / fl(1 / scale))`, both quotients in float64."""
    return (1.0 / (1.0 / scale.double()).float().double()).float()


class Gemmlowp(EngineRule):
    """LiteRT's MultiplyByQuantizedMultiplier of int32: two roundings. `M / 2**31 * 2**s` is the factor."""

    name = "gemmlowp"
    accumulator_bits = 32
    saturates = False

    def _stored(self, factor: torch.Tensor) -> Factor:
        return quantize_multiplier(factor)

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        return multiply_by_multiplier(accumulator, factor.multiplier, factor.shifts()) + zero


class TfliteInt64(EngineRule):
    """LiteRT's MultiplyByQuantizedMultiplier of int64: a 16-bit multiplier and one rounding, ties upwards."""

    name = "tflite_int64"
    accumulator_bits = 48
    largest = float(1 << 14) * (1 - torch.finfo(torch.float32).eps)

    def _stored(self, factor: torch.Tensor) -> Factor:
        exact = quantize_multiplier(factor)
        full = exact.multiplier >= 0x7FFF0000
        short = torch.where(full, 0x7FFF, (exact.multiplier + (1 << 15)) >> 16)
        return Factor(short, exact.shifts())

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        total = 15 - factor.shifts()
        half = torch.ones_like(total) << (total - 1)
        return wrap32((accumulator * factor.multiplier + half) >> total) + zero


class TfliteDouble(EngineRule):
    """LiteRT's fully connected operator: one float64 product, ties away from zero."""

    name = "tflite_double"
    accumulator_bits = 53

    def _stored(self, factor: torch.Tensor) -> Factor:
        return Factor(factor, None)

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        return to_int32(round_half_away(accumulator.double() * factor.multiplier)) + zero


class MeanRule(EngineRule):
    """A rule for means: what is stored depends on the number of elements, not only on the real factor.

    Attributes:
        raw: whether it sums raw codes, zero points included; the result then has the operand's scale and zero point.
    """

    raw: ClassVar[bool] = False

    @abstractmethod
    def encode_mean(self, ratio: torch.Tensor, count: torch.Tensor) -> Factor:
        """What the engine stores for a mean of `count` elements (whole numbers, any shape).

        Args:
            ratio: scale of the operand over scale of the result, float64 `[]`.
            count: float64 or int64.

        Raises:
            QuantizationError: the ratio is not usable.
        """

    def _stored(self, factor: torch.Tensor) -> Factor:
        raise QuantizationError(f"{self} computes means only", fix="give this operator another word")


class TfliteMean(MeanRule):
    """LiteRT's MEAN: the number of elements divides the multiplier, which is truncated."""

    name = "tflite_mean"
    accumulator_bits = 32

    def encode_mean(self, ratio: torch.Tensor, count: torch.Tensor) -> Factor:
        exact = Gemmlowp().encode(ratio)
        whole = count.to(torch.int64)
        bits = torch.frexp(whole.double()).exponent.to(torch.int64) - 1
        lift = torch.minimum(bits.clamp(max=32), 31 + exact.shifts())
        multiplier = torch.div(exact.multiplier << lift, whole, rounding_mode="floor")
        return Factor(multiplier, exact.shifts() - lift)

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return Gemmlowp().apply(accumulator, factor, zero, bias)


class TfliteAverage(MeanRule):
    """LiteRT's averages of raw codes: integer division, ties away from code 0. The multiplier is the divisor."""

    name = "tflite_average"
    raw = True

    def encode_mean(self, ratio: torch.Tensor, count: torch.Tensor) -> Factor:
        if not bool((ratio == 1.0).all()):
            raise QuantizationError(
                f"{self} keeps the scale of its operand",
                why="the result was given another scale",
                fix="write same_scale = true for this operator in the target's file",
            )
        return Factor(count.to(torch.int64), None)

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        refuse_bias(bias, self)
        count = factor.multiplier
        size = torch.div(accumulator.abs() + (count >> 1), count, rounding_mode="floor")
        return torch.sign(accumulator) * size + zero


def quantize_multiplier(factor: torch.Tensor) -> Factor:
    """TFLite's QuantizeMultiplier: `factor = M * 2**(s - 31)`, `2**30 <= |M| < 2**31`; M = 0 below `2**-32`."""
    mantissa, exponent = torch.frexp(factor)
    multiplier = round_half_away(torch.ldexp(mantissa, torch.tensor(float(_MULTIPLIER_BITS)))).to(torch.int64)
    shift = exponent.to(torch.int64)
    full = multiplier.abs() == 1 << _MULTIPLIER_BITS
    multiplier = torch.where(full, torch.div(multiplier, 2, rounding_mode="trunc"), multiplier)
    shift = torch.where(full, shift + 1, shift)
    none = (shift < _SMALLEST_SHIFT) | (factor == 0)
    return Factor(torch.where(none, 0, multiplier), torch.where(none, 0, shift))


def multiply_by_multiplier(values: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """TFLite's MultiplyByQuantizedMultiplier of int32 values held in int64; the left shift wraps at 32 bits."""
    lifted = wrap32(values << shift.clamp(min=0))
    high = (lifted * multiplier + (1 << 30)) >> 31
    return rounding_divide(high, (-shift).clamp(min=0))


def rounding_divide(values: torch.Tensor, exponent: torch.Tensor | int) -> torch.Tensor:
    """Gemmlowp's RoundingDivideByPOT: `values / 2**exponent`, ties away from zero."""
    amount = torch.as_tensor(exponent, dtype=torch.int64, device=values.device)
    mask = (torch.ones_like(amount) << amount) - 1
    above = (values & mask) > (mask >> 1) + (values < 0).to(torch.int64)
    return (values >> amount) + above.to(torch.int64)


def refuse_bias(bias: torch.Tensor | None, rule: EngineRule) -> None:
    """Refuses a float bias where the engine adds none.

    Raises:
        QuantizationError: there is one.
    """
    if bias is not None:
        raise QuantizationError(f"{rule} adds no float bias", fix="give the bias in steps of the accumulator, int32")


_RULES = (MlasMul(), Fbgemm(), OneDnn(), Gemmlowp(), TfliteInt64(), TfliteDouble(), TfliteMean(), TfliteAverage())
ENGINE_RULES: dict[str, EngineRule] = {rule.name: rule for rule in _RULES}

"""Sums of two terms with scales of their own, as existing engines compute them.

    mlas_add      onnxruntime QLinearAdd
        int32(rhe(fma(x, rx, fma(y, ry, f)))), f = fl(z - fma(rx, zx, fl(ry * zy)))
    aten_add      torch quantized::add, in its vector body and in the tail
        rhe(fl(fl(dx + dy) * r)) + z, dx = fma(s, x, fl(s * -zx))
        rhe(fl(fl(fl(dx + dy) * r) + z)), dx = fl(s * (x - zx))
    tflite_add    LiteRT ADD and SUB; g is gemmlowp, L = 20 for 8 bits, 15 for 16
        g(g((x - zx) << L; Mx) + g((y - zy) << L; My); Mz) + z
Codes are raw here: zero points are part of the formulas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from qgraph.errors import QuantizationError
from qgraph.numerics.engines import multiply_by_multiplier, quantize_multiplier
from qgraph.numerics.float_steps import fma32, to_int32, wrap32

_CODES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class AddFactors:
    """What an engine stores for a sum of two terms: a multiplier for each, and what else it needs."""

    x: torch.Tensor
    y: torch.Tensor
    shift: torch.Tensor | None = None
    result: torch.Tensor | None = None


@dataclass(frozen=True)
class Zeros:
    """Zero points of two operands and of the result."""

    x: int
    y: int
    result: int


class EngineSum(ABC):
    """One engine's sum of two terms with scales of their own.

    Attributes:
        name: the word.
        subtracts: whether it also computes differences.
        broadcasts: whether the operands may have different shapes.
    """

    name: ClassVar[str]
    subtracts: ClassVar[bool] = False
    broadcasts: ClassVar[bool] = True
    accumulator_bits: ClassVar[int] = 64

    @abstractmethod
    def encode(self, x: torch.Tensor, y: torch.Tensor, result: torch.Tensor, sign: float, bits: int) -> AddFactors:
        """What is stored for `x + sign * y`, from the scales (float32, 0-d); `bits` of the operands' format."""

    @abstractmethod
    def add(self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros) -> torch.Tensor:
        """The unsaturated sum (int64) of raw codes `x` and `y`, broadcast, the result's zero point included."""

    @abstractmethod
    def elements(
        self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros, *, regular: bool
    ) -> torch.Tensor:
        """As `add`, with one of the two formulas for every element, see `regular`."""

    def regular(self, x: torch.Size, y: torch.Size) -> int:
        """How many results for operands of these shapes follow the engine's regular formula.

        They come first in memory order, channels_last for four dimensions; the others follow its other formula.
        """
        return int(torch.broadcast_shapes(x, y).numel())

    def __str__(self) -> str:
        return self.name


class MlasAdd(EngineSum):
    """onnxruntime: two fused multiply-adds; a broadcast operand changes their order."""

    name = "mlas_add"

    def encode(self, x: torch.Tensor, y: torch.Tensor, result: torch.Tensor, sign: float, bits: int) -> AddFactors:
        _refuse_difference(sign, self)
        return AddFactors(x / result, y / result)

    def add(self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros) -> torch.Tensor:
        return self.elements(x, y, factors, zeros, regular=not _first_is_scalar(x.shape, y.shape))

    def elements(
        self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros, *, regular: bool
    ) -> torch.Tensor:
        """The operands in their order, or changed places."""
        first, second = (x, factors.x, zeros.x), (y, factors.y, zeros.y)
        if not regular:
            first, second = second, first
        (a, ratio_a, zero_a), (b, ratio_b, zero_b) = first, second
        inner = fma32(b.to(torch.float32), ratio_b, self.fixed((ratio_a, ratio_b), Zeros(zero_a, zero_b, zeros.result)))
        return to_int32(torch.round(fma32(a.to(torch.float32), ratio_a, inner)))

    def fixed(self, ratios: tuple[torch.Tensor, torch.Tensor], zeros: Zeros) -> torch.Tensor:
        """What the zero points add, float32 `[]`, with the operands in the order of the formula."""
        zero_a, zero_b = (torch.full_like(ratio, zero) for ratio, zero in zip(ratios, (zeros.x, zeros.y), strict=True))
        return zeros.result - fma32(ratios[0], zero_a, ratios[1] * zero_b)

    def regular(self, x: torch.Size, y: torch.Size) -> int:
        """All or none: a scalar first operand changes places."""
        return 0 if _first_is_scalar(x, y) else super().regular(x, y)


class AtenAdd(EngineSum):
    """torch's quantized::add of 8-bit codes on one thread.

    Elements are taken in memory order, channels_last for four dimensions: 64 at a time by a vector loop, the rest one
    by one by another formula. Which elements these are for operands of different shapes is not described here.
    """

    name = "aten_add"
    broadcasts = False

    def encode(self, x: torch.Tensor, y: torch.Tensor, result: torch.Tensor, sign: float, bits: int) -> AddFactors:
        _refuse_difference(sign, self)
        return AddFactors(x, y, result=1.0 / result)

    def add(self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros) -> torch.Tensor:
        if x.shape != y.shape:
            raise QuantizationError(
                f"{self} adds values of shapes {list(x.shape)} and {list(y.shape)}", fix="give operands of one shape"
            )
        body, tail = (self.elements(x, y, factors, zeros, regular=regular) for regular in (True, False))
        return torch.where(in_vector_loop(x), body, tail)

    def elements(
        self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros, *, regular: bool
    ) -> torch.Tensor:
        """The vector loop's formula, or that of the rest."""
        assert factors.result is not None
        sides = ((x, factors.x, zeros.x), (y, factors.y, zeros.y))
        if not regular:
            alone = [scale * (codes.to(torch.int64) - zero).to(torch.float32) for codes, scale, zero in sides]
            return to_int32(torch.round((alone[0] + alone[1]) * factors.result + float(zeros.result)))
        real = [fma32(scale, codes.to(torch.float32), scale * -float(zero)) for codes, scale, zero in sides]
        steps = ((real[0] + real[1]) * factors.result).clamp(-(2.0**31), 2.0**31 - 128)
        return torch.round(steps).to(torch.int64) + zeros.result

    def regular(self, x: torch.Size, y: torch.Size) -> int:
        """What the vector loop takes."""
        return x.numel() // _CODES_AT_ONCE * _CODES_AT_ONCE


def in_vector_loop(x: torch.Tensor) -> torch.Tensor:
    """Which elements torch's vector loop of 64 codes takes on one thread, bool of `x`'s shape."""
    whole = x.numel() // _CODES_AT_ONCE * _CODES_AT_ONCE
    inside = torch.arange(x.numel(), device=x.device) < whole
    if x.dim() != 4:
        return inside.reshape(x.shape)
    batch, channels, height, width = x.shape
    return inside.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class TfliteAdd(EngineSum):
    """LiteRT: both terms lifted, rescaled to twice the larger scale, added, rescaled to the result."""

    name = "tflite_add"
    subtracts = True

    def encode(self, x: torch.Tensor, y: torch.Tensor, result: torch.Tensor, sign: float, bits: int) -> AddFactors:
        twice = 2.0 * torch.maximum(x, y).double()
        lifted = 2.0 ** _lift(bits) * result.double()
        if bool(twice >= lifted):
            raise QuantizationError(
                f"{self} cannot add scale {torch.maximum(x, y).item():g} to scale {result.item():g}",
                why=f"its last factor is {(twice / lifted).item():g}, and the engine computes with those below 1 only",
                fix="look at the calibrated ranges around this op",
            )
        parts = [quantize_multiplier(real) for real in (x.double() / twice, y.double() / twice, twice / lifted)]
        shift = torch.stack([part.shifts() for part in parts])
        return AddFactors(parts[0].multiplier, int(sign) * parts[1].multiplier, shift, parts[2].multiplier)

    def add(self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros) -> torch.Tensor:
        return self.elements(x, y, factors, zeros, regular=True)

    def elements(
        self, x: torch.Tensor, y: torch.Tensor, factors: AddFactors, zeros: Zeros, *, regular: bool
    ) -> torch.Tensor:
        """There is one formula."""
        assert factors.shift is not None
        assert factors.result is not None
        lift = _lift(8 * x.element_size())
        left = (x.to(torch.int64) - zeros.x) << lift
        right = (y.to(torch.int64) - zeros.y) << lift
        term = multiply_by_multiplier(right, factors.y.abs(), factors.shift[1])
        total = multiply_by_multiplier(left, factors.x, factors.shift[0]) + torch.sign(factors.y) * term
        return multiply_by_multiplier(wrap32(total), factors.result, factors.shift[2]) + zeros.result


def _lift(bits: int) -> int:
    return 20 if bits == 8 else 15


def _first_is_scalar(x: torch.Size, y: torch.Size) -> bool:
    """Whether MLAS sees the first operand as the scalar of the innermost span, and lets the operands change roles."""
    shared = min(len(x), len(y))
    if shared == 0:
        return not x or (y[-1:] == () and x[-1] == 1)
    for back in range(1, shared + 1):
        if max(x[-back], y[-back]) > 1 or back == shared:
            return x[-back] == 1
    return False


def _refuse_difference(sign: float, rule: EngineSum) -> None:
    if sign != 1.0:
        raise QuantizationError(f"{rule} computes no differences", fix="leave the operator in float on this target")


ENGINE_SUMS: dict[str, EngineSum] = {rule.name: rule for rule in (MlasAdd(), AtenAdd(), TfliteAdd())}

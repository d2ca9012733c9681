"""From real numbers to codes and back, and the differentiable round trip used in training.

The float arithmetic is fixed, so that fake quantization and integer simulation agree to the last bit:

    code = saturate(round_half_even(x * (1 / scale)) + zero_point)        1 / scale rounded to float32
    real = (code - zero_point) * scale                                    in float32

Some engines add the zero point before they round, which moves ties where it is odd: `ZeroPoint`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch

from qgraph.errors import QuantizationError, UserError, did_you_mean
from qgraph.numerics.float_steps import fma32, to_int32, wrap32
from qgraph.numerics.formats import qint32
from qgraph.numerics.qparams import QParams
from qgraph.numerics.rounding import Rounding, round_float


class ZeroPoint(str, Enum):
    """Where a zero point is added."""

    AFTER = ""
    """To the rounded value."""
    BEFORE = "before"
    """To the float32 quotient, which rounds once more."""
    FUSED = "fused"
    """To the exact product with the reciprocal: one fused multiply-add."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class QuantizeRule:
    """How a device turns real numbers into steps of a scale, in float32.

    Args:
        divides: whether it divides by the scale; else it multiplies by the scale's float32 reciprocal.
        rounding: rounding of the quotient.
        zero: where the zero point is added.
        through_int32: whether the steps pass an int32 register as on x86: what does not fit, and NaN, becomes
            `-2**31`, and adding the zero point wraps. Otherwise steps saturate and NaN becomes real zero.

    Raises:
        UserError: a quotient is fused with nothing, or a zero point that enters before the rounding is added later.
    """

    divides: bool
    rounding: Rounding
    zero: ZeroPoint = ZeroPoint.AFTER
    through_int32: bool = False

    def __post_init__(self) -> None:
        if self.divides and self.zero is ZeroPoint.FUSED:
            raise UserError("a division cannot be fused with an addition", fix="use reciprocal:fused")
        if self.through_int32 and self.zero is not ZeroPoint.AFTER:
            raise UserError("int32 steps take their zero point after the rounding", fix="leave out one of the two")

    def steps(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """float32 `values` in whole steps of a broadcastable `scale`, float32, without zero point."""
        return round_float(self._quotient(values, scale), self.rounding)

    def codes(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Unsaturated codes of float32 `values`, float32; `scale` and `zero` broadcast. NaN becomes `zero`."""
        if zero is None:
            return self.steps(values, scale).nan_to_num_(0.0, float("inf"), float("-inf"))
        real_zero = zero.to(torch.float32)
        if self.zero is ZeroPoint.AFTER:
            return self.steps(values, scale).nan_to_num_(0.0, float("inf"), float("-inf")) + real_zero
        if self.zero is ZeroPoint.FUSED:
            moved = fma32(values, 1.0 / scale, real_zero)
        else:
            moved = self._quotient(values, scale) + real_zero
        return torch.where(moved.isnan(), real_zero, round_float(moved, self.rounding))

    def _quotient(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return values / scale if self.divides else values * (1.0 / scale)

    def __str__(self) -> str:
        words = ("divide" if self.divides else "reciprocal", str(self.zero), str(self.rounding))
        return ":".join(word for word in (*words, "int32" if self.through_int32 else "") if word)


RECIPROCAL = QuantizeRule(False, Rounding.HALF_EVEN)


@lru_cache(maxsize=64)
def parse_quantize_rule(text: str) -> QuantizeRule:
    """The rule that prints as `text`, such as `reciprocal:half_even`.

    Raises:
        UserError: the text names no rule.
    """
    forms = [(divides, zero, False) for divides in (False, True) for zero in ZeroPoint]
    forms.remove((True, ZeroPoint.FUSED, False))
    forms += [(divides, ZeroPoint.AFTER, True) for divides in (False, True)]
    every = (QuantizeRule(divides, way, zero, wide) for divides, zero, wide in forms for way in Rounding)
    rules = {str(rule): rule for rule in every}
    if text not in rules:
        raise UserError(f"{text!r} is no way to quantize", fix=did_you_mean(text, rules))
    return rules[text]


def quantize(values: torch.Tensor, qparams: QParams, rule: QuantizeRule = RECIPROCAL) -> torch.Tensor:
    """Codes of `values`.

    Args:
        values: float tensor of any shape; NaN becomes the code of real zero unless the rule says otherwise.
        qparams: parameters of the result.
        rule: the float32 arithmetic.

    Returns:
        Integer tensor of the same shape, dtype `qparams.qtype.storage`, saturated.

    Raises:
        QuantizationError: the format has more than 32 bits.
    """
    if qparams.qtype.bits > 32:
        raise QuantizationError(f"real numbers are not quantized to {qparams.qtype}", fix="use at most 32 bits")
    rank = values.dim()
    scale = qparams.shaped(qparams.scale, rank)
    if rule.through_int32:
        steps = to_int32(rule.steps(values.to(torch.float32), scale))
        whole = wrap32(steps + qparams.shaped(qparams.zero_points(), rank))
        return qparams.qtype.saturate(whole).to(qparams.qtype.storage)
    zero = None if qparams.zero_point is None else qparams.shaped(qparams.zero_point, rank)
    codes = rule.codes(values.to(torch.float32), scale, zero)
    return _saturated_cast(codes, qparams)


def dequantize(codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Real numbers of `codes` (integer tensor of any shape), float32 of the same shape."""
    rank = codes.dim()
    if qparams.zero_point is not None:
        codes = codes.to(torch.int64) - qparams.shaped(qparams.zero_point, rank)
    return codes.to(torch.float32) * qparams.shaped(qparams.scale, rank)


def bias_codes(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """What a device adds to its 32-bit accumulator for a bias: `saturate(round_half_even(bias / step))`.

    Args:
        bias: float `[C]`.
        step: value of one unit of the accumulator, float64 `[C]` or `[]`.

    Returns:
        float64 `[C]`, whole numbers within 32 bits.
    """
    return qint32.saturate(torch.round(bias.double() / step.double()))


def fake_quantize(values: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """`dequantize(quantize(values))` without leaving floating point, differentiable.

    The gradient passes straight through where the unsaturated code is in bounds and is zero elsewhere
    (straight-through estimator; Bengio et al., "Estimating or Propagating Gradients Through Stochastic
    Neurons"). NaN stays NaN, so that it can be found downstream.

    Args:
        values: float tensor of any shape.
        qparams: parameters of the grid; they receive no gradient.

    Returns:
        float32 tensor of the same shape, equal to the integer round trip for every finite input.
    """
    result: torch.Tensor = _FakeQuantize.apply(values.to(torch.float32), qparams)  # type: ignore[no-untyped-call]
    return result


class _FakeQuantize(torch.autograd.Function):
    """Elementwise ops on one owned buffer: torch's own fake-quantize kernel is several times slower on CPUs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: torch.Tensor, qparams: QParams) -> torch.Tensor:
        rank, qtype = values.dim(), qparams.qtype
        codes = torch.mul(values, qparams.shaped(1.0 / qparams.scale, rank)).round_()
        zero_point = None
        if qparams.zero_point is not None:
            zero_point = qparams.shaped(qparams.zero_point, rank).to(codes.dtype)
            codes.add_(zero_point)
        if values.requires_grad:
            inside = qtype.contains(codes)
            # A mask costs memory and a pass in backward; most batches clip nothing once ranges settled.
            ctx.save_for_backward(*([] if bool(inside.all()) else [inside]))
        codes.clamp_(qtype.qmin, qtype.qmax)
        if zero_point is not None:
            codes.sub_(zero_point)
        # Codes have one zero, floats two, and a reciprocal tells them apart: added to 0, every zero is positive.
        if qparams.axis is None and codes.device.type == "cpu":
            return torch.add(codes.new_zeros(()), codes, alpha=qparams.scale.item(), out=codes)
        return codes.mul_(qparams.shaped(qparams.scale, rank)).add_(0.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        return (gradient.masked_fill(~saved[0], 0.0) if saved else gradient), None


def _saturated_cast(codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
    # In float64 the bounds of 32-bit formats are representable; in float32 qmax would round up and wrap.
    wide = codes.double() if qparams.qtype.bits > 24 else codes
    return qparams.qtype.saturate(wide).to(qparams.qtype.storage)

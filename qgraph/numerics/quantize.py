"""From real numbers to codes and back, and the differentiable round trip used in training.

The float arithmetic is fixed, so that fake quantization and integer simulation agree to the last bit:

    code = saturate(round_half_even(x * (1 / scale)) + zero_point)        1 / scale rounded to float32
    real = (code - zero_point) * scale                                    in float32
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from qgraph.errors import QuantizationError, UserError, did_you_mean
from qgraph.numerics.float_steps import to_int32, wrap32
from qgraph.numerics.formats import qint32
from qgraph.numerics.qparams import QParams
from qgraph.numerics.rounding import Rounding, round_float


@dataclass(frozen=True)
class QuantizeRule:
    """How a device turns real numbers into steps of a scale, in float32.

    Args:
        divides: whether it divides by the scale; else it multiplies by the scale's float32 reciprocal.
        rounding: rounding of the quotient.
        through_int32: whether the steps pass an int32 register as on x86: what does not fit, and NaN, becomes
            `-2**31`, and adding the zero point wraps. Otherwise steps saturate and NaN becomes real zero.
    """

    divides: bool
    rounding: Rounding
    through_int32: bool = False

    def steps(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """float32 `values` in whole steps of a broadcastable `scale`, float32, without zero point."""
        quotient = values / scale if self.divides else values * (1.0 / scale)
        return round_float(quotient, self.rounding)

    def __str__(self) -> str:
        end = ":int32" if self.through_int32 else ""
        return f"{'divide' if self.divides else 'reciprocal'}:{self.rounding}{end}"


RECIPROCAL = QuantizeRule(False, Rounding.HALF_EVEN)


@lru_cache(maxsize=64)
def parse_quantize_rule(text: str) -> QuantizeRule:
    """The rule that prints as `text`, such as `reciprocal:half_even`.

    Raises:
        UserError: the text names no rule.
    """
    flags = (False, True)
    rules = {str(r): r for r in (QuantizeRule(d, way, i) for i in flags for d in flags for way in Rounding)}
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
    steps = rule.steps(values.to(torch.float32), qparams.shaped(qparams.scale, values.dim()))
    if rule.through_int32:
        whole = wrap32(to_int32(steps) + qparams.shaped(qparams.zero_points(), values.dim()))
        return qparams.qtype.saturate(whole).to(qparams.qtype.storage)
    codes = steps.nan_to_num_(0.0, float("inf"), float("-inf"))
    if qparams.zero_point is not None:
        codes = codes + qparams.shaped(qparams.zero_point, values.dim()).to(torch.float32)
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

"""Quantization parameters: how codes of an integer format stand for real numbers.

    real = (code - zero_point) * scale

Invariants of `QParams`:
- `scale` is float32, finite and positive; 0-d for one scale per tensor, 1-d for one per slice of `axis`.
- `zero_point` is int64 of the same shape, zero when symmetric, and a code of `qtype`, which has at most 24 bits if it
  is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from qgraph.errors import QuantizationError, UserError
from qgraph.numerics.formats import QType

_WIDEST_AFFINE = 24
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Scheme(str, Enum):
    """How a range of real numbers becomes scale and zero point."""

    SYMMETRIC = "symmetric"
    """Zero point 0, `scale = reach / -qmin`: the largest positive value may saturate by one step."""
    SYMMETRIC_NARROW = "symmetric_narrow"
    """Zero point 0, `scale = reach / qmax`: the lowest code is never used."""
    AFFINE = "affine"
    """The range, widened to hold zero, spans all codes."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class QParams:
    """Scale and zero point of one tensor.

    Args:
        scale: float32, shape `[]` or `[C]`, value of one step.
        qtype: integer format of the codes.
        zero_point: int64, shape of `scale`; zeros if not given.
        axis: the dimension the entries of a 1-d `scale` run along; None for one scale per tensor.

    Raises:
        QuantizationError: a scale is not finite and positive, dtypes or shapes and axis disagree, or a zero point is
            no code.
    """

    scale: torch.Tensor
    qtype: QType
    zero_point: torch.Tensor | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.scale.dim() == 0) or self.scale.dim() > 1:
            raise QuantizationError(
                f"a scale of shape {list(self.scale.shape)} does not go with axis {self.axis}",
                fix="give a 0-d scale and axis=None, or a 1-d scale and its axis",
            )
        if self.scale.dtype is not torch.float32:
            raise QuantizationError(f"a scale is {self.scale.dtype}", fix="give it as float32")
        usable = (self.scale > 0) & torch.isfinite(self.scale) & torch.isfinite(self.scale.reciprocal())
        if not bool(usable.all()):
            raise QuantizationError(
                f"a scale is not finite and positive, or its reciprocal is not: {self.scale.flatten()[:8].tolist()}",
                why="zero, negative, infinite, NaN or subnormal scales stand for no real number",
                fix="look at the calibration data of this site, or give a fixed scale",
            )
        if self.zero_point is not None:
            self._check_zero_point(self.zero_point)

    def _check_zero_point(self, zero_point: torch.Tensor) -> None:
        if zero_point.shape != self.scale.shape:
            raise QuantizationError("scale and zero point have different shapes")
        if zero_point.dtype is not torch.int64:
            raise QuantizationError(f"a zero point is {zero_point.dtype}", fix="give it as int64")
        if not bool(self.qtype.contains(zero_point).all()):
            raise QuantizationError(f"a zero point is no code of {self.qtype}: {zero_point.flatten()[:8].tolist()}")
        if self.qtype.bits > _WIDEST_AFFINE and bool(zero_point.any()):
            raise QuantizationError(
                f"zero points are not available for {self.qtype}",
                why=f"float32 holds the sum of code and zero point for up to {_WIDEST_AFFINE} bits only",
            )

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale per slice of `axis`."""
        return self.axis is not None

    @property
    def symmetric(self) -> bool:
        """Whether real zero is code zero in every slice."""
        return self.zero_point is None or not bool(self.zero_point.any())

    def same_as(self, other: QParams) -> bool:
        """Whether both map every code to the same real number."""
        return (
            self.qtype == other.qtype
            and self.axis == other.axis
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_points(), other.zero_points())
        )

    def zero_points(self) -> torch.Tensor:
        """int64 zero points of `scale`'s shape."""
        if self.zero_point is not None:
            return self.zero_point
        return torch.zeros_like(self.scale, dtype=torch.int64)

    @property
    def zero(self) -> int:
        """The one zero point of the tensor.

        Raises:
            QuantizationError: slices have zero points of their own.
        """
        if self.zero_point is None:
            return 0
        if self.per_channel and bool(self.zero_point.any()):
            raise QuantizationError("integer operators know one zero point per tensor", fix="use symmetric weights")
        return int(self.zero_point.flatten()[0])

    def shaped(self, values: torch.Tensor, rank: int) -> torch.Tensor:
        """`values` (shape of `scale`) viewed so that it broadcasts against a tensor of `rank` dimensions."""
        if self.axis is None:
            return values
        shape = [1] * rank
        shape[self.axis] = -1
        return values.reshape(shape)

    def to(self, device: torch.device) -> QParams:
        """The same parameters on `device`."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QParams(self.scale.to(device), self.qtype, zero_point, self.axis)

    def __str__(self) -> str:
        step = f"{self.scale.item():.6g}" if self.axis is None else f"[{self.scale.numel()}]"
        zero = "" if self.symmetric else f"+{self.zero_points().flatten()[0].item()}"
        return f"{self.qtype}*{step}{zero}"


def choose_qparams(
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    qtype: QType,
    *,
    scheme: Scheme = Scheme.SYMMETRIC,
    axis: int | None = None,
) -> QParams:
    """Parameters that cover the range [minimum, maximum].

    Symmetric: `scale = max(|minimum|, |maximum|) / -qmin`, so the largest positive value may round to
    `qmax + 1` and saturate by one step; zero point 0. This is the convention of the chips this tool serves
    (128 for int8, 32768 for int16). Symmetric narrow: `scale = max(|minimum|, |maximum|) / qmax`. Affine: the
    range is widened to contain 0 and `scale = (maximum - minimum) / (qmax - qmin)`,
    `zero_point = round(qmin - minimum / scale)` (Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", section 2).

    Args:
        minimum, maximum: float tensors, shape `[]` or `[C]`.
        qtype: the format; signed for symmetric parameters.
        scheme: how the range is covered.
        axis: dimension of the `C` ranges.

    Returns:
        Parameters with scale 1 where the range is exactly zero, and no scale below the smallest normal float32.

    Raises:
        QuantizationError: a bound is NaN or infinite, minimum exceeds maximum, the format is unsigned and a symmetric
            scheme asked for, or it has more than 24 bits and the scheme is affine.
    """
    low, high = minimum.detach().to(torch.float32), maximum.detach().to(torch.float32)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise QuantizationError(
            "a value range is not finite",
            why="the observed data holds NaN or infinite values",
            fix="remove such samples, or find the op that makes them",
        )
    if bool((low > high).any()):
        raise QuantizationError("a value range has its minimum above its maximum")
    if scheme is not Scheme.AFFINE:
        if not qtype.signed:
            raise QuantizationError(
                f"symmetric parameters need a signed format, not {qtype}",
                fix="use a signed format or the affine scheme",
            )
        reach = torch.maximum(low.abs(), high.abs())
        steps = -qtype.qmin if scheme is Scheme.SYMMETRIC else qtype.qmax
        return QParams(_usable(reach / steps, reach), qtype, axis=axis)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # In float64: the span of two finite float32 bounds can exceed the largest float32.
    span = (high.double() - low.double()) / (qtype.qmax - qtype.qmin)
    scale = _usable(span.to(torch.float32), high - low)
    zero_point = qtype.saturate(torch.round(qtype.qmin - low / scale)).to(torch.int64)
    return QParams(scale, qtype, zero_point, axis)


def qparams_from_scale(scale: float, qtype: QType, zero: int | None = None) -> QParams:
    """Parameters with one given scale.

    Args:
        scale: finite and positive.
        qtype: the format.
        zero: code of real zero; if None, code zero, or the middle code of an unsigned format.

    Raises:
        UserError: the scale is not finite and positive, or the zero point is no code.
    """
    if not 0.0 < scale < float("inf"):
        raise UserError(f"a fixed scale of {scale} is not usable", fix="give a finite scale > 0")
    if zero is not None and not qtype.qmin <= zero <= qtype.qmax:
        raise UserError(
            f"a zero point of {zero} is no code of {qtype}", fix=f"give one between {qtype.qmin} and {qtype.qmax}"
        )
    middle = zero if zero is not None else 0 if qtype.signed else 1 << (qtype.bits - 1)
    zero_point = torch.tensor(middle, dtype=torch.int64) if middle else None
    return QParams(torch.tensor(scale, dtype=torch.float32), qtype, zero_point)


def _usable(scale: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    floored = scale.clamp(min=_SMALLEST_SCALE)
    return torch.where(reach == 0, torch.ones_like(scale), floored)

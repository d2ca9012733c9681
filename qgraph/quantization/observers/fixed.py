"""A scale that no data changes."""

from __future__ import annotations

from typing import ClassVar

from qgraph.errors import QuantizationError
from qgraph.numerics import QParams, QType, Scheme, qint32, qparams_from_scale
from qgraph.quantization.observers.base import Observer


class FixedScaleObserver(Observer):
    """Always the same scale and zero point; the range is kept for reports only.

    Args:
        scale: value of one step, finite and positive.
        zero_point: code of real zero; sites with symmetric codes take 0 only.
        ch_axis: -1: there is one scale per tensor.
    """

    registered_name: ClassVar[str] = "fixed_scale"

    def __init__(self, scale: float, zero_point: int = 0, ch_axis: int = -1) -> None:
        super().__init__(ch_axis)
        if ch_axis != -1:
            raise QuantizationError("one fixed scale cannot serve slices", fix="use it where scales are per tensor")
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (scale, zero_point)):
            raise QuantizationError(f"scale {scale!r}, zero_point {zero_point!r} are no numbers", fix="give numbers")
        qparams_from_scale(scale, qint32)
        self.fixed, self.zero_point = float(scale), zero_point

    @property
    def observed(self) -> bool:
        return True

    def qparams(self, qtype: QType, scheme: Scheme = Scheme.SYMMETRIC) -> QParams:
        """The fixed parameters.

        Raises:
            QuantizationError: the zero point does not fit the site, or values seen were not finite.
        """
        if self._has_range and not self._finite:
            super().qparams(qtype, scheme)
        if self.zero_point and scheme is not Scheme.AFFINE:
            raise QuantizationError(
                f"a zero point of {self.zero_point} is not available here",
                why=f"the codes of this site are {scheme}",
                fix="leave zero_point out",
            )
        found = qparams_from_scale(self.fixed, qtype, self.zero_point)
        return found.to(self.min_val.device)

    def extra_repr(self) -> str:
        return f"scale={self.fixed}, zero_point={self.zero_point}"

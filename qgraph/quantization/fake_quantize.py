"""Fake quantization as a module: one per site."""

from __future__ import annotations

import torch
from torch import nn

from qgraph.errors import QuantizationError, StateError
from qgraph.numerics import QParams, QType, Scheme, bias_codes, fake_quantize, qparams_from_scale
from qgraph.quantization.observers import Observer
from qgraph.quantization.states import FakeQuantState

FAKE_QUANT_KINDS = ("fake_quant",)


class FakeQuantize(nn.Module):
    """Observes or rounds the values of one site, depending on its state.

    Args:
        site: the site's name, for messages.
        qtype: integer format of the codes.
        observer: finds the range; None with `fixed_scale`.
        fixed_scale: a scale that no state ever changes.
        fixed_zero: the zero point that goes with it; that of `qparams_from_scale` if None.
        scheme: how a range becomes scale and zero point.
        frozen: whether only calibration may change a known scale, so that training leaves it as it is.

    Buffers:
        scale: float32 `[]` or `[C]`; empty before the scale is known.
        zero_point: int64 of the same shape, for affine sites and those with a fixed zero point only.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def __init__(
        self,
        site: str,
        qtype: QType,
        observer: Observer | None,
        *,
        fixed_scale: float | None = None,
        fixed_zero: int | None = None,
        scheme: Scheme = Scheme.SYMMETRIC,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self._calibrating = False  # whether calibration has seen data the scale does not know yet
        self.site = site
        self.qtype = qtype
        self.observer = observer
        self.fixed_scale = fixed_scale
        self.state = FakeQuantState.FLOAT
        self.scheme = scheme
        self.register_buffer("scale", torch.zeros(0))
        has_zero = scheme is Scheme.AFFINE or fixed_zero is not None
        empty = torch.zeros(0, dtype=torch.int64) if has_zero else None
        self.register_buffer("zero_point", empty)
        self._cached: QParams | None = None
        if fixed_scale is not None:
            self._keep(qparams_from_scale(fixed_scale, qtype, fixed_zero))
        elif observer is None:
            raise QuantizationError(f"site {site} has neither an observer nor a fixed scale")

    @property
    def axis(self) -> int | None:
        """Dimension of per-slice scales; None for one scale per tensor."""
        return None if self.observer is None or self.observer.ch_axis < 0 else self.observer.ch_axis

    @property
    def has_scale(self) -> bool:
        """Whether the scale is known."""
        return self.scale.dim() == 0 or self.scale.numel() > 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (float, any shape), rounded to the site's grid in QAT and VALIDATION, unchanged otherwise."""
        if self.state is FakeQuantState.FLOAT:
            return values
        keeps = self.state is FakeQuantState.QAT and self.keeps_scale
        if self.state is not FakeQuantState.VALIDATION and self.observer is not None and not keeps:
            self.observer(values)
            if self.state is FakeQuantState.CALIBRATION:
                self._calibrating = True
                return values
            if self.observer.due or not self.has_scale:
                self.settle()
        if self.state is FakeQuantState.CALIBRATION:
            return values
        return fake_quantize(values, self.qparams())

    def settle(self) -> None:
        """Computes the scale from what was observed.

        Raises:
            QuantizationError: nothing was observed, or the values were not finite; the message names the site.
        """
        if self.fixed_scale is not None or self.observer is None or self.keeps_scale:
            return
        try:
            found = self.observer.qparams(self.qtype, self.scheme)
        except QuantizationError as error:
            raise QuantizationError(error.what, where=f"site {self.site}", why=error.why, fix=error.fix) from error
        self._keep(found)
        self._calibrating = False

    @property
    def keeps_scale(self) -> bool:
        """Whether the scale is frozen as it is."""
        return self.frozen and self.has_scale and not self._calibrating

    def _keep(self, qparams: QParams) -> None:
        self.scale = qparams.scale
        if self.zero_point is not None:
            self.zero_point = qparams.zero_points()
        self._cached = qparams

    def qparams(self) -> QParams:
        """The site's parameters.

        Raises:
            StateError: the scale is not known yet.
        """
        if not self.has_scale:
            raise StateError(
                f"site {self.site} has no scale yet",
                why="the model has not been calibrated",
                fix="run qgraph.calibrate(model, loader) first",
            )
        if self._cached is None or self._cached.scale is not self.scale:
            self._cached = QParams(self.scale, self.qtype, self.zero_point, self.axis)
        return self._cached

    def extra_repr(self) -> str:
        step = f"{self.scale.item():.6g}" if self.scale.dim() == 0 else f"[{self.scale.numel()}]"
        return f"{self.qtype}, scale={step}, state={self.state}"

    def _apply(self, fn, recurse: bool = True) -> FakeQuantize:  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._cached = None
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "scale")
        if saved is not None and self.fixed_scale is None:
            self.scale = torch.empty_like(saved, device=self.scale.device)
            if self.zero_point is not None:
                self.zero_point = torch.empty_like(saved, dtype=torch.int64, device=self.scale.device)
        elif saved is not None and not torch.equal(saved.to(self.scale), self.scale):
            raise StateError(
                f"the saved scale of site {self.site} is {saved.tolist()}",
                why=f"the site has a fixed scale of {self.fixed_scale}",
                fix="load into a graph prepared with the settings of the saved one",
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._cached = None


class WeightFakeQuantize(FakeQuantize):
    """As `FakeQuantize`, for a weight: looked at once per calibration, because it does not change with the data."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.state is FakeQuantState.CALIBRATION:
            if self.observer is not None and not self.observer.observed:
                self.observer(values)
            return values
        if self.state is FakeQuantState.QAT and self.observer is not None and not self.keeps_scale:
            self.observer.reset()
            self.observer(values)
            self.settle()
            return fake_quantize(values, self.qparams())
        return super().forward(values)


class BiasFakeQuantize(nn.Module):
    """Rounds a bias to the accumulator's grid, whose step is input scale times weight scale.

    The step follows from two other sites, so it is written when the graph enters VALIDATION;
    in the other states the bias passes unchanged, as its rounding is far below one step of the result.
    """

    step: torch.Tensor

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.state = FakeQuantState.FLOAT
        self.register_buffer("step", torch.zeros(0))

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """`bias` `[C]`, rounded to multiples of `step` `[C]` or `[]` in VALIDATION."""
        if self.state is not FakeQuantState.VALIDATION or (self.step.dim() > 0 and self.step.numel() == 0):
            return bias
        return (bias_codes(bias, self.step) * self.step).to(bias.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "step")
        if saved is not None:
            self.step = torch.empty_like(saved, device=self.step.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

"""What all observers share: a range, kept in two small buffers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from qgraph.errors import QuantizationError
from qgraph.numerics import QParams, QType, Scheme, choose_qparams


class Observer(nn.Module):
    """Base of observers.

    Args:
        ch_axis: dimension with one range per slice; -1 for one range per tensor.

    Buffers:
        min_val, max_val: float32, shape `[]` or `[C]`; empty `[0]` before the first observation.
    """

    registered_name: ClassVar[str] = ""
    kept: ClassVar[tuple[str, ...]] = ("min_val", "max_val")
    """Buffers that start empty and take their shape from the first data."""
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(self, ch_axis: int = -1) -> None:
        super().__init__()
        if isinstance(ch_axis, bool) or not isinstance(ch_axis, int) or ch_axis < -1:
            raise QuantizationError(f"ch_axis is {ch_axis!r}", fix="give a dimension, or -1 for the whole tensor")
        self.ch_axis = ch_axis
        self.register_buffer("min_val", torch.zeros(0))
        self.register_buffer("max_val", torch.zeros(0))

    @property
    def observed(self) -> bool:
        """Whether a scale can be computed."""
        return self._has_range

    @property
    def due(self) -> bool:
        """Whether training should compute the scale anew after this step."""
        return True

    @property
    def _has_range(self) -> bool:
        return self.min_val.dim() == 0 or self.min_val.numel() > 0

    @property
    def _finite(self) -> bool:
        return bool((torch.isfinite(self.min_val) & torch.isfinite(self.max_val)).all())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values` (float, any shape; empty ones say nothing) and returns them unchanged.

        Raises:
            QuantizationError: `values` has no dimension `ch_axis`, or another number of slices than before.
        """
        if values.numel():
            slices = self._slices(values.detach())
            low, high = torch.aminmax(slices) if self.ch_axis < 0 else torch.aminmax(slices, dim=1)
            if self._has_range and low.shape != self.min_val.shape:
                raise QuantizationError(
                    f"an observer of {self.min_val.numel()} slices was given {low.numel()}",
                    why="every slice has one range over all data",
                    fix="use one observer per site, or reset() it",
                )
            low, high = low.to(torch.float32), high.to(torch.float32)
            self._count(slices, low, high)
            self._update(low, high)
        return values

    def _slices(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as `[C, N]`, or in any shape without a copy where there is one range per tensor."""
        if self.ch_axis < 0:
            return _in_storage_order(values)
        if self.ch_axis >= values.dim():
            raise QuantizationError(
                f"values of shape {list(values.shape)} have no dimension {self.ch_axis}",
                why=f"the observer finds one range per slice of dimension {self.ch_axis}",
                fix="use an observer of the whole tensor, or another ch_axis",
            )
        return values.movedim(self.ch_axis, 0).reshape(values.shape[self.ch_axis], -1)

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Takes up the range of one batch, float32 `[]` or `[C]`."""
        if self._has_range:
            low, high = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        self.min_val, self.max_val = low, high

    def _count(self, slices: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Takes up more than the range, for observers that need it."""

    def merge(self, other: Observer) -> None:
        """Adds what `other` saw: the result is what one observer of all the data would hold.

        Args:
            other: an observer of the same class and options; it is not changed.

        Raises:
            QuantizationError: it is of another kind, saw another number of slices, or its result depends on the order
                of the data.
        """
        if type(self) is not type(other) or repr(self) != repr(other):
            raise QuantizationError(
                f"{self} and {other} cannot be merged", why="they look at the data differently", fix="make both alike"
            )
        if not other._has_range:
            return
        low, high = other.min_val.to(self.min_val.device), other.max_val.to(self.max_val.device)
        if self._has_range and low.shape != self.min_val.shape:
            raise QuantizationError(
                f"an observer of {self.min_val.numel()} slices cannot take up one of {low.numel()}",
                fix="merge observers of the same site",
            )
        self._merge_more(other)
        self._update(low, high)

    def _merge_more(self, other: Observer) -> None:
        """Adds what `_count` keeps."""

    def reset(self) -> None:
        """Forgets everything seen."""
        for name in self.kept:
            setattr(self, name, getattr(self, name).new_zeros(0))

    def range_for(self, qtype: QType, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
        """The range that the codes of `qtype` shall cover: float32 `[]` or `[C]` each, on the observer's device."""
        return self.min_val, self.max_val

    def qparams(self, qtype: QType, scheme: Scheme = Scheme.SYMMETRIC) -> QParams:
        """Parameters for what was observed.

        Raises:
            QuantizationError: nothing was observed, or the range is not finite.
        """
        if not self._has_range:
            raise QuantizationError("no data was observed", fix="run calibrate(model, loader) first")
        axis = None if self.ch_axis < 0 else self.ch_axis
        low, high = self.range_for(qtype, scheme) if self._finite else (self.min_val, self.max_val)
        return choose_qparams(low, high, qtype, scheme=scheme, axis=axis)

    def extra_repr(self) -> str:
        return f"ch_axis={self.ch_axis}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        # Buffers start empty and take their shape from the first data, so a saved shape is always right.
        for name in self.kept:
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _in_storage_order(values: torch.Tensor) -> torch.Tensor:
    """`values` flattened without a copy where their memory is dense in some order, as channels_last is."""
    if values.is_contiguous():
        return values.reshape(-1)
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1).reshape(-1)
    return values

"""Observers: what range of values passed a site.

Each keeps two small buffers, so memory does not grow with the data, and its result does not depend on anything but the
data seen. A NaN or infinity in the data stays visible in the range: it is refused when the scale is computed, with the
site's name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qgraph.errors import QuantizationError, did_you_mean
from qgraph.numerics import QParams, QType, choose_qparams


class Observer(nn.Module):
    """Base of range observers.

    Args:
        ch_axis: dimension with one range per slice; -1 for one range per tensor.

    Buffers:
        min_val, max_val: float32, shape `[]` or `[C]`; empty `[0]` before the first observation.
    """

    registered_name: str = ""
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(self, ch_axis: int = -1) -> None:
        super().__init__()
        self.ch_axis = ch_axis
        self.register_buffer("min_val", torch.zeros(0))
        self.register_buffer("max_val", torch.zeros(0))

    @property
    def observed(self) -> bool:
        """Whether any data was seen."""
        return self.min_val.dim() == 0 or self.min_val.numel() > 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values` (float, any shape, not empty) and returns them unchanged."""
        if values.numel():
            low, high = self._range(values.detach())
            self._update(low.to(torch.float32), high.to(torch.float32))
        return values

    def _range(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.ch_axis < 0:
            return torch.aminmax(_in_storage_order(values))
        rows = values.movedim(self.ch_axis, 0).flatten(1) if values.dim() > 1 else values[:, None]
        return torch.aminmax(rows, dim=1)

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets everything seen."""
        self.min_val = self.min_val.new_zeros(0)
        self.max_val = self.max_val.new_zeros(0)

    def qparams(self, qtype: QType) -> QParams:
        """Symmetric parameters for the observed range.

        Raises:
            QuantizationError: nothing was observed, or the range is not finite.
        """
        if not self.observed:
            raise QuantizationError("no data was observed", fix="run calibrate(model, loader) first")
        axis = None if self.ch_axis < 0 else self.ch_axis
        return choose_qparams(self.min_val, self.max_val, qtype, axis=axis)

    def extra_repr(self) -> str:
        return f"ch_axis={self.ch_axis}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        # Ranges start empty and take their shape from the first data, so a saved shape is always right.
        for name in ("min_val", "max_val"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MinMaxObserver(Observer):
    """The smallest and largest value ever seen."""

    registered_name = "min_max"

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        if self.observed:
            low, high = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        self.min_val, self.max_val = low, high


class MovingAverageMinMaxObserver(Observer):
    """Moving averages of each batch's extremes: `range += averaging_constant * (batch range - range)`.

    Args:
        averaging_constant: weight of a new batch; 0 keeps the first range for ever.
        ch_axis: as for `Observer`.
    """

    registered_name = "moving_average"

    def __init__(self, averaging_constant: float = 0.01, ch_axis: int = -1) -> None:
        super().__init__(ch_axis)
        if not 0.0 <= averaging_constant <= 1.0:
            raise QuantizationError(f"averaging_constant is {averaging_constant}", fix="give a number from 0 to 1")
        self.averaging_constant = averaging_constant

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        if self.observed:
            low = self.min_val + self.averaging_constant * (low - self.min_val)
            high = self.max_val + self.averaging_constant * (high - self.max_val)
        self.min_val, self.max_val = low, high

    def extra_repr(self) -> str:
        return f"averaging_constant={self.averaging_constant}, {super().extra_repr()}"


class PerChannelMinMaxObserver(MinMaxObserver):
    """`MinMaxObserver` with one range per slice of dimension 0, the output channels of most weights."""

    def __init__(self, ch_axis: int = 0) -> None:
        super().__init__(ch_axis)


class MovingAveragePerChannelMinMaxObserver(MovingAverageMinMaxObserver):
    """`MovingAverageMinMaxObserver` with one range per slice of dimension 0."""

    def __init__(self, averaging_constant: float = 0.01, ch_axis: int = 0) -> None:
        super().__init__(averaging_constant, ch_axis)


OBSERVERS: dict[str, Callable[[int], Observer]] = {
    "min_max": lambda ch_axis: MinMaxObserver(ch_axis),
    "moving_average": lambda ch_axis: MovingAverageMinMaxObserver(ch_axis=ch_axis),
}


def make_observer(name: str, ch_axis: int) -> Observer:
    """A new observer by its registered name.

    Raises:
        QuantizationError: no observer has that name.
    """
    if name not in OBSERVERS:
        raise QuantizationError(f"no observer is named {name!r}", fix=did_you_mean(name, OBSERVERS))
    return OBSERVERS[name](ch_axis)


def observer_name(observer: str | type[Observer]) -> str:
    """The registered name of an observer given by name or class.

    Raises:
        QuantizationError: it is not registered.
    """
    name = observer if isinstance(observer, str) else observer.registered_name
    if name not in OBSERVERS:
        raise QuantizationError(f"no observer is named {name!r}", fix=did_you_mean(str(name), OBSERVERS))
    return name


def _in_storage_order(values: torch.Tensor) -> torch.Tensor:
    """`values` flattened without a copy where their memory is dense in some order, as channels_last is."""
    if values.is_contiguous():
        return values.reshape(-1)
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1).reshape(-1)
    return values

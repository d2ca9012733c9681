"""Observers: what range of values passed a site.

Each keeps two small buffers, so memory does not grow with the data, and its result does not depend on anything but the
data seen. A NaN or infinity in the data stays visible in the range: it is refused when the scale is computed, with the
site's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from qgraph.errors import QuantizationError, did_you_mean
from qgraph.numerics import QParams, QType, Scheme, choose_qparams


class Observer(nn.Module):
    """Base of range observers.

    Args:
        ch_axis: dimension with one range per slice; -1 for one range per tensor.

    Buffers:
        min_val, max_val: float32, shape `[]` or `[C]`; empty `[0]` before the first observation.
    """

    registered_name: ClassVar[str] = ""
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
        """Observes `values` (float, any shape; empty ones say nothing) and returns them unchanged.

        Raises:
            QuantizationError: `values` has no dimension `ch_axis`, or another number of slices than before.
        """
        if values.numel():
            low, high = self._range(values.detach())
            if self.observed and low.shape != self.min_val.shape:
                raise QuantizationError(
                    f"an observer of {self.min_val.numel()} slices was given {low.numel()}",
                    why="every slice has one range over all data",
                    fix="use one observer per site, or reset() it",
                )
            self._update(low.to(torch.float32), high.to(torch.float32))
        return values

    def _range(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.ch_axis < 0:
            return torch.aminmax(_in_storage_order(values))
        if self.ch_axis >= values.dim():
            raise QuantizationError(
                f"values of shape {list(values.shape)} have no dimension {self.ch_axis}",
                why=f"the observer finds one range per slice of dimension {self.ch_axis}",
                fix="use an observer of the whole tensor, or another ch_axis",
            )
        return torch.aminmax(values.movedim(self.ch_axis, 0).reshape(values.shape[self.ch_axis], -1), dim=1)

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets everything seen."""
        self.min_val = self.min_val.new_zeros(0)
        self.max_val = self.max_val.new_zeros(0)

    def qparams(self, qtype: QType, scheme: Scheme = Scheme.SYMMETRIC) -> QParams:
        """Parameters for the observed range.

        Raises:
            QuantizationError: nothing was observed, or the range is not finite.
        """
        if not self.observed:
            raise QuantizationError("no data was observed", fix="run calibrate(model, loader) first")
        axis = None if self.ch_axis < 0 else self.ch_axis
        return choose_qparams(self.min_val, self.max_val, qtype, scheme=scheme, axis=axis)

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

    registered_name: ClassVar[str] = "min_max"

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

    registered_name: ClassVar[str] = "moving_average"

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

    registered_name: ClassVar[str] = "min_max"

    def __init__(self, ch_axis: int = 0) -> None:
        super().__init__(ch_axis)


class MovingAveragePerChannelMinMaxObserver(MovingAverageMinMaxObserver):
    """`MovingAverageMinMaxObserver` with one range per slice of dimension 0."""

    registered_name: ClassVar[str] = "moving_average"

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

    Whether a site has one range or one per channel is the plan's choice, so that classes that differ in it only share
    a name.

    Raises:
        QuantizationError: it is not registered.
    """
    if isinstance(observer, str):
        name = observer
    elif isinstance(observer, type) and issubclass(observer, Observer):
        # Inherited names do not count: they would put the parent in place of the class that was asked for.
        name = vars(observer).get("registered_name", "")
    else:
        raise QuantizationError(
            f"{observer!r} is no observer", fix="give a registered name such as 'min_max', or a class"
        )
    if name not in OBSERVERS:
        known = did_you_mean(name, OBSERVERS)
        raise QuantizationError(
            f"no observer is named {name!r}" if name else f"{observer} has no registered name of its own",
            fix=known if name else f"give it a registered_name and an entry in OBSERVERS; {known}",
        )
    return name


def _in_storage_order(values: torch.Tensor) -> torch.Tensor:
    """`values` flattened without a copy where their memory is dense in some order, as channels_last is."""
    if values.is_contiguous():
        return values.reshape(-1)
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1).reshape(-1)
    return values

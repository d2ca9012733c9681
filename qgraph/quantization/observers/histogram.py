"""Observers that keep a histogram of all values, and a search that turns it into a range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from qgraph.errors import QuantizationError, StateError
from qgraph.numerics import QType, Scheme
from qgraph.quantization.observers.base import Observer
from qgraph.quantization.observers.distribution import Distribution, merge_bins
from qgraph.quantization.observers.search import Search, power_of_two
from qgraph.quantization.observers.searches import search_of, text_of
from qgraph.quantization.observers.spec import ObserverSpec

_LOWEST = -100
"""Exponent of the smallest top: below it `bins / top` would leave float32."""
_CHUNK = 1 << 17
"""Values counted at once on a CPU, so that what lies between stays in the cache."""


class HistogramObserver(Observer):
    """An exact histogram of magnitudes and signs, in one pass and bounded memory.

    The bins reach to the power of two above the largest magnitude. When that grows, bins merge in pairs; as widths are
    powers of two, the result is what counting everything at the end gives, whatever the order and the batches.

    Args:
        bins: per sign, a power of two; at least half of them hold the largest magnitude's range.
        search: what turns the histogram into a range: `mse`, `percentile(percentile=99.9)`, `kl`, `mix`, `clip_std`
            or `max`.
        ch_axis: as for `Observer`.

    Buffers, beside those of `Observer`:
        counts: int64 `[2 * bins]` or `[C, 2 * bins]`; entry `bins - 1 + i` counts values `x` with
            `ceil(x * bins / 2**exponent) == i`, so that zeros have a bin of their own where nothing is negative.
        exponent: int64 `[]` or `[C]`.
    """

    registered_name: ClassVar[str] = "histogram"
    kept: ClassVar[tuple[str, ...]] = (*Observer.kept, "counts", "exponent")
    counts: torch.Tensor
    exponent: torch.Tensor

    def __init__(self, bins: int = 2048, search: str | Search = "mse", ch_axis: int = -1) -> None:
        super().__init__(ch_axis)
        power_of_two("bins", bins)
        self.bins = bins
        if not isinstance(search, (str, Search)):
            raise QuantizationError(f"search is {search!r}", fix="give a text such as 'percentile(percentile=99.9)'")
        self.search: Search = search_of(search) if isinstance(search, str) else search
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("exponent", torch.zeros(0, dtype=torch.int64))

    def _count(self, slices: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        values = slices.to(torch.float32)
        finite = bool((torch.isfinite(low) & torch.isfinite(high)).all())
        if not finite:  # the range refuses them; the counts are of the others, whatever batch they came in
            odd = ~torch.isfinite(values)
            values = values.masked_fill(odd, 0.0)
            low, high = torch.aminmax(values) if self.ch_axis < 0 else torch.aminmax(values, dim=1)
        self._add(*self._histogram(values, low, high))
        if not finite:
            self.counts = self.counts.clone()
            self.counts[..., self.bins - 1] -= odd.sum() if self.ch_axis < 0 else odd.sum(1)

    def _histogram(
        self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts and exponent of finite float32 values."""
        reach = torch.maximum(-low, high)
        exponent = torch.frexp(reach).exponent.long().clamp(min=_LOWEST).where(reach > 0, _LOWEST)
        if self._has_range:
            exponent = torch.maximum(exponent, self.exponent)
        if self.ch_axis < 0:
            return _bincount(values, int(exponent), self.bins, signed=bool(low < 0)), exponent
        signed = (low < 0).tolist()
        rows = [
            _bincount(row, top, self.bins, signed=s)
            for row, top, s in zip(values, exponent.tolist(), signed, strict=True)
        ]
        return torch.stack(rows), exponent

    def _add(self, counts: torch.Tensor, exponent: torch.Tensor) -> None:
        if self._has_range:
            top = torch.maximum(self.exponent, exponent)
            counts = self._grown(self.counts, top - self.exponent) + self._grown(counts, top - exponent)
            exponent = top
        self.counts, self.exponent = counts, exponent

    @staticmethod
    def _grown(counts: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        if not bool(times.any()):
            return counts
        return merge_bins(counts.cpu(), times.cpu()).to(counts.device)  # small, rare, and deterministic there

    def _merge_more(self, other: Observer) -> None:
        assert isinstance(other, HistogramObserver)
        self._add(other.counts.to(self.counts.device), other.exponent.to(self.exponent.device))

    def distributions(self) -> Iterator[Distribution]:
        """The histogram of every slice.

        Raises:
            QuantizationError: nothing was observed, or values were not finite.
        """
        if not self._has_range or not self._finite:
            raise QuantizationError("the histogram is empty or holds values that are not finite")
        rows = self.counts.reshape(-1, 2 * self.bins).cpu()
        tops, lows, highs = (each.reshape(-1).tolist() for each in (self.exponent, self.min_val, self.max_val))
        for row, top, low, high in zip(rows, tops, lows, highs, strict=True):
            yield Distribution(row, math.ldexp(1.0, top) / self.bins, low, high)

    def range_for(self, qtype: QType, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
        found = [self.search.find(seen, qtype, scheme) for seen in self.distributions()]
        low, high = torch.tensor(found, dtype=torch.float64).to(self.min_val).unbind(1)
        return low.reshape(self.min_val.shape), high.reshape(self.min_val.shape)

    @property
    def text(self) -> str:
        """The text form of an observer that does the same."""
        return str(ObserverSpec("histogram", (("bins", self.bins), ("search", text_of(self.search)))))

    def extra_repr(self) -> str:
        return f"bins={self.bins}, search={text_of(self.search)}, {super().extra_repr()}"

    def get_extra_state(self) -> torch.Tensor:
        """The search as text, in a tensor: everything in a state dict is one."""
        return torch.tensor(list(text_of(self.search).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.search = search_of(bytes(state.tolist()).decode())

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "counts")
        if saved is not None and saved.numel() and saved.shape[-1] != 2 * self.bins:
            raise StateError(
                f"the saved histogram {prefix}counts has {saved.shape[-1] // 2} bins, this observer {self.bins}",
                fix="load into a graph prepared with the settings of the saved one",
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _bincount(values: torch.Tensor, exponent: int, bins: int, *, signed: bool) -> torch.Tensor:
    """Counts `[2 * bins]` of finite float32 values with magnitudes below `2**exponent`."""
    factor = math.ldexp(float(bins), -exponent)  # a power of two: the product is exact, so bins merge exactly
    flat = values.reshape(-1) if factor >= 1 else values.reshape(-1).double()  # float32 could underflow to zero
    total = torch.zeros(2 * bins, dtype=torch.int64, device=values.device)
    part = total if signed else total[bins - 1 :]
    for chunk in flat.split(_CHUNK) if flat.device.type == "cpu" else (flat,):
        index = (chunk * factor).ceil_().to(torch.int32)
        if signed:
            index += bins - 1
        part += torch.bincount(index, minlength=part.numel())
    return total

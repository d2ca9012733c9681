"""Searches: which range of a distribution the codes shall cover.

A search returns a range, not a scale, because a range fits every format and scheme. Of equally good ranges the widest
wins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qgraph.errors import QuantizationError
from qgraph.numerics import QType, Scheme
from qgraph.quantization.observers.distribution import Distribution

_FRACTIONS = 100


@dataclass(frozen=True)
class Search(ABC):
    """Chooses a range."""

    name: ClassVar[str]

    @abstractmethod
    def find(self, seen: Distribution, qtype: QType, scheme: Scheme) -> tuple[float, float]:
        """The range to cover, low and high; it holds zero unless it is the whole range."""


@dataclass(frozen=True)
class MaxSearch(Search):
    """Everything that was seen."""

    name: ClassVar[str] = "max"

    def find(self, seen: Distribution, qtype: QType, scheme: Scheme) -> tuple[float, float]:
        return seen.low, seen.high


@dataclass(frozen=True)
class PercentileSearch(Search):
    """The magnitude that `percentile` percent of the values do not exceed; each end by itself for affine codes."""

    name: ClassVar[str] = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        number("percentile", self.percentile, 50, 100)

    def find(self, seen: Distribution, qtype: QType, scheme: Scheme) -> tuple[float, float]:
        part = self.percentile / 100
        if scheme is Scheme.AFFINE:
            return seen.quantile(1 - part), seen.quantile(part)
        return seen.clipped(seen.magnitude_quantile(part))


@dataclass(frozen=True)
class MSESearch(Search):
    """The threshold with the least mean squared error of rounding and clipping, of 100 fractions of the largest.

    For affine codes the two ends are searched one after the other afterwards, from the best common threshold.

    Args:
        stride: try every `stride`-th fraction only, from the largest down.
    """

    name: ClassVar[str] = "mse"
    stride: int = 1

    def __post_init__(self) -> None:
        whole("stride", self.stride, 1, _FRACTIONS)

    def find(self, seen: Distribution, qtype: QType, scheme: Scheme) -> tuple[float, float]:
        parts = [part / _FRACTIONS for part in range(_FRACTIONS, 0, -self.stride)]
        low, high = least_error(seen, [seen.clipped(part * seen.reach) for part in parts], qtype, scheme)
        if scheme is Scheme.AFFINE and low < 0 < high:
            low, high = least_error(seen, [(part * low, high) for part in parts], qtype, scheme)
            low, high = least_error(seen, [(low, part * high) for part in parts], qtype, scheme)
        return low, high


@dataclass(frozen=True)
class MixSearch(Search):
    """Of several percentiles the one with the least mean squared error."""

    name: ClassVar[str] = "mix"
    percentiles: tuple[float, ...] = (100.0, 99.999, 99.99, 99.95, 99.9, 99.5, 99.0)

    def __post_init__(self) -> None:
        given: Any = self.percentiles
        if isinstance(given, str) or not isinstance(given, Iterable) or not list(given):
            raise QuantizationError(f"percentiles is {given!r}", fix="give several numbers: percentiles=(99.9, 100)")
        ordered = sorted((PercentileSearch(each).percentile for each in given), reverse=True)
        object.__setattr__(self, "percentiles", tuple(ordered))

    def find(self, seen: Distribution, qtype: QType, scheme: Scheme) -> tuple[float, float]:
        ranges = [PercentileSearch(each).find(seen, qtype, scheme) for each in self.percentiles]
        return least_error(seen, ranges, qtype, scheme)


@dataclass(frozen=True)
class ClipStdSearch(Search):
    """Mean plus and minus `std_scale` standard deviations, as far as there are values."""

    name: ClassVar[str] = "clip_std"
    std_scale: float = 6.0

    def __post_init__(self) -> None:
        number("std_scale", self.std_scale, 0, 1e6)

    def find(self, seen: Distribution, qtype: QType, scheme: Scheme) -> tuple[float, float]:
        counts, lower, upper = seen.occupied
        part = counts / counts.sum()
        middle = (lower + upper) / 2
        mean = min(max(float((part * middle).sum()), seen.low), seen.high)
        variance = (part * ((middle - mean) ** 2 + (upper - lower) ** 2 / 12)).sum()
        away = self.std_scale * float(variance.sqrt())
        return max(seen.low, mean - away), min(seen.high, mean + away)


def least_error(
    seen: Distribution, ranges: list[tuple[float, float]], qtype: QType, scheme: Scheme
) -> tuple[float, float]:
    """The first of the `ranges` with the least mean squared error."""
    return ranges[first_least(seen.errors(ranges, qtype, scheme, "mse"))]


def number(name: str, value: Any, above: float, most: float) -> None:
    """Checks an option.

    Raises:
        QuantizationError: it is no number above `above` and at most `most`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value <= most:
        raise QuantizationError(f"{name} is {value!r}", fix=f"give a number above {above}, at most {most}")


def whole(name: str, value: Any, least: int, most: int) -> None:
    """Checks an option.

    Raises:
        QuantizationError: it is no whole number from `least` to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise QuantizationError(f"{name} is {value!r}", fix=f"give a whole number from {least} to {most}")


def power_of_two(name: str, value: Any) -> None:
    """Checks a number of bins.

    Raises:
        QuantizationError: it is no power of two from 2 to 65536.
    """
    whole(name, value, 2, 1 << 16)
    if value & (value - 1):
        below = 1 << (value.bit_length() - 1)
        raise QuantizationError(
            f"{name} is {value}",
            why="bins merge in pairs when the range grows, so their number is a power of two",
            fix=f"give {below} or {2 * below}",
        )


def first_least(errors: torch.Tensor) -> int:
    """Index of the first of the smallest entries."""
    return int((errors == errors.min()).nonzero()[0])

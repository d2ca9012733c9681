"""What an entry of the zoo is, and the inputs most of them take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

Inputs = dict[str, Any]


class Entry(NamedTuple):
    """One architecture.

    Args:
        name: in the table.
        family: `cnn`, `detector`, `transformer`, `sequence` or `other`.
        build: makes the model; random weights, the seed is set before.
        example: the keyword arguments of one call for a batch size.
        waive: kinds of capture findings that are known to be harmless, as for `trace`.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    example: Callable[[int], Inputs]
    waive: tuple[str, ...] = ()


def image(size: int = 32, channels: int = 3, name: str = "x") -> Callable[[int], Inputs]:
    """Random images `[batch, channels, size, size]`, float32."""
    return lambda batch: {name: torch.randn(batch, channels, size, size)}


def sequence(length: int, channels: int, name: str = "x") -> Callable[[int], Inputs]:
    """Random sequences `[batch, length, channels]`, float32."""
    return lambda batch: {name: torch.randn(batch, length, channels)}


def tokens(length: int = 8, vocabulary: int = 64, name: str = "input_ids") -> Callable[[int], Inputs]:
    """Random token ids `[batch, length]`, int64."""
    return lambda batch: {name: torch.randint(0, vocabulary, (batch, length))}

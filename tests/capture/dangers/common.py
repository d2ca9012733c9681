"""What a case is, and example inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.support.models import Forward

EXACT = "exact"
FREE = "free"
REFUSED = "refused"


class Danger(NamedTuple):
    """A model and what its capture must do.

    Args:
        name: of the case.
        build: makes the model.
        example: makes example inputs; with an argument, for that batch size.
        expect: `FREE`: captured, right on other values and batch sizes. `EXACT`: captured, right on other values.
            `REFUSED`: a CaptureError. Else the kind of flag that must be raised.
        others: further inputs on which a wrong capture would show.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[..., tuple[Any, ...]]
    expect: str = FREE
    others: Callable[[], list[tuple[Any, ...]]] = list


def one(size: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(size, 4, 6),)


def image(size: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(size, 3, 8, 8),)


def indices(size: int = 2) -> tuple[torch.Tensor]:
    return (torch.randint(0, 10, (size, 5)),)


def padded(size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(size, 4, dtype=torch.bool)
    mask[-1, 2:] = True
    return torch.randn(size, 4, 6), mask


def fixed(size: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(6, 2).abs(),)


def nothing_found(size: int = 2) -> tuple[torch.Tensor]:
    """As a detector with random weights: no score is high enough."""
    return (-torch.randn(6, 2).abs(),)


def of(function: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Forward(function, **{name: copy.deepcopy(part) for name, part in parts.items()})

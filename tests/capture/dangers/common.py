"""What a case is, and example inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

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


class Function(nn.Module):
    """A forward given as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            if isinstance(child, torch.Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)
        self._function = function

    def forward(self, *inputs: Any) -> Any:
        return self._function(self, *inputs)


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
    return lambda: Function(function, **{name: copy.deepcopy(part) for name, part in parts.items()})

"""Networks from lists of steps, for properties that hold for every network.

A network is a list of steps. A step takes its operands from the values made so far, so every list is a network, and
shrinking a failing list gives a smaller network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

CHANNELS, SIZE = 4, 6
SHAPE = (CHANNELS, SIZE, SIZE)


@dataclass(frozen=True)
class Step:
    """One operator.

    Args:
        kind: a key of `KINDS`.
        first, second: which values it reads, counted from the newest and taken modulo their number.
        variant: which of its variants.
    """

    kind: str
    first: int
    second: int
    variant: int


class Generated(nn.Module):
    """The network of a list of steps on `[N, 4, 6, 6]`; every value is `[N, C, H, W]`."""

    def __init__(self, steps: list[Step], *, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = steps
        self.outputs = outputs
        self.parts = nn.ModuleDict()
        shapes = [SHAPE]
        for index, step in enumerate(steps):
            shape = _pick(shapes, step.first)
            built = KINDS[step.kind].build(shape[0], step.variant)
            if built is not None:
                self.parts[f"{step.kind}{index}"] = built
            shapes.append(self._shape_after(index, shapes))
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-0.5, 0.5)
                part.running_var.uniform_(0.5, 2)
        self.eval()

    def _shape_after(self, index: int, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        values = [torch.zeros(2, *shape) for shape in shapes]
        with torch.no_grad():
            return tuple(self.eval()._apply_step(index, values).shape[1:])

    def _apply_step(self, index: int, values: list[torch.Tensor]) -> torch.Tensor:
        step = self.steps[index]
        first = _pick(values, step.first)
        alike = [value for value in values if value.shape == first.shape]
        part = dict(self.parts.items()).get(f"{step.kind}{index}")
        return KINDS[step.kind].call(part, first, _pick(alike, step.second), step.variant)

    def forward(self, x: torch.Tensor) -> Any:
        values = [x]
        for index in range(len(self.steps)):
            values.append(self._apply_step(index, values))
        return values[-1] if self.outputs == 1 else tuple(values[-self.outputs :])


def _pick(values: list[Any], index: int) -> Any:
    return values[-1 - index % len(values)]


@dataclass(frozen=True)
class Kind:
    """How a step is built and called: `call(module, first, second of the same shape, variant)`."""

    call: Callable[[Any, torch.Tensor, torch.Tensor, int], torch.Tensor]
    build: Callable[[int, int], nn.Module | None] = lambda channels, variant: None


def _module(*classes: Callable[[int], nn.Module]) -> Kind:
    return Kind(lambda m, x, y, v: m(x), lambda channels, v: classes[v % len(classes)](channels))


def _function(*functions: Callable[[torch.Tensor], torch.Tensor]) -> Kind:
    return Kind(lambda m, x, y, v: functions[v % len(functions)](x))


def _pair(*functions: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Kind:
    return Kind(lambda m, x, y, v: functions[v % len(functions)](x, y))


def _twice(m: nn.Module, x: torch.Tensor, y: torch.Tensor, variant: int) -> torch.Tensor:
    return m(m(x).relu()) if variant % 2 else m(x) + m(y)


def _add_in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 2
    z += y
    return z


def _attention(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x.mean(3) @ y.mean(3).transpose(1, 2), -1).unsqueeze(3)


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1]
    # A shift, so that a mean of the result is more than rounding noise of float32.
    return F.layer_norm(x, (size,), None, torch.linspace(0.5, 1, size)) if size > 1 else x


def _halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, 3) if x.shape[3] > 1 else (x, x)
    return torch.cat((second, first), 3)


KINDS: dict[str, Kind] = {
    "conv": _module(
        lambda c: nn.Conv2d(c, CHANNELS, 3, padding=1),
        lambda c: nn.Conv2d(c, CHANNELS, 1, bias=False),
        lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
        lambda c: nn.Conv2d(c, 2 * CHANNELS, 3, padding=2, dilation=2),
        lambda c: nn.Conv2d(c, CHANNELS, 3, padding="same", padding_mode="circular"),
        lambda c: nn.ConvTranspose2d(c, CHANNELS, 3, padding=1),
    ),
    "norm": _module(nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, affine=False, eps=1e-3)),
    "conv_norm": _module(
        lambda c: nn.Sequential(nn.Conv2d(c, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()),
        lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=c), nn.BatchNorm2d(c), nn.ReLU6()),
    ),
    "shared": Kind(_twice, lambda c, v: nn.Conv2d(c, c, 1)),
    "activation": _module(
        lambda c: nn.ReLU(),
        lambda c: nn.ReLU6(),
        lambda c: nn.Sigmoid(),
        lambda c: nn.Tanh(),
        lambda c: nn.SiLU(),
        lambda c: nn.GELU(),
        lambda c: nn.Hardswish(),
        lambda c: nn.LeakyReLU(0.1),
        lambda c: nn.Hardtanh(-0.5, 0.75),
    ),
    "nothing": _module(lambda c: nn.Identity(), lambda c: nn.Dropout(0.5)),
    "add": _pair(torch.add, _add_in_place, lambda x, y: x - y, lambda x, y: x + y.relu()),
    "mul": _pair(lambda x, y: x * y, lambda x, y: x * y.mean((2, 3), keepdim=True).sigmoid()),
    "cat": _pair(lambda x, y: torch.cat((x, y), 1), lambda x, y: torch.cat((x, y), 2)),
    "matmul": _pair(lambda x, y: x @ y.transpose(-1, -2), _attention),
    "number": _function(lambda x: x + 0.5, lambda x: 1 - x, lambda x: x / 3, lambda x: 2 * x),
    "pool": _function(
        lambda x: F.max_pool2d(x, 3, 1, 1),
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.adaptive_avg_pool2d(x, 3),
        lambda x: x.mean((2, 3), keepdim=True),
    ),
    "resize": _function(
        lambda x: F.interpolate(x, (SIZE, SIZE)),
        lambda x: F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False),
    ),
    "move": _function(
        lambda x: x.transpose(2, 3),
        lambda x: x.flatten(1).reshape(x.size(0), x.size(1), -1, 1),
        lambda x: x[:, :1],
        _halves,
        lambda x: F.pad(x, (1, 1)),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ),
    "layer_norm": _function(lambda x: _layer_norm(x), lambda x: _layer_norm(x + 1)),
    "linear": Kind(
        lambda m, x, y, v: m(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), lambda c, v: nn.Linear(c, CHANNELS)
    ),
}

steps = st.lists(
    st.builds(Step, st.sampled_from(sorted(KINDS)), st.integers(0, 3), st.integers(0, 3), st.integers(0, 8)),
    min_size=1,
    max_size=9,
)

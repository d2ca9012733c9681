"""Small networks whose every operator existing engines have."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """A stem, a block with a short cut, one with a convolution in it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1))
        self.short = nn.Conv2d(8, 12, 1, 2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = F.relu(self.first(x) + x)
        x = F.relu(self.second(x) + self.short(x))
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


class Mobile(nn.Module):
    """Two inverted residuals, one with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(6, 18, 1, bias=False), nn.BatchNorm2d(18), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(18, 18, 3, 1, 1, groups=18), nn.BatchNorm2d(18), nn.ReLU6())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(18, 4, 1), nn.ReLU(), nn.Conv2d(4, 18, 1))
        self.project = nn.Conv2d(18, 6, 1)
        self.down = nn.Conv2d(6, 6, 5, 2, 2, groups=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depth(self.expand(x))
        y = y * torch.sigmoid(self.gate(y))
        return self.down(x + self.project(y))  # type: ignore[no-any-return]


class Pyramid(nn.Module):
    """Two scales joined, and probabilities for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.score = nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = F.leaky_relu(self.fine(x), 0.1)
        coarse = torch.tanh(self.coarse(fine))
        larger = F.interpolate(coarse, scale_factor=2.0, mode="bilinear")
        return F.softmax(self.score(torch.cat([fine, larger, self.up(coarse)], 1)), 1)


class _Block(nn.Module):
    """Two convolutions around a short cut."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels))
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.short: nn.Module = nn.Identity()
        if stride != 1:
            self.short = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


class ResNet18(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", table 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        blocks = []
        for i, (before, channels) in enumerate(pairwise(widths)):
            blocks += [_Block(before, channels, 1 if i == 0 else 2), _Block(channels, channels, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.average(self.blocks(self.pool(self.stem(x))))
        return self.head(x.flatten(1))  # type: ignore[no-any-return]

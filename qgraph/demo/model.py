"""The demo's model: a small residual network with the structures that quantization has to deal with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    """conv-bn-relu, then conv-bn-add-relu: `[N, C, H, W]` to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same shape."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        result: torch.Tensor = self.relu(y)
        return result


class Gate(nn.Module):
    """Weighs channels by a sigmoid of their means (Hu et al., "Squeeze-and-Excitation Networks", 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same shape."""
        weights = torch.sigmoid(self.linear(x.mean(dim=(2, 3))))
        return x * weights[:, :, None, None]


class DigitsNet(nn.Module):
    """Handwritten digits `[N, 1, 8, 8]` in [0, 1] to logits `[N, 10]`."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.block = ResidualBlock(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2)
        self.shared = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = Gate(channels)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[N, 1, 8, 8]` to logits `[N, 10]`."""
        x = self.block(self.stem(x))
        x = self.pool(F.relu(self.bn(self.depthwise(x))))
        x = F.relu(self.shared(x))
        x = F.relu(self.shared(x))  # the same convolution again: one weight, two activations
        x = self.gate(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: torch.Tensor = self.head(self.dropout(x))
        return logits

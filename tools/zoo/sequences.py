"""Small networks for sequences, points and functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Recurrent(nn.Module):
    """An LSTM or GRU and a linear layer on its last step."""

    def __init__(self, kind: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.recurrent, self.out = kind(8, 12, batch_first=True, **options), nn.LazyLinear(4)
        self.forward(torch.zeros(1, 3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.recurrent(x)[0][:, -1])


class Temporal(nn.Module):
    """Bai et al., "Temporal convolutional networks", 2018: causal dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(8, 8, 3, dilation=1 << i) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        for i, conv in enumerate(self.convs):
            x = x + F.relu(conv(F.pad(x, (2 << i, 0))))
        return x.mean(-1)


class Mixer(nn.Module):
    """Tolstikhin et al., "MLP-Mixer", 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.places = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = y + self.places(self.norms[0](y).transpose(1, 2)).transpose(1, 2)
        return self.head((y + self.channels(self.norms[1](y))).mean(1))


class PointNet(nn.Module):
    """Qi et al., 2016: shared layers per point, then the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1))
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.head(self.points(x.transpose(1, 2)).amax(2)), dim=-1)


class Field(nn.Module):
    """Mildenhall et al., "NeRF", 2020: sines and cosines of positions, a skip connection, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(27, 32), nn.Linear(59, 32)
        self.density, self.colour = nn.Linear(32, 1), nn.Linear(32, 3)
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (x.unsqueeze(-1) * self.frequencies).flatten(-2)
        encoded = torch.cat([x, angles.sin(), angles.cos()], -1)
        y = F.relu(self.first(encoded))
        y = F.relu(self.second(torch.cat([y, encoded], -1)))
        return F.softplus(self.density(y)), torch.sigmoid(self.colour(y))


class Siamese(nn.Module):
    """Two inputs through one network, and their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        difference = torch.abs(self.net(x) - self.net(y))
        return torch.exp(-difference.sum(-1))


class Gated(nn.Module):
    """Gated residual layers with softmax mixing of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gate, self.out = nn.Linear(8, 3), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        value, gate = self.out((outputs * weights.unsqueeze(-2)).sum(-1)).chunk(2, -1)
        return value * torch.sigmoid(gate)


def encoder() -> nn.Module:
    """A stack of torch's own encoder layers."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

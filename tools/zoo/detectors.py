"""Small detectors and bird's-eye-view networks: necks, heads, decoders, view transforms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tools.zoo.convolutional import Residual, cbr


class Backbone(nn.Module):
    """Three stages of a small ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 8, 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(cbr(8 << i, 16 << i, 3, 2), Residual(cbr(16 << i, 16 << i), nn.ReLU())) for i in range(3)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class FPN(nn.Module):
    """Lin et al., "Feature Pyramid Networks", 2016, with one head shared by all levels ("RetinaNet", 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.lateral = nn.ModuleList(nn.Conv2d(16 << i, 16, 1) for i in range(3))
        self.smooth = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.classes = nn.Sequential(cbr(16, 16), nn.Conv2d(16, 6, 3, padding=1))
        self.boxes = nn.Sequential(cbr(16, 16), nn.Conv2d(16, 8, 3, padding=1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        levels = [lateral(level) for lateral, level in zip(self.lateral, self.backbone(x), strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        scores = [self.classes(level).permute(0, 2, 3, 1).flatten(1) for level in levels]
        boxes = [self.boxes(level).permute(0, 2, 3, 1).flatten(1) for level in levels]
        return {"scores": torch.cat(scores, 1).sigmoid(), "boxes": torch.cat(boxes, 1)}


class Yolo(nn.Module):
    """Cross-stage partial block, pooled pyramid, anchor-free decoding, as in the YOLO family."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 16, 3, 2, act="SiLU")
        self.body = nn.ModuleList(Residual(cbr(8, 8, act="SiLU")) for _ in range(2))
        self.merge = cbr(32, 16, 1, act="SiLU")
        self.pools, self.after = nn.MaxPool2d(5, 1, 2), cbr(64, 16, 1, act="SiLU")
        self.head = nn.Conv2d(16, 4 + 3, 1)
        self.register_buffer(
            "cells", torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.stem(x)
        parts = list(y.chunk(2, 1))
        for block in self.body:
            parts.append(block(parts[-1]))
        y = self.merge(torch.cat(parts, 1))
        pooled = [y]
        for _ in range(3):
            pooled.append(self.pools(pooled[-1]))
        box, score = self.head(self.after(torch.cat(pooled, 1))).split([4, 3], dim=1)
        centre = (box[:, :2].sigmoid() * 2 - 0.5 + self.cells) * 2
        size = (box[:, 2:].sigmoid() * 2) ** 2
        return torch.cat([centre, size], 1), score.sigmoid()


class CenterNet(nn.Module):
    """Zhou et al., "Objects as Points", 2019: peaks of a heat map by max pooling, the best by topk."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(cbr(3, 8, 3, 2), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.heat, self.size = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.net(x)
        heat = torch.sigmoid(self.heat(y))
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        score, place = peaks.flatten(1).topk(5)
        return score, place, self.size(y)


class DETR(nn.Module):
    """Carion et al., 2020: a transformer decoder with learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.project = Backbone(), nn.Conv2d(64, 16, 1)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.queries = nn.Parameter(torch.randn(5, 16))
        self.place = nn.Parameter(torch.randn(1, 4, 16))
        self.classes, self.boxes = nn.Linear(16, 4), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.project(self.backbone(x)[-1]).flatten(2).transpose(1, 2) + self.place
        y = self.transformer(y, self.queries.unsqueeze(0).expand(x.shape[0], -1, -1))
        return self.classes(y), self.boxes(y).sigmoid()


class DeformableEncoder(nn.Module):
    """One level of deformable attention (Zhu et al., 2020) by grid_sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.value = cbr(3, 16, 3, 4), nn.Conv2d(16, 16, 1)
        self.offsets, self.weights, self.out = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 16)
        axis = torch.linspace(-0.9, 0.9, 8)
        self.register_buffer("points", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, 64, 1, 1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        batch, channels, height, width = y.shape
        query = y.flatten(2).transpose(1, 2)
        values = self.value(y).view(batch * 2, channels // 2, height, width)
        place = self.points + self.offsets(query).view(batch, 64, 2, 4, 2) * 0.1
        place = place.transpose(1, 2).flatten(0, 1)
        weights = self.weights(query).view(batch, 64, 2, 4).softmax(-1).transpose(1, 2).reshape(batch * 2, 1, 64, 4)
        found = F.grid_sample(values, place, mode="bilinear", padding_mode="zeros", align_corners=False)
        mixed = (found * weights).sum(-1).view(batch, channels, 64).transpose(1, 2)
        return query + self.out(mixed)


class LiftSplat(nn.Module):
    """Philion and Fidler, "Lift, Splat, Shoot", 2020: depth distributions times features, pooled over heights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.feature = cbr(3, 16, 3, 4), nn.Conv2d(16, 6, 1), nn.Conv2d(16, 8, 1)
        self.bev = nn.Sequential(cbr(8, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, cameras, *image = x.shape
        y = self.stem(x.view(batch * cameras, *image))
        lifted = torch.einsum("ndhw,nchw->ncdw", self.depth(y).softmax(1), self.feature(y))
        return self.bev(lifted.view(batch, cameras, *lifted.shape[1:]).mean(1))


class CrossView(nn.Module):
    """Bird's-eye-view queries attend to cameras one after the other; positions by sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = cbr(3, 16, 3, 4), nn.MultiheadAttention(16, 2, batch_first=True)
        self.queries, self.embed = nn.Parameter(torch.randn(1, 25, 16)), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)
        axis = torch.arange(25.0).unsqueeze(1) / 10000 ** (torch.arange(8.0) / 8)
        self.register_buffer("angles", axis * 2 * math.pi)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = self.embed(torch.cat([self.angles.sin(), self.angles.cos()], -1))
        query = self.queries + place
        for camera in range(x.shape[1]):
            memory = self.stem(x[:, camera]).flatten(2).transpose(1, 2)
            query = query.expand(x.shape[0], -1, -1)
            query = self.norm(query + self.attention(query, memory, memory, need_weights=False)[0])
        return self.head(query)


class PillarNet(nn.Module):
    """Points of each pillar through a small network, their maximum, then a grid (Lang et al., "PointPillars", 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.norm = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8)
        self.grid = nn.Sequential(cbr(8, 8), nn.Conv2d(8, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, pillars, points, _ = x.shape
        y = self.norm(self.points(x).view(batch, pillars * points, 8).transpose(1, 2)).relu()
        y = y.view(batch, 8, pillars, points).max(-1).values
        return self.grid(y.view(batch, 8, 8, 8))

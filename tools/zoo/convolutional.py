"""Small convolutional networks of well-known designs, defined here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def cbr(
    channels_in: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: str = "ReLU"
) -> nn.Module:
    """Convolution, batch norm, activation."""
    conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), getattr(nn, act)())


class Head(nn.Module):
    """Global average and a linear layer behind a feature extractor."""

    def __init__(self, features: nn.Module, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.features, self.fc = features, nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def vgg() -> nn.Module:
    """Simonyan and Zisserman, 2014."""
    return nn.Sequential(
        cbr(3, 8), nn.MaxPool2d(2), cbr(8, 16), cbr(16, 16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 32),
        nn.ReLU(), nn.Dropout(), nn.Linear(32, 10),
    )  # fmt: skip


class Fire(nn.Module):
    """Iandola et al., "SqueezeNet", 2016."""

    def __init__(self, channels_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels_in, squeeze, 1)
        self.narrow, self.wide = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x))], 1)


def squeezenet() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 8, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 8), Fire(16, 4, 8)), 16)


class Dense(nn.Module):
    """Huang et al., "DenseNet", 2016: batch norm and relu before each convolution."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels + growth * i) for i in range(layers))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + growth * i, growth, 3, padding=1, bias=False) for i in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat((x, conv(F.relu(norm(x)))), 1)
        return x


def densenet() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 8, 3, 2), Dense(8, 4, 3), nn.AvgPool2d(2), Dense(20, 4, 2)), 28)


class Inception(nn.Module):
    """Szegedy et al., 2014."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.three = cbr(channels, 8, 1), nn.Sequential(cbr(channels, 4, 1), cbr(4, 8))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), cbr(channels, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in (self.one, self.three, self.pool)], dim=1)


def inception() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 8, 3, 2), Inception(8), Inception(24)), 24)


class Shuffle(nn.Module):
    """Ma et al., "ShuffleNet V2", 2018: half of the channels pass, then channels are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(cbr(half, half, 1), cbr(half, half, 3, 1, half), cbr(half, half, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat((left, self.branch(right)), dim=1)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return y.view(batch, channels, height, width)


def shufflenet() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 16, 3, 2), Shuffle(16), Shuffle(16)), 16)


class SqueezeExcite(nn.Module):
    """Hu et al., "Squeeze-and-Excitation Networks", 2017."""

    def __init__(self, channels: int, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Residual(nn.Module):
    """`act(x + body(x))`."""

    def __init__(self, body: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.act = body, act or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x) + x)


def se_resnet() -> nn.Module:
    body = nn.Sequential(cbr(8, 8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), SqueezeExcite(8))
    return Head(nn.Sequential(cbr(3, 8, 3, 2), Residual(body, nn.ReLU())), 8)


def mobilenet_v3() -> nn.Module:
    """Howard et al., 2019: hard swish and hard sigmoid."""
    body = nn.Sequential(
        cbr(8, 24, 1, act="Hardswish"),
        cbr(24, 24, 5, 1, 24, act="Hardswish"),
        SqueezeExcite(24, nn.Hardsigmoid),
        nn.Conv2d(24, 8, 1),
        nn.BatchNorm2d(8),
    )
    return Head(nn.Sequential(cbr(3, 8, 3, 2, act="Hardswish"), Residual(body)), 8)


class Ghost(nn.Module):
    """Han et al., "GhostNet", 2019: half of the channels by a cheap depthwise convolution, cut to size."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.channels, half = channels, (channels + 1) // 2
        self.primary, self.cheap = cbr(channels_in, half, 1), cbr(half, half, 3, 1, half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.channels, :, :]


def ghostnet() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 8, 3, 2), Ghost(8, 15), Ghost(15, 9)), 9)


class Res2(nn.Module):
    """Gao et al., "Res2Net", 2019: splits of channels feed one another."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(cbr(channels // 4, channels // 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.split(x, x.shape[1] // 4, 1)
        done = [parts[0]]
        for conv, part in zip(self.convs, parts[1:], strict=True):
            done.append(conv(part + done[-1]))
        return torch.cat(done, 1) + x


def res2net() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 16, 3, 2), Res2(16)), 16)


class RepVGG(nn.Module):
    """Ding et al., 2021: three branches as they are trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.same = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.same(x))


def repvgg() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 8, 3, 2), RepVGG(8), RepVGG(8)), 8)


def convmixer() -> nn.Module:
    """Trockman and Kolter, 2022."""

    def layer() -> nn.Module:
        depthwise = nn.Sequential(nn.Conv2d(16, 16, 5, groups=16, padding="same"), nn.GELU(), nn.BatchNorm2d(16))
        return nn.Sequential(Residual(depthwise), nn.Conv2d(16, 16, 1), nn.GELU(), nn.BatchNorm2d(16))

    stem = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.GELU(), nn.BatchNorm2d(16))
    return Head(nn.Sequential(stem, layer(), layer()), 16)


class CBAM(nn.Module):
    """Woo et al., 2018: attention over channels, then over places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1))
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(torch.amax(x, (2, 3), keepdim=True))
        x = x * torch.sigmoid(weight)
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.place(both))


def cbam() -> nn.Module:
    return Head(nn.Sequential(cbr(3, 8, 3, 2), CBAM(8)), 8)


class UNet(nn.Module):
    """Ronneberger et al., 2015, with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = cbr(3, 8), cbr(8, 16), cbr(16, 16)
        self.up1, self.up2 = nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge1, self.merge2, self.out = cbr(32, 16), cbr(16, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.up1(self.middle(F.max_pool2d(second, 2)))
        y = self.up2(self.merge1(torch.cat([second, y], 1)))
        return self.out(self.merge2(torch.cat([first, y], 1)))


class ASPP(nn.Module):
    """Chen et al., "DeepLab v3", 2017: dilated branches, image pooling, bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 8, 3, 2)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=rate, dilation=rate) for rate in (1, 2, 4))
        self.pooled, self.project = nn.Conv2d(8, 8, 1), cbr(32, 8, 1)
        self.classes = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        parts = [F.relu(branch(y)) for branch in self.branches]
        pooled = F.relu(self.pooled(F.adaptive_avg_pool2d(y, 1)))
        parts.append(F.interpolate(pooled, size=y.shape[-2:], mode="bilinear", align_corners=False))
        y = self.classes(self.project(torch.cat(parts, 1)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def superresolution() -> nn.Module:
    """Shi et al., "Sub-pixel CNN", 2016."""
    return nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))


def autoencoder() -> nn.Module:
    return nn.Sequential(
        cbr(3, 8, 3, 2, act="LeakyReLU"),
        cbr(8, 16, 3, 2, act="ELU"),
        nn.ConvTranspose2d(16, 8, 4, 2, 1),
        nn.PReLU(8),
        nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.Sigmoid(),
    )


class SpatialTransformer(nn.Module):
    """Jaderberg et al., 2015: the image is sampled where a small network says."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(cbr(3, 8, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
        self.net = Head(cbr(3, 8), 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = self.where(x).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        return self.net(F.grid_sample(x, grid, align_corners=False))

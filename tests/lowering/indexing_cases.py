"""Cases of `test_operators` for operators that order, index, sample and unfold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import Forward


class Case(NamedTuple):
    name: str
    op: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 6, 6)


def of(function: Callable[..., Any], **children: Any) -> Callable[[], nn.Module]:
    return lambda: Forward(function, **children)


def module(child: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Forward(lambda m, x: m.child(x), child=child)


def resized(**options: Any) -> Callable[[], nn.Module]:
    return of(lambda m, x: F.interpolate(x, **options))


def sampled(**options: Any) -> Callable[[], nn.Module]:
    """Samples a map at positions computed from the same map, some of them outside."""
    return of(lambda m, x: F.grid_sample(x, torch.tanh(x[:, :2]).permute(0, 2, 3, 1) * 1.3, **options))


def constant_grid() -> nn.Module:
    grid = torch.rand(1, 3, 5, 2) * 2.4 - 1.2
    return Forward(lambda m, x: F.grid_sample(x, m.grid.expand(len(x), -1, -1, -1), align_corners=False), grid=grid)


def indices(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(below))


VOLUME = (2, 4, 4, 4)
torch.manual_seed(3)

CASES = [
    Case("argmax", "argmax", of(lambda m, x: (x.argmax(1), x))),
    Case("argmax_keepdim", "argmax", of(lambda m, x: (torch.argmax(x, dim=-1, keepdim=True), x))),
    Case("argmin", "argmin", of(lambda m, x: (x.argmin(dim=2), x))),
    Case("argmax_gather", "gather", of(lambda m, x: x.gather(1, x.argmax(1, keepdim=True)))),
    Case("max_dim", "take_along_dim", of(lambda m, x: x.max(dim=1))),
    Case("max_values", "amax", of(lambda m, x: x.max(dim=1)[0])),
    Case("max_keepdim", "take_along_dim", of(lambda m, x: tuple(torch.max(x, 2, keepdim=True)))),
    Case("min_indices", "argmin", of(lambda m, x: (x.min(-1).indices, x))),
    Case("min_all", "amin", of(lambda m, x: x - x.amin(dim=(1, 2, 3), keepdim=True))),
    Case("amin", "amin", of(lambda m, x: x.amin(dim=(1, 2)))),
    Case("topk", "top_indices", of(lambda m, x: tuple(x.topk(3, dim=1)))),
    Case("topk_smallest", "take_along_dim", of(lambda m, x: torch.topk(x, 2, largest=False).values)),
    Case("sort", "argsort", of(lambda m, x: x.sort(dim=2, descending=True)[0])),
    Case("argsort", "argsort", of(lambda m, x: x.gather(-1, torch.argsort(x, dim=-1, stable=True)))),
    Case("cumsum", "cumsum", of(lambda m, x: x.cumsum(1))),
    Case("cumsum_last", "cumsum", of(lambda m, x: torch.cumsum(x, dim=-1))),
    Case("gather", "gather", of(lambda m, x: x.gather(1, m.i.expand(len(x), -1, -1, -1)), i=indices(4, 1, 2, 6, 6))),
    Case("take_along_dim", "take_along_dim", of(lambda m, x: x.take_along_dim(m.i, dim=3), i=indices(6, 1, 1, 6, 2))),
    Case("index_constant", "slice", of(lambda m, x: x[:, m.i], i=torch.tensor([3, 0, 0]))),
    Case("index_computed", "slice", of(lambda m, x: x[torch.arange(x.shape[0]), x.amax((2, 3)).argmax(1)])),
    Case("embedding", "embedding", of(lambda m, x: m.table(x.argmax(1)), table=nn.Embedding(4, 5))),
    Case("embedding_function", "embedding", of(lambda m, x: F.embedding(x.argmax(1), m.w), w=torch.eye(4))),
    Case("row_of_table", "slice", of(lambda m, x: m.w[x.argmax(1)], w=torch.randn(4, 5))),
    Case("pixel_shuffle", "pixel_shuffle", module(nn.PixelShuffle(2))),
    Case("pixel_unshuffle", "pixel_unshuffle", module(nn.PixelUnshuffle(2))),
    Case("channel_shuffle", "channel_shuffle", module(nn.ChannelShuffle(2))),
    Case("unfold", "unfold", of(lambda m, x: F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1)))),
    Case("unfold_module", "unfold", module(nn.Unfold(2, stride=2))),
    Case("fold", "fold", of(lambda m, x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1))),
    Case("fold_module", "fold", module(nn.Fold((5, 4), (2, 2), dilation=(2, 1), stride=1)), (8, 9)),
    Case("windows", "windows", of(lambda m, x: x.unfold(2, 3, 2))),
    Case("var", "mean", of(lambda m, x: x.var(dim=(2, 3)))),
    Case("var_biased", "mean", of(lambda m, x: torch.var(x, 1, False, True))),
    Case("std", "sqrt", of(lambda m, x: x.std(-1, keepdim=True))),
    Case("std_correction", "sqrt", of(lambda m, x: torch.std(x, dim=1, correction=2))),
    Case("movedim", "movedim", of(lambda m, x: x.movedim(1, -1))),
    Case("repeat_interleave", "repeat_interleave", of(lambda m, x: x.repeat_interleave(2, dim=1))),
    Case("expand_as", "expand_as", of(lambda m, x: x[:, :1].expand_as(x.relu()))),
    Case("reflection_pad", "pad", module(nn.ReflectionPad2d((1, 2, 0, 1)))),
    Case("replication_pad", "pad", module(nn.ReplicationPad1d(2)), (4, 6)),
    Case("circular_pad", "pad", module(nn.CircularPad2d(2))),
    Case("nearest_exact", "index_select", resized(size=(5, 9), mode="nearest-exact")),
    Case("linear_resize", "interpolate", resized(scale_factor=2.5, mode="linear"), (4, 6)),
    Case("trilinear", "interpolate", resized(size=(3, 5, 7), mode="trilinear"), VOLUME),
    Case("trilinear_corners", "interpolate", resized(size=(5, 6, 2), mode="trilinear", align_corners=True), VOLUME),
    Case("bicubic", "interpolate", resized(scale_factor=2, mode="bicubic")),
    Case("bicubic_corners", "interpolate", resized(size=(11, 4), mode="bicubic", align_corners=True)),
    Case("bicubic_antialiased", "interpolate", resized(size=(3, 9), mode="bicubic", antialias=True)),
    Case("bilinear_antialiased", "interpolate", resized(size=(2, 9), mode="bilinear", antialias=True)),
    Case("area", "interpolate", resized(size=(4, 3), mode="area")),
    Case("grid_sample", "grid_sample", sampled(align_corners=False)),
    Case("grid_sample_corners", "grid_sample", sampled(align_corners=True)),
    Case("grid_sample_border", "grid_sample", sampled(padding_mode="border", align_corners=False)),
    Case("grid_sample_reflection", "grid_sample", sampled(padding_mode="reflection", align_corners=False)),
    Case("grid_sample_reflection_corners", "grid_sample", sampled(padding_mode="reflection", align_corners=True)),
    Case("grid_sample_nearest", "grid_sample", sampled(mode="nearest", align_corners=False)),
    Case("grid_sample_constant_grid", "grid_sample", constant_grid),
]  # fmt: skip

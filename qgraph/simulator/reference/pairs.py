"""Reference kernel: depthwise convolutions that add their products in saturating pairs, see `qgraph.numerics.pairs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qgraph.numerics import pair_sums
from qgraph.simulator.reference.common import along_channels, wide
from qgraph.simulator.reference.products import finish_product
from qgraph.simulator.trace import KernelTrace


def conv_pairs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    shift: torch.Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`x` uint8 `[N, C, H, W]`, `weight` `[O, 1, h, w]`, O a multiple of C; result `[N, O, *out]`.

    `bias` is int32 or float32 `[O]`.
    """
    filters, _, height, width = weight.shape
    padded = F.pad(wide(x), (padding[1], padding[1], padding[0], padding[0]), value=x_zero)
    windows = padded.unfold(2, height, stride[0]).unfold(3, width, stride[1])
    taps = windows.flatten(-2).repeat_interleave(filters // x.shape[1], 1)
    kernels = wide(weight).flatten(1)
    sums = pair_sums(taps * kernels[:, None, None, :]) - x_zero * kernels.sum(1)[:, None, None]
    bias, multiplier, shift = (along_channels(values, 2) for values in (bias, multiplier, shift))
    return finish_product(sums, bias, None, multiplier, shift, None, arithmetic, low, high, format, zero, trace)

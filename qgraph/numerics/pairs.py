"""fbgemm's depthwise kernel: it adds products in pairs, and every pair saturates at 16 bits.

    acc = sum(sat16(x[2i] * w[2i] + x[2i + 1] * w[2i + 1])) - zx * sum(w)

over the taps of a channel in row-major order, a last odd one alone; `x` are raw unsigned codes, padding is `zx`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qgraph.numerics.formats import QType, qint16

_KERNELS = (3, 5, 7, 9, 11)
_CHANNELS_AT_ONCE = 8


def dispatches_pairs(
    weight: Sequence[int], groups: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether fbgemm computes a 2-d convolution with weight `[C_out, C_in / groups, h, w]` in its depthwise kernel."""
    if len(weight) != 4:
        return False
    out, per_group, height, width = weight
    return (
        per_group == 1
        and out in (groups, 2 * groups)
        and groups % _CHANNELS_AT_ONCE == 0
        and height == width
        and height in _KERNELS
        and all(step in (1, 2) for step in stride)
        and all(step == 1 for step in dilation)
        and all(amount == (height - 1) // 2 for amount in padding)
    )


def pairs_may_saturate(weight: torch.Tensor, source: QType) -> bool:
    """Whether codes of `source` exist for which a pair of `weight` (integers `[C_out, 1, h, w]`) leaves 16 bits."""
    pairs = _paired(weight.to(torch.int64).flatten(1))
    highest = pairs.clamp(min=0).sum(-1) * source.qmax
    lowest = pairs.clamp(max=0).sum(-1) * source.qmax
    return not bool((qint16.contains(highest) & qint16.contains(lowest)).all())


def pair_sums(products: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension of int64 products (any shape), taken in saturating pairs."""
    return qint16.saturate(_paired(products).sum(-1)).sum(-1)


def _paired(values: torch.Tensor) -> torch.Tensor:
    """`[*, n]` as `[*, ceil(n / 2), 2]`."""
    odd = values.shape[-1] % 2
    paired: torch.Tensor = F.pad(values, (0, odd)).unflatten(-1, (-1, 2))
    return paired

"""Where oneDNN's 8-bit convolutions are wrong."""

from __future__ import annotations

from collections.abc import Sequence


def one_column_is_wrong(weight: Sequence[int], groups: int) -> bool:
    """Whether oneDNN may compute wrong sums where the result of a convolution is one column wide.

    Found by comparison with exact sums (oneDNN of torch 2.13): convolutions of several groups with kernels wider than
    one column fail for some strides and paddings. One filter per channel is right.

    Args:
        weight: shape of the weight, `[C_out, C_in / groups, *kernel]`.
    """
    depthwise = weight[1] == 1 and weight[0] == groups
    return groups > 1 and weight[-1] > 1 and not depthwise

"""Where oneDNN's 8-bit convolutions are wrong."""

from __future__ import annotations

from collections.abc import Sequence


def one_column_is_wrong(weight: Sequence[int], groups: int) -> bool:
    """Whether oneDNN may compute wrong sums where the result of a convolution is one column wide.

    Found by comparison with exact sums (oneDNN of torch 2.13): convolutions with kernels wider than one column fail for
    some strides and paddings, now and then only. Several groups of one filter per channel are right.

    Args:
        weight: shape of the weight, `[C_out, C_in / groups, *kernel]`.
    """
    depthwise = groups > 1 and weight[1] == 1 and weight[0] == groups
    return weight[-1] > 1 and not depthwise


def sees_input(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether the window of every output has a tap inside the input; oneDNN is wrong or ends the process where not.

    Args:
        sizes: spatial sizes of the input; the others per dimension, too.
    """
    for size, length, step, pad, spread in zip(sizes, kernel, stride, padding, dilation, strict=True):
        count = (size + 2 * pad - spread * (length - 1) - 1) // step + 1
        starts = [position * step - pad for position in range(count)]
        taps = range(0, spread * length, spread)
        if not all(any(0 <= start + tap < size for tap in taps) for start in starts):
            return False
    return True

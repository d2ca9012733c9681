"""Reference kernels: convolutions, linear and matrix products.

acc = sum(x * w) + bias                             exact, then as the accumulator holds it
y   = saturate(rescale(acc))                        without a residual
y   = saturate(round(acc * Ma + r * Mr, shift))     with one: both terms at one shift, rounded once
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qgraph.errors import UserError
from qgraph.numerics import parse_arithmetic
from qgraph.simulator.reference.common import accumulated, along_channels, finished, general, requantized, wide
from qgraph.simulator.trace import KernelTrace

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual_multiplier: torch.Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    transposed: bool,
    groups: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    residual_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`x` `[N, C_in, *in]`, `weight` as torch lays it out, `bias` `[C_out]`; result `[N, C_out, *out]`.

    The bias is int32, or float32 on engines that add one. As in torch, `N` may be missing in both.
    """
    rank = weight.dim() - 2
    if transposed:
        options = (list(stride), list(padding), list(output_padding), groups, list(dilation))
        sums = _TRANSPOSED[rank - 1](_exact(x, x_zero), _exact(weight), None, *options)
    else:
        sums = _CONVOLUTIONS[rank - 1](
            _exact(x, x_zero), _exact(weight), None, list(stride), list(padding), list(dilation), groups
        )
    sums = wide(sums)
    return finish_product(
        sums,
        along_channels(bias, rank),
        None if residual is None else wide(residual, residual_zero),
        along_channels(multiplier, rank),
        along_channels(shift, rank),
        along_channels(residual_multiplier, rank),
        arithmetic,
        low,
        high,
        format,
        zero,
        trace,
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual_multiplier: torch.Tensor | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    residual_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`x` `[*, in]`, `weight` `[out, in]`, `bias` int32 or float32 `[out]`; result `[*, out]`."""
    sums = wide(torch.matmul(_exact(x, x_zero), _exact(weight).t()))
    other = None if residual is None else wide(residual, residual_zero)
    return finish_product(
        sums, bias, other, multiplier, shift, residual_multiplier, arithmetic, low, high, format, zero, trace
    )


def matmul(
    x: torch.Tensor,
    y: torch.Tensor,
    multiplier: torch.Tensor | None,
    shift: torch.Tensor | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    y_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The matrix product of `x` `[*, n, k]` and `y` `[*, k, m]`."""
    sums = wide(torch.matmul(_exact(x, x_zero), _exact(y, y_zero)))
    return finish_product(sums, None, None, multiplier, shift, None, arithmetic, low, high, format, zero, trace)


def finish_product(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual_multiplier: torch.Tensor | None,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int,
    trace: KernelTrace | None,
) -> torch.Tensor:
    """The end of every product: bias, accumulator, rescaling with or without a residual, bounds."""
    word = parse_arithmetic(arithmetic)
    real_bias = bias if bias is not None and bias.is_floating_point() else None
    if bias is not None and real_bias is None:
        sums = sums + wide(bias)
    if multiplier is None:  # a high-precision output: the accumulator itself
        return finished(accumulated(sums, word, trace), low, high, format, trace)
    if residual is None or residual_multiplier is None:
        return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace, real_bias)
    held = accumulated(sums, word, trace)
    scaled = general(word.rule).apply_sum([held, residual], [multiplier, residual_multiplier], shift) + zero
    return finished(scaled, low, high, format, trace)


def _exact(codes: torch.Tensor, zero: int = 0) -> torch.Tensor:
    """Codes, counted from their zero point, in a dtype in which products and sums are exact.

    int64, or float64 where int64 has no kernels (CUDA).
    Sums stay below 2**53 for operands of up to 16 bits and fewer than 2**23 products.

    Raises:
        UserError: the codes are wider than 16 bits.
    """
    if codes.dtype is torch.int32:
        raise UserError("an operand of a matrix product is int32", fix="requantize it to int8 or int16 first")
    exact = codes.to(torch.int64 if codes.device.type == "cpu" else torch.float64)
    return exact - zero if zero else exact

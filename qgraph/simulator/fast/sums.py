"""Exact sums of products, by the fastest way proven exact for the weights at hand.

8-bit codes    oneDNN with float32 sums within 2**24, over slices of the input channels where all together are beyond;
               `_int_mm` with int32 sums for matrices
16-bit codes   x = 256 h + l, both bytes as above
otherwise      carried in float32 within 2**24, else in float64 (also on devices other than the CPU)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from qgraph.numerics import one_column_is_wrong, qint8, qint16, qint32, quint8
from qgraph.simulator.fast.exact import DOUBLE, SINGLE, product_bound
from qgraph.simulator.fast.layout import as_unsigned, channels_last, rows_of
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.fast.probe import Convolution, exact_kinds, kind_of
from qgraph.simulator.kernel import NoFastForm, Operand

Sums = Callable[[torch.Tensor], torch.Tensor]
Geometry: TypeAlias = tuple[list[int], list[int], list[int]]  # stride, padding, dilation
_BYTE = 8
_BYTES = (torch.int8, torch.uint8)


# --- convolutions ---------------------------------------------------------------------------------------------------


def convolution_sums(
    x: Operand,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    zero: int,
    options: dict[str, Any],
    *,
    saturates: bool = False,
) -> Sums:
    """Sums of a 2-d convolution, float32, float64 or int32 `[N, C, H, W]` in channels_last.

    Args:
        x: the input, `zero` its zero point.
        weight: `[out, in / groups, kh, kw]`.
        bias: int32 `[out]`.
        options: stride, padding, dilation and groups, two numbers each.
        saturates: 8-bit sums beyond 2**24 need not be exact; they have 32 bits.
    """
    low, high = x.low - zero, x.high - zero
    geometry = (list(options["stride"]), list(options["padding"]), list(options["dilation"]))
    groups = int(options["groups"])
    kind = kind_of(weight.shape[1] * groups, weight.shape[0], (weight.shape[2], weight.shape[3]), groups)
    one_column = weight.shape[-1] > 1 and _columns(x, weight, geometry) == 1
    wrong = one_column and one_column_is_wrong(weight.shape, groups)
    if weight.dtype is torch.int8 and x.device.type == "cpu" and kind in exact_kinds() and not wrong:
        if x.dtype in _BYTES:
            sums = _byte_convolution(weight, bias, low, high, geometry, groups, saturates=saturates)
            if sums is not None:
                return lambda values: sums(*as_unsigned(channels_last(values), x.low, zero))
        if x.dtype is torch.int16 and zero == 0:
            both = _two_byte_convolution(weight, bias, x.low, geometry, groups)
            if both is not None:
                return both
    # oneDNN's float32 convolutions of one channel are wrong there, too; float64 ones are not oneDNN's.
    wide = torch.float64 if one_column else None
    return _carried_convolution(weight, bias, low, high, zero, geometry, groups, x.device, wide)


def _columns(x: Operand, weight: torch.Tensor, geometry: Geometry) -> int:
    """Width of the result."""
    stride, padding, dilation = (values[1] for values in geometry)
    return (x.shape[-1] + 2 * padding - dilation * (weight.shape[-1] - 1) - 1) // stride + 1


def _byte_convolution(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: int,
    high: int,
    geometry: Geometry,
    groups: int,
    *,
    saturates: bool = False,
) -> Callable[[torch.Tensor, int], torch.Tensor] | None:
    """Takes uint8 codes and their zero point."""
    slices = [(0, weight.shape[1])] if saturates else _channel_slices(weight, bias, low, high, groups)
    if slices is None:
        return None
    parts: list[Convolution] = []
    for number, (first, last) in enumerate(slices):
        addend = bias.float() if bias is not None and number == 0 else None
        parts.append(Convolution(weight[:, first:last].contiguous(), addend, *geometry, groups, 0))

    def single(codes: torch.Tensor, zero: int) -> torch.Tensor:
        parts[0].at(zero)
        return parts[0](codes)

    def several(codes: torch.Tensor, zero: int) -> torch.Tensor:
        total: torch.Tensor | None = None
        for part, (first, last) in zip(parts, slices, strict=True):
            part.at(zero)
            sums = part(channels_last(codes[:, first:last])).to(torch.int32)
            total = sums if total is None else total.add_(sums)
        assert total is not None
        return total

    return single if len(parts) == 1 else several


def _channel_slices(
    weight: torch.Tensor, bias: torch.Tensor | None, low: int, high: int, groups: int
) -> list[tuple[int, int]] | None:
    """Slices of input channels whose sums stay within 2**24 (the bias is in the first) and 2**31 together."""
    channels = weight.shape[1]
    if product_bound(weight, low, high, bias) <= SINGLE:
        return [(0, channels)]
    if groups > 1 or product_bound(weight, low, high, bias) > qint32.qmax:
        return None
    slices, first = [], 0
    while first < channels:
        last = channels
        while last > first and product_bound(weight[:, first:last], low, high, None if first else bias) > SINGLE:
            last = first + (last - first) // 2
        if last == first:
            return None
        slices.append((first, last))
        first = last
    return slices


def _two_byte_convolution(
    weight: torch.Tensor, bias: torch.Tensor | None, low: int, geometry: Geometry, groups: int
) -> Sums | None:
    """int16 codes as 256 h + l: `l` has zero point 0, `h` is signed; without negative codes both are alike."""
    lower = _byte_convolution(weight, None, 0, quint8.qmax, geometry, groups)
    upper = _byte_convolution(weight, None, qint8.qmin, qint8.qmax, geometry, groups)
    bound = product_bound(weight, qint16.qmin, qint16.qmax, bias)
    if lower is None or upper is None or bound >= DOUBLE:
        return None
    wide = torch.int32 if bound <= qint32.qmax else torch.int64
    start = torch.zeros(weight.shape[0], dtype=wide) if bias is None else bias.to(wide)

    def sums(values: torch.Tensor) -> torch.Tensor:
        both = _bytes_of(channels_last(values).permute(0, 2, 3, 1), flipped=low < 0)
        images = both.flatten(0, 1).permute(0, 3, 1, 2)
        count = values.shape[0]
        if low >= 0:
            parts = lower(images, 0)
            return joined(parts[:count], parts[count:], start)
        return joined(lower(images[:count], 0), upper(images[count:], -qint8.qmin), start)

    return sums


def joined(lower: torch.Tensor, upper: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """`lower + 256 * upper + start` of channels_last sums, in the dtype of `start`, which has one entry per channel."""
    if loops() is None:
        total = lower.to(start.dtype).add_(upper.to(start.dtype), alpha=1 << _BYTE)
        return total.add_(start.view(-1, 1, 1))
    out = torch.empty_like(lower, dtype=start.dtype)
    loops().join(*(rows_of(part).numpy() for part in (lower, upper)), start.numpy(), rows_of(out).numpy())
    return out


def _bytes_of(codes: torch.Tensor, *, flipped: bool = False) -> torch.Tensor:
    """Low and high bytes of contiguous int16 codes, uint8 `[2, *]`; `flipped` adds 128 to the high ones."""
    if codes.stride(-1) != 1:  # torch calls a single channel contiguous whatever its stride
        codes = codes.clone(memory_format=torch.contiguous_format)
    out = torch.empty(2, *codes.shape, dtype=torch.uint8)
    if loops() is None:
        halves = codes.view(torch.uint8).view(*codes.shape, 2)
        out[0], out[1] = halves[..., 0], halves[..., 1]
        if flipped:
            out[1] ^= -qint8.qmin
    else:
        loops().split(codes.view(-1).numpy(), -qint8.qmin if flipped else 0, out.view(2, -1).numpy())
    return out


def _carried_convolution(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: int,
    high: int,
    zero: int,
    geometry: Geometry,
    groups: int,
    device: torch.device,
    least: torch.dtype | None,
) -> Sums:
    narrow = carrier(weight, bias, low, high, device)
    wide = narrow if least is None else least
    held = weight.to(wide).contiguous(memory_format=torch.channels_last)
    addend = None if bias is None else bias.to(wide)

    def sums(values: torch.Tensor) -> torch.Tensor:
        codes = channels_last(values).to(wide)
        if zero:
            codes -= zero
        with torch.backends.nnpack.flags(enabled=False):  # its Winograd is not exact
            return channels_last(F.conv2d(codes, held, addend, *geometry, groups))

    return sums


def carrier(weight: torch.Tensor, bias: torch.Tensor | None, low: int, high: int, device: torch.device) -> torch.dtype:
    """The float dtype whose sums are exact; on devices with other float32 convolutions always float64.

    Raises:
        NoFastForm: there is none.
    """
    bound = product_bound(weight, low, high, bias)
    if bound >= DOUBLE:
        raise NoFastForm("sums have more than 53 bits")
    return torch.float32 if bound <= SINGLE and device.type == "cpu" else torch.float64


# --- matrices -------------------------------------------------------------------------------------------------------


class Matrix:
    """A constant weight for `_int_mm`: sums of `x @ weight.t()` in int32, to which `start` is still to be added.

    Args:
        weight: int8 `[out, in]`.
        start: int32 `[out]`: the bias, and what the zero point of `x` takes away; None for zeros.
    """

    def __init__(self, weight: torch.Tensor, start: torch.Tensor | None) -> None:
        self.packed, self.start = weight.contiguous().t(), start

    def tiles(self, x: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, Any]]]:
        """Sums of contiguous `x` `[rows, in]`, some rows at a time, in memory that is used again."""
        rows, columns = x.shape[0], self.packed.shape[1]
        height = max(TILE // max(columns, 1), 1)
        for first in range(0, rows, height):
            part = slice(first, min(first + height, rows))
            held = scratch(part.stop - first, columns)
            multiplied(x if rows <= height else x[part], self.packed, held[0])
            yield part, held


TILE = 1 << 19  # sums that stay in a cache until they are rescaled
_KEPT = 32  # shapes
_LOCAL = threading.local()


def scratch(rows: int, columns: int) -> tuple[torch.Tensor, Any]:
    """int32 `[rows, columns]` as a tensor and an array, the same memory at every call of a thread: fresh memory costs
    more than the sums in it, and views cost more than remembering them.
    """
    memory: torch.Tensor | None = getattr(_LOCAL, "memory", None)
    if memory is None or memory.numel() < rows * columns or len(_LOCAL.views) > _KEPT:
        size = max(rows * columns, TILE if memory is None else memory.numel())
        memory = _LOCAL.memory = torch.empty(size, dtype=torch.int32)
        _LOCAL.views = {}
    held: tuple[torch.Tensor, Any] | None = _LOCAL.views.get((rows, columns))
    if held is None:
        view = memory[: rows * columns].view(rows, columns)
        held = _LOCAL.views[rows, columns] = view, view.numpy()
    return held


def matrix_of(x: Operand, weight: torch.Tensor, bias: torch.Tensor | None, zero: int) -> Matrix | None:
    """`weight` `[out, in]` prepared for `_int_mm`, if that is exact for `x`."""
    if not matrices_multiply(x.device, weight.shape[1]) or weight.dtype is not torch.int8:
        return None
    if x.dtype not in (*_BYTES, torch.int16):
        return None
    # The sum of the codes themselves, then what the zero point takes away; all of it in int32.
    start = torch.zeros(weight.shape[0], dtype=torch.int64) if bias is None else bias.to(torch.int64)
    start = start - zero * weight.to(torch.int64).sum(1)
    if product_bound(weight, x.low, x.high, start) > qint32.qmax:
        return None
    return Matrix(weight, start.to(torch.int32) if bool((start != 0).any()) else None)


def linear_sums(x: Operand, weight: torch.Tensor, bias: torch.Tensor | None, zero: int) -> Sums:
    """Sums of `x` `[rows, in]` and `weight` `[out, in]` beyond 32 bits, or carried in floats: float32 or float64."""
    by_bytes = matrices_multiply(x.device, weight.shape[1]) and weight.dtype is torch.int8
    if x.dtype is torch.int16 and by_bytes and not zero and product_bound(weight, 0, quint8.qmax) <= qint32.qmax:
        packed, addend = weight.contiguous().t(), None if bias is None else bias.double()

        def from_bytes(values: torch.Tensor) -> torch.Tensor:
            low_byte, high_byte = _bytes_of(values.contiguous())
            total = torch._int_mm(low_byte, packed).double()
            total.add_(torch._int_mm(high_byte.view(torch.int8), packed).double(), alpha=1 << _BYTE)
            return total if addend is None else total.add_(addend)

        return from_bytes
    wide = carrier(weight, bias, x.low - zero, x.high - zero, x.device)
    held, offset = weight.to(wide), None if bias is None else bias.to(wide)

    def sums(values: torch.Tensor) -> torch.Tensor:
        codes = values.to(wide)
        return F.linear(codes - zero if zero else codes, held, offset)

    return sums


def multiplied(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ y` in int32 of int8, uint8 or int16 codes `[n, k]` and int8 codes `[k, m]`."""
    if x.dtype is not torch.int16:
        return torch._int_mm(x, y) if out is None else torch._int_mm(x, y, out=out)
    low_byte, high_byte = _bytes_of(x)
    total = torch._int_mm(low_byte, y) if out is None else torch._int_mm(low_byte, y, out=out)
    return total.add_(torch._int_mm(high_byte.view(torch.int8), y), alpha=1 << _BYTE)


def matrices_multiply(device: torch.device, terms: int) -> bool:
    """Whether `_int_mm` may be used: on CUDA it wants sizes in multiples of 8, and with sums of one term it is wrong.

    It tells a transposed matrix by its strides, which are those of a plain one if a dimension is 1.
    """
    return device.type == "cpu" and terms > 1 and "matrix" in exact_kinds()

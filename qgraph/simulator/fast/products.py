"""Fast convolutions, linear and matrix products: exact sums, then one `Finish`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qgraph.numerics import Overflow, RequantizeRule, parse_arithmetic, parse_qtype, qint32, sees_input
from qgraph.simulator.fast.exact import DOUBLE, SINGLE, product_bound
from qgraph.simulator.fast.finish import Finish
from qgraph.simulator.fast.layout import array_of_rows, channels_last, image_of, rows_of
from qgraph.simulator.fast.sums import (
    TILE,
    Matrix,
    convolution_sums,
    linear_sums,
    matrices_multiply,
    matrix_of,
    multiplied,
    scratch,
)
from qgraph.simulator.fast.term import Term
from qgraph.simulator.kernel import Kernel, KernelCall, NoFastForm, Operand
from qgraph.simulator.trace import KernelTrace

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def prepare_conv(call: KernelCall) -> Kernel:
    """`[N, C, *in]` with a constant weight; 2-d ones stay channels_last."""
    x, weight, bias = _checked(*call.args[:3])
    rank, options = weight.dim() - 2, call.options
    if len(x.shape) != rank + 2:
        raise NoFastForm("the input has no batch dimension")
    if options["transposed"] or rank != 2:
        return _any_convolution(call, x, weight)
    geometry = [options[name] for name in ("stride", "padding", "dilation")]
    if not sees_input(x.shape[2:], weight.shape[2:], *geometry):
        raise NoFastForm(
            "some of its outputs see nothing but padding, which oneDNN's channels_last kernels may not survive"
        )
    zero = options.get("x_zero", 0)
    if tuple(weight.shape[2:]) == (1, 1) and options["groups"] == 1 and not any(options["padding"]):
        matrix = matrix_of(x, weight.reshape(weight.shape[:2]), bias, zero)
        if matrix is not None:
            return _pointwise(call, x, weight, bias, matrix)
    bound = product_bound(weight, x.low - zero, x.high - zero, bias)
    saturates = bound > SINGLE and _saturates(call, bound, bias)
    sums = convolution_sums(x, weight, bias, zero, options, saturates=saturates)
    end = _End(call, SINGLE if saturates else bound)

    def part(values: torch.Tensor, other: torch.Tensor | None, trace: KernelTrace | None) -> torch.Tensor:
        total = sums(values)
        if end.compiles:
            n, c, h, w = total.shape
            out = torch.empty(n, h, w, c, dtype=end.storage)
            third = None if other is None else array_of_rows(channels_last(other))
            end.write(array_of_rows(channels_last(total)), third, out.numpy().reshape(-1, c), trace)
            return out.permute(0, 3, 1, 2)
        second = None if other is None else rows_of(channels_last(other))
        return image_of(end.rows(rows_of(total), second, trace), total.shape)

    def run(values: torch.Tensor, other: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        count = _images_at_once(values, weight.shape[0], options["stride"])
        if count >= values.shape[0]:
            return part(values, other, trace)
        parts = [slice(first, first + count) for first in range(0, values.shape[0], count)]
        done = [part(values[p], None if other is None else other[p], trace) for p in parts]
        return torch.cat(done)

    return run


def _saturates(call: KernelCall, bound: int, bias: torch.Tensor | None) -> bool:
    """Whether every result of a sum beyond 2**24 lies outside the bounds of the codes.

    Then it does not matter that float32 rounds such a sum (and adds the bias to what is rounded already): rounding
    keeps order, so that what is beyond stays beyond.
    """
    options, (residual, multiplier, shift, other) = call.options, call.args[3:7]
    word = parse_arithmetic(options["arithmetic"])
    if not isinstance(word.rule, RequantizeRule) or bound > min(word.accumulator.qmax, qint32.qmax):
        return False
    if not isinstance(multiplier, torch.Tensor) or isinstance(shift, Operand):
        return False
    unit = torch.ones(()) if shift is None else torch.ldexp(torch.ones(()).double(), -shift.double())
    reach = torch.tensor(max(abs(options[name] - options.get("zero", 0)) for name in ("low", "high")) + 2.0).double()
    if isinstance(residual, Operand) and isinstance(other, torch.Tensor):
        reach = reach + _reach(residual, options.get("residual_zero", 0)) * other.double().abs() * unit
    within = SINGLE - (torch.zeros(()) if bias is None else bias.abs()).double()
    return bool((within * multiplier.double().abs() * unit * (1 - 2.0**-20) > reach).all())


def _images_at_once(x: torch.Tensor, channels: int, stride: Sequence[int]) -> int:
    """How many images of a batch are computed at a time, so that their sums are rescaled while they are in a cache."""
    sums = max(channels * x.shape[2] * x.shape[3] // (stride[0] * stride[1]), 1)
    return max(2 * TILE // sums, 1)


def _pointwise(call: KernelCall, x: Operand, weight: torch.Tensor, bias: torch.Tensor | None, matrix: Matrix) -> Kernel:
    """A 1x1 convolution: a matrix product of pixels."""
    zero, (down, across) = call.options.get("x_zero", 0), call.options["stride"]
    end = _End(call, product_bound(weight, x.low - zero, x.high - zero, bias), matrix.start)

    def run(values: torch.Tensor, other: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        picked = values if down == across == 1 else values[:, :, ::down, ::across]
        image = channels_last(picked)
        n, c, h, w = image.shape
        rows = image.as_strided((n * h * w, c), (c, 1))
        if end.compiles:
            out = torch.empty(n, h, w, weight.shape[0], dtype=end.storage)
            second = None if other is None else array_of_rows(channels_last(other))
            end.write_products(matrix, rows, second, out.numpy().reshape(-1, weight.shape[0]), trace)
            return out.permute(0, 3, 1, 2)
        third = None if other is None else rows_of(channels_last(other))
        return image_of(end.tiled(matrix, rows, third, trace), torch.Size((n, weight.shape[0], h, w)))

    return run


def _any_convolution(call: KernelCall, x: Operand, weight: torch.Tensor) -> Kernel:
    """1-d, 3-d and transposed convolutions, carried in floats."""
    bias = _checked(*call.args[:3])[2]
    options, rank = call.options, weight.dim() - 2
    zero = options.get("x_zero", 0)
    low, high = x.low - zero, x.high - zero
    bound = (
        _transposed_bound(call, weight, low, high) if options["transposed"] else product_bound(weight, low, high, bias)
    )
    if bound >= DOUBLE:
        raise NoFastForm("sums have more than 53 bits")
    # float32 convolutions of other shapes and devices may be computed by transforms that round.
    # ... or by oneDNN where the result may be one column wide, which it computes wrongly.
    plain = x.device.type == "cpu" and not options["transposed"] and not _may_be_one_column(x, weight, options)
    wide = torch.float32 if bound <= SINGLE and plain else torch.float64
    held, addend = weight.to(wide), None if bias is None else bias.to(wide)
    names = ("stride", "padding", "dilation")
    stride, padding, dilation = (list(options[name]) for name in names)
    end = _End(call, bound)

    def run(values: torch.Tensor, other: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        codes = values.to(wide)
        if zero:
            codes -= zero
        if options["transposed"]:
            more = (list(options["output_padding"]), options["groups"], dilation)
            total = _TRANSPOSED[rank](codes, held, addend, stride, padding, *more)
        else:
            with torch.backends.nnpack.flags(enabled=False):
                total = _CONVOLUTIONS[rank](codes, held, addend, stride, padding, dilation, options["groups"])
        moved = total.movedim(1, -1).contiguous()
        second = None if other is None else other.movedim(1, -1).reshape(-1, other.shape[1])
        codes_out = end.rows(moved.view(-1, moved.shape[-1]), second, trace)
        return codes_out.view(moved.shape).movedim(-1, 1)

    return run


def _may_be_one_column(x: Operand, weight: torch.Tensor, options: dict[str, Any]) -> bool:
    reach = options["dilation"][-1] * (weight.shape[-1] - 1) + 1
    return bool(reach > 1 and x.shape[-1] + 2 * options["padding"][-1] - reach < options["stride"][-1])


def _transposed_bound(call: KernelCall, weight: torch.Tensor, low: int, high: int) -> int:
    """As if every input met every weight of its output channel; `weight` is `[in, out / groups, ...]`."""
    groups, bias = call.options["groups"], _checked(*call.args[:3])[2]
    shape = (groups, weight.shape[0] // groups, weight.shape[1], -1)
    return product_bound(weight.reshape(shape).transpose(1, 2).reshape(groups * weight.shape[1], -1), low, high, bias)


def prepare_linear(call: KernelCall) -> Kernel:
    """`[*, in]` with a constant weight `[out, in]`."""
    x, weight, bias = _checked(*call.args[:3])
    zero, size = call.options.get("x_zero", 0), weight.shape[0]
    bound = product_bound(weight, x.low - zero, x.high - zero, bias)
    matrix = matrix_of(x, weight, bias, zero)
    end = _End(call, bound, None if matrix is None else matrix.start)
    sums = linear_sums(x, weight, bias, zero) if matrix is None else None

    def run(values: torch.Tensor, other: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        rows = values.reshape(-1, values.shape[-1])
        if matrix is not None and end.compiles:
            out = torch.empty(*values.shape[:-1], size, dtype=end.storage)
            third = None if other is None else other.contiguous().numpy().reshape(-1, size)
            end.write_products(matrix, rows.contiguous(), third, out.numpy().reshape(-1, size), trace)
            return out
        second = None if other is None else other.reshape(-1, size)
        if matrix is not None:
            codes = end.tiled(matrix, rows.contiguous(), second, trace)
        else:
            assert sums is not None
            codes = end.rows(sums(rows), second, trace)
        return codes.view(*values.shape[:-1], size)

    return run


def prepare_matmul(call: KernelCall) -> Kernel:
    """Batches of `[n, k]` and `[k, m]`, both computed."""
    x, y, multiplier, _ = call.args
    if not isinstance(x, Operand) or not isinstance(y, Operand):
        raise NoFastForm("an operand is a constant")
    if len(x.shape) < 2 or len(y.shape) < 2:
        raise NoFastForm("an operand is a vector")
    if torch.int32 in (x.dtype, y.dtype):
        raise NoFastForm("an operand is int32")
    x_zero, y_zero = call.options.get("x_zero", 0), call.options.get("y_zero", 0)
    largest_x = max(abs(x.low - x_zero), abs(x.high - x_zero))
    largest_y = max(abs(y.low - y_zero), abs(y.high - y_zero))
    bound = x.shape[-1] * largest_x * largest_y
    if multiplier is not None and multiplier.numel() != 1:
        raise NoFastForm("there is more than one multiplier")
    end = _End(call, bound)
    by_integers = matrices_multiply(x.device, x.shape[-1]) and y.dtype is torch.int8 and not x_zero and not y_zero
    by_integers = by_integers and bound <= qint32.qmax
    wide = torch.float32 if bound <= SINGLE and x.device.type == "cpu" else torch.float64
    terms = x.shape[-1]

    def run(left: torch.Tensor, right: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        if left.shape[-1] != terms:
            raise RuntimeError(f"a matrix product of {left.shape[-1]} terms was prepared for {terms}")
        if by_integers:
            return _batched(left, right, end, trace)
        return end.flat(torch.matmul(left.to(wide) - x_zero, right.to(wide) - y_zero), trace)

    return run


def _batched(x: torch.Tensor, y: torch.Tensor, end: _End, trace: KernelTrace | None) -> torch.Tensor:
    """One matrix product after the other, rescaled before the next."""
    n, m, batch = x.shape[-2], y.shape[-1], x.shape[:-2]
    if batch != y.shape[:-2]:
        batch = torch.broadcast_shapes(batch, y.shape[:-2])
        x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    left, right = x.reshape(-1, *x.shape[-2:]).contiguous(), _ordered(y.reshape(-1, *y.shape[-2:]))
    result = torch.empty(*batch, n, m, dtype=end.storage)
    sums, array = scratch(n, m)
    if end.compiles:
        codes = result.numpy().reshape(-1, n, m)
        for number, (a, b) in enumerate(zip(left.unbind(0), right.unbind(0), strict=True)):
            multiplied(a, b, sums)
            end.write(array, None, codes[number], trace)
        return result
    for a, b, out in zip(left.unbind(0), right.unbind(0), result.view(-1, n, m).unbind(0), strict=True):
        end.fill(multiplied(a, b, sums), out, trace)
    return result


def _ordered(y: torch.Tensor) -> torch.Tensor:
    """Matrices stored by rows or by columns."""
    if y.stride(1) == 1:
        return y.transpose(1, 2).contiguous().transpose(1, 2)
    return y.contiguous()


class _End:
    """The end of a product: rescaling, with a residual or without, or the accumulator itself."""

    def __init__(self, call: KernelCall, bound: int, start: torch.Tensor | None = None) -> None:
        self.start = start
        args, options = call.args, call.options
        with_residual = call.operator != "matmul"
        residual, multiplier = (args[3], args[4]) if with_residual else (None, args[2])
        shift, other = (args[5], args[6]) if with_residual else (args[3], None)
        self.options = options
        self.finish: Finish | None = None
        word = parse_arithmetic(options["arithmetic"])
        self.wraps = bound > word.accumulator.qmax
        if self.wraps:
            if word.accumulator != qint32 or word.overflow is not Overflow.WRAP or bound >= DOUBLE:
                raise NoFastForm(f"sums may leave the accumulator of {word.accumulator.bits} bits")
            bound = -qint32.qmin
        if multiplier is None:
            self.qtype = parse_qtype(options["format"])
            if self.qtype.bits < 32 or bound > -qint32.qmin or residual is not None or options.get("zero", 0):
                raise NoFastForm("an accumulator is cut to a narrower format")
            return
        if isinstance(multiplier, Operand) or isinstance(shift, Operand) or isinstance(other, Operand):
            raise NoFastForm("a multiplier is computed")
        terms = [Term(multiplier, bound, 0, start)]
        if residual is not None and other is not None:
            if not isinstance(residual, Operand):
                raise NoFastForm("the residual is a constant")
            zero = options.get("residual_zero", 0)
            terms.append(Term(other, _reach(residual, zero), zero))
        elif residual is not None:
            raise NoFastForm("the residual has no multiplier")
        bias = args[2] if with_residual else None
        real_bias = bias if bias is not None and bias.is_floating_point() else None
        self.finish = Finish(options, terms, shift, real_bias=real_bias, accumulates=not self.wraps)

    @property
    def compiles(self) -> bool:
        """Whether `write` may be used."""
        return self.finish is not None and self.finish.compiles and not self.wraps

    def write(self, sums: Any, other: Any, out: Any, trace: KernelTrace | None) -> None:
        """Codes of sums `[rows, columns]` into `out`, numpy arrays."""
        assert self.finish is not None
        self.finish.write(sums, other, out, trace)

    def rows(self, sums: torch.Tensor, other: torch.Tensor | None, trace: KernelTrace | None) -> torch.Tensor:
        """Codes of sums `[rows, columns]`."""
        if self.wraps:
            sums = _wrapped(sums, trace)
        if self.finish is None:
            return self._raw(sums)
        return self.finish.rows(sums, other, trace)

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the result."""
        return torch.int32 if self.finish is None else self.finish.qtype.storage

    def fill(self, sums: torch.Tensor, out: torch.Tensor, trace: KernelTrace | None) -> None:
        """Codes of sums `[rows, columns]` into `out`."""
        if self.finish is None or self.wraps:
            out.copy_(self.rows(sums, None, trace))
        else:
            self.finish.fill(sums, None, out, trace)

    def tiled(
        self, matrix: Matrix, x: torch.Tensor, other: torch.Tensor | None, trace: KernelTrace | None
    ) -> torch.Tensor:
        """Codes of the products of `x` `[rows, in]`."""
        size = matrix.packed.shape[1]
        out = torch.empty(x.shape[0], size, dtype=self.storage)
        if self.compiles:
            self.write_products(matrix, x, None if other is None else other.numpy(), out.numpy(), trace)
            return out
        for part, (sums, _) in matrix.tiles(x):
            second = None if other is None else other[part]
            if self.finish is None:
                out[part] = self._raw(sums)
            else:
                self.finish.fill(sums, second, out[part], trace)
        return out

    def write_products(self, matrix: Matrix, x: torch.Tensor, other: Any, out: Any, trace: KernelTrace | None) -> None:
        """As `tiled`, into `out`; that and `other` are numpy arrays of rows."""
        for part, (_, sums) in matrix.tiles(x):
            self.write(sums, None if other is None else other[part], out[part], trace)

    def flat(self, sums: torch.Tensor, trace: KernelTrace | None) -> torch.Tensor:
        """Codes of sums of any shape, with one multiplier."""
        if self.wraps:
            sums = _wrapped(sums, trace)
        if self.finish is None:
            return self._raw(sums)
        return self.finish.flat(sums.contiguous().view(-1), None, trace).view(sums.shape)

    def _raw(self, sums: torch.Tensor) -> torch.Tensor:
        """The accumulator; bounds of 32 bits are beyond what float32 can compare, but sums within it are exact."""
        whole = sums.to(torch.int32)
        whole = whole if self.start is None else whole.add_(self.start)
        return whole.clamp_(self.options["low"], self.options["high"])


def _wrapped(sums: torch.Tensor, trace: KernelTrace | None) -> torch.Tensor:
    """Exact sums modulo 2**32: the conversion to int32 keeps the low bits."""
    exact = sums.to(torch.int64)
    held = exact.to(torch.int32)
    if trace is not None:
        trace.overflowed += int(torch.count_nonzero(held != exact))
    return held


def _reach(operand: Operand, zero: int) -> int:
    """Largest magnitude of `code - zero`."""
    return max(abs(operand.low - zero), abs(operand.high - zero))


def _checked(x: Any, weight: Any, bias: Any) -> tuple[Operand, torch.Tensor, torch.Tensor | None]:
    """Input, weight, and the bias if it is an integer; a float bias is part of the rescaling."""
    if not isinstance(x, Operand) or not isinstance(weight, torch.Tensor) or isinstance(bias, Operand):
        raise NoFastForm("the weight is computed, or the input is a constant")
    if torch.int32 in (x.dtype, weight.dtype):
        raise NoFastForm("an operand is int32")
    return x, weight, None if bias is not None and bias.is_floating_point() else bias


KERNELS = {"conv": prepare_conv, "linear": prepare_linear, "matmul": prepare_matmul}

"""The integer operators as torch operators, `torch.ops.qgraph.*`.

Registered with the reference kernels and with fake kernels, so that an integer graph runs as it is, on any device, and
under torch.compile and torch.export. The simulator does not go through here: it calls kernels directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qgraph.ir.integer import NAMESPACE
from qgraph.numerics import RECIPROCAL, parse_qtype
from qgraph.simulator import function_operators, sampling_operators
from qgraph.simulator.reference import KERNELS
from qgraph.simulator.reference.windows import max_pool_size

_BOUNDS = "str arithmetic, int low, int high, str format, int x_zero=0, int zero=0"
_TWO = "str arithmetic, int low, int high, str format, int x_zero=0, int y_zero=0, int zero=0"
_RESIDUAL = "str arithmetic, int low, int high, str format, int x_zero=0, int residual_zero=0, int zero=0"
_PRODUCT = "Tensor? bias, Tensor? residual, Tensor? multiplier, Tensor? shift, Tensor? residual_multiplier"
_WINDOW = "int[] kernel_size, int[] stride, int[] padding"

SCHEMAS: dict[str, str] = {
    "quantize": f'(Tensor x, Tensor scale, *, str format, int zero=0, str rounding="{RECIPROCAL}") -> Tensor',
    "dequantize": "(Tensor x, Tensor scale, *, int axis, int x_zero=0) -> Tensor",
    "requantize": f"(Tensor x, Tensor multiplier, Tensor? shift, Tensor? offset, *, {_BOUNDS}) -> Tensor",
    "conv": f"(Tensor x, Tensor weight, {_PRODUCT}, *, int[] stride, int[] padding, int[] dilation, "
    f"int[] output_padding, bool transposed, int groups, {_RESIDUAL}) -> Tensor",
    "conv_pairs": "(Tensor x, Tensor weight, Tensor? bias, Tensor multiplier, Tensor? shift, *, int[] stride, "
    f"int[] padding, {_BOUNDS}) -> Tensor",
    "linear": f"(Tensor x, Tensor weight, {_PRODUCT}, *, {_RESIDUAL}) -> Tensor",
    "matmul": f"(Tensor x, Tensor y, Tensor? multiplier, Tensor? shift, *, {_TWO}) -> Tensor",
    "add": "(Tensor x, Tensor y, Tensor multiplier_x, Tensor multiplier_y, Tensor? shift, "
    f"Tensor? multiplier=None, *, {_TWO}) -> Tensor",
    "mul": f"(Tensor x, Tensor y, Tensor multiplier, Tensor? shift, *, {_TWO}) -> Tensor",
    "lookup": "(Tensor x, Tensor table, *, str source) -> Tensor",
    "softmax": "(Tensor x, Tensor multiplier, Tensor? shift, *, int dim, str arithmetic, int low, int high, "
    "str format, int zero=0) -> Tensor",
    "clamp": "(Tensor x, *, int low, int high, str format) -> Tensor",
    "max_pool": f"(Tensor x, *, {_WINDOW}, int[] dilation, bool ceil_mode) -> Tensor",
    "avg_pool": f"(Tensor x, Tensor multiplier, Tensor? shift, *, {_WINDOW}, int[] output_size, {_BOUNDS}) -> Tensor",
    "adaptive_avg_pool": f"(Tensor x, Tensor multiplier, Tensor? shift, *, int[] output_size, {_BOUNDS}) -> Tensor",
    "reduce_sum": f"(Tensor x, Tensor multiplier, Tensor? shift, *, int[] dims, bool keepdim, {_BOUNDS}) -> Tensor",
    "resize_bilinear": "(Tensor x, Tensor rows, Tensor columns, Tensor multiplier, Tensor? shift, *, "
    f"int weight_bits, {_BOUNDS}) -> Tensor",
}


# --- fake kernels: shapes and dtypes without values ----------------------------------------------------------------


def _like(x: torch.Tensor, shape: Sequence[int], format: str) -> torch.Tensor:
    return x.new_empty(list(shape), dtype=parse_qtype(format).storage)


def _fake_conv(x, weight, bias, residual, multiplier, shift, residual_multiplier, **options):  # type: ignore[no-untyped-def]
    rank, groups = weight.dim() - 2, options["groups"]
    out = [*x.shape[: -rank - 1], weight.shape[1] * groups if options["transposed"] else weight.shape[0]]
    for axis in range(rank):
        size, kernel = x.shape[axis - rank], weight.shape[2 + axis]
        step, pad, dilation = (options[name][axis] for name in ("stride", "padding", "dilation"))
        reach = dilation * (kernel - 1)
        if options["transposed"]:
            out.append((size - 1) * step - 2 * pad + reach + options["output_padding"][axis] + 1)
        else:
            out.append((size + 2 * pad - reach - 1) // step + 1)
    return _like(x, out, options["format"])


def _fake_conv_pairs(x, weight, bias, multiplier, shift, *, stride, padding, format, **options):  # type: ignore[no-untyped-def]
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return _like(x, [x.shape[0], weight.shape[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)], format)


def _fake_max_pool(x, **options):  # type: ignore[no-untyped-def]
    rank = len(options["kernel_size"])
    return x.new_empty([*x.shape[:-rank], *max_pool_size(x.shape[-rank:], **options)])


def _fake_pool(x, multiplier, shift, **options):  # type: ignore[no-untyped-def]
    size = options["output_size"]
    return _like(x, [*x.shape[: x.dim() - len(size)], *size], options["format"])


def _fake_reduce(x, multiplier, shift, *, dims, keepdim, format, **options):  # type: ignore[no-untyped-def]
    reduced = {dim % x.dim() for dim in dims}
    shape = [1 if axis in reduced else size for axis, size in enumerate(x.shape) if keepdim or axis not in reduced]
    return _like(x, shape, format)


FAKES: dict[str, Any] = {
    "quantize": lambda x, scale, *, format, **_: _like(x, x.shape, format),
    "dequantize": lambda x, scale, *, axis, **_: x.new_empty(x.shape, dtype=torch.float32),
    "requantize": lambda x, m, s, o, *, format, **_: _like(x, torch.broadcast_shapes(x.shape, m.shape), format),
    "conv": _fake_conv,
    "conv_pairs": _fake_conv_pairs,
    "linear": lambda x, weight, *_, format, **__: _like(x, [*x.shape[:-1], weight.shape[0]], format),
    "matmul": lambda x, y, *_, format, **__: _like(x, _matmul_shape(x, y), format),
    "add": lambda x, y, *_, format, **__: _like(x, torch.broadcast_shapes(x.shape, y.shape), format),
    "mul": lambda x, y, *_, format, **__: _like(x, torch.broadcast_shapes(x.shape, y.shape), format),
    "lookup": lambda x, table, *, source: x.new_empty(x.shape, dtype=table.dtype),
    "softmax": lambda x, multiplier, shift, *, format, **_: _like(x, x.shape, format),
    "clamp": lambda x, *, low, high, format: _like(x, x.shape, format),
    "max_pool": _fake_max_pool,
    "avg_pool": _fake_pool,
    "adaptive_avg_pool": _fake_pool,
    "reduce_sum": _fake_reduce,
    "resize_bilinear": lambda x, rows, columns, *_, format, **__: _like(
        x, [*x.shape[:2], rows.shape[1], columns.shape[1]], format
    ),
}


def _matmul_shape(x: torch.Tensor, y: torch.Tensor) -> list[int]:
    if x.dim() == 1 or y.dim() == 1:
        left = x.shape[:-1] if x.dim() > 1 else ()
        right = (*y.shape[:-2], y.shape[-1]) if y.dim() > 1 else ()
        return [*left, *right]
    return [*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]]


def _contiguous(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The kernel with a contiguous result, as the fake kernels promise whatever the layout of the operands."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        return kernel(*args, **kwargs).contiguous()

    return call


_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define_operator(name: str, schema: str, kernel: Callable[..., torch.Tensor], fake: Callable[..., Any]) -> None:
    """Makes `torch.ops.qgraph.<name>`."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, _contiguous(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


SCHEMAS |= sampling_operators.SCHEMAS
FAKES |= sampling_operators.FAKES
SCHEMAS |= function_operators.SCHEMAS
FAKES |= function_operators.FAKES
for _name, _schema in SCHEMAS.items():
    define_operator(_name, _schema, KERNELS[_name], FAKES[_name])

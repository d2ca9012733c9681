"""Schemas and fake kernels of the operators that sample, order and unfold."""

from __future__ import annotations

from typing import Any

import torch

from qgraph.numerics import parse_qtype
from qgraph.simulator.reference.ordering import unfolded_size

_BOUNDS = "str arithmetic, int low, int high, str format, int x_zero=0, int zero=0"
_FACTOR = "Tensor multiplier, Tensor? shift"
_WINDOW = "int[] kernel_size, int[] dilation, int[] padding, int[] stride"
_PLACE = "int position_bits, str padding, bool align_corners"

SCHEMAS: dict[str, str] = {
    "arg_extreme": "(Tensor x, *, int? dim, bool keepdim, bool largest) -> Tensor",
    "cumsum": f"(Tensor x, {_FACTOR}, *, int dim, {_BOUNDS}) -> Tensor",
    "fold": f"(Tensor x, {_FACTOR}, *, int[] output_size, {_WINDOW}, {_BOUNDS}) -> Tensor",
    "order": "(Tensor x, *, int dim, bool descending, int? count) -> Tensor",
    "resize": f"(Tensor x, Tensor? depth, Tensor? rows, Tensor columns, {_FACTOR}, *, {_BOUNDS}) -> Tensor",
    "sample_bilinear": f"(Tensor x, Tensor positions, {_FACTOR}, *, {_PLACE}, {_BOUNDS}) -> Tensor",
    "sample_nearest": f"(Tensor x, Tensor positions, *, {_PLACE}, int outside=0) -> Tensor",
    "unfold": f"(Tensor x, *, {_WINDOW}, int outside=0) -> Tensor",
}


def _like(x: torch.Tensor, shape: Any, format: str) -> torch.Tensor:
    return x.new_empty(list(shape), dtype=parse_qtype(format).storage)


def _sampled(x: torch.Tensor, positions: torch.Tensor) -> list[int]:
    return [*x.shape[:2], *positions.shape[1:-1]]


def _fake_arg_extreme(x: torch.Tensor, *, dim: int | None, keepdim: bool, largest: bool) -> torch.Tensor:
    reduced = range(x.dim()) if dim is None else [dim % max(x.dim(), 1)]
    shape = [1 if axis in reduced else size for axis, size in enumerate(x.shape) if keepdim or axis not in reduced]
    return x.new_empty(shape, dtype=torch.int64)


def _fake_order(x: torch.Tensor, *, dim: int, descending: bool, count: int | None) -> torch.Tensor:
    shape = list(x.shape)
    if count is not None:
        shape[dim] = count
    return x.new_empty(shape, dtype=torch.int64)


def _fake_unfold(x, *, kernel_size, dilation, padding, stride, outside=0):  # type: ignore[no-untyped-def]
    rows, columns = unfolded_size(x.shape[-2:], kernel_size, dilation, padding, stride)
    return x.new_empty([*x.shape[:-3], x.shape[-3] * kernel_size[0] * kernel_size[1], rows * columns])


def _fake_fold(x, multiplier, shift, *, output_size, kernel_size, format, **options):  # type: ignore[no-untyped-def]
    channels = x.shape[-2] // (kernel_size[0] * kernel_size[1])
    return _like(x, [*x.shape[:-2], channels, *output_size], format)


def _fake_resize(x, depth, rows, columns, multiplier, shift, *, format, **options):  # type: ignore[no-untyped-def]
    sizes = [table.shape[2] for table in (depth, rows, columns) if table is not None]
    return _like(x, [*x.shape[:2], *sizes], format)


FAKES: dict[str, Any] = {
    "arg_extreme": _fake_arg_extreme,
    "cumsum": lambda x, *_, format, **__: _like(x, x.shape, format),
    "fold": _fake_fold,
    "order": _fake_order,
    "resize": _fake_resize,
    "sample_bilinear": lambda x, positions, *_, format, **__: _like(x, _sampled(x, positions), format),
    "sample_nearest": lambda x, positions, **_: x.new_empty(_sampled(x, positions)),
    "unfold": _fake_unfold,
}

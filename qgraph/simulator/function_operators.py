"""Schemas and fake kernels of functions of one value and of comparisons."""

from __future__ import annotations

from typing import Any

import torch

from qgraph.numerics import parse_qtype

_BOUNDS = "str arithmetic, int low, int high, str format, int x_zero=0, int zero=0"
_FACTORS = "Tensor multiplier, Tensor? shift, Tensor negative_multiplier, Tensor? negative_shift"

SCHEMAS: dict[str, str] = {
    "compare": "(Tensor x, Tensor y, Tensor multiplier_x, Tensor multiplier_y, *, str relation, int x_zero=0, "
    "int y_zero=0) -> Tensor",
    "lookup_segments": "(Tensor x, Tensor entries, Tensor starts, Tensor shifts, *, str source, int fraction_bits, "
    "str format) -> Tensor",
    "lookup_two": "(Tensor x, Tensor tables, *, str source) -> Tensor",
    "lookup_steps": "(Tensor x, Tensor thresholds, Tensor values) -> Tensor",
    "prelu": f"(Tensor x, {_FACTORS}, *, {_BOUNDS}) -> Tensor",
}

FAKES: dict[str, Any] = {
    "compare": lambda x, y, *_, **__: x.new_empty(torch.broadcast_shapes(x.shape, y.shape), dtype=torch.bool),
    "lookup_segments": lambda x, *_, format, **__: x.new_empty(x.shape, dtype=parse_qtype(format).storage),
    "lookup_two": lambda x, tables, *, source: x.new_empty(x.shape, dtype=tables.dtype),
    "lookup_steps": lambda x, thresholds, values: x.new_empty(x.shape, dtype=values.dtype),
    "prelu": lambda x, *_, format, **__: x.new_empty(x.shape, dtype=parse_qtype(format).storage),
}

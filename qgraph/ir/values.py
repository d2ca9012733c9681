"""What is known of a node's value: shapes and dtypes, taken from one real run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor on the example run."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def __str__(self) -> str:
        short = _SHORT.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{short}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class ScalarSpec:
    """A Python value: `kind` is its type's name."""

    kind: str

    def __str__(self) -> str:
        return self.kind


ValueSpec: TypeAlias = "TensorSpec | ScalarSpec | tuple[ValueSpec, ...]"


def spec_of(value: object) -> ValueSpec:
    """The specification of a run's `value`: tensors, sequences of values, anything else by type name."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(spec_of(entry) for entry in value)
    return ScalarSpec(type(value).__name__)


def holds_floats(spec: ValueSpec | None) -> bool:
    """Whether a value is a float tensor, or has one among its parts."""
    if isinstance(spec, tuple):
        return any(holds_floats(entry) for entry in spec)
    return isinstance(spec, TensorSpec) and spec.dtype.is_floating_point


def format_spec(spec: ValueSpec | None) -> str:
    """`f32[1,3,8,8]`, `(f32[2], i64[2])` or `int`; `?` where nothing is known."""
    if spec is None:
        return "?"
    if isinstance(spec, tuple):
        return "(" + ", ".join(format_spec(entry) for entry in spec) + ")"
    return str(spec)

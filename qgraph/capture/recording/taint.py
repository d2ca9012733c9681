"""Which tensors depend on the inputs, followed below torch's functions, at dispatch.

Taint sticks to storages, so that views and in-place writes carry it. A storage's identity is held by a weak
reference, which keeps the address from being used again while the capture runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qgraph.capture.values.storage import flat_tensors, storage_key


class Taint:
    """Sets of storages that depend on input values, and of those whose size does."""

    def __init__(self) -> None:
        self._values: dict[int, StorageWeakRef | None] = {}
        self._sizes: dict[int, StorageWeakRef | None] = {}

    def mark(self, tensor: torch.Tensor, *, size: bool = False) -> None:
        """`tensor`'s values depend on the inputs; with `size`, its shape does too.

        Tensors without storage are all taken for one.
        """
        key = storage_key(tensor)
        reference = StorageWeakRef(tensor.untyped_storage()) if key else None
        self._values[key] = reference
        if size:
            self._sizes[key] = reference

    def depends(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor`'s values depend on the inputs."""
        return storage_key(tensor) in self._values

    def sized_by_data(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor`'s shape depends on input values."""
        return storage_key(tensor) in self._sizes

    def propagate(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
        """Carries taint through one dispatched op to what it returns or writes; returns whether any operand has it."""
        keys = [storage_key(tensor) for tensor in inputs]
        depends = any(key in self._values for key in keys)
        if not depends:
            return False
        sized = any(key in self._sizes for key in keys) or (
            torch.Tag.dynamic_output_shape in func.tags and not _index_without_mask(func, inputs)
        )
        for tensor in outputs:
            self.mark(tensor, size=sized and tensor.dim() > 0)
        return True


def _index_without_mask(func: Any, inputs: list[torch.Tensor]) -> bool:
    # aten.index has a data-dependent size only when it is given a boolean mask.
    return "index" in func.__name__ and all(tensor.dtype is not torch.bool for tensor in inputs[1:])


def sized_by(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a value that a function has read may decide the size of its result.

    It does not where a tensor without dimensions is an index (and no bound), a value to fill in, or only checked.
    """
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(flat_tensors((e.start, e.stop, e.step)) for e in index if isinstance(e, slice))
    if name == "one_hot":
        return bool((args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) < 0)
    if name in ("full", "new_full"):
        return bool(flat_tensors((kwargs.get("size", args[name == "new_full"] if args else None),)))
    return name not in _KEEPING_SIZE


_KEEPING_SIZE = frozenset({"__setitem__", "fill_", "full_like", "embedding"})

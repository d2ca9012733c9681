"""Tensors among values, and the memory that they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the tensor's storage; 0 where it has none (sparse, functorch wrappers)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


def flat_tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Tensors among arguments or results, looking into tuples, lists and dicts."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += flat_tensors(value)
        elif isinstance(value, dict):
            found += flat_tensors(value.values())
    return found


def written_operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that a dispatched op writes to, by its schema."""
    if not func._schema.is_mutable:
        return []
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return flat_tensors(written)

"""Tensors as members of a file: safetensors, and beside them what that format lacks (strides)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from qgraph.errors import ArtifactError

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class TensorWriter:
    """Collects tensors under names of their own; one tensor object is kept once."""

    def __init__(self) -> None:
        self._data: dict[str, torch.Tensor] = {}
        self._held: dict[int, tuple[str, torch.Tensor]] = {}
        self.strides: dict[str, list[int]] = {}

    def add(self, tensor: torch.Tensor, wanted: str) -> str:
        """The name under which a tensor is kept.

        Raises:
            ArtifactError: a file cannot hold it.
        """
        if id(tensor) in self._held:
            return self._held[id(tensor)][0]
        name, counter = wanted, 1
        while name in self._data:
            name, counter = f"{wanted}_{counter}", counter + 1
        self._data[name] = self._stored(tensor, name)
        self._held[id(tensor)] = name, tensor
        return name

    def member(self) -> bytes:
        """All of them as safetensors."""
        return save(self._data)

    def _stored(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        plain = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
        if not plain or tensor.dtype not in _DTYPES or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ArtifactError(
                f"the tensor {name} ({type(tensor).__name__}, {tensor.dtype}, {tensor.layout}) cannot be saved",
                why=f"files hold dense tensors of {', '.join(str(dtype)[6:] for dtype in _DTYPES)}",
                fix="convert it before the model is captured",
            )
        plain_tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        order = _memory_order(plain_tensor.shape, plain_tensor.stride())
        if order is None:
            plain_tensor = plain_tensor.contiguous()
            order = tuple(range(plain_tensor.dim()))
        if plain_tensor.stride() != _contiguous_strides(plain_tensor.shape):
            self.strides[name] = list(plain_tensor.stride())
        in_memory = plain_tensor.permute(order).contiguous()
        return in_memory.clone()  # safetensors refuses tensors that share memory


class TensorReader:
    """The tensors of a file.

    Raises:
        ArtifactError: the member is damaged, or strides do not fit their tensor.
    """

    def __init__(self, member: bytes, strides: Mapping[str, Any]) -> None:
        try:
            stored = load(member)
        except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ArtifactError("the tensors cannot be read", why=f"{type(error).__name__}: {error}") from error
        unknown = sorted(strides.keys() - stored.keys())
        if unknown:
            raise ArtifactError(f"strides are given for {unknown[0]!r}, which is no tensor of the file")
        self._tensors = {
            name: _as_strided(tensor, strides[name], name) if name in strides else tensor
            for name, tensor in stored.items()
        }
        self._unused = set(self._tensors)

    def get(self, name: Any) -> torch.Tensor:
        """The tensor of that name.

        Raises:
            ArtifactError: there is none.
        """
        if not isinstance(name, str) or name not in self._tensors:
            raise ArtifactError(f"the file has no tensor {str(name)[:80]!r}")
        self._unused.discard(name)
        return self._tensors[name]

    def require_all_used(self) -> None:
        """Checks that every tensor was asked for.

        Raises:
            ArtifactError: some were not.
        """
        if self._unused:
            raise ArtifactError(f"nothing uses the tensor {min(self._unused)!r}")


def _memory_order(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dimensions from outermost to innermost in memory; None where elements overlap or leave gaps."""
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
    expected = 1
    for axis in reversed(order):
        if shape[axis] == 1:
            continue
        if strides[axis] != expected:
            return None
        expected *= shape[axis]
    return tuple(order)


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [1] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def _as_strided(tensor: torch.Tensor, strides: Any, name: str) -> torch.Tensor:
    """The stored tensor, whose dimensions lie as in memory, with its own dimensions and strides."""
    wanted = strides if isinstance(strides, list) and all(type(step) is int for step in strides) else []
    if len(wanted) != tensor.dim() or not all(0 <= step < 1 << 62 for step in wanted):
        raise ArtifactError(f"the strides of the tensor {name!r} do not fit its {tensor.dim()} dimensions")
    order = sorted(range(len(wanted)), key=lambda axis: (-wanted[axis], axis))
    shape = [0] * len(wanted)
    for place, axis in enumerate(order):
        shape[axis] = tensor.shape[place]
    if _memory_order(torch.Size(shape), tuple(wanted)) is None:
        raise ArtifactError(f"the strides of the tensor {name!r} leave gaps in it")
    return tensor.as_strided(shape, wanted)

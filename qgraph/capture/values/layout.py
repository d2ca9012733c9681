"""How a tensor lies in memory: a forward may look at it, and a view may depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides in memory of its own."""
    copied = tensor.detach().clone()
    if tensor.layout is not torch.strided or copied.stride() == tensor.stride():
        return copied
    # With gaps or overlaps: copy the whole span.
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    whole = tensor.detach().as_strided((span,), (1,), tensor.storage_offset()).clone()
    return whole.as_strided(tensor.shape, tensor.stride())


def laid_out_as(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """The same values with the strides `example` would have in this shape."""
    strides = strides_like(example, tensor.shape)
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def strides_like(example: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor of `shape` laid out as `example`: dimensions nested in the same order, with the same gaps.

    An expanded example has no layout to keep; its variants are contiguous.
    """
    steps = list(zip(example.shape, example.stride(), strict=True))
    expanded = any(stride == 0 and size > 1 for size, stride in steps)
    wanted = torch.empty(example.shape, device="meta").stride() if expanded else example.stride()
    strides = list(wanted)
    order = sorted(range(len(shape)), key=lambda axis: (wanted[axis], -axis))
    for inner, outer in pairwise(order):
        extent = wanted[inner] * example.shape[inner]
        strides[outer] = strides[inner] * shape[inner] * wanted[outer] // extent if extent else wanted[outer]
    return tuple(strides)


class TensorLayout:
    """The layout of an example, kept without its values."""

    def __init__(self, example: torch.Tensor) -> None:
        self.example = torch.empty_strided(example.shape, example.stride(), device="meta")
        self.strides = tuple(example.stride())
        self.formats = _contiguous(example)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether questions about the layout have the same answers, the batch size apart."""
        if _contiguous(tensor) != self.formats:
            return False
        shape = tuple(tensor.shape)
        return any(
            all(size == 1 or one == two for size, one, two in zip(shape, tensor.stride(), strides, strict=True))
            for strides in (self.strides, strides_like(self.example, shape))
        )


def _contiguous(tensor: torch.Tensor) -> tuple[bool, ...]:
    form = _FORMATS.get(tensor.dim())
    plain = tensor.is_contiguous()
    return (plain,) if form is None else (plain, tensor.is_contiguous(memory_format=form))


def relaid(args: Sequence[object], result: object) -> bool:
    """Whether a copy lies in memory otherwise than its first operand."""
    source = args[0] if args else None
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor) or source.shape != result.shape:
        return False
    if source.layout is not torch.strided or result.layout is not torch.strided:
        return source.layout is not result.layout
    steps = zip(source.shape, source.stride(), result.stride(), strict=True)
    return any(size > 1 and before != after for size, before, after in steps)

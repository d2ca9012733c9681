"""Variants of the example inputs: copies, other values, other batch sizes."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qgraph.capture.values.layout import copy_tensor, laid_out_as, strides_like
from qgraph.capture.values.structure import Inputs, Path, follow, format_path, leaves, map_leaves
from qgraph.errors import UserError

Place = tuple[str, Path]

# Values that are compared by what they are, and that nobody can change behind the graph's back.
_PLAIN = (
    *(numbers.Number, str, bytes, type(None), type(Ellipsis), slice, range, frozenset, type, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


@dataclass(frozen=True)
class BatchChoice:
    """Which input tensors grow with the batch, along dimension 0.

    Args:
        places: their places among the inputs.
        size: their common measure: dimension 0 of the first of them.
    """

    places: tuple[Place, ...]
    size: int


def copy_inputs(inputs: Inputs) -> Inputs:
    """The same values in tensors of their own, layout kept."""
    return _map_tensors(copy_tensor, inputs)


def tensor_places(inputs: Inputs) -> Iterator[tuple[Place, torch.Tensor]]:
    """Every tensor among the inputs, with its place."""
    for name, value in inputs.items():
        for path, leaf in leaves(value):
            if isinstance(leaf, torch.Tensor):
                yield (name, path), leaf


def batch_choices(inputs: Inputs) -> list[BatchChoice]:
    """Ways to read the batch dimension, most likely first.

    Dimension 0 of every tensor whose dimension 0 equals that of the first tensor, then of the first tensor that has
    another one, and so on; at last dimension 0 of all tensors.
    """
    shaped = [(place, tensor) for place, tensor in tensor_places(inputs) if tensor.dim() > 0 and tensor.size(0) > 0]
    if not shaped:
        return []
    by_size: dict[int, list[Place]] = {}
    for place, tensor in shaped:
        by_size.setdefault(tensor.size(0), []).append(place)
    choices = [BatchChoice(tuple(places), size) for size, places in by_size.items()]
    everything = tuple(place for place, _ in shaped)
    return choices + ([BatchChoice(everything, shaped[0][1].size(0))] if len(choices) > 1 else [])


def varied(inputs: Inputs, seed: int) -> Inputs:
    """Other values of the same kind: floats permuted and shrunk, integers and booleans permuted.

    Integers stay in the range the example spans down to zero, so that indices and lengths stay legal.
    """
    generator = torch.Generator().manual_seed(seed)
    return _map_tensors(lambda tensor: _vary(tensor, generator), inputs)


def with_batch(inputs: Inputs, choice: BatchChoice, factor: int, seed: int) -> Inputs:
    """Inputs whose batch is `factor` times the example's; each repetition has other values."""
    parts = [varied(inputs, seed + position) for position in range(factor)]

    def grown(place: Place) -> torch.Tensor:
        return laid_out_as(torch.cat([_at(part, place) for part in parts]), _at(inputs, place))

    return _map_places(choice, grown, parts[0])


def with_rows(inputs: Inputs, choice: BatchChoice, size: int, seed: int) -> Inputs:
    """As `with_batch`, of any size.

    Raises:
        ValueError: an input that holds several rows per sample would have a part of a sample.
    """
    whole = with_batch(inputs, choice, -(-size // choice.size), seed)

    def cut(place: Place) -> torch.Tensor:
        return _at(whole, place)[: _rows(_at(inputs, place), place, choice, size)].clone()

    return whole if size % choice.size == 0 else _map_places(choice, cut, whole)


def _rows(tensor: torch.Tensor, place: Place, choice: BatchChoice, size: int) -> int:
    rows, rest = divmod(tensor.size(0) * size, choice.size)
    if rest:
        raise ValueError(f"no {place[0]} has {tensor.size(0)} * {size} / {choice.size} rows")
    return rows


def first_sample(inputs: Inputs, choice: BatchChoice) -> Inputs:
    """Inputs with the example's first sample alone."""

    def shrunk(place: Place) -> torch.Tensor:
        tensor = _at(inputs, place)
        return tensor[: tensor.size(0) // choice.size].clone()

    return _map_places(choice, shrunk, inputs)


def empty_with_batch(inputs: Inputs, choice: BatchChoice, size: int) -> Inputs:
    """Inputs whose batch is `size`, on the meta device: for a run that only looks at shapes.

    Raises:
        ValueError: an input that holds several rows per sample would have a part of a sample.
    """

    def grown(place: Place) -> torch.Tensor:
        tensor = _at(inputs, place)
        shape = (_rows(tensor, place, choice, size), *tensor.shape[1:])
        return torch.empty_strided(shape, strides_like(tensor, shape), dtype=tensor.dtype, device="meta")

    return _map_tensors(lambda tensor: tensor.to("meta"), _map_places(choice, grown, inputs))


def check_inputs(inputs: Inputs) -> None:
    """Refuses inputs that no run can use, or that a graph could not recognize at its next call.

    Raises:
        UserError: there is no tensor, one has no values or no strides, or an object is neither tensor nor plain value.
    """
    found = [(format_path(name, path), leaf) for name, value in inputs.items() for path, leaf in leaves(value)]
    for place, leaf in found:
        if isinstance(leaf, torch.Tensor):
            _check_tensor(place, leaf)
        elif not isinstance(leaf, _PLAIN):
            raise UserError(
                f"example input {place} is a {type(leaf).__name__}",
                why="the graph keeps what is no tensor as it is now, and could not tell when the object has changed",
                fix="pass what the forward needs of it: tensors, numbers, strings, or containers of these",
            )
    if not any(isinstance(leaf, torch.Tensor) for _, leaf in found):
        raise UserError(
            "example_inputs hold no tensor",
            why="a graph is captured by running the model on tensors",
            fix="pass the tensors the model is called with",
        )


def _check_tensor(place: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise UserError(
            f"example input {place} is a {'nested' if tensor.is_nested else tensor.layout} tensor",
            why="a captured graph takes dense tensors only",
            fix="pass a dense tensor, and make the other form of it in the forward",
        )
    if tensor.is_meta:
        raise UserError(
            f"example input {place} is on the meta device",
            why="capture runs the model, which needs values",
            fix="pass a tensor with values",
        )


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs) -> Inputs:
    def change(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return {name: map_leaves(change, value) for name, value in inputs.items()}


def _at(inputs: Inputs, place: Place) -> torch.Tensor:
    name, path = place
    value = follow(inputs[name], path)
    assert isinstance(value, torch.Tensor)
    return value


def _map_places(choice: BatchChoice, grow: Callable[[Place], torch.Tensor], inputs: Inputs) -> Inputs:
    """`inputs` with the tensors at the chosen places replaced by `grow(place)`."""
    chosen = set(choice.places)
    places = iter([(name, path) for name, value in inputs.items() for path, _ in leaves(value)])

    def change(leaf: Any) -> Any:
        place = next(places)
        return grow(place) if place in chosen else leaf

    return {name: map_leaves(change, value) for name, value in inputs.items()}


def _vary(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other values in the layout of `tensor`; what is expanded stays expanded."""
    core = tensor.detach()
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(axis) > 1:
            core = core.narrow(axis, 0, 1)
    return laid_out_as(_other_values(core, generator), core).expand(tensor.shape)


def _other_values(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    flat = tensor.reshape(-1)
    order = torch.randperm(flat.numel(), generator=generator).to(tensor.device)
    mixed = flat[order].reshape(tensor.shape)
    if tensor.is_floating_point() or tensor.is_complex():
        if not bool(tensor.any()):
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        shrink = 1.0 - 0.25 * torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.real.dtype)
        return (mixed * shrink).to(tensor.dtype)
    if flat.numel() == 0 or tensor.dtype is torch.bool or not torch.equal(mixed, tensor):
        return mixed
    low, high = min(0, int(flat.min())), max(0, int(flat.max()))
    drawn = torch.randint(low, high + 1, tensor.shape, generator=generator)
    return drawn.to(tensor.device, tensor.dtype)

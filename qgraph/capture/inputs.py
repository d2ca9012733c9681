"""Variants of the example inputs: copies, other values, other batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qgraph.capture.structure import Path, leaves, map_leaves
from qgraph.errors import UserError

Inputs = dict[str, Any]
Place = tuple[str, Path]


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
    return {
        name: map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, value)
        for name, value in inputs.items()
    }


def tensor_places(inputs: Inputs) -> Iterator[tuple[Place, torch.Tensor]]:
    """Every tensor among the inputs, with its place."""
    for name, value in inputs.items():
        for path, leaf in leaves(value):
            if isinstance(leaf, torch.Tensor):
                yield (name, path), leaf


def batch_choices(inputs: Inputs) -> list[BatchChoice]:
    """Ways to read the batch dimension, most likely first.

    First: dimension 0 of every tensor whose dimension 0 equals that of the first tensor. Second: dimension 0 of all.
    """
    shaped = [(place, tensor) for place, tensor in tensor_places(inputs) if tensor.dim() > 0 and tensor.size(0) > 0]
    if not shaped:
        return []
    size = shaped[0][1].size(0)
    equal = tuple(place for place, tensor in shaped if tensor.size(0) == size)
    everything = tuple(place for place, _ in shaped)
    return [BatchChoice(equal, size)] + ([BatchChoice(everything, size)] if everything != equal else [])


def varied(inputs: Inputs, seed: int) -> Inputs:
    """Other values of the same kind: floats permuted and shrunk, integers and booleans permuted.

    Integers stay in the range the example spans down to zero, so that indices and lengths stay legal.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: map_leaves(lambda leaf: _vary(leaf, generator) if isinstance(leaf, torch.Tensor) else leaf, value)
        for name, value in inputs.items()
    }


def with_batch(inputs: Inputs, choice: BatchChoice, factor: int, seed: int) -> Inputs:
    """Inputs whose batch is `factor` times the example's; each repetition has other values."""
    parts = [varied(inputs, seed + position) for position in range(factor)]
    return _map_places(inputs, choice, lambda place: torch.cat([_at(part, place) for part in parts]), parts[0])


def empty_with_batch(inputs: Inputs, choice: BatchChoice, factor: int) -> Inputs:
    """As `with_batch`, on the meta device: for a run that only looks at shapes."""

    def grown(place: Place) -> torch.Tensor:
        tensor = _at(inputs, place)
        return torch.empty((tensor.size(0) * factor, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")

    grown_inputs = _map_places(inputs, choice, grown, inputs)
    return {
        name: map_leaves(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, value)
        for name, value in grown_inputs.items()
    }


def check_tensors(inputs: Inputs) -> None:
    """Refuses inputs that no run can use.

    Raises:
        UserError: there is no tensor at all.
    """
    if not any(True for _ in tensor_places(inputs)):
        raise UserError(
            "example_inputs hold no tensor",
            why="a graph is captured by running the model on tensors",
            fix="pass the tensors the model is called with",
        )


def _at(inputs: Inputs, place: Place) -> torch.Tensor:
    name, path = place
    value = inputs[name]
    for step, key in path:
        value = value[key] if step == "item" else getattr(value, key)
    assert isinstance(value, torch.Tensor)
    return value


def _map_places(inputs: Inputs, choice: BatchChoice, grow: Any, others: Inputs) -> Inputs:
    """`others` with the tensors at the chosen places replaced by `grow(place)`."""
    chosen = set(choice.places)
    by_identity: dict[int, torch.Tensor] = {}
    for place, tensor in tensor_places(others):
        if place in chosen:
            by_identity[id(tensor)] = grow(place)
    return {name: map_leaves(lambda leaf: by_identity.get(id(leaf), leaf), value) for name, value in others.items()}


def _vary(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    order = torch.randperm(flat.numel(), generator=generator).to(tensor.device)
    mixed = flat[order].reshape(tensor.shape)
    if tensor.is_floating_point() or tensor.is_complex():
        shrink = 1.0 - 0.25 * torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.real.dtype)
        if not bool(tensor.any()):
            shrink, mixed = torch.zeros_like(shrink), torch.randn(tensor.shape, generator=generator).to(tensor)
            return mixed
        return (mixed * shrink).to(tensor.dtype)
    if flat.numel() == 0 or not torch.equal(mixed, tensor):
        return mixed
    if tensor.dtype is torch.bool:
        return mixed
    low, high = min(0, int(flat.min())), max(0, int(flat.max()))
    drawn = torch.randint(low, high + 1, tensor.shape, generator=generator)
    return drawn.to(tensor.device, tensor.dtype)

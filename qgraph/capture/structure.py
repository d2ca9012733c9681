"""Nested inputs and outputs: walking them, taking them apart in a graph, and building them again.

Containers are tuples, named tuples, lists, dicts (and other mappings) and dataclasses; everything else is a leaf.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qgraph.errors import UserError
from qgraph.ir.node_info import ExampleInputs

Path = tuple[tuple[str, Any], ...]


def as_example(example_inputs: object) -> ExampleInputs:
    """Example inputs as positional and keyword arguments.

    A tensor is the only argument, a tuple or list holds positional arguments, a mapping keyword arguments; a single
    argument that is itself a tuple or dict goes into a tuple of one.

    Raises:
        UserError: none of these, or nothing at all.
    """
    if isinstance(example_inputs, ExampleInputs):
        return example_inputs
    if isinstance(example_inputs, torch.Tensor):
        return ExampleInputs((example_inputs,))
    if isinstance(example_inputs, (tuple, list)):
        return ExampleInputs(tuple(example_inputs))
    if isinstance(example_inputs, Mapping):
        return ExampleInputs((), dict(example_inputs))
    raise UserError(
        f"example_inputs is a {type(example_inputs).__name__}",
        why="the model is run on it, so it must hold the arguments of one call",
        fix="pass a tensor, a tuple of positional arguments, or a dict of keyword arguments",
    )


def bind_to_forward(model: nn.Module, example: ExampleInputs) -> dict[str, Any]:
    """Parameter name to value, in the order of the model's forward.

    Raises:
        UserError: the arguments do not fit the signature.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise UserError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}",
            why=str(error),
            fix="pass a tuple of positional arguments or a dict of keyword arguments",
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            inputs.update({f"{name}_{position}": entry for position, entry in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(value)
        else:
            inputs[name] = value
    return inputs


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every leaf replaced by `function(leaf)`; containers keep their types."""
    if isinstance(value, torch.Size):
        return function(value)
    if isinstance(value, tuple):
        entries = [map_leaves(function, entry) for entry in value]
        return rebuild_named_tuple(type(value), entries) if is_named_tuple(value) else tuple(entries)
    if isinstance(value, list):
        return [map_leaves(function, entry) for entry in value]
    if is_dataclass_value(value):
        return rebuild_dataclass(
            type(value), {name: map_leaves(function, entry) for name, entry in dataclass_items(value)}
        )
    if isinstance(value, Mapping):
        entries_by_key = {key: map_leaves(function, entry) for key, entry in value.items()}
        return entries_by_key if type(value) is dict else _same_mapping(value, entries_by_key)
    return function(value)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with the way to it: `("item", key)` and `("field", name)` steps."""
    if isinstance(value, torch.Size):
        yield path, value
    elif is_dataclass_value(value):
        for name, entry in dataclass_items(value):
            yield from leaves(entry, (*path, ("field", name)))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, (*path, ("item", key)))
    elif isinstance(value, (tuple, list)):
        for position, entry in enumerate(value):
            yield from leaves(entry, (*path, ("item", position)))
    else:
        yield path, value


def follow(value: Any, path: Path) -> Any:
    """The leaf at `path`."""
    for step, key in path:
        value = value[key] if step == "item" else getattr(value, key)
    return value


def format_path(name: str, path: Path) -> str:
    """`batch['image'][0].points`."""
    return name + "".join(f"[{key!r}]" if step == "item" else f".{key}" for step, key in path)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in a nested value, in order."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def is_named_tuple(value: object) -> bool:
    """Whether `value` is a named tuple or one of torch's return types, such as that of `max`."""
    kind = type(value)
    return isinstance(value, tuple) and (hasattr(kind, "_make") or hasattr(kind, "n_sequence_fields"))


def rebuild_named_tuple(kind: type[Any], entries: Sequence[Any]) -> Any:
    """An instance of the named tuple or return type `kind`."""
    return kind(*entries) if hasattr(kind, "_make") else kind(entries)


def is_dataclass_value(value: object) -> bool:
    """Whether `value` is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def dataclass_items(value: Any) -> list[tuple[str, Any]]:
    """Field name and value; fields that a mapping-like dataclass leaves out are left out here."""
    names = [field.name for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(name, value[name]) for name in names if name in value]
    return [(name, getattr(value, name)) for name in names]


def rebuild_dataclass(kind: type[Any], items: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `kind` with the given fields; fields without an `__init__` parameter are set."""
    takes = {field.name for field in dataclasses.fields(kind) if field.init}
    instance = kind(**{name: value for name, value in items.items() if name in takes})
    for name, value in items.items():
        if name not in takes:
            object.__setattr__(instance, name, value)
    return instance


def _same_mapping(value: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    try:
        return type(value)(entries)  # type: ignore[call-arg]
    except TypeError as error:
        raise UserError(
            f"a {type(value).__name__} cannot be rebuilt from a dict",
            fix="use a dict, list, tuple or dataclass for nested inputs and outputs",
        ) from error

"""Nested inputs and outputs: walking them, taking them apart in a graph, and building them again.

Containers are tuples, named tuples, lists, mappings and dataclasses; everything else is a leaf.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

from qgraph.errors import UserError
from qgraph.ir.node_info import ExampleInputs

Step = tuple[str, Any]
Path = tuple[Step, ...]
Inputs = dict[str, Any]


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


def bind_to_forward(model: nn.Module, example: ExampleInputs) -> Inputs:
    """A name for every argument, in the order of the model's forward; positional arguments come first.

    Raises:
        UserError: the arguments do not fit the signature.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise _misfit(f"{type(model).__name__}.forward{signature}", str(error)) from error
    taken = signature.parameters.keys() | example.kwargs.keys()
    inputs: Inputs = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            inputs.update({_free_name(f"{name}_{place}", taken): entry for place, entry in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            for key in value:
                if key in inputs or not key.isidentifier() or keyword.iskeyword(key):
                    raise _misfit(f"{type(model).__name__}.forward{signature}", f"{key!r} cannot name an input")
            inputs.update(value)
        else:
            inputs[name] = value
    return inputs


def parts(value: Any) -> list[tuple[Step, Any]] | None:
    """The parts of a container, each with the step to it; None for a leaf."""
    if isinstance(value, (torch.Tensor, torch.Size)):
        return None
    if is_dataclass_value(value):
        return [(("field", name), entry) for name, entry in dataclass_items(value)]
    if isinstance(value, Mapping):
        return [(("item", key), entry) for key, entry in value.items()]
    if isinstance(value, (tuple, list)):
        return [(("item", position), entry) for position, entry in enumerate(value)]
    return None


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with the way to it: `("item", key)` and `("field", name)` steps."""
    found = parts(value)
    if found is None:
        yield path, value
        return
    for step, entry in found:
        yield from leaves(entry, (*path, step))


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every leaf replaced by `function(leaf)`; containers keep their types.

    Raises:
        UserError: a container's class cannot be built from its parts.
    """
    found = parts(value)
    if found is None:
        return function(value)
    return rebuild_like(value, [map_leaves(function, entry) for _, entry in found])


def rebuild_like(value: Any, entries: Sequence[Any]) -> Any:
    """A container like `value` with other parts, in the order of `parts(value)`.

    Raises:
        UserError: its class cannot be built from its parts.
    """
    try:
        if is_dataclass_value(value):
            names = [name for name, _ in dataclass_items(value)]
            return rebuild_dataclass(type(value), dict(zip(names, entries, strict=True)))
        if isinstance(value, Mapping):
            return rebuild_mapping(emptied(value), zip(value, entries, strict=True))
        return rebuild_sequence(type(value), entries)
    except Exception as error:
        raise UserError(
            f"a {type(value).__name__} cannot be built again from its parts",
            why=f"{type(error).__name__}: {error}",
            fix="use a dict, list, tuple, named tuple or dataclass that takes its fields as arguments",
        ) from error


def follow(value: Any, path: Path) -> Any:
    """The part at `path`."""
    for step, key in path:
        value = value[key] if step == "item" else getattr(value, key)
    return value


def format_path(name: str, path: Path) -> str:
    """`batch['image'][0].points`."""
    return name + "".join(f"[{key!r}]" if step == "item" else f".{key}" for step, key in path)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in a nested value, in order."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


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
    """An instance of the dataclass `kind` with the given fields, whatever its `__post_init__` makes of them."""
    takes = {field.name for field in dataclasses.fields(kind) if field.init}
    instance = kind(**{name: value for name, value in items.items() if name in takes})
    for name, value in items.items():
        if getattr(instance, name, None) is not value:
            object.__setattr__(instance, name, value)
    return instance


def rebuild_sequence(kind: type[Any], entries: Sequence[Any]) -> Any:
    """An instance of a tuple, named tuple, return type (such as that of `max`) or list class."""
    return kind(*entries) if hasattr(kind, "_make") else kind(entries)


def emptied(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A copy of a mapping without entries, to be filled by `rebuild_mapping`: it keeps what a class adds to a dict."""
    if type(value) is dict or not isinstance(value, MutableMapping):
        return type(value)()
    shell = copy(value)
    shell.clear()
    return shell


def rebuild_mapping(shell: Mapping[Any, Any], entries: Any) -> Any:
    """A copy of the empty mapping `shell` with the given pairs."""
    if not isinstance(shell, MutableMapping):
        return type(shell)(dict(entries))  # type: ignore[call-arg]
    filled = copy(shell)
    for key, value in entries:
        filled[key] = value
    return filled


def _free_name(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _misfit(forward: str, why: str) -> UserError:
    return UserError(
        f"example_inputs do not fit {forward}",
        why=why,
        fix="pass a tuple of positional arguments or a dict of keyword arguments",
    )

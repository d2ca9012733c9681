"""Arguments of integer operators against their schemas, so that a wrong one is found when a file is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from qgraph.errors import ArtifactError

_PLAIN = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}


def check_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Checks arguments by the operator's schema.

    Raises:
        ArtifactError: an argument is missing, unknown or of another kind.
    """
    schema = target._schema
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    given = dict(zip((argument.name for argument in positional), args, strict=False))
    known = {argument.name: argument for argument in schema.arguments}
    if len(args) > len(positional) or kwargs.keys() - known.keys() or kwargs.keys() & given.keys():
        raise ArtifactError(f"the arguments do not fit {schema}")
    given.update(kwargs)
    for name, argument in known.items():
        if name not in given:
            if not argument.has_default_value():
                raise ArtifactError(f"the argument {name} of {schema.name} is missing")
        elif not _fits(str(argument.type), given[name]):
            raise ArtifactError(f"the argument {name} of {schema.name} is {str(given[name])[:80]}, not {argument.type}")


def _fits(kind: str, value: Any) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(kind.removeprefix("Optional[")[:-1], value)
    if kind.startswith("List["):
        return isinstance(value, (list, tuple)) and all(_fits(kind.removeprefix("List[")[:-1], v) for v in value)
    if isinstance(value, fx.Node):
        return True  # a tensor, or a number computed from sizes
    return type(value) in _PLAIN.get(kind, ())

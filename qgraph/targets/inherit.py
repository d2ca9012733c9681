"""`base = "..."`: a target file that says only in what it differs from another one.

Tables are merged key by key, the file's own values win. An entry of [[ops]] takes its operators out of the base's
entries. The base is a complete target and is checked as one, so that its mistakes are reported with its own name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from qgraph.errors import TargetError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_IN = ("bpu", "litert", "onnxruntime", "x86", "x86-fbgemm", "x86-onednn")
_OPS = "ops"


def built_in_text(name: str) -> tuple[str, str]:
    """Text of a built-in target's file, and how messages call it."""
    return resources.files("qgraph.targets").joinpath(f"{name}.toml").read_text(
        encoding="utf-8"
    ), f"{name}.toml of qgraph"


def read_file(path: Path) -> str:
    """Text of a target file.

    Raises:
        TargetError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(
            f"the target file {path} cannot be read",
            why=f"{type(error).__name__}: {error}",
            fix="give the path of a target's TOML file",
        ) from error


def resolved(
    text: str,
    origin: str,
    folder: Path | None,
    check: Callable[[Mapping[str, Any], str], object],
    seen: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The tables of a target file, together with those of its bases.

    Args:
        text: what the file holds.
        origin: the file, for messages.
        folder: where relative paths start; None if the text comes from no file.
        check: raises where a base is no target.
        seen: files that build on this one.

    Raises:
        TargetError: malformed TOML, a base that does not exist, is wrong, or builds on the file itself.
    """
    try:
        own = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError("the target file is not TOML", where=origin, why=str(error)) from error
    if "base" not in own:
        return own
    if "name" not in own:
        raise TargetError(
            "the target file lacks 'name'", where=origin, fix="a target with a base has a name of its own"
        )
    base_text, base_origin, base_folder = _base(own.pop("base"), origin, folder)
    chain = (*seen, origin)
    if base_origin in chain:
        raise TargetError("a target is its own base", where=" -> ".join((*chain, base_origin)), fix="break the circle")
    base = resolved(base_text, base_origin, base_folder, check, chain)
    check(base, base_origin)
    return _merged(base, own)


def _base(name: object, origin: str, folder: Path | None) -> tuple[str, str, Path | None]:
    if not isinstance(name, str):
        raise TargetError(f"base is {name!r}", where=origin, fix="give the name of a target or the path of its file")
    if name.endswith(".toml"):
        path = (Path() if folder is None else folder) / name
        try:
            return read_file(path), str(path.resolve()), path.parent
        except TargetError as error:
            raise TargetError(error.what, where=f"{origin}, base", why=error.why, fix=error.fix) from error
    if name not in BUILT_IN:
        raise TargetError(f"no target is named {name!r}", where=f"{origin}, base", fix=did_you_mean(name, BUILT_IN))
    return *built_in_text(name), None


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in own.items():
        below = base.get(key)
        if key == _OPS and isinstance(value, list) and isinstance(below, list):
            result[key] = [*value, *_without(below, _named(value))]
        elif isinstance(value, dict) and isinstance(below, dict):
            result[key] = _merged(below, value)
        else:
            result[key] = value
    return result


def _named(entries: list[Any]) -> set[str]:
    """Operators that entries of [[ops]] name; what is malformed is refused later."""
    lists = [entry.get("names") for entry in entries if isinstance(entry, dict)]
    return {name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)}


def _without(entries: list[Any], names: set[str]) -> list[Any]:
    kept = [{**entry, "names": [name for name in entry["names"] if name not in names]} for entry in entries]
    return [entry for entry in kept if entry["names"]]

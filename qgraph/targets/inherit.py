"""`base = "..."`: a target file that says only in what it differs from another one.

Tables are merged key by key, the file's own values win. An entry of [[ops]] takes its operators out of the base's
entries, `remove` takes operators and formats out of the whole base. The base is a complete target and is checked as
one, so that its mistakes are reported with its own name.
"""

from __future__ import annotations

import re
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
_FORMAT = re.compile(r"u?int[0-9]+")


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
        TargetError: malformed TOML, a base that does not exist, is wrong, or builds on the file itself; something to
            remove that it does not have.
    """
    try:
        own = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError("the target file is not TOML", where=origin, why=str(error)) from error
    if "base" not in own:
        if "remove" in own:
            raise TargetError(
                "remove takes away what a base has, and there is no base", where=origin, fix="leave it out"
            )
        return own
    if "name" not in own:
        raise TargetError(
            "the target file lacks 'name'", where=origin, fix="a target with a base has a name of its own"
        )
    base_text, base_origin, base_folder = _base(own.pop("base"), origin, folder)
    removed = own.pop("remove", [])
    chain = (*seen, origin)
    if base_origin in chain:
        raise TargetError("a target is its own base", where=" -> ".join((*chain, base_origin)), fix="break the circle")
    base = resolved(base_text, base_origin, base_folder, check, chain)
    check(base, base_origin)
    return _merged(_reduced(base, removed, origin), own)


def _reduced(base: Mapping[str, Any], removed: object, origin: str) -> dict[str, Any]:
    """The base without the operators and formats that `remove` names."""
    if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
        raise TargetError(f"remove is {removed!r}", where=origin, fix="give a list of operators and formats")
    known = _named(base[_OPS]) | {name for name in base["activations"] if _FORMAT.fullmatch(name)}
    for name in removed:
        if name not in known:
            raise TargetError(
                f"remove names {name!r}, which the base has not", where=origin, fix=did_you_mean(name, known)
            )
    formats = {name for name in removed if _FORMAT.fullmatch(name)}
    gone = set(removed)
    entries = [_narrowed(entry, formats) for entry in _without(base[_OPS], gone)]
    result = {**base, _OPS: [entry for entry in entries if entry["legal"]]}
    gone |= _named(base[_OPS]) - _named(result[_OPS])
    for key in ("activations", "weights", "tables", "arithmetic"):
        result[key] = {name: value for name, value in base[key].items() if not gone & set(name.split("."))}
    used = {entry["unit"] for entry in result[_OPS]} | {"cpu"}
    result["units"] = {
        unit: {name: rate for name, rate in rates.items() if not formats & set(name.split("*"))}
        for unit, rates in base["units"].items()
        if unit in used
    }
    return result


def _narrowed(entry: Mapping[str, Any], formats: set[str]) -> dict[str, Any]:
    """An entry of [[ops]] whose legal lines have no such formats; a line that needs one is gone."""
    lines = [_narrowed_line(line, formats) for line in entry["legal"]]
    result = {**entry, "legal": list(dict.fromkeys(line for line in lines if line is not None))}
    if "fixed_result" in entry:
        result["fixed_result"] = {name: value for name, value in entry["fixed_result"].items() if name not in formats}
    return result


def _narrowed_line(line: str, formats: set[str]) -> str | None:
    operands, _, results = line.partition("->")
    columns = [[name.strip() for name in column.split("|")] for column in (*operands.split(","), results)]
    kept = [" | ".join(name for name in column if name not in formats) for column in columns]
    return f"{', '.join(kept[:-1])} -> {kept[-1]}" if all(kept) else None


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

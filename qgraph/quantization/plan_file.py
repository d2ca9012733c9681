"""Plans as TOML: written to be edited, read with errors that name key and line.

    [sites."conv1"]
    role = "activation"
    op = "conv2d"
    format = "int8"
    observer = "min_max"
    scale = "observed"
    decided = "int8, min_max, symmetric, observed"
    rule = "default_calibration_qconfig_setter"

`scale` is a number for a fixed scale. `decided` tells whether the entry was edited: it is the settings as they were
when `rule` decided; where they differ, the plan itself has decided.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qgraph.errors import QGraphError, UserError, did_you_mean
from qgraph.numerics import Scheme, float32, parse_format, qint8, qint32, qparams_from_scale
from qgraph.quantization.fake_quantize import FAKE_QUANT_KINDS
from qgraph.quantization.observers import observer_name
from qgraph.quantization.plan import EDITED_RULE, ROLES, SCALES, Plan, PlannedSite, reader_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
_TOP = ("version", "model", "target", "sites")
_NO_OBSERVER = "none"


def write(plan: Plan) -> str:
    """The text of a plan."""
    lines = [f"version = {VERSION}", f"model = {_text(plan.model)}", f"target = {_text(plan.target)}"]
    for entry in plan.sites.values():
        lines += ["", f"[sites.{_text(entry.site)}]", *(f"{key} = {value}" for key, value in _keys(entry))]
    return "\n".join(lines) + "\n"


def _keys(entry: PlannedSite) -> list[tuple[str, str]]:
    keys: list[tuple[str, str]] = [("role", _text(entry.role))]
    keys += [("op", _text(entry.op))] if entry.op else []
    keys += [("feeds", _text(entry.feeds))] if entry.feeds is not None else []
    keys += [("format", _text(str(entry.format)))]
    keys += [("observer", _text(entry.observer))] if entry.observer is not None else []
    keys += [("scheme", _text(entry.scheme.value))] if entry.scheme is not None else []
    keys += [("per_channel", _flag(entry.per_channel))] if entry.per_channel is not None else []
    if entry.scale == "fixed":
        keys += [("scale", repr(entry.fixed_scale))]
    elif entry.scale is not None:
        keys += [("scale", _text(entry.scale))]
    keys += [("fixed_scale", repr(entry.fixed_scale))] if entry.scale in ("stub", "target") else []
    keys += [("frozen", _flag(True))] if entry.frozen else []
    keys += [("fake_quant", _text(entry.fake_quant))] if entry.fake_quant != "fake_quant" else []
    keys += [("rule", _text(entry.rule)), ("decided", _text(entry.summary))]
    keys += [("overrode", "[" + ", ".join(map(_text, entry.overrode)) + "]")] if entry.overrode else []
    keys += [("line", _text(entry.line))] if entry.line else []
    return keys


def _text(value: str) -> str:
    """A TOML string; its escapes are those of JSON, and DEL, which JSON lets stand."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flag(value: bool) -> str:
    return "true" if value else "false"


def read(text: str, origin: str) -> Plan:
    """The plan of a text.

    Raises:
        UserError: it is no TOML or no plan; the message names key and line.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError("the plan is not TOML", where=origin, why=str(error), fix="correct the line") from error
    place = _Place(text, origin)
    for key in table:
        if key not in _TOP:
            raise UserError(f"a plan has no key {key!r}", where=place.of(key), fix=did_you_mean(key, _TOP))
    if table.get("version") != VERSION:
        raise UserError(
            f"the plan has version {table.get('version')!r}",
            where=place.of("version"),
            fix=f"write version = {VERSION}, or read it with the qgraph that wrote it",
        )
    sites = table.get("sites")
    if not isinstance(sites, dict) or not sites:
        raise UserError("the plan has no sites", where=place.of("sites"), fix='write [sites."conv1"] and its keys')
    entries = {site: _site(site, entry, place) for site, entry in sites.items()}
    head = [table.get(key, "") for key in ("model", "target")]
    for key, value in zip(("model", "target"), head, strict=True):
        if not isinstance(value, str):
            raise UserError(f"{key} is {value!r}", where=place.of(key), fix="give a text")
    return Plan(entries, *head)


class _Place:
    """Where keys stand in a text."""

    def __init__(self, text: str, origin: str) -> None:
        self.lines = text.splitlines()
        self.origin = origin

    def of(self, key: str, site: str | None = None) -> str:
        """File, line and key; the line of the site's table, or no line, where the key is not written."""
        first = 0
        if site is not None:
            headers = (f"[sites.{_text(site)}]", f"[sites.'{site}']", f"[sites.{site}]")
            first = next((n for n, line in enumerate(self.lines) if line.split("#")[0].strip() in headers), 0)
        pattern = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
        found = None
        for number in range(first + (site is not None), len(self.lines)):
            if self.lines[number].lstrip().startswith("["):
                break
            if pattern.match(self.lines[number]):
                found = number
                break
        name = key if site is None else f"{key} of site {site}"
        if found is None and site is None:
            return f"{self.origin}, {name}"
        return f"{self.origin}, line {(first if found is None else found) + 1}, {name}"


def _choice(options: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in options:
            raise UserError(f"{value!r} is none of {', '.join(options)}", fix=did_you_mean(str(value), options))
        return str(value)

    return check


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{value!r} is no text", fix="write it in quotes")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{value!r} is neither true nor false", fix="write true or false")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UserError(f"{value!r} is no list", fix="write [] or a list of texts")
    return tuple(_string(one) for one in value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{value!r} is no number", fix="give a number > 0")
    qparams_from_scale(float(value), qint8)
    return float(value)


def _scale(value: Any) -> str | float:
    return _choice(SCALES)(value) if isinstance(value, str) else _number(value)


def _observer(value: Any) -> str:
    return value if value == _NO_OBSERVER else observer_name(_string(value))


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "role": _choice(ROLES),
    "op": _string,
    "feeds": _string,
    "format": lambda value: parse_format(_string(value)),
    "observer": _observer,
    "scheme": lambda value: Scheme(_choice(tuple(one.value for one in Scheme))(value)),
    "per_channel": _boolean,
    "scale": _scale,
    "fixed_scale": _number,
    "frozen": _boolean,
    "fake_quant": _choice(FAKE_QUANT_KINDS),
    "rule": _string,
    "decided": _string,
    "overrode": _strings,
    "line": _string,
}


def _site(site: str, table: Any, place: _Place) -> PlannedSite:
    """An entry of the plan."""
    if not isinstance(table, dict):
        raise UserError(f"site {site!r} is {table!r}", where=place.of(site), fix=f"write [sites.{_text(site)}]")
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _READERS:
            if isinstance(value, dict):
                raise UserError(
                    f"[sites.{site}.{key}] is a table inside a table",
                    where=place.origin,
                    why="a dot separates tables in TOML",
                    fix=f"write names in quotes: [sites.{_text(f'{site}.{key}')}]",
                )
            raise UserError(
                f"a site of a plan has no key {key!r}", where=place.of(key, site), fix=did_you_mean(key, _READERS)
            )
        try:
            found[key] = _READERS[key](value)
        except QGraphError as error:
            error.where = place.of(key, site)
            raise
    if "format" not in found:
        raise UserError(
            "a site of a plan lacks its format", where=place.of("format", site), fix='write format = "int8"'
        )
    return _checked(site, found, place)


def _checked(site: str, found: dict[str, Any], place: _Place) -> PlannedSite:
    """An entry, with the rule `plan` if it was edited."""
    if isinstance(found.get("scale"), float):
        found["scale"], found["fixed_scale"] = "fixed", found["scale"]
    elif found.get("scale") == "fixed":
        raise UserError("a fixed scale has no number", where=place.of("scale", site), fix="write scale = 0.0078125")
    decided = found.pop("decided", None)
    entry = _consistent(PlannedSite(site, **found), decided, place)
    if entry.role == "input":
        try:
            reader_of(entry)
        except UserError as error:
            error.where = place.of("feeds", site)
            raise
    if decided is None or entry.summary == decided:
        return entry
    earlier = (*entry.overrode, f"{entry.rule}: {decided}")
    return replace(entry, rule=EDITED_RULE, overrode=earlier)


def _consistent(entry: PlannedSite, decided: str | None, place: _Place) -> PlannedSite:
    """An entry without what an edited format makes meaningless."""
    special = {float32: "none", qint32: "accumulator"}.get(entry.format)
    if special is not None and entry.scale == "fixed":
        raise UserError(
            f"a site in {entry.format} has a fixed scale",
            where=place.of("scale", entry.site),
            why="it is not rounded",
            fix="leave the scale out, or write another format",
        )
    if entry.scale != special and (special is not None or entry.scale in ("none", "accumulator")):
        return replace(entry, observer=None, scheme=None, per_channel=None, scale=None, fixed_scale=None)
    if entry.role == "weight" and entry.scale == "fixed":
        entry = replace(entry, per_channel=False)
    words = decided.split(", ") if decided is not None else []
    follows = entry.scheme is not None and entry.scheme.value in words
    if words and words[0] != str(entry.format) and follows:
        return replace(entry, scheme=None)  # the target chooses it by format
    return entry

"""A target: what a device can compute, and exactly how, as data.

Invariants:
- nothing outside the target's file decides formats, rounding, accumulator width or table sizes;
- an operator the file does not name cannot run on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from qgraph.errors import QGraphError, TargetError, did_you_mean
from qgraph.numerics import Arithmetic, Format, QType, check_intervals, parse_arithmetic, parse_format, parse_qtype

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENTRY_POINT_GROUP = "qgraph.targets"
BUILT_IN = ("bpu",)

_KEYS = {"name", "description", "symmetric", "weight_per_channel", "tables", "sampling"} | {
    "arithmetic",
    "ops",
    "units",
    "memory",
}
_OP_KEYS = {"names", "unit", "legal"}


@dataclass(frozen=True)
class LegalFormats:
    """One line of legal formats: alternatives for each operand, and for the result."""

    operands: tuple[tuple[Format, ...], ...]
    results: tuple[Format, ...]

    def accepts(self, operands: Iterable[Format], result: Format) -> bool:
        """Whether this line allows a combination; further operands follow the last alternative."""
        given = tuple(operands)
        columns = [self.operands[min(i, len(self.operands) - 1)] for i in range(len(given))]
        return result in self.results and all(f in column for f, column in zip(given, columns, strict=True))

    def __str__(self) -> str:
        columns = ["|".join(map(str, column)) for column in (*self.operands, self.results)]
        return f"{', '.join(columns[:-1])} -> {columns[-1]}"


@dataclass(frozen=True)
class OpRule:
    """What a target says of one operator.

    Args:
        unit: the part of the device that runs it.
        legal: legal combinations of formats.
    """

    unit: str
    legal: tuple[LegalFormats, ...]

    def accepts(self, operands: Iterable[Format], result: Format) -> bool:
        """Whether a combination of operand formats and result format is legal."""
        given = tuple(operands)
        return any(line.accepts(given, result) for line in self.legal)


@dataclass(frozen=True)
class Target:
    """A device.

    Args:
        name: its name.
        description: one line for listings.
        symmetric: whether real zero is always code zero.
        weight_per_channel: whether weights have a scale per output channel.
        tables: intervals of a function table by input format; None for one entry per code.
        weight_bits: fractional bits of bilinear interpolation weights.
        arithmetic: named steps and how they accumulate and rescale.
        ops: operator name to its rule.
        units: unit to operand formats to work per cycle.
        bytes_per_cycle: memory bandwidth.
        clock_hz: cycles per second.
    """

    name: str
    description: str
    symmetric: bool
    weight_per_channel: bool
    tables: Mapping[str, int | None]
    weight_bits: int
    arithmetic: Mapping[str, Arithmetic]
    ops: Mapping[str, OpRule]
    units: Mapping[str, Mapping[str, float]]
    bytes_per_cycle: float
    clock_hz: float
    origin: str = field(default="", compare=False)

    def rule(self, op: str) -> OpRule | None:
        """What the target says of an operator; None if it cannot run it."""
        return self.ops.get(op)

    def step(self, name: str) -> Arithmetic:
        """The arithmetic of a named step.

        Raises:
            TargetError: the target does not define it.
        """
        if name not in self.arithmetic:
            raise TargetError(
                f"target {self.name} defines no arithmetic for {name!r}",
                where=self.origin,
                fix=did_you_mean(name, self.arithmetic),
            )
        return self.arithmetic[name]

    def table_entries(self, source: QType) -> int | None:
        """Intervals of a function table for this input format; None for one entry per code.

        Raises:
            TargetError: the target has no tables for the format.
        """
        if str(source) not in self.tables:
            raise TargetError(f"target {self.name} has no function tables for {source}", where=self.origin)
        return self.tables[str(source)]

    def nearest_legal(self, op: str, operands: Iterable[Format], result: Format) -> str:
        """The legal lines of an operator, those sharing most formats with the request first."""
        rule = self.rule(op)
        if rule is None:
            return f"{self.name} has no {op}"
        wanted = [*operands, result]

        def common(line: LegalFormats) -> int:
            columns = [*line.operands, line.results]
            return sum(f in column for f, column in zip(wanted, columns, strict=False))

        return "; ".join(str(line) for line in sorted(rule.legal, key=common, reverse=True)[:2])


def get_target(target: Target | str) -> Target:
    """The target with this name, or of this TOML file.

    Raises:
        TargetError: no target has the name, or its file is wrong.
    """
    if isinstance(target, Target):
        return target
    if target in BUILT_IN:
        text = resources.files("qgraph.targets").joinpath(f"{target}.toml").read_text(encoding="utf-8")
        return parse_target(text, origin=f"{target}.toml of qgraph")
    if target.endswith(".toml"):
        return load_target(Path(target))
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == target:
            provided = point.load()
            return get_target(provided() if callable(provided) else provided)
    raise TargetError(f"no target is named {target!r}", fix=did_you_mean(target, list_targets()))


def list_targets() -> list[str]:
    """Names of all targets: built-in ones, then those of other packages."""
    return [*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))]


def load_target(path: Path) -> Target:
    """The target a TOML file describes.

    Raises:
        TargetError: the file cannot be read or is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TargetError(f"the target file {path} cannot be read", why=str(error)) from error
    return parse_target(text, origin=str(path))


def parse_target(text: str, *, origin: str) -> Target:
    """The target a TOML text describes.

    Raises:
        TargetError: malformed TOML, unknown or missing keys, or values that make no sense.
    """
    try:
        data = tomllib.loads(text)
        return _build(data, origin)
    except tomllib.TOMLDecodeError as error:
        raise TargetError("the target file is not TOML", where=origin, why=str(error)) from error
    except KeyError as error:
        raise TargetError(f"the target file lacks {error}", where=origin) from error
    except TargetError:
        raise
    except QGraphError as error:
        raise TargetError("the target file is wrong", where=origin, why=str(error)) from error


def _build(data: dict[str, Any], origin: str) -> Target:
    _refuse_unknown(data, _KEYS, origin)
    ops: dict[str, OpRule] = {}
    for entry in data["ops"]:
        _refuse_unknown(entry, _OP_KEYS, origin)
        rule = OpRule(entry["unit"], tuple(_parse_legal(line, origin) for line in entry["legal"]))
        if entry["unit"] not in data["units"]:
            raise TargetError(
                f"unit {entry['unit']!r} is not described",
                where=origin,
                fix=did_you_mean(entry["unit"], data["units"]),
            )
        for name in entry["names"]:
            if name in ops:
                raise TargetError(f"operator {name!r} is described twice", where=origin)
            ops[name] = rule
    return Target(
        name=data["name"],
        description=data.get("description", ""),
        symmetric=data["symmetric"],
        weight_per_channel=data["weight_per_channel"],
        tables={name: _table_intervals(name, count) for name, count in data["tables"].items()},
        weight_bits=data["sampling"]["weight_bits"],
        arithmetic={name: parse_arithmetic(word) for name, word in data["arithmetic"].items()},
        ops=ops,
        units=data["units"],
        bytes_per_cycle=data["memory"]["bytes_per_cycle"],
        clock_hz=data["memory"]["clock_hz"],
        origin=origin,
    )


def _table_intervals(name: str, count: str | int) -> int | None:
    if count == "full":
        return None
    check_intervals(int(count), parse_qtype(name))
    return int(count)


def _parse_legal(line: str, origin: str) -> LegalFormats:
    operands, arrow, results = line.partition("->")
    if not arrow:
        raise TargetError(f"{line!r} is not a line of legal formats", where=origin, fix="int8, int8 -> int8|int16")

    def column(text: str) -> tuple[Format, ...]:
        return tuple(parse_format(name.strip()) for name in text.split("|"))

    return LegalFormats(tuple(column(text) for text in operands.split(",")), column(results))


def _refuse_unknown(data: dict[str, Any], known: set[str], origin: str) -> None:
    for key in data:
        if key not in known:
            raise TargetError(f"unknown key {key!r}", where=origin, fix=did_you_mean(key, known))

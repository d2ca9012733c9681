"""Reading a target's TOML file: every key is known, present and of the right kind, or the message names it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from qgraph.errors import QGraphError, TargetError, did_you_mean
from qgraph.ir.op_table import OPS
from qgraph.numerics import (
    Arithmetic,
    Format,
    QType,
    QuantizeRule,
    Scheme,
    SegmentForm,
    TwoTables,
    check_intervals,
    parse_arithmetic,
    parse_format,
    parse_qtype,
    parse_quantize_rule,
    qparams_from_scale,
)
from qgraph.targets.inherit import resolved
from qgraph.targets.target import FACTORS, OPTIONAL, Functions, LegalFormats, Memory, OpRule, TableForm, Target

_Parsed = TypeVar("_Parsed")


def parse_target(text: str, *, origin: str, folder: Path | None = None) -> Target:
    """The target a TOML text describes.

    Args:
        text: what the file holds.
        origin: the file, for messages.
        folder: where the path of a base starts; the current folder if None.

    Raises:
        TargetError: malformed TOML, unknown or missing keys, or values that make no sense.
    """
    return _target(resolved(text, origin, folder, _target), origin)


def _target(data: Mapping[str, Any], origin: str) -> Target:
    table = _Table(data, origin)
    table.allow({*KEYS, "base", "remove"})
    units = _units(table.table("units"))
    activations, weights = table.table("activations"), table.table("weights")
    tables, arithmetic = table.table("tables"), table.table("arithmetic")
    sampling, memory, fusion = table.table("sampling"), table.table("memory"), table.table("fusion")
    sampling.allow({"weight_bits", "positions"})
    fusion.allow({"residual"})
    ops = _ops(table.tables("ops"), units)
    return Target(
        name=table.text("name"),
        description=table.text("description") if "description" in table.data else "",
        eight_bits=activations.understood(lambda: parse_qtype(activations.text("eight_bits"))),
        activations=_schemes(activations, but={"eight_bits"}),
        weights=_schemes(weights, but={"per_channel", "bias"}),
        weight_per_channel=weights.flag("per_channel"),
        bias=weights.understood(lambda: parse_format(weights.text("bias"))),
        residual=fusion.flag("residual"),
        many_groups=_many_groups(table, arithmetic),
        quantize_rule=_quantize_rule(arithmetic, "quantize"),
        bound_rule=_quantize_rule(arithmetic, "bounds" if "bounds" in arithmetic.data else "quantize"),
        factors=_factors(arithmetic, ops),
        tables={name: _table_form(tables, name) for name in tables.data},
        functions=_functions(table.table("functions"), ops) if "functions" in table.data else Functions(),
        weight_bits=int(sampling.number("weight_bits", whole=True)),
        integer_positions="positions" in sampling.data and _choice(sampling, "positions", _POSITIONS) == "integer",
        arithmetic=_steps(arithmetic, ops),
        ops=ops,
        units=units,
        memories=_memories(memory),
        clock_hz=memory.number("clock_hz"),
        origin=origin,
    )


KEYS = (
    "name",
    "description",
    "activations",
    "weights",
    "fusion",
    "convolution",
    "tables",
    "functions",
    "sampling",
    "arithmetic",
    "ops",
    "units",
    "memory",
)
_POSITIONS = ("float32", "integer")
_FORMAT = re.compile(r"u?int[0-9]+")
STEPS = ("product", "sum")  # the lowerings of qgraph need these; others may need more

ENGINE_FUNCTIONS: set[Callable[..., torch.Tensor]] = set()
"""Functions of the modules that targets read so far have named: saved graphs may name these."""


class _Table:
    """A TOML table whose keys are read with their expected kind."""

    def __init__(self, data: Mapping[str, Any], origin: str) -> None:
        self.data = data
        self.origin = origin

    def allow(self, known: Collection[str]) -> None:
        for key in self.data:
            if key not in known:
                raise TargetError(f"unknown key {key!r}", where=self.origin, fix=did_you_mean(key, known))

    def text(self, key: str) -> str:
        value = self._get(key, str, "a text")
        if not value:
            raise self.wrong(key, "a text that is not empty")
        return str(value)

    def flag(self, key: str) -> bool:
        return bool(self._get(key, bool, "true or false"))

    def number(self, key: str, *, whole: bool = False) -> float:
        value = self._get(key, (int, float), "a number")
        if isinstance(value, bool) or not value > 0 or value == float("inf") or (whole and not isinstance(value, int)):
            raise self.wrong(key, "a positive whole number" if whole else "a positive number")
        return float(value)

    def texts(self, key: str) -> list[str]:
        values = self._get(key, list, "a list of texts")
        if not values or not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of texts that is not empty")
        return list(values)

    def table(self, key: str) -> _Table:
        return _Table(self._get(key, dict, f"a table [{key}]"), f"{self.origin}, [{key}]")

    def tables(self, key: str) -> list[_Table]:
        entries = self._get(key, list, f"tables, each headed [[{key}]]")
        if not all(isinstance(entry, dict) for entry in entries):
            raise self.wrong(key, f"tables, each headed [[{key}]]")
        return [_Table(entry, f"{self.origin}, [[{key}]] number {i}") for i, entry in enumerate(entries, start=1)]

    def understood(self, read: Callable[[], _Parsed]) -> _Parsed:
        """What `read` returns; its errors are those of the file."""
        try:
            return read()
        except QGraphError as error:
            raise TargetError(error.what, where=self.origin, why=error.why, fix=error.fix) from error

    def wrong(self, key: str, expected: str) -> TargetError:
        return TargetError(f"{key} is {self.data[key]!r}", where=self.origin, fix=f"give {expected}")

    def _get(self, key: str, kind: Any, expected: str) -> Any:
        if key not in self.data:
            raise TargetError(f"the target file lacks {key!r}", where=self.origin, fix=f"give {expected}")
        if not isinstance(self.data[key], kind):
            raise self.wrong(key, expected)
        return self.data[key]


def _schemes(table: _Table, but: Collection[str]) -> dict[str, Scheme]:
    """Formats and their schemes."""
    found = {}
    for name in table.data:
        if name in but:
            continue
        if not _FORMAT.fullmatch(name):
            raise TargetError(
                f"unknown number format {name!r}",
                where=table.origin,
                fix=did_you_mean(name, {*but, "int8", "uint8", "int16"}),
            )
        table.understood(lambda name=name: parse_qtype(name))  # type: ignore[misc]
        word, schemes = table.text(name), {str(scheme): scheme for scheme in Scheme}
        if word not in schemes:
            raise TargetError(f"{name} is {word!r}", where=table.origin, fix=did_you_mean(word, schemes))
        found[name] = schemes[word]
    return found


def _factors(arithmetic: _Table, ops: Collection[str]) -> dict[str, str]:
    """How scales become factors: in general, and for single operators (`op.factors`)."""
    found = {}
    for name in ("factors", *(name for name in arithmetic.data if name.endswith(".factors"))):
        word = arithmetic.text(name)
        if word not in FACTORS:
            raise TargetError(f"{name} is {word!r}", where=arithmetic.origin, fix=did_you_mean(word, FACTORS))
        _check_op(name, ops, arithmetic)
        found[name] = word
    return found


def _many_groups(table: _Table, arithmetic: _Table) -> int | None:
    """How many groups a convolution may have before it takes another step."""
    if "convolution" not in table.data:
        return None
    convolution = table.table("convolution")
    convolution.allow({"many_groups"})
    arithmetic.text("many_groups")
    return int(convolution.number("many_groups", whole=True))


def _check_op(name: str, ops: Collection[str], arithmetic: _Table) -> None:
    """Refuses `op.step` where the target has no such operator; `step`, `step.format`, `op.step.format` are others."""
    parts = name.split(".")
    if len(parts) > 1 and _FORMAT.fullmatch(parts[-1]):
        arithmetic.understood(lambda: parse_qtype(parts.pop()))
    op = ".".join(parts[:-1])
    if op and op not in ops:
        raise TargetError(f"there is no operator {op!r}", where=arithmetic.origin, fix=did_you_mean(op, ops))


def _steps(table: _Table, ops: Collection[str]) -> dict[str, Arithmetic]:
    """The arithmetic of every step, and of steps of single operators (`op.step`)."""
    for step in STEPS:
        table.text(step)
    steps = {}
    for name in table.data:
        if name in ("quantize", "bounds") or name.endswith("factors"):
            continue
        _check_op(name, ops, table)
        steps[name] = _arithmetic(table, name)
    return steps


def _choice(table: _Table, key: str, known: Collection[str]) -> str:
    word = table.text(key)
    if word not in known:
        raise TargetError(f"{key} is {word!r}", where=table.origin, fix=did_you_mean(word, known))
    return word


def _memories(table: _Table) -> dict[str, Memory]:
    levels = {}
    for name in table.data:
        if name == "clock_hz":
            continue
        level = table.table(name)
        level.allow({"bytes", "bytes_per_cycle"})
        levels[name] = Memory(level.number("bytes"), level.number("bytes_per_cycle"))
    if "ddr" not in levels:
        raise TargetError("the memory 'ddr' is not described", where=table.origin, fix="add [memory.ddr]")
    return levels


def _quantize_rule(table: _Table, key: str) -> QuantizeRule:
    word = table.text(key)
    return table.understood(lambda: parse_quantize_rule(word))


def _arithmetic(table: _Table, step: str) -> Arithmetic:
    word = table.text(step)
    return table.understood(lambda: parse_arithmetic(word))


def _table_form(table: _Table, name: str) -> TableForm:
    qtype = table.understood(lambda: parse_qtype(name))
    if table.data[name] == "full":
        return None
    if table.data[name] == str(TwoTables()):
        return TwoTables()
    if isinstance(table.data[name], dict):
        return _segments(_Table(table.data[name], f"{table.origin}, {name}"), qtype)
    count = int(table.number(name, whole=True))
    table.understood(lambda: check_intervals(count, qtype))
    return count


def _functions(table: _Table, ops: Collection[str]) -> Functions:
    """How function tables are made."""
    table.allow({"values", "quantize", "rescale", "module"})
    precisions = {"float32": torch.float32, "float64": torch.float64}
    if table.text("values") not in precisions:
        raise table.wrong("values", " or ".join(precisions))
    return Functions(
        values=precisions[table.text("values")],
        quantize=table.understood(lambda: parse_quantize_rule(table.text("quantize"))),
        rescale=table.flag("rescale"),
        own=_from_module(table, "FUNCTIONS", ops),
        tables=_from_module(table, "TABLES", ops),
    )


def _from_module(table: _Table, kind: str, ops: Collection[str]) -> Mapping[str, Callable[..., torch.Tensor]]:
    """`FUNCTIONS` or `TABLES` of the Python module the file names; a module may have one of them only."""
    if "module" not in table.data:
        return {}
    name = table.text("module")
    try:
        module = importlib.import_module(name)
        own = getattr(module, kind, None)
        if own is None and not hasattr(module, "TABLES" if kind == "FUNCTIONS" else "FUNCTIONS"):
            raise AttributeError("it has neither FUNCTIONS nor TABLES")
    except (ImportError, AttributeError) as error:
        raise TargetError(
            f"the functions of {name!r} cannot be read",
            where=table.origin,
            why=f"{type(error).__name__}: {error}",
            fix="name an importable module with a dictionary FUNCTIONS or TABLES from operator names to functions",
        ) from error
    for op in own or ():
        if op not in ops:
            raise TargetError(
                f"{name} has a function for {op!r}, which the target does not run",
                where=table.origin,
                fix=did_you_mean(op, ops),
            )
    ENGINE_FUNCTIONS.update((own or {}).values())
    return dict(own or {})


def _segments(table: _Table, qtype: QType) -> SegmentForm:
    table.allow({"segments", "entries", "break_points", "fraction_bits"})
    break_points = table.text("break_points")
    if break_points not in ("even", "curvature"):
        raise table.wrong("break_points", '"even" or "curvature"')
    fraction_bits = table.data.get("fraction_bits", 0)
    if not isinstance(fraction_bits, int) or isinstance(fraction_bits, bool):
        raise table.wrong("fraction_bits", "a whole number")

    def form() -> SegmentForm:
        segments, entries = (int(table.number(key, whole=True)) for key in ("segments", "entries"))
        made = SegmentForm(segments, entries, break_points == "curvature", fraction_bits)
        made.check(qtype)
        return made

    return table.understood(form)


def _units(table: _Table) -> dict[str, dict[str, float]]:
    return {unit: _rates(table.table(unit)) for unit in table.data}


def _rates(table: _Table) -> dict[str, float]:
    names = [name for formats in table.data for name in formats.split("*")]
    table.understood(lambda: [parse_format(name) for name in names])
    return {formats: table.number(formats) for formats in table.data}


def _ops(entries: list[_Table], units: Collection[str]) -> dict[str, OpRule]:
    known = {op.name for op in OPS}
    ops: dict[str, OpRule] = {}
    for entry in entries:
        entry.allow({"names", "unit", "legal", "without", "factor_range", "least_scale", "fixed_result", *_FLAGS})
        unit = entry.text("unit")
        if unit not in units:
            raise TargetError(f"unit {unit!r} is not described", where=entry.origin, fix=did_you_mean(unit, units))
        rule = _op_rule(entry, unit)
        for name in entry.texts("names"):
            if name in ops:
                raise TargetError(f"operator {name!r} is described twice", where=entry.origin)
            if name not in known:
                raise TargetError(
                    f"there is no operator {name!r}", where=entry.origin, fix=did_you_mean(name, known - ops.keys())
                )
            ops[name] = rule
    return ops


_FLAGS = {"numbers": True, "one_pixel": True, "global_only": False, "same_scale": False, "tensorflow_padding": False}


def _op_rule(entry: _Table, unit: str) -> OpRule:
    legal = tuple(_legal(line, entry) for line in entry.texts("legal"))
    flags = {name: entry.flag(name) if name in entry.data else default for name, default in _FLAGS.items()}
    without = tuple(entry.texts("without")) if "without" in entry.data else ()
    for option in without:
        if option not in OPTIONAL:
            raise TargetError(f"without has {option!r}", where=entry.origin, fix=did_you_mean(option, OPTIONAL))
    fixed = _fixed_result(entry, legal)
    if fixed and flags["same_scale"]:
        raise TargetError(
            "a result keeps its operand's scale and has a fixed one",
            where=entry.origin,
            fix="give same_scale or fixed_result, not both",
        )
    least = entry.number("least_scale") if "least_scale" in entry.data else 0.0
    span = _factor_range(entry)
    return OpRule(unit, legal, fixed_result=fixed, without=without, factor_range=span, least_scale=least, **flags)


def _fixed_result(entry: _Table, legal: tuple[LegalFormats, ...]) -> dict[str, tuple[float, int]]:
    if "fixed_result" not in entry.data:
        return {}
    fixed, results = entry.table("fixed_result"), {str(f): f for line in legal for f in line.results}
    for name in fixed.data:
        if name not in results:
            raise TargetError(
                f"{name!r} is no format of the result", where=fixed.origin, fix=did_you_mean(name, results)
            )
    return {name: _scale_and_zero(fixed, name) for name in fixed.data}


def _factor_range(entry: _Table) -> tuple[float, float] | None:
    given = entry.data.get("factor_range")
    if given is None:
        return None
    if (
        not isinstance(given, list)
        or [type(value) for value in given] != [float, float]
        or not 0 <= given[0] < given[1]
    ):
        raise entry.wrong("factor_range", "a list of two numbers such as [0.001, 256.0], the smaller one first")
    return given[0], given[1]


def _scale_and_zero(table: _Table, name: str) -> tuple[float, int]:
    qtype, given = table.understood(lambda: parse_qtype(name)), table.data[name]
    kinds = [type(value) for value in given] if isinstance(given, list) else []
    if len(kinds) != 2 or kinds[0] not in (int, float) or kinds[1] is not int:
        raise table.wrong(name, "a list of scale and zero point")
    scale, zero = float(given[0]), given[1]
    table.understood(lambda: qparams_from_scale(scale, qtype, zero))
    return scale, zero


def _legal(line: str, entry: _Table) -> LegalFormats:
    operands, arrow, results = line.partition("->")
    if not arrow:
        raise TargetError(
            f"{line!r} is not a line of legal formats",
            where=entry.origin,
            fix="write operands and results like: int8, int8 -> int8|int16",
        )

    def column(text: str) -> tuple[Format, ...]:
        return tuple(parse_format(name.strip()) for name in text.split("|"))

    return entry.understood(lambda: LegalFormats(tuple(column(text) for text in operands.split(",")), column(results)))

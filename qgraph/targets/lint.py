"""Looks for what a target file says twice, wrongly, or not at all.

`parse_target` refuses what cannot be understood; the linter reads what can be, and asks whether it makes sense: every
rule is a function in `LINT_RULES` that yields findings. An error contradicts something else in the file, a warning has
no effect or leaves operators in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qgraph.errors import QGraphError, TargetError, did_you_mean
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import OPS
from qgraph.numerics import EngineSum, OneDnn, QType, RequantizeRule, Scheme, parse_format, qint32
from qgraph.targets.find import get_target, load_target, target_path
from qgraph.targets.target import LegalFormats, OpRule, Target

_BORDER = "quant_stub"
_STEPS = ("product", "sum", "rescale", "sample", "many_groups")


class Severity(str, Enum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Args:
        severity: error or warning.
        where: the part of the file.
        what: what is wrong.
        fix: what to do.
    """

    severity: Severity
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what} ({self.fix})"


def lint_target(target: Target | str | Path) -> list[Finding]:
    """What is contradictory, useless or missing in a target.

    Args:
        target: a target, the name of one, or the path of a TOML file, as for `get_target`; a file that cannot be read
            or understood is one error.

    Raises:
        TargetError: no target has the name, or it is neither a name, a path nor a target.
    """
    if not isinstance(target, Target):
        path = target_path(target)
        if path is None:
            return lint_target(get_target(target))
        try:
            target = load_target(path)
        except TargetError as error:
            what = error.what if error.why is None else f"{error.what}: {error.why}"
            return [Finding(Severity.ERROR, error.where or str(target), what, error.fix or "correct the file")]
    return [finding for rule in LINT_RULES for finding in rule(target)]


def _error(where: str, what: str, fix: str) -> Finding:
    return Finding(Severity.ERROR, where, what, fix)


def _warning(where: str, what: str, fix: str) -> Finding:
    return Finding(Severity.WARNING, where, what, fix)


# --- formats --------------------------------------------------------------------------------------------------------


def _formats_have_schemes(target: Target) -> Iterator[Finding]:
    """Every result format that codes can have is in [activations], every weight format in [weights]."""
    for op, rule in target.ops.items():
        for found in sorted(_results(rule) - {str(qint32)} - set(target.activations)):
            yield _error(
                "[[ops]]", f"{op} has results in {found}, which [activations] does not describe", "add the format there"
            )
        if "weight" in OPS.named(op).operands and OPS.named(op).kind is OpKind.MATMUL:
            for line in rule.legal:
                for found in sorted({str(f) for f in _column(line, 1)} - set(target.weights)):
                    yield _error(
                        "[[ops]]", f"{op} has weights in {found}, unknown to [weights]", "add the format there"
                    )


def _schemes_fit_formats(target: Target) -> Iterator[Finding]:
    """Unsigned formats need zero points; weights have none."""
    for name, scheme in target.activations.items():
        if scheme is not Scheme.AFFINE and _is_unsigned(name):
            yield _error("[activations]", f"{name} cannot be {scheme}: its codes have no sign", 'use "affine"')
    for name, scheme in target.weights.items():
        if scheme is Scheme.AFFINE:
            yield _error("[weights]", f"{name} is affine, and products know symmetric weights only", 'use "symmetric"')


def _eight_bits_are_usable(target: Target) -> Iterator[Finding]:
    """The default format of 8 bits has a scheme and enters and leaves the device."""
    name = str(target.eight_bits)
    if name not in target.activations:
        yield _error("[activations]", f"eight_bits is {name}, which has no scheme", f'add {name} = "..."')
    if _BORDER not in target.ops:
        yield _error("[[ops]]", f"no entry names {_BORDER}: nothing can enter the device", f"add {_BORDER} to an entry")
    elif name not in _results(target.ops[_BORDER]):
        yield _error("[[ops]]", f"{_BORDER} has no results in {name}, the default", f"add {name} to its results")


def _formats_are_used(target: Target) -> Iterator[Finding]:
    """A format of [activations] or [tables] that no operator has says nothing."""
    used = {name for rule in target.ops.values() for name in _results(rule)}
    for name in sorted(set(target.activations) - used):
        yield _warning("[activations]", f"no operator has results in {name}", "remove it, or add it to legal lines")
    for name in sorted(set(target.tables) - _operand_formats(target)):
        yield _warning("[tables]", f"no operator reads {name}", "remove it, or add it to legal lines")


# --- operators ------------------------------------------------------------------------------------------------------


def _operators_can_be_lowered(target: Target) -> Iterator[Finding]:
    """An operator without integer form stays in float whatever the file says."""
    for op in target.ops:
        entry = OPS.named(op)
        if entry.lowering is None and entry.kind not in (OpKind.STRUCTURE, OpKind.COMPOSITE):
            yield _warning("[[ops]]", f"nothing takes {op} to integers: it stays in float", "remove it")


def _tables_exist(target: Target) -> Iterator[Finding]:
    """Functions are tables of their operand's format."""
    for op, rule in target.ops.items():
        if OPS.named(op).kind is not OpKind.TABLE:
            continue
        for name in sorted({str(f) for line in rule.legal for f in line.operands[0]} - set(target.tables)):
            yield _error("[tables]", f"{op} reads {name}, for which no table is described", f"add {name} to [tables]")


def _lines_say_something(target: Target) -> Iterator[Finding]:
    """A line that another line contains is never needed."""
    seen: set[int] = set()
    for op, rule in target.ops.items():
        if id(rule) in seen:
            continue
        seen.add(id(rule))
        for i, line in enumerate(rule.legal):
            if any(_contains(other, line) and (other != line or j < i) for j, other in enumerate(rule.legal) if j != i):
                yield _warning("[[ops]]", f"{op}: the line {str(line)!r} is part of another one", "remove it")


def _decompositions_are_complete(target: Target) -> Iterator[Finding]:
    """A composite goes to integers only if the device has every step of it; the target may lack one by oversight."""
    for name, steps in COMPOSITE_STEPS.items():
        present = [step for step in steps if step in target.ops]
        lacking = [step for step in steps if step not in target.ops]
        if name not in target.ops and lacking and len(present) >= 2 and len(lacking) <= 2:
            fix = f"add {', '.join(lacking)}, or accept the float island"
            yield _warning("[[ops]]", f"{name} stays in float for want of {', '.join(lacking)}", fix)


COMPOSITE_STEPS = {
    "softmax": ("amax", "sub", "exp", "sum", "reciprocal", "mul"),
    "layer_norm": ("mean", "sub", "mul", "rsqrt", "affine"),
}
"""Steps of the composites most networks have, as `decompose-composites` makes them (a test compares them)."""


# --- units and memory -----------------------------------------------------------------------------------------------


def _units_have_rates(target: Target) -> Iterator[Finding]:
    """The cost of an operator is its work over its unit's rate for the operands' formats."""
    missing: dict[tuple[str, str], str] = {}
    for op, rule in target.ops.items():
        for needed in sorted(_rates_needed(op, rule) - set(target.units.get(rule.unit, {}))):
            missing.setdefault((rule.unit, needed), op)
    for (unit, needed), op in missing.items():
        yield _error(f"[units.{unit}]", f"no rate for {needed}, which {op} needs", f'add "{needed}" = <work per cycle>')


def _units_are_used(target: Target) -> Iterator[Finding]:
    used = {rule.unit for rule in target.ops.values()}
    for unit in target.units:
        if unit not in used and unit != "cpu":
            yield _warning(f"[units.{unit}]", "no operator runs there", "remove it, or name it in an [[ops]] entry")


def _memories_are_ordered(target: Target) -> Iterator[Finding]:
    """Memory nearer to the units is smaller and faster."""
    far = target.memories["ddr"]
    for name, near in target.memories.items():
        if name == "ddr":
            continue
        if near.bytes > far.bytes:
            yield _error(f"[memory.{name}]", "it is larger than ddr", "exchange the sizes")
        if near.bytes_per_cycle < far.bytes_per_cycle:
            yield _error(f"[memory.{name}]", "it is slower than ddr", "exchange the bandwidths")


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _words_fit_steps(target: Target) -> Iterator[Finding]:
    """The word of an engine's sum of two rescales nothing else, and the other way round."""
    for name, word in target.arithmetic.items():
        step = name.split(".")[1] if "." in name else name
        if step == "sum":
            if not isinstance(word.rule, (EngineSum, RequantizeRule)):
                yield _error("[arithmetic]", f"{name}: {word.rule} rescales single products", "use it for products")
        elif isinstance(word.rule, EngineSum):
            yield _error("[arithmetic]", f"{name}: {word.rule} adds two terms, it rescales none", "use it for sum")
        elif isinstance(word.rule, OneDnn) and "." not in name and name != "many_groups":
            yield _error("[arithmetic]", f"{name}: {word.rule} knows convolutions and linear only", "name the operator")
    if target.residual and isinstance(target.step("sum").rule, EngineSum):
        yield _error("[fusion]", f"residual is true, and {target.step('sum')} adds two codes only", "residual = false")


def _steps_are_known(target: Target) -> Iterator[Finding]:
    """A lowering of another package may ask for a step of its own, so a word for it is no error."""
    for name in target.arithmetic:
        parts = [part for part in name.split(".") if part not in target.ops and not _is_format(part)]
        for step in parts:
            if step not in _STEPS:
                yield _warning("[arithmetic]", f"{name}: qgraph has no step {step!r}", did_you_mean(step, _STEPS))


def _accumulators_hold_products(target: Target) -> Iterator[Finding]:
    """One product of two codes must fit the accumulator, or nothing can be computed."""
    for op, rule in target.ops.items():
        if OPS.named(op).kind is not OpKind.MATMUL:
            continue
        word = target.step("product", op)
        for line in rule.legal:
            bits = max(_bits(f) for f in _column(line, 0)) + max(_bits(f) for f in _column(line, 1)) - 1
            if bits > word.accumulator.bits:
                yield _error(
                    "[arithmetic]",
                    f"{op}: a product of {line} has {bits} bits, the accumulator {word.accumulator.bits}",
                    "widen the accumulator, or narrow the formats",
                )


# --- helpers --------------------------------------------------------------------------------------------------------


def _results(rule: OpRule) -> set[str]:
    return {str(found) for line in rule.legal for found in line.results}


def _operand_formats(target: Target) -> set[str]:
    return {str(f) for rule in target.ops.values() for line in rule.legal for column in line.operands for f in column}


def _column(line: LegalFormats, index: int) -> tuple[object, ...]:
    return line.operands[min(index, len(line.operands) - 1)]


def _bits(format: object) -> int:
    return format.bits if isinstance(format, QType) else 0


def _is_format(name: str) -> bool:
    try:
        parse_format(name)
    except QGraphError:
        return False
    return True


def _is_unsigned(name: str) -> bool:
    parsed = parse_format(name)
    return isinstance(parsed, QType) and not parsed.signed


def _contains(wide: LegalFormats, narrow: LegalFormats) -> bool:
    """Whether every combination of `narrow` is one of `wide`."""
    columns = max(len(wide.operands), len(narrow.operands))
    within = all(set(_column(narrow, i)) <= set(_column(wide, i)) for i in range(columns))
    return within and set(narrow.results) <= set(wide.results)


def _rates_needed(op: str, rule: OpRule) -> set[str]:
    if OPS.named(op).kind is OpKind.MATMUL:
        return {f"{a}*{b}" for line in rule.legal for a in _column(line, 0) for b in _column(line, 1)}
    return {str(f) for line in rule.legal for column in line.operands for f in column}


LINT_RULES: tuple[Callable[[Target], Iterator[Finding]], ...] = (
    _formats_have_schemes,
    _schemes_fit_formats,
    _eight_bits_are_usable,
    _formats_are_used,
    _operators_can_be_lowered,
    _tables_exist,
    _lines_say_something,
    _decompositions_are_complete,
    _units_have_rates,
    _units_are_used,
    _memories_are_ordered,
    _words_fit_steps,
    _steps_are_known,
    _accumulators_hold_products,
)

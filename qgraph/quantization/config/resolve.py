"""From setters to one decision per site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qgraph.errors import QuantizationError, UserError, did_you_mean
from qgraph.quantization.config.attributes import AttributeQconfigSetter, attribute_setters
from qgraph.quantization.config.dictionary import dict_setters
from qgraph.quantization.config.qconfig import QConfig, Setting, Threshold
from qgraph.quantization.config.query import SiteQuery
from qgraph.quantization.config.setters import (
    DefaultQconfigSetter,
    ModuleTypeQconfigSetter,
    QConfigSetter,
    default_calibration_qconfig_setter,
)
from qgraph.quantization.config.templates import QconfigSetter
from qgraph.quantization.plan import Plan

_FORMATS = ("output", "weight", "input", "inputs")
_WEIGHT = ("weight", "weight_observer")


@dataclass(frozen=True)
class Decision:
    """What was decided for one site.

    Args:
        qconfig: the configuration; None if it stays in float.
        rule: who decided the result's format, or that it stays in float.
        rules: who decided, field by field of `QConfig`.
        overrode: later setters that would have answered otherwise for the result, `name: what`.
        weight_overrode: the same for the weight.
        preference: whether illegal formats become the nearest legal ones, instead of an error.
        plan: the plan that decided the result's format, if one did.
        weight_plan: the plan that decided the weight's format, if one did.
    """

    qconfig: QConfig | None
    rule: str
    rules: Mapping[str, str]
    overrode: tuple[str, ...] = ()
    weight_overrode: tuple[str, ...] = ()
    preference: bool = False
    plan: Plan | None = None
    weight_plan: Plan | None = None


@dataclass(frozen=True)
class _Answer:
    """What one setter gives for a site: the fields it decides, and those it would have decided otherwise."""

    setter: QConfigSetter
    preference: bool
    used: dict[str, Any]
    lost: dict[str, Any]


def as_setters(value: Any, model: nn.Module | None = None) -> tuple[QConfigSetter, ...]:
    """Setters from what `prepare` accepts, most specific first; the last is a default.

    Args:
        value: None, a `QConfig`, a setter, a qconfig dict, a plan or the path of one, or an ordered sequence of these.
        model: its `qconfig` attributes come before everything but plans at the front, which record them.

    Raises:
        UserError: something else was given.
    """
    given = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
    setters = [setter for entry in given for setter in _setters_of(entry)]
    if not any(isinstance(setter, DefaultQconfigSetter) for setter in setters):
        setters.append(default_calibration_qconfig_setter)
    if model is not None:
        first = next(index for index, setter in enumerate(setters) if not isinstance(setter, Plan))
        setters[first:first] = attribute_setters(model)
    return tuple(setters)


def _setters_of(entry: Any) -> Sequence[QConfigSetter]:
    if isinstance(entry, QConfig):
        return [DefaultQconfigSetter(entry, "qconfig")]
    if isinstance(entry, QconfigSetter):
        return entry.setters()
    if isinstance(entry, Mapping) and not isinstance(entry, Plan):
        return dict_setters(entry)
    if isinstance(entry, Path) or (isinstance(entry, str) and entry.endswith(".toml")):
        return [Plan.load(entry)]
    if isinstance(entry, QConfigSetter) and not isinstance(entry, type):
        return [entry]
    raise UserError(
        f"qconfig_setter holds {entry!r}",
        fix="give a QConfig, a setter such as ModuleNameQconfigSetter, a qconfig dict, a plan or its file (.toml), "
        "or a tuple of these",
    )


def resolve(setters: Iterable[QConfigSetter], query: SiteQuery, *, quantized: bool = False) -> Decision:
    """The answers of all setters for a site, merged field by field.

    Args:
        setters: most specific first.
        query: the site.
        quantized: whether answers that keep it in float are left out, as for the stub behind an operator in float.

    Raises:
        QuantizationError: no setter answers, or one answers something else than a configuration.
    """
    values: dict[str, Any] = {}
    rules: dict[str, str] = {}
    by: dict[str, _Answer] = {}
    overrode: list[str] = []
    weight_overrode: list[str] = []
    for answer in _answers(setters, query, quantized):
        rule = _cited(answer.setter, query) if answer.used or answer.lost else ""
        for name in answer.used:
            rules[name], by[name] = rule, answer
        values.update(answer.used)
        if values.get("stays_float"):
            if answer.lost:
                overrode.append(f"{rule}: {_described(answer.lost)}")
            continue
        lost = {name: value for name, value in answer.lost.items() if name not in _WEIGHT}
        weight_lost = {name: value for name, value in answer.lost.items() if name in _WEIGHT}
        if lost:
            overrode.append(f"{rule}: {_described(lost)}")
        if weight_lost:
            weight_overrode.append(f"{rule}: {_described(weight_lost)}")
    if values.pop("stays_float", False):
        return Decision(None, rules["stays_float"], rules, tuple(overrode))
    if "output" not in values or "weight" not in values:
        raise QuantizationError(f"no setter answers for site {query.site}", fix="end the setters with a default")
    qconfig = QConfig(**values)
    deciders = [by[name] for name in _FORMATS if name in by and getattr(qconfig, name) is not None]
    plan, weight_plan = by["output"].setter, by["weight"].setter
    return Decision(
        qconfig,
        rules["output"],
        rules,
        tuple(overrode),
        tuple(weight_overrode),
        all(answer.preference for answer in deciders),
        plan if isinstance(plan, Plan) else None,
        weight_plan if isinstance(weight_plan, Plan) else None,
    )


def _answers(setters: Iterable[QConfigSetter], query: SiteQuery, quantized: bool = False) -> Iterator[_Answer]:
    """What each setter gives, in order."""
    values: dict[str, Any] = {}
    for setter in setters:
        answer = setter.decide(query)
        if answer is None:
            continue
        if not isinstance(answer, (QConfig, Setting)):
            raise QuantizationError(
                f"the setter {setter.name} answered {answer!r} for site {query.site}",
                fix="let decide() return a QConfig or Setting, or None to leave the site to the next setter",
            )
        given = answer.given()
        if quantized and given.get("stays_float"):
            continue
        closed = set(values) | _said_otherwise(values) | (set(given) if values.get("stays_float") else set())
        used = {name: value for name, value in given.items() if name not in closed}
        lost = {name: value for name, value in given.items() if name in closed and _differs(name, value, values)}
        preference = isinstance(setter, DefaultQconfigSetter) or (isinstance(answer, Setting) and answer.preference)
        values.update(used)
        yield _Answer(setter, preference, used, lost)


def _said_otherwise(values: Mapping[str, Any]) -> set[str]:
    """Fields that another field has decided: there are two ways to give a scale, and two for operands."""
    found = set()
    threshold = values.get("threshold")
    if threshold is not None and threshold.output is not None:
        found.add("fixed_scale")
    if values.get("fixed_scale") is not None:
        found.add("threshold")
    if values.get("input") is not None or values.get("inputs") is not None:
        found |= {"input", "inputs"}
    return found


_SILENT = {"input": None, "inputs": None, "fixed_scale": None, "threshold": None, "frozen": False}


def _differs(name: str, value: Any, values: Mapping[str, Any]) -> bool:
    """Whether a field that is already decided would have become something worth telling."""
    if values.get("stays_float"):
        return name in ("output", "stays_float") and value is not True
    if name == "fake_quant" and value == "fake_quant":
        return False
    return bool(values.get(name) != value and not (name in _SILENT and value == _SILENT[name]))


def _described(lost: Mapping[str, Any]) -> str:
    """Fields in words; formats of result and weight stand for themselves."""
    if lost.get("stays_float"):
        return "float"
    shown = []
    for name, value in lost.items():
        if isinstance(value, Threshold):
            value = ", ".join(f"{port} {getattr(value, port)}" for port in ("input", "weight", "output"))
        elif name == "inputs":
            value = ", ".join(str(one) for one in value)
        if name != "stays_float":
            shown.append(str(value) if name in ("output", "weight") else f"{name} {value}")
    return ", ".join(shown) or "quantized"


def _cited(setter: QConfigSetter, query: SiteQuery) -> str:
    cite = getattr(setter, "cite", None)
    return setter.name if cite is None else str(cite(query))


def check_all_used(setters: Iterable[QConfigSetter], queries: Sequence[SiteQuery]) -> None:
    """Refuses settings that decide nothing for any of the sites asked for.

    Raises:
        QuantizationError: a name matched nothing, or earlier settings always win; close matches are given.
    """
    ordered = list(setters)
    reached: dict[int, list[SiteQuery]] = {id(setter): [] for setter in ordered}
    for query in queries:
        for answer in _answers(ordered, query):
            if answer.used:
                reached[id(answer.setter)].append(query)
    for setter in ordered:
        # Only a plan comes before attributes, and it records what they decided: they need not decide it again.
        recorded = isinstance(setter, AttributeQconfigSetter)
        for key in setter.unused(queries if recorded else reached[id(setter)]):
            raise QuantizationError(
                f"the {setter.name} setting for {key!r} has no effect",
                why="no quantized site of the graph has that name, or a deeper name or an earlier setter always wins",
                fix=did_you_mean(key.removesuffix(".qconfig"), _known(setter, queries)),
            )


def _known(setter: QConfigSetter, queries: Sequence[SiteQuery]) -> list[str]:
    """What a setting could have been for."""
    if isinstance(setter, ModuleTypeQconfigSetter):
        return [name for query in queries for name in (query.op, *(cls.__name__ for cls in query.types))]
    return [name for query in queries for name in query.names]

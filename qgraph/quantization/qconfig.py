"""What the user asks for, site by site: formats and observers, and who decides where.

A setter answers for a site or passes. Setters are asked in order, most specific first, the default last; what each of
them matched is remembered, so that a setting without effect is an error and not a surprise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch

from qgraph.errors import QuantizationError, UserError, did_you_mean
from qgraph.numerics import Format, QType, as_format, qint8, qint16, qparams_from_scale
from qgraph.quantization.observers import Observer, observer_name


@dataclass(frozen=True)
class QConfig:
    """Formats and observers for one site.

    Args:
        output: format of the result.
        weight: format of the weight, for operators that have one.
        input: format the operands must have; None takes them as they come.
        activation_observer: registered name of the observer of the result.
        weight_observer: registered name of the observer of the weight.
        fixed_scale: scale of the result, never updated.
    """

    output: Format = qint8
    weight: Format = qint8
    input: Format | None = None
    activation_observer: str = "min_max"
    weight_observer: str = "min_max"
    fixed_scale: float | None = None

    def __post_init__(self) -> None:
        # Names and torch dtypes are as good as formats, classes as good as names.
        object.__setattr__(self, "output", as_format(self.output))
        object.__setattr__(self, "weight", as_format(self.weight))
        if self.input is not None:
            object.__setattr__(self, "input", as_format(self.input))
        object.__setattr__(self, "activation_observer", observer_name(self.activation_observer))
        object.__setattr__(self, "weight_observer", observer_name(self.weight_observer))
        if self.fixed_scale is not None:
            given: Any = self.fixed_scale
            if isinstance(given, bool) or not isinstance(given, Real):
                raise QuantizationError(f"a fixed scale of {given!r} is no number", fix="give a float")
            qparams_from_scale(self.fixed_scale, qint8)


def get_qconfig(
    observer: str | type[Observer] = "min_max",
    in_dtype: Format | torch.dtype | str | None = None,
    weight_dtype: Format | torch.dtype | str = qint8,
    out_dtype: Format | torch.dtype | str = qint8,
    fix_scale: float | None = None,
) -> QConfig:
    """A `QConfig` from formats, torch dtypes or names such as `"int16"` and `"qint16"`.

    Raises:
        UserError: a format or observer does not exist.
    """
    return QConfig(
        output=as_format(out_dtype),
        weight=as_format(weight_dtype),
        input=None if in_dtype is None else as_format(in_dtype),
        activation_observer=observer_name(observer),
        fixed_scale=fix_scale,
    )


@dataclass(frozen=True)
class SiteQuery:
    """A site for which a decision is wanted.

    Args:
        site: its name.
        module: path of the enclosing module.
        origins: names of the captured nodes it stands for.
        op: its operator's name.
    """

    site: str
    module: str
    origins: tuple[str, ...]
    op: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every name the site answers to: its own, its members', each also without the call number."""
        names = [self.site, *self.origins]
        return tuple(dict.fromkeys([*names, *(name.partition("(")[0] for name in names)]))


@runtime_checkable
class QConfigSetter(Protocol):
    """Decides for some sites."""

    @property
    def name(self) -> str:
        """How decisions of this setter are cited."""

    def decide(self, query: SiteQuery) -> QConfig | None:
        """The configuration for a site; None to leave it to the next setter."""

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        """Parts of this setter that decide none of the sites asked for."""


@dataclass(frozen=True)
class DefaultQconfigSetter:
    """The same configuration for every site.

    Args:
        qconfig: the configuration.
        label: how its decisions are cited.
    """

    qconfig: QConfig = field(default_factory=QConfig)
    label: str = "default"

    @property
    def name(self) -> str:
        return self.label

    def decide(self, query: SiteQuery) -> QConfig | None:
        return self.qconfig

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return []


@dataclass(frozen=True)
class ModuleNameQconfigSetter:
    """Configurations by name: a site, a fused member, or a module with everything in it; `""` is every site.

    The longest matching name wins.

    Args:
        qconfigs: name to configuration.
    """

    qconfigs: Mapping[str, QConfig]

    def __post_init__(self) -> None:
        if not isinstance(self.qconfigs, Mapping):
            raise UserError(
                f"ModuleNameQconfigSetter was given a {type(self.qconfigs).__name__}", fix='give {"name": QConfig(...)}'
            )
        for key, value in self.qconfigs.items():
            if not isinstance(key, str):
                raise UserError(f"the name {key!r} of a setting is a {type(key).__name__}", fix="give site names")
            if not isinstance(value, QConfig):
                raise UserError(
                    f"the configuration for {key!r} is a {type(value).__name__}", fix="give QConfig or get_qconfig(...)"
                )

    @property
    def name(self) -> str:
        return "module name"

    def decide(self, query: SiteQuery) -> QConfig | None:
        key = self._best_match(query)
        return None if key is None else self.qconfigs[key]

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        used = {self._best_match(query) for query in queries}
        return [key for key in self.qconfigs if key not in used]

    def _best_match(self, query: SiteQuery) -> str | None:
        matching = [key for key in self.qconfigs if any(_covers(key, name) for name in query.names)]
        return max(matching, key=len, default=None)


def _covers(key: str, name: str) -> bool:
    return key in ("", name) or name.startswith((f"{key}.", f"{key}(", f"{key}["))


default_calibration_qconfig_setter = DefaultQconfigSetter(QConfig(), "default_calibration_qconfig_setter")
default_qat_qconfig_setter = DefaultQconfigSetter(
    QConfig(activation_observer="moving_average"), "default_qat_qconfig_setter"
)
calibration_8bit_weight_16bit_act_qconfig_setter = DefaultQconfigSetter(
    QConfig(output=qint16), "calibration_8bit_weight_16bit_act_qconfig_setter"
)
qat_8bit_weight_16bit_act_qconfig_setter = DefaultQconfigSetter(
    QConfig(output=qint16, activation_observer="moving_average"), "qat_8bit_weight_16bit_act_qconfig_setter"
)


def as_setters(value: Any) -> tuple[QConfigSetter, ...]:
    """Setters from what `prepare` accepts: None, a `QConfig`, a setter, or an ordered sequence of these.

    The result always ends with a default.

    Raises:
        UserError: something else was given.
    """
    given = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
    setters: list[QConfigSetter] = []
    for entry in given:
        if isinstance(entry, QConfig):
            setters.append(DefaultQconfigSetter(entry, "qconfig"))
        elif isinstance(entry, QConfigSetter) and not isinstance(entry, type):
            setters.append(entry)
        else:
            raise UserError(
                f"qconfig_setter holds {entry!r}",
                fix="give a QConfig, a setter such as ModuleNameQconfigSetter, or a tuple of these",
            )
    if not any(isinstance(setter, DefaultQconfigSetter) for setter in setters):
        setters.append(default_calibration_qconfig_setter)
    return tuple(setters)


def resolve(setters: Iterable[QConfigSetter], query: SiteQuery) -> tuple[QConfig, str]:
    """The first answer for a site, and the name of the setter that gave it.

    Raises:
        QuantizationError: no setter answers.
    """
    for setter in setters:
        qconfig = setter.decide(query)
        if isinstance(qconfig, QConfig):
            return qconfig, setter.name
        if qconfig is not None:
            raise QuantizationError(
                f"the setter {setter.name} answered {qconfig!r} for site {query.site}",
                fix="let decide() return a QConfig, or None to leave the site to the next setter",
            )
    raise QuantizationError(f"no setter answers for site {query.site}", fix="end the setters with a default")


def check_all_used(setters: Iterable[QConfigSetter], queries: Sequence[SiteQuery]) -> None:
    """Refuses settings that decide none of the sites asked for.

    Raises:
        QuantizationError: a name matched nothing; close matches are given.
    """
    left = queries
    for setter in setters:
        if isinstance(setter, DefaultQconfigSetter):
            left = ()  # it answers for every site, so that nobody asks those after it
            continue
        for key in setter.unused(left):
            known = [name for query in queries for name in query.names]
            raise QuantizationError(
                f"the {setter.name} setting for {key!r} has no effect",
                why="no quantized site of the graph has that name, or a longer name or an earlier setter always wins",
                fix=did_you_mean(key, known),
            )
        left = [query for query in left if setter.decide(query) is None]


def require_integer(value: Format, where: str) -> QType:
    """`value` as an integer format.

    Raises:
        QuantizationError: it is a float format.
    """
    if not isinstance(value, QType):
        raise QuantizationError(
            f"format {value} is not available for this site",
            where=where,
            why="only int8 and int16 are lowered so far",
            fix="use qint8 or qint16",
        )
    return value

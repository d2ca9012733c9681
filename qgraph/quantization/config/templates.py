"""Templates: settings from broad to narrow, as one setter. The last template that says something wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from qgraph.errors import UserError, did_you_mean
from qgraph.numerics import Format, as_format, qint16
from qgraph.quantization.config.qconfig import PORTS, FormatLike, QConfig, Setting, as_threshold
from qgraph.quantization.config.query import SiteQuery, deepest, unused_keys
from qgraph.quantization.config.sensitivity import KINDS, SensitivityQconfigSetter, sensitivity_setter
from qgraph.quantization.config.setters import DefaultQconfigSetter, QConfigSetter

_CONVOLUTIONS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)) | {"linear"}
_MATMULS = frozenset({"matmul"})


@runtime_checkable
class Template(QConfigSetter, Protocol):
    """A setter with a flag that protects it from later templates."""

    @property
    def freeze(self) -> bool:
        """Whether later templates leave alone what this one decides."""


@dataclass(frozen=True)
class ModuleNameTemplate:
    """Settings by name; `""` is every site, and what the target cannot do there becomes the nearest it can.

    Args:
        settings: name to a format (of the result), to formats by port `{"input", "weight", "output"}`, to
            `{"dtype": either of these, "threshold": a number for the result or numbers by port}`, or to None (float).
            `"input"` may be a list with one format per operand.
        freeze: later templates leave alone what this one decides.
    """

    settings: Mapping[str, Any]
    freeze: bool = False
    _parsed: dict[str, Setting] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.settings, Mapping):
            raise UserError(
                f"ModuleNameTemplate was given a {type(self.settings).__name__}", fix='give {"name": qint16}'
            )
        parsed = {key: _setting(value, key) for key, value in self.settings.items()}
        if "" in parsed:
            parsed[""] = replace(parsed[""], preference=True)
        object.__setattr__(self, "_parsed", parsed)

    @property
    def name(self) -> str:
        return "ModuleNameTemplate"

    def decide(self, query: SiteQuery) -> Setting | None:
        key = deepest(self._parsed, query)
        return None if key is None else self._parsed[key]

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return [key for key in unused_keys(self._parsed, queries) if key]


def _setting(value: Any, key: str) -> Setting:
    if value is None:
        return Setting(stays_float=True)
    if not isinstance(value, Mapping):
        return Setting(output=as_format(value))
    if not value.keys() & {"dtype", "threshold"}:
        return Setting(**_ports(value, key))
    for name in value:
        if name not in ("dtype", "threshold"):
            raise UserError(
                f"the template for {key!r} names {name!r}", fix=did_you_mean(str(name), ("dtype", "threshold"))
            )
    dtype = value.get("dtype")
    formats = {} if dtype is None else _ports(dtype, key) if isinstance(dtype, Mapping) else {"output": dtype}
    return Setting(**formats, threshold=as_threshold(value.get("threshold")))


def _ports(value: Mapping[Any, Any], key: str) -> dict[str, Any]:
    found = {}
    for port, given in value.items():
        if port not in PORTS:
            raise UserError(f"the template for {key!r} names the port {port!r}", fix=did_you_mean(str(port), PORTS))
        several = port == "input" and isinstance(given, (list, tuple))
        found["inputs" if several else port] = tuple(given) if several else given
    return found


@dataclass(frozen=True)
class ConvDtypeTemplate:
    """Formats of what convolutions and linears read.

    Args:
        input_dtype: of the activations; others are converted on their way in.
        weight_dtype: of the weights.
        freeze: later templates leave alone what this one decides.
    """

    input_dtype: FormatLike | None = None
    weight_dtype: FormatLike | None = None
    freeze: bool = False

    @property
    def name(self) -> str:
        return "ConvDtypeTemplate"

    def decide(self, query: SiteQuery) -> Setting | None:
        if query.op not in _CONVOLUTIONS:
            return None
        return Setting(input=_optional(self.input_dtype), weight=_optional(self.weight_dtype))

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return [] if any(query.op in _CONVOLUTIONS for query in queries) else ["convolutions and linears"]


@dataclass(frozen=True)
class MatmulDtypeTemplate:
    """Formats of the operands of matrix products of two activations.

    Args:
        input_dtypes: one format for both, or a pair.
        freeze: later templates leave alone what this one decides.
    """

    input_dtypes: FormatLike | Sequence[FormatLike | None]
    freeze: bool = False

    @property
    def name(self) -> str:
        return "MatmulDtypeTemplate"

    def decide(self, query: SiteQuery) -> Setting | None:
        if query.op not in _MATMULS:
            return None
        if isinstance(self.input_dtypes, Sequence) and not isinstance(self.input_dtypes, str):
            return Setting(inputs=tuple(_optional(one) for one in self.input_dtypes))
        return Setting(input=_optional(self.input_dtypes))

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return [] if any(query.op in _MATMULS for query in queries) else ["matmul"]


def _optional(value: FormatLike | None) -> Format | None:
    return None if value is None else as_format(value)


@dataclass(frozen=True)
class SensitivityTemplate:
    """Higher precision for the most sensitive rows of a table.

    Args:
        sensitive_table: rows, dicts, or the path of a .csv or .json file.
        topk_or_ratio: how many rows (a whole number), or which share of them, rounded up (a float from 0 to 1).
        sensitive_type: which rows count: `activation`, `weight` or `both`.
        low_precision_dtype: format of the table's other rows; None leaves them to other templates.
        high_precision_dtype: format of the chosen rows.
        freeze: later templates leave alone what this one decides.
    """

    sensitive_table: Any
    topk_or_ratio: int | float
    sensitive_type: str = "both"
    low_precision_dtype: FormatLike | None = None
    high_precision_dtype: FormatLike = qint16
    freeze: bool = False
    _setter: SensitivityQconfigSetter = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sensitive_type not in (*KINDS, "both"):
            raise UserError(
                f"sensitive_type is {self.sensitive_type!r}",
                fix=did_you_mean(str(self.sensitive_type), (*KINDS, "both")),
            )
        share = isinstance(self.topk_or_ratio, float)
        setter = sensitivity_setter(
            self.sensitive_table,
            self.name,
            ratio=self.topk_or_ratio if share else None,
            topk=None if share else self.topk_or_ratio,  # type: ignore[arg-type]
            kinds=KINDS if self.sensitive_type == "both" else (self.sensitive_type,),
            low=_optional(self.low_precision_dtype),
            high=as_format(self.high_precision_dtype),
        )
        object.__setattr__(self, "_setter", setter)

    @property
    def name(self) -> str:
        return "SensitivityTemplate"

    def decide(self, query: SiteQuery) -> Setting | None:
        return self._setter.decide(query)

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return self._setter.unused(queries)


@dataclass(frozen=True)
class QconfigSetter:
    """Templates over a reference configuration.

    Args:
        reference_qconfig: decides what no template does, such as observers.
        templates: from broad to narrow: a later one wins, unless an earlier one has `freeze=True`.
    """

    reference_qconfig: QConfig
    templates: Sequence[Template] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.reference_qconfig, QConfig):
            raise UserError(
                f"reference_qconfig is a {type(self.reference_qconfig).__name__}", fix="give get_qconfig(...)"
            )
        for template in self.templates:
            if not isinstance(template, Template) or isinstance(template, type):
                raise UserError(f"templates holds {template!r}", fix="give for example ModuleNameTemplate({...})")

    def setters(self) -> list[QConfigSetter]:
        """The same as setters, most specific first."""
        frozen = [template for template in self.templates if template.freeze]
        free = [template for template in reversed(self.templates) if not template.freeze]
        return [*frozen, *free, DefaultQconfigSetter(self.reference_qconfig, "reference_qconfig")]

"""Setters: each decides for some sites and passes on the others. They are asked in order, most specific first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from torch import nn

from qgraph.errors import UserError
from qgraph.numerics import qint16, qint32
from qgraph.quantization.config.qconfig import QConfig, Setting, as_setting
from qgraph.quantization.config.query import SiteQuery, deepest, unused_keys

Answer: TypeAlias = QConfig | Setting | None


@runtime_checkable
class QConfigSetter(Protocol):
    """Decides for some sites."""

    @property
    def name(self) -> str:
        """How decisions of this setter are cited; `cite(query)`, where a setter has it, says more."""

    def decide(self, query: SiteQuery) -> QConfig | Setting | None:
        """A whole configuration, which ends the search, a partial one, or None to leave the site to later setters."""

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        """Parts of this setter that decide none of the sites asked for."""


@dataclass(frozen=True)
class DefaultQconfigSetter:
    """The same configuration for every site. Where the target cannot do it, the nearest legal one is taken.

    Args:
        qconfig: the configuration.
        label: how its decisions are cited.
    """

    qconfig: QConfig = field(default_factory=QConfig)
    label: str = "default"

    @property
    def name(self) -> str:
        return self.label

    def decide(self, query: SiteQuery) -> Answer:
        return self.qconfig

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return []


@dataclass(frozen=True)
class ModuleNameQconfigSetter:
    """Configurations by name: a site, a fused member, or a module with everything in it; `""` is every site.

    The name that lies deepest wins. None keeps operators in float.

    Args:
        qconfigs: name to configuration.
    """

    qconfigs: Mapping[str, QConfig | Setting | None]

    def __post_init__(self) -> None:
        _check_mapping(self.qconfigs, "ModuleNameQconfigSetter", '{"name": QConfig(...)}')
        for key, value in self.qconfigs.items():
            if not isinstance(key, str):
                raise UserError(f"the name {key!r} of a setting is a {type(key).__name__}", fix="give site names")
            as_setting(value, repr(key))

    @property
    def name(self) -> str:
        return "module name"

    def decide(self, query: SiteQuery) -> Answer:
        key = deepest(self.qconfigs, query)
        return None if key is None else as_setting(self.qconfigs[key], repr(key))

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return unused_keys(self.qconfigs, queries)


@dataclass(frozen=True)
class ModuleTypeQconfigSetter:
    """Configurations by kind: a module class with its subclasses, a class's name, or an operator's name.

    What lies in a module of that class is included. The innermost module wins, and of several classes that fit it
    the nearest ancestor; an operator's name comes before all of them. None keeps operators in float.

    Args:
        qconfigs: class, class name or operator name to configuration.
    """

    qconfigs: Mapping[type[nn.Module] | str, QConfig | Setting | None]

    def __post_init__(self) -> None:
        _check_mapping(self.qconfigs, "ModuleTypeQconfigSetter", '{nn.Conv2d: QConfig(...), "gelu": ...}')
        for key, value in self.qconfigs.items():
            if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
                raise UserError(f"the kind {key!r} of a setting is no module class", fix="give a class or a name")
            as_setting(value, _shown(key))

    @property
    def name(self) -> str:
        return "module type"

    def decide(self, query: SiteQuery) -> Answer:
        key = self._match(query)
        return None if key is None else as_setting(self.qconfigs[key], _shown(key))

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        used = {self._match(query) for query in queries}
        return [_shown(key) for key in self.qconfigs if key not in used]

    def _match(self, query: SiteQuery) -> type[nn.Module] | str | None:
        if query.op in self.qconfigs:
            return query.op
        for cls in query.types:
            for ancestor in cls.__mro__:
                for key in (ancestor, ancestor.__name__):
                    if key in self.qconfigs:
                        return key
        return None


def _shown(key: type | str) -> str:
    return key if isinstance(key, str) else key.__name__


def _check_mapping(value: object, what: str, example: str) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} was given a {type(value).__name__}", fix=f"give {example}")


default_calib_8bit_fake_quant_qconfig = QConfig()
default_qat_8bit_fake_quant_qconfig = QConfig(activation_observer="moving_average")
default_calib_16bit_fake_quant_qconfig = QConfig(output=qint16)
default_calib_8bit_weight_32bit_out_fake_quant_qconfig = QConfig(output=qint32)
_qat_16bit = QConfig(output=qint16, activation_observer="moving_average")
_fixed_16bit = QConfig(output=qint16, activation_observer="moving_average", frozen=True)

default_calibration_qconfig_setter = DefaultQconfigSetter(
    default_calib_8bit_fake_quant_qconfig, "default_calibration_qconfig_setter"
)
default_qat_qconfig_setter = DefaultQconfigSetter(default_qat_8bit_fake_quant_qconfig, "default_qat_qconfig_setter")
calibration_8bit_weight_16bit_act_qconfig_setter = DefaultQconfigSetter(
    default_calib_16bit_fake_quant_qconfig, "calibration_8bit_weight_16bit_act_qconfig_setter"
)
qat_8bit_weight_16bit_act_qconfig_setter = DefaultQconfigSetter(_qat_16bit, "qat_8bit_weight_16bit_act_qconfig_setter")
qat_8bit_weight_16bit_fixed_act_qconfig_setter = DefaultQconfigSetter(
    _fixed_16bit, "qat_8bit_weight_16bit_fixed_act_qconfig_setter"
)

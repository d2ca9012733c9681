"""The dict form: `{"": q, "module_type": [(type, q)], "module_name": [(name, q)]}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.errors import UserError, did_you_mean
from qgraph.quantization.config.qconfig import QConfig
from qgraph.quantization.config.setters import (
    DefaultQconfigSetter,
    ModuleNameQconfigSetter,
    ModuleTypeQconfigSetter,
    QConfigSetter,
)

_KEYS = ("", "module_type", "module_name")


def dict_setters(given: Mapping[Any, Any]) -> list[QConfigSetter]:
    """Setters of a dict, most specific first: names, then types, then `""` for the whole model.

    Raises:
        UserError: a key does not exist, or an entry is no list of pairs.
    """
    for key in given:
        if key not in _KEYS:
            raise UserError(
                f"qconfig_setter holds a dict with the key {key!r}",
                why='the dict form has the keys "", "module_type" and "module_name"',
                fix=f'{did_you_mean(str(key), _KEYS)}; by name alone: ModuleNameQconfigSetter({{"name": qconfig}})',
            )
    setters: list[QConfigSetter] = []
    if "module_name" in given:
        setters.append(ModuleNameQconfigSetter(_pairs(given["module_name"], "module_name")))
    if "module_type" in given:
        setters.append(ModuleTypeQconfigSetter(_pairs(given["module_type"], "module_type")))
    if isinstance(given.get(""), QConfig):
        setters.append(DefaultQconfigSetter(given[""], "qconfig dict"))
    elif "" in given:
        setters.append(ModuleNameQconfigSetter({"": given[""]}))
    return setters


def _pairs(value: Any, key: str) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    found: dict[Any, Any] = {}
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{key} of the qconfig dict is {value!r}", fix="give a list of pairs (what, qconfig)")
    for entry in value:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise UserError(f"{key} of the qconfig dict holds {entry!r}", fix="give pairs (what, qconfig)")
        if entry[0] in found:
            raise UserError(f"{key} of the qconfig dict names {entry[0]!r} twice", fix="leave one of them out")
        found[entry[0]] = entry[1]
    return found

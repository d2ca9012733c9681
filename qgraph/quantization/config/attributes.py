"""`module.qconfig` attributes on the user's float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qgraph.quantization.config.qconfig import QConfig, Setting, as_setting
from qgraph.quantization.config.query import SiteQuery, deepest, unused_keys

_MISSING = object()


@dataclass(frozen=True)
class AttributeQconfigSetter:
    """What `module.qconfig` says; a module inherits it from the modules it lies in.

    Args:
        qconfigs: path of a module to its attribute.
    """

    qconfigs: Mapping[str, QConfig | Setting]

    @property
    def name(self) -> str:
        return "attribute"

    def cite(self, query: SiteQuery) -> str:
        """The attribute that decides for a site."""
        return f"attribute {_attribute(deepest(self.qconfigs, query) or '')}"

    def decide(self, query: SiteQuery) -> QConfig | Setting | None:
        key = deepest(self.qconfigs, query)
        return None if key is None else self.qconfigs[key]

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return [_attribute(path) for path in unused_keys(self.qconfigs, queries)]


def attribute_setters(model: nn.Module) -> tuple[AttributeQconfigSetter, ...]:
    """A setter for the attributes of a model; none if it has none. The model is only read.

    Raises:
        UserError: an attribute is neither a configuration nor None.
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        value = getattr(module, "qconfig", _MISSING)
        if value is not _MISSING:
            found[path] = as_setting(value, _attribute(path))
    return (AttributeQconfigSetter(found),) if found else ()


def _attribute(path: str) -> str:
    return f"{path}.qconfig" if path else "model.qconfig"

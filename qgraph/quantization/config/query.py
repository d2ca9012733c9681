"""A site for which a decision is wanted, and the names it answers to."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from qgraph.ir.node_info import info

_SEPARATOR = re.compile(r"[.(\[]")


@dataclass(frozen=True)
class SiteQuery:
    """A site for which a decision is wanted.

    Args:
        site: its name.
        module: path of the enclosing module.
        origins: names of the captured nodes it stands for.
        op: its operator's name.
        types: classes of the user's modules it is, stands for or lies in, innermost first.
    """

    site: str
    module: str
    origins: tuple[str, ...]
    op: str
    types: tuple[type[nn.Module], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name the site answers to: its own, its members', each also without the call number."""
        names = [self.site, *self.origins]
        return tuple(dict.fromkeys([*names, *(name.partition("(")[0] for name in names)]))


def query_of(node: fx.Node, classes: Mapping[str, type[nn.Module]]) -> SiteQuery:
    """The query for a node; `classes` holds the user's modules by path."""
    record = info(node)
    members = (record.site, *record.stands_for)
    paths = {path: len(parts(path)) for member in members for path in enclosing(member) if path in classes}
    innermost = sorted(paths, key=lambda path: -paths[path])
    types = tuple(dict.fromkeys(classes[path] for path in innermost))
    return SiteQuery(record.site, record.module, record.stands_for, record.op.name, types)


def enclosing(name: str) -> Iterator[str]:
    """`name` and everything it lies in, innermost first; `""`, the whole model, is last."""
    yield name
    for separator in reversed(list(_SEPARATOR.finditer(name))):
        yield name[: separator.start()]
    if name:
        yield ""


def parts(name: str) -> list[str]:
    """A name taken apart where modules, calls and elements begin; nothing for the whole model."""
    return _SEPARATOR.split(name) if name else []


def deepest(keys: Container[str], query: SiteQuery) -> str | None:
    """The key that names the site most closely; of equally close ones the site's own before a fused member's."""
    best: str | None = None
    for name in query.names:
        found = next((key for key in enclosing(name) if key in keys), None)
        if found is not None and (best is None or len(parts(found)) > len(parts(best))):
            best = found
    return best


def unused_keys(keys: Mapping[str, object], queries: Sequence[SiteQuery]) -> list[str]:
    """Keys that name none of the sites most closely."""
    used = {deepest(keys, query) for query in queries}
    return [key for key in keys if key not in used]

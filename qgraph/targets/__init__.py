"""Hardware targets as data."""

from qgraph.targets.target import (
    ENTRY_POINT_GROUP,
    LegalFormats,
    OpRule,
    Target,
    get_target,
    list_targets,
    load_target,
    parse_target,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "LegalFormats",
    "OpRule",
    "Target",
    "get_target",
    "list_targets",
    "load_target",
    "parse_target",
]

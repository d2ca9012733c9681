"""Hardware targets as data."""

from qgraph.targets.find import ENTRY_POINT_GROUP, get_target, list_targets, load_target, target_of
from qgraph.targets.parse import parse_target
from qgraph.targets.target import Functions, LegalFormats, Memory, OpRule, Target

__all__ = [
    "ENTRY_POINT_GROUP",
    "Functions",
    "LegalFormats",
    "Memory",
    "OpRule",
    "Target",
    "get_target",
    "list_targets",
    "load_target",
    "parse_target",
    "target_of",
]

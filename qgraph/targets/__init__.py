"""Hardware targets as data."""

from qgraph.targets.find import ENTRY_POINT_GROUP, get_target, list_targets, load_target, target_of
from qgraph.targets.lint import Finding, Severity, lint_target
from qgraph.targets.parse import parse_target
from qgraph.targets.target import Functions, LegalFormats, Memory, OpRule, Target

__all__ = [
    "ENTRY_POINT_GROUP",
    "Finding",
    "Functions",
    "LegalFormats",
    "Memory",
    "OpRule",
    "Severity",
    "Target",
    "get_target",
    "lint_target",
    "list_targets",
    "load_target",
    "parse_target",
    "target_of",
]

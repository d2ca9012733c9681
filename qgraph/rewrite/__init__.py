"""Patterns, rules and the driver that applies them."""

from qgraph.rewrite.driver import Rewriting, rewrite_graph
from qgraph.rewrite.pattern import Call, Match, Pattern, any_value, call, constant, optional
from qgraph.rewrite.rule import Rule, Verdict, no, skip, yes

__all__ = [
    "Call",
    "Match",
    "Pattern",
    "Rewriting",
    "Rule",
    "Verdict",
    "any_value",
    "call",
    "constant",
    "no",
    "optional",
    "rewrite_graph",
    "skip",
    "yes",
]

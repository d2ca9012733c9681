"""Rules in three parts: pattern, check, rewrite; a refusal says why and where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import fx

from qgraph.errors import PassError
from qgraph.ir.editor import Editor
from qgraph.rewrite.pattern import Call, Match


@dataclass(frozen=True)
class Verdict:
    """The answer of a check: yes, or no with a reason and the node it concerns."""

    reason: str | None = None
    node: fx.Node | None = None

    def __bool__(self) -> bool:
        return self.reason is None


def yes() -> Verdict:
    """The rule may fire."""
    return Verdict()


def no(reason: str, node: fx.Node | None = None) -> Verdict:
    """The rule must not fire, because of `reason`, at `node` (the match's root if not given)."""
    if not reason:
        raise PassError("a refusal gives no reason", fix="say why in no(reason), or return skip()")
    return Verdict(reason, node)


def skip() -> Verdict:
    """The rule must not fire, and nobody needs to know why: the case has nothing to do with it."""
    return Verdict("")


class Rule(ABC):
    """One rewrite.

    A subclass sets `name` and `root`, and usually keeps the parts of its pattern as attributes.
    """

    name: str
    root: Call

    def check(self, match: Match) -> Verdict:
        """Whether the rule may fire here. Never changes anything."""
        return yes()

    @abstractmethod
    def rewrite(self, match: Match, edit: Editor) -> None:
        """Makes the change through `edit`; the matched root is erased or no longer matches afterwards."""

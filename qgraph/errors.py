"""The one error family of qgraph, and the shape of its messages.

Every message says *what* went wrong, *where* (node, module path, source line), *why*, and *what to do*.
The four parts are keyword arguments, so that callers cannot forget which one they are writing and tools can
read them back. Errors a user can cause derive from `UserError`; a broken promise of qgraph itself is an
`InternalError` and asks for a bug report.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QGraphError(Exception):
    """Base of every error qgraph raises on purpose.

    Args:
        what: one sentence naming the failure.
        where: the node, module path and source line it concerns.
        why: the cause, as far as it is known.
        fix: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        parts += [f"  {label}: {text}" for label, text in self._labelled() if text]
        return "\n".join(parts)

    def _labelled(self) -> list[tuple[str, str | None]]:
        return [("where", self.where), ("why", self.why), ("what to do", self.fix)]

    def attach(self, note: str) -> None:
        """Adds a longer explanation, such as a printed neighbourhood, below the message."""
        notes: list[str] = getattr(self, "__notes__", [])
        self.__notes__ = [*notes, note]


class UserError(QGraphError):
    """The request cannot be met as it was made: bad input, option, name or order of calls."""


class CaptureError(UserError):
    """The model could not be turned into a graph that is known to be right."""


class StateError(UserError):
    """A prepared model was asked for a step that its state does not allow."""


class QuantizationError(UserError):
    """A quantization setting is illegal, has no effect, or cannot be computed from the data."""


class TargetError(UserError):
    """A target description is missing, contradictory or does not offer what was asked of it."""


class ArtifactError(UserError):
    """A graph cannot be saved, or a saved one is damaged, unknown or made by a newer version."""


class DrawError(UserError):
    """A picture could not be drawn."""


class PassError(QGraphError):
    """A pass failed, or broke the contract it declares."""


class VerifyError(QGraphError):
    """A graph breaks a rule of its stage."""


class NumericCheckError(QGraphError):
    """A pass changed the numbers a graph computes by more than it declares."""


class MissingKernel(QGraphError):
    """The simulator has no kernel for an operator of the graph."""


class InternalError(QGraphError):
    """qgraph broke a promise of its own: please report it with the message and the graph text."""


def did_you_mean(name: str, options: Iterable[str], *, shown: int = 3) -> str:
    """Names close to `name`, as a sentence to append to a message; lists the options if none is close."""
    known = sorted(set(options))
    close = difflib.get_close_matches(name, known, n=shown, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(option) for option in close) + "?"
    if not known:
        return "there is none to choose from"
    listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"known names: {listed}"

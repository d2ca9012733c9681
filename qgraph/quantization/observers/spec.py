"""Observers and searches as text: a name, or a name with options such as `percentile(percentile=99.9)`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qgraph.errors import QuantizationError, did_you_mean

_Made = TypeVar("_Made")
_FORM = "write a name, or a name with options: percentile(percentile=99.9)"


@dataclass(frozen=True)
class ObserverSpec:
    """A registered name and options.

    Args:
        name: the registered name.
        options: name and value of each; kept in order of name, so that equal specs have equal texts.

    Raises:
        QuantizationError: a value is no number, text, truth value or tuple of these, or an option is given twice.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        given = self.options.items() if isinstance(self.options, Mapping) else self.options
        options = tuple(sorted((str(key), _literal(self.name, str(key), value)) for key, value in given))
        names = [key for key, _ in options]
        twice = next((key for key in names if names.count(key) > 1), None)
        if twice is not None:
            raise QuantizationError(f"option {twice} of {self.name} is given twice", fix="give it once")
        object.__setattr__(self, "options", options)

    @classmethod
    def parse(cls, text: str) -> ObserverSpec:
        """The spec of a text.

        Raises:
            QuantizationError: it has another form.
        """
        if not isinstance(text, str):
            raise QuantizationError(f"{text!r} is no text", fix=_FORM)
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            if isinstance(tree, ast.Name):
                return cls(tree.id)
            if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
                options = [(str(word.arg), ast.literal_eval(word.value)) for word in tree.keywords if word.arg]
                if len(options) == len(tree.keywords):
                    return cls(tree.func.id, tuple(options))
        except (SyntaxError, ValueError):
            pass
        raise QuantizationError(f"{text!r} names no observer", fix=_FORM)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options)
        return f"{self.name}({options})" if options else self.name

    def make(self, known: Mapping[str, Callable[..., _Made]], what: str, **more: Any) -> _Made:
        """Calls the entry of `known` that has this name, with the options and `more`.

        Args:
            known: name to class or function.
            what: what the entries are, for messages.
            more: arguments that are no options.

        Raises:
            QuantizationError: there is no such entry or option, one is missing, or a value is not accepted.
        """
        if self.name not in known:
            raise QuantizationError(f"no {what} is named {self.name!r}", fix=did_you_mean(self.name, known))
        maker = known[self.name]
        parameters = {key: p for key, p in inspect.signature(maker).parameters.items() if key not in ("ch_axis", *more)}
        given = dict(self.options)
        for key in given:
            if key not in parameters:
                raise _unknown_option(self.name, what, key, parameters)
        missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
        if missing:
            raise QuantizationError(
                f"the {what} {self.name} needs {' and '.join(missing)}", fix=f"write {self.name}({missing[0]}=...)"
            )
        return maker(**given, **more)


def _unknown_option(name: str, what: str, key: str, known: Mapping[str, Any]) -> QuantizationError:
    why = None
    if key == "averaging_constant":
        why = "only moving_average averages; what keeps a histogram weighs all data alike"
    fix = did_you_mean(key, known) if known else f"write {name} without options"
    return QuantizationError(f"the {what} {name} has no option {key!r}", why=why, fix=fix)


def _literal(name: str, key: str, value: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (bool, int, float, str)) for part in parts):
        raise QuantizationError(f"option {key} of {name} is {value!r}", fix="give a number, a text or several numbers")
    return value

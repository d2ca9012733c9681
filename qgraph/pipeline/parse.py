"""The text form of pipelines.

    canonicalize,fuse-conv-bn-add-relu,[fold-constants,eliminate-dead-code]*3,decompose-composites{skip=softmax}

Options are the pass's dataclass fields; their types are read from the class. Square brackets nest a pipeline, `*n`
repeats it until it changes nothing, at most n times.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from qgraph.errors import UserError, did_you_mean
from qgraph.pipeline.base import Pass
from qgraph.pipeline.registry import REGISTRY


@dataclasses.dataclass(frozen=True)
class Group:
    """A bracketed part of a pipeline text."""

    members: tuple[Pass | Group, ...]
    repeat: int = 1


def parse_passes(text: str) -> Group:
    """The passes a text names.

    Raises:
        UserError: the text is malformed, or names an unknown pass or option.
    """
    parser = _Parser(text)
    members = parser.sequence(end="")
    return Group(members)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def sequence(self, end: str) -> tuple[Pass | Group, ...]:
        """Comma-separated entries up to `end`, which is consumed."""
        members: list[Pass | Group] = []
        while True:
            self._skip_space()
            members.append(self._group() if self._peek() == "[" else self._pass())
            self._skip_space()
            if self._peek() == end:
                self.position += len(end)
                return tuple(members)
            self._expect(",")

    def _group(self) -> Group:
        self._expect("[")
        members = self.sequence(end="]")
        if self._peek() != "*":
            return Group(members)
        self._expect("*")
        digits = self._take(lambda letter: letter.isdigit())
        if not digits or int(digits) < 1:
            raise self._error("a repeat count of at least 1 is missing after '*'")
        return Group(members, int(digits))

    def _pass(self) -> Pass:
        name = self._take(lambda letter: letter not in ",{}[]*").strip()
        if not name:
            raise self._error("a pass name is missing")
        cls = REGISTRY.get(name)
        options: dict[str, str] = {}
        if self._peek() == "{":
            self._expect("{")
            body = self._take(lambda letter: letter != "}")
            self._expect("}")
            for entry in filter(None, (part.strip() for part in body.split(","))):
                key, equals, value = entry.partition("=")
                if not equals:
                    raise self._error(f"option {entry!r} of {name} has no value")
                options[key.strip()] = value.strip()
        return make_pass(cls, options)

    def _take(self, wanted: typing.Callable[[str], bool]) -> str:
        start = self.position
        while self.position < len(self.text) and wanted(self.text[self.position]):
            self.position += 1
        return self.text[start : self.position]

    def _skip_space(self) -> None:
        self._take(str.isspace)

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _expect(self, letter: str) -> None:
        if self._peek() != letter:
            raise self._error(
                f"expected {letter!r}, found {self._peek()!r}" if self._peek() else f"expected {letter!r}"
            )
        self.position += 1

    def _error(self, what: str) -> UserError:
        marked = f"{self.text[: self.position]}<here>{self.text[self.position :]}"
        return UserError(
            f"this is not a pipeline: {what}",
            where=marked,
            fix="write pass names separated by commas, options as name{option=value}, groups as [a,b]*2",
        )


def make_pass(cls: type[Pass], options: dict[str, str]) -> Pass:
    """An instance of `cls` from options given as text.

    Raises:
        UserError: an option does not exist or its value does not fit its type.
    """
    types = typing.get_type_hints(cls)
    known = {option.name: types[option.name] for option in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise UserError(f"the pass {cls.name} has no option {key!r}", fix=did_you_mean(key, known))
        values[key] = _convert(cls.name, key, text, known[key])
    return cls(**values)


def _convert(owner: str, key: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            return tuple(_convert(owner, key, part, inner) for part in text.split("+") if part)
        for choice in typing.get_args(kind):
            if choice is not type(None):
                return None if text == "none" else _convert(owner, key, text, choice)
    except (KeyError, ValueError) as error:
        wanted = getattr(kind, "__name__", str(kind))
        raise UserError(f"option {key!r} of {owner} cannot be {text!r}", why=f"it takes a {wanted}") from error
    raise UserError(f"option {key!r} of {owner} cannot be given as text", fix="build the pass in Python")

"""The check at a captured graph's entry: other inputs than the example's would give wrong numbers, not an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qgraph.capture.sizes.expressions import Condition
from qgraph.capture.values.layout import TensorLayout
from qgraph.capture.values.structure import Inputs, Path, Step, follow, format_path, is_dataclass_value, parts
from qgraph.capture.values.variants import BatchChoice, Place
from qgraph.errors import UserError
from qgraph.ir.op_table import GUARD, OPS


@dataclass(frozen=True)
class TensorRule:
    """What a tensor among the inputs must be."""

    place: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool
    layout: TensorLayout | None


@dataclass(frozen=True)
class ValueRule:
    """What another value among the inputs must equal."""

    place: str
    value: Any


@dataclass(frozen=True)
class ContainerRule:
    """What a container among the inputs must hold."""

    name: str
    path: Path
    kind: type[Any]
    parts: tuple[tuple[Step, Rule], ...]

    @property
    def place(self) -> str:
        return format_path(self.name, self.path)


Rule = TensorRule | ValueRule | ContainerRule


class InputGuard(nn.Module):
    """Checks inputs against the example: structure, dtypes, shapes (batch excepted), and plain values.

    Args:
        inputs: the example inputs by name.
        choice: which tensors grow with the batch; None if the batch is fixed.
        fixed: why it is fixed.
        layout: whether the forward depends on how its tensors lie in memory.
        conditions: what must hold of a batch size for the forward to do what it did on the example.

    `proven` are batch sizes at which another path gave the same result when it was replayed.
    """

    def __init__(
        self,
        inputs: Inputs,
        choice: BatchChoice | None,
        fixed: str | None,
        *,
        layout: bool = False,
        conditions: tuple[Condition, ...] = (),
    ) -> None:
        super().__init__()
        self.names = tuple(inputs)
        self.fixed = fixed
        self.layout = layout
        self.choice = choice
        self.conditions = conditions
        self.proven: set[int] = set()
        batched: set[Place] = set(choice.places) if choice else set()
        self.rules = tuple(self._rule(name, (), value, batched) for name, value in inputs.items())

    def __deepcopy__(self, memo: dict[int, object]) -> InputGuard:
        return self

    def forward(self, *inputs: Any) -> None:
        """Raises `UserError` at the first input that differs."""
        factors: set[float] = set()
        for rule, value in zip(self.rules, inputs, strict=True):
            self._check(rule, value, factors)
        if len(factors) > 1:
            raise UserError(
                "the inputs have different batch sizes",
                why=f"their first dimensions are {sorted(factors)} times those of the example",
                fix="give every input the same number of samples",
            )
        if self.conditions and self.choice is not None:
            self._check_batch(round(factors.pop() * self.choice.size))

    def batched(self, inputs: tuple[Any, ...]) -> torch.Tensor | None:
        """The input whose dimension 0 is the batch."""
        if self.choice is None:
            return None
        name, path = self.choice.places[0]
        found = follow(inputs[self.names.index(name)], path)
        return found if isinstance(found, torch.Tensor) else None

    def _check_batch(self, batch: int) -> None:
        if batch in self.proven:
            return
        for condition in self.conditions:
            if not condition.holds(batch):
                raise UserError(
                    f"the graph does not serve a batch size of {batch}",
                    why=f"the forward takes another path there: in the capture, {condition}",
                    fix="use another batch size, or capture the model again with an example of this one",
                )

    def _rule(self, name: str, path: Path, value: Any, batched: set[Place]) -> Rule:
        if isinstance(value, torch.Tensor):
            layout = TensorLayout(value) if self.layout else None
            return TensorRule(format_path(name, path), tuple(value.shape), value.dtype, (name, path) in batched, layout)
        found = parts(value)
        if found is None:
            return ValueRule(format_path(name, path), value)
        inner = tuple((step, self._rule(name, (*path, step), entry, batched)) for step, entry in found)
        return ContainerRule(name, path, type(value), inner)

    def _check(self, rule: Rule, value: Any, factors: set[float]) -> None:
        if isinstance(rule, TensorRule):
            self._check_tensor(rule, value, factors)
        elif isinstance(rule, ValueRule):
            if not _same_value(value, rule.value):
                raise _mismatch(rule.place, _described(value), repr(rule.value))
        else:
            found = _checked_parts(rule, value)
            for (_, inner), (_, entry) in zip(rule.parts, found, strict=True):
                self._check(inner, entry, factors)

    def _check_tensor(self, rule: TensorRule, value: Any, factors: set[float]) -> None:
        if not isinstance(value, torch.Tensor):
            raise _mismatch(rule.place, f"a {type(value).__name__}", "a tensor")
        if value.dtype is not rule.dtype:
            raise _mismatch(rule.place, f"dtype {value.dtype}", f"dtype {rule.dtype}")
        shape = tuple(value.shape)
        if shape != rule.shape and not (rule.batched and shape and shape[0] > 0 and shape[1:] == rule.shape[1:]):
            raise self._wrong_shape(rule, shape)
        if rule.batched:
            factors.add(shape[0] / rule.shape[0])
        if rule.layout is not None and not rule.layout.fits(value):
            raise UserError(
                f"input {rule.place} has strides {list(value.stride())}, expected the layout of the example, "
                f"whose strides are {list(rule.layout.strides)}",
                why="the forward depends on how its tensors lie in memory, and the graph keeps what it found",
                fix="copy the input into that layout (contiguous()), or capture the model again with this one",
            )

    def _wrong_shape(self, rule: TensorRule, shape: tuple[int, ...]) -> UserError:
        expected = ["any" if rule.batched and axis == 0 else str(size) for axis, size in enumerate(rule.shape)]
        why = "the graph was captured for these sizes"
        if rule.batched and shape[:1] == (0,):
            expected[0] = "1 or more"
        if self.fixed and shape[1:] == rule.shape[1:]:
            why = f"the batch size is fixed: {self.fixed}"
        return UserError(
            f"input {rule.place} has shape {list(shape)}, expected [{', '.join(expected)}]",
            why=why,
            fix="resize the input, or capture the model again with an example of this shape",
        )

    def extra_repr(self) -> str:
        return ", ".join(self.names)


OPS.add_module(GUARD, InputGuard)  # a captured graph may be captured again, alone or as a part of a model


def _checked_parts(rule: ContainerRule, value: Any) -> list[tuple[Step, Any]]:
    """The parts of a container that has those of the example, in the same order."""
    found = parts(value)
    same_kind = type(value) is rule.kind or (
        # Mappings are read by key, whatever their class.
        isinstance(value, Mapping) and issubclass(rule.kind, Mapping) and not is_dataclass_value(value)
    )
    expected = [step for step, _ in rule.parts]
    if found is None or not same_kind:
        raise _mismatch(rule.place, _described(value), f"a {rule.kind.__name__} with {_listed(expected)}")
    given = [step for step, _ in found]
    if given == expected:
        return found
    for step in expected:
        if step not in given:
            place = format_path(rule.name, (*rule.path, step))
            raise _misfit(f"input {place} is missing", "the graph was captured with this part present")
    for step in given:
        if step not in expected:
            place = format_path(rule.name, (*rule.path, step))
            raise _misfit(f"input {place} is unexpected", "the graph was captured without this part")
    raise _misfit(
        f"the keys of input {rule.place} come in another order: {_listed(given)} instead of {_listed(expected)}",
        "the forward may go through them in order, and the graph keeps the example's",
    )


def _same_value(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, float) and one == two == 0:
        return math.copysign(1, one) == math.copysign(1, two)
    return bool(one == two) or (one != one and two != two)


def _listed(steps: list[Step]) -> str:
    return ", ".join(f".{key}" if step == "field" else f"[{key!r}]" for step, key in steps) or "no parts"


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    found = parts(value)
    return repr(value) if found is None else f"a {type(value).__name__} with {_listed([step for step, _ in found])}"


def _mismatch(place: str, found: str, expected: str) -> UserError:
    return _misfit(
        f"input {place} is {found}, expected {expected}",
        "the graph was captured with this value and holds no code for others",
    )


def _misfit(what: str, why: str) -> UserError:
    return UserError(what, why=why, fix="give inputs like the example, or capture the model again")

"""Small networks as data: what a case computes, before anything is known of scales and codes.

A program is a list of named steps. It is turned into the source of a module, and that source is what runs and what a
reproducer prints, so that both are the same network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FILE = "case"
"""What source lines of nodes name as their file."""

Shape = tuple[int, ...]
NAMES = {"torch": torch, "nn": nn, "F": F}


@dataclass(frozen=True)
class Step:
    """One call.

    Args:
        name: its value's name, and its module's.
        module: text that makes its module, with fields from `options`, and `{c}` and `{k}`, the operand's second and
            last size.
        call: text of the call, with `{0}`, `{1}`, ... for operands and the same fields; `{name}` is the step's name.
        inputs: names of its operands.
        options: numbers the texts name; a shrinker makes them smaller.
        least: the smallest value of each option, as far as it may shrink.
        op: what it is called in reports.
    """

    name: str
    op: str
    call: str
    inputs: tuple[str, ...]
    module: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    least: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What the texts may name, for an operand of this shape."""
        return {**self.options, "name": self.name, "c": shape[1] if len(shape) > 1 else 1, "k": shape[-1]}

    def module_text(self, shape: tuple[int, ...]) -> str | None:
        return None if self.module is None else self.module.format(**self.fields(shape))

    def call_text(self, shape: tuple[int, ...]) -> str:
        return self.call.format(*self.inputs, **self.fields(shape))


@dataclass(frozen=True)
class Program:
    """Inputs by name with their shapes, and steps in order; the last step's value is the result."""

    inputs: Mapping[str, tuple[int, ...]]
    steps: tuple[Step, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every value.

        Raises:
            Exception: torch refuses a step.
        """
        values = {name: torch.zeros(shape) for name, shape in self.inputs.items()}
        for step in self.steps:
            values[step.name] = evaluate(step, values)
        return {name: tuple(value.shape) for name, value in values.items()}

    def used(self) -> Program:
        """The program without steps and inputs the result does not need."""
        needed = {self.steps[-1].name}
        for step in reversed(self.steps):
            if step.name in needed:
                needed.update(step.inputs)
        inputs = {name: shape for name, shape in self.inputs.items() if name in needed}
        return Program(inputs, tuple(step for step in self.steps if step.name in needed))

    def source(self) -> str:
        """The module as Python text, a class named `Model`."""
        shapes = self.shapes()
        first = [(step, shapes[step.inputs[0]]) for step in self.steps]
        modules = [f"        self.{step.name} = {step.module_text(shape)}" for step, shape in first if step.module]
        lines = ["class Model(nn.Module):"]
        if modules:
            lines += ["    def __init__(self):", "        super().__init__()", *modules, ""]
        lines += [f"    def forward(self, {', '.join(self.inputs)}):"]
        lines += [f"        {step.name} = {step.call_text(shape)}" for step, shape in first]
        return "\n".join([*lines, f"        return {self.steps[-1].name}", ""])

    def lines(self) -> dict[str, int]:
        """Line of the source in which each step is called."""
        text = self.source().splitlines()
        first = len(text) - len(self.steps)  # the last line returns
        return {step.name: first + position for position, step in enumerate(self.steps)}

    def model(self) -> nn.Module:
        """The module, in eval mode."""
        scope: dict[str, Any] = dict(NAMES)
        exec(compile(self.source(), FILE, "exec"), scope)
        model: nn.Module = scope["Model"]().eval()
        return model

    def operators(self) -> list[str]:
        return [step.op for step in self.steps]

    def with_steps(self, steps: Iterable[Step]) -> Program:
        return replace(self, steps=tuple(steps))


def evaluate(step: Step, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a step makes of zeros; the module is a fresh one."""

    class Holder:
        pass

    holder = Holder()
    shape = tuple(values[step.inputs[0]].shape)
    text = step.module_text(shape)
    with torch.no_grad():
        if text is not None:
            setattr(holder, step.name, eval(text, dict(NAMES)))
        result: torch.Tensor = eval(step.call_text(shape), {**NAMES, **values, "self": holder})
    return result

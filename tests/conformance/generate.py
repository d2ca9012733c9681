"""Draws programs for a target: one to six calls of operators that the target and the engine both know."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from qgraph.targets import Target
from tests.conformance.operators import OPERATORS, Chance, Operator
from tests.conformance.program import Program, Shape, Step, evaluate

SMALL_MACS = 20_000
LARGE_MACS = 8_000_000
# Sums long enough to leave float32's exact whole numbers.
LONG_SUMS = (512, 1024, 2048, 4096, 8192)


def usable(target: Target, supported: Collection[str] | None = None) -> dict[str, Operator]:
    """The operators a program for this target may call."""
    known = set(target.ops) if supported is None else set(target.ops) & set(supported)
    return {name: operator for name, operator in OPERATORS.items() if known.issuperset(operator.needs)}


def draw_program(chance: Chance, operators: dict[str, Operator], limit: int | None = None) -> Program:
    """A program of 1 to 6 steps whose products stay below `limit`."""
    room = limit or (LARGE_MACS if chance.large else SMALL_MACS)
    while True:
        drawing = _Drawing(chance, operators, room)
        program = drawing.program()
        if program is not None:
            return program


class _Drawing:
    """One attempt."""

    def __init__(self, chance: Chance, operators: dict[str, Operator], room: int) -> None:
        self.chance = chance
        self.operators = operators
        self.room = room
        self.inputs: dict[str, Shape] = {}
        self.steps: list[Step] = []
        self.values: dict[str, torch.Tensor] = {}
        self.first: str | None = None

    def program(self) -> Program | None:
        self._input(self._first_shape())
        wanted = self.chance.choice([1, 1, 1, 2, 2, 3, 3, 4, 5, 6])
        for _ in range(4 * wanted):
            if len(self.steps) == wanted:
                break
            self._step()
        return Program(self.inputs, tuple(self.steps)).used() if self.steps else None

    def _first_shape(self) -> Shape:
        chance = self.chance
        batch = chance.choice([1, 1, 2, 3])
        rank = chance.choice([2, 3, 4, 4, 4, 4])
        if rank == 2:
            if chance.likely(0.5) and "linear" in self.operators:
                return self._long(2)
            return (batch, chance.size(12, 300))
        if rank == 4 and chance.likely(0.05) and "conv2d" in self.operators:
            return self._long(4)
        channels = chance.choice([1, 2, 3, 4, 6, 8])
        if chance.large:
            channels = chance.choice([3, 8, 16, 17, 32, 64])
        sides = tuple(chance.choice([2, 4, 4, 8, chance.size(7, 20, least=2)]) for _ in range(rank - 2))
        return (batch, channels, *sides)

    def _long(self, rank: int) -> Shape:
        """One row of many channels, read by a product."""
        self.first = {2: "linear", 4: "conv2d"}[rank]
        return (1, self.chance.choice(LONG_SUMS), *[1] * (rank - 2))

    def _input(self, shape: Shape) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = shape
        self.values[name] = torch.zeros(shape)
        return name

    def _step(self) -> None:
        chance = self.chance
        latest = self.steps[-1].name if self.steps else "x0"
        source = latest if chance.likely(0.9) else chance.choice(list(self.values))
        shape = tuple(self.values[source].shape)
        name, operator = self._operator(len(shape))
        options = operator.draw(chance, shape)
        if options is None:
            return
        inputs = [source]
        added: list[str] = []
        if operator.other is not None:
            inputs.append(self._other(operator, shape, added))
        step = Step(
            f"s{len(self.steps)}", name, operator.call, tuple(inputs), operator.module, options, dict(operator.least)
        )
        try:
            value = evaluate(step, self.values)
        except (RuntimeError, ValueError):  # sizes that do not fit
            self._forget(added)
            return
        cost = value.numel() * operator.macs(options, shape)
        if value.numel() == 0 or cost > self.room:
            self._forget(added)
            return
        self.room -= cost
        self.steps.append(step)
        self.values[step.name] = value

    def _operator(self, rank: int) -> tuple[str, Operator]:
        fitting = {n: o for n, o in self.operators.items() if not o.ranks or rank in o.ranks}
        if self.first is not None and not self.steps:
            return self.first, fitting[self.first]
        name = self.chance.choices(list(fitting), [operator.weight for operator in fitting.values()])[0]
        return name, fitting[name]

    def _other(self, operator: Operator, shape: Shape, added: list[str]) -> str:
        """An earlier value of the shape wanted, or a new input."""
        assert operator.other is not None
        wanted = operator.other(self.chance, shape)
        there = [name for name, value in self.values.items() if tuple(value.shape) == wanted]
        if there and self.chance.likely(0.7):
            return self.chance.choice(there)
        added.append(self._input(wanted))
        return added[0]

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            del self.inputs[name], self.values[name]

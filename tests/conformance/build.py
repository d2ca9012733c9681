"""From a case to a prepared graph with its values, a frozen graph and an integer graph; nothing is calibrated."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx, nn

from qgraph.errors import QuantizationError
from qgraph.pipeline import CheckLevel
from qgraph.quantization import convert, freeze, prepare
from qgraph.quantization.config.qconfig import QConfig
from qgraph.quantization.config.query import SiteQuery
from qgraph.targets import Target
from tests.conformance.operators import Chance
from tests.conformance.program import Program
from tests.conformance.values import Drawing, Values


@dataclass
class Formats:
    """A setter that draws formats per site from a list, and remembers them.

    Args:
        results: choices for results.
        weights: choices for weights.
        known: what was drawn, by site.
        chance: draws; None to take the first choice.
    """

    results: Sequence[str]
    weights: Sequence[str]
    known: dict[str, tuple[str, str]] = field(default_factory=dict)
    chance: Chance | None = None
    name: str = "case"

    def decide(self, query: SiteQuery) -> QConfig:
        if query.site not in self.known:
            pick = self.chance.choice if self.chance is not None else lambda choices: choices[0]
            self.known[query.site] = (pick(self.results), pick(self.weights))
        result, weight = self.known[query.site]
        return QConfig(output=result, weight=weight)  # type: ignore[arg-type]

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return []


@dataclass(frozen=True)
class Case:
    """A network, the formats of its sites, and their values as far as they are given; the rest is drawn from `seed`.

    `overflow` lets biases reach the ends of the accumulator.
    """

    target: Target
    program: Program
    formats: dict[str, tuple[str, str]]
    default: tuple[str, str]
    values: Values
    seed: str
    overflow: bool = True


@dataclass(frozen=True)
class Built:
    """What a case becomes."""

    case: Case
    prepared: fx.GraphModule
    integer: fx.GraphModule

    @cached_property
    def frozen(self) -> fx.GraphModule:
        """The graph engines and exporters read."""
        return freeze(self.prepared)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The model's inputs, in order."""
        return tuple(self.case.values.inputs[name] for name in self.case.program.inputs)


def prepare_program(program: Program, target: Target, formats: Formats) -> fx.GraphModule:
    """The program's module, prepared, with formats for every site."""
    model = program.model()
    example = tuple(torch.zeros(shape) for shape in program.inputs.values())
    return prepare(model, example, formats, target=target, verify=False, checks=CheckLevel.NONE)


def draw_formats(program: Program, target: Target, chance: Chance) -> tuple[Formats, fx.GraphModule]:
    """Formats the target allows for every site, and the graph prepared with them: mixed ones, or one for all."""
    results, weights = list(target.activations), list(target.weights)
    first = chance.choice(results)
    choices = [([first], ["int8"])]
    if chance.likely(0.4):
        choices = [(results, weights), ([first], weights), *choices]
    choices += [([result], ["int8"]) for result in results]
    for result, weight in choices:
        formats = Formats(result, weight, chance=chance)
        try:
            return formats, prepare_program(program, target, formats)
        except QuantizationError as error:
            refusal = error
    raise refusal


def build(case: Case, prepared: fx.GraphModule | None = None) -> Built:
    """Assigns and draws the values of a case, and converts it; `prepared` spares preparing it again."""
    if prepared is None:
        formats = Formats([case.default[0]], [case.default[1]], dict(case.formats))
        prepared = prepare_program(case.program, case.target, formats)
    drawing = Drawing(prepared, Chance(case.seed), copy.deepcopy(case.values), case.overflow)
    whole = replace(case, values=drawing.run())
    return Built(whole, prepared, convert(prepared, checks=CheckLevel.NONE))


def with_values(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    scales: dict[str, tuple[list[float], int]],
    weights: dict[str, torch.Tensor],
    biases: dict[str, torch.Tensor],
    formats: dict[str, tuple[str, str]],
    target: str,
) -> fx.GraphModule:
    """A prepared graph with these values, as printed reproducers ask for it."""
    default = next(iter(formats.values()))
    setter = Formats([default[0]], [default[1]], dict(formats))
    example = tuple(inputs.values())
    gm = prepare(model.eval(), example, setter, target=target, verify=False, checks=CheckLevel.NONE)
    Drawing(gm, Chance(0), Values(dict(scales), dict(weights), dict(biases), dict(inputs))).run()
    return gm

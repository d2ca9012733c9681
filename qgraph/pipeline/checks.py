"""Comparing a graph's outputs before and after a pass, and finding the first node that differs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from qgraph.errors import NumericCheckError
from qgraph.ir.evaluate import evaluate
from qgraph.ir.node_info import ExampleInputs, graph_info, info, where
from qgraph.pipeline.base import Execute, Numerics, Pass

_FLIPS = 0.01  # share of integer results (argmax, comparisons) that may differ where floats may


@dataclass(frozen=True)
class Difference:
    """One tensor that differs by more than allowed.

    Args:
        place: where in the outputs, or which node.
        worst: largest absolute difference.
        scale: largest magnitude of the reference.
    """

    place: str
    worst: float
    scale: float

    def __str__(self) -> str:
        relative = self.worst / self.scale if self.scale else float("inf")
        return f"{self.place} differs by {self.worst:.3g} ({relative:.2g} of its largest magnitude)"


def run_example(gm: fx.GraphModule, example: ExampleInputs, execute: Execute | None = None) -> Any:
    """The graph's outputs on the example inputs, always the same: random draws are seeded, state is left alone.

    `execute` is a faster way to run it, bit-identical.
    """
    with _seeded(), torch.no_grad(), _without_attention_fast_path():
        graph = _disposable(gm)
        return evaluate(graph, example.args, example.kwargs) if execute is None else execute(graph, example)


@contextmanager
def _seeded() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _without_attention_fast_path() -> Iterator[None]:
    """It adds in another order, and whether it is taken depends on who listens; captures run without it too."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _disposable(gm: fx.GraphModule) -> fx.GraphModule:
    """A module that may be run without leaving traces in `gm`."""
    return copy.deepcopy(gm) if graph_info(gm).stateful else gm


def outputs_differ(reference: Any, outputs: Any, numerics: Numerics) -> Difference | None:
    """The first output that breaks the promise; None if all keep it."""
    expected, actual = list(_tensors(reference, "output")), list(_tensors(outputs, "output"))
    if [place for place, _ in expected] != [place for place, _ in actual]:
        return Difference("the structure of the outputs", float("nan"), 0.0)
    for (place, one), (_, two) in zip(expected, actual, strict=True):
        found = tensors_differ(place, one, two, numerics)
        if found is not None:
            return found
    return None


def tensors_differ(place: str, one: torch.Tensor, two: torch.Tensor, numerics: Numerics) -> Difference | None:
    """Whether two tensors differ by more than `numerics` allows."""
    if one.shape != two.shape:
        return Difference(f"{place}: shape {list(one.shape)} became {list(two.shape)}, so it", float("nan"), 0.0)
    if one.dtype != two.dtype:
        return Difference(f"{place}: {one.dtype} became {two.dtype}, so it", float("nan"), 0.0)
    if one.numel() == 0 or torch.equal(one, two):
        return None
    if not one.is_floating_point():
        share = (one != two).float().mean().item()
        allowed = _FLIPS if numerics.rtol else 0.0
        return None if share <= allowed else Difference(place, share, 1.0)
    both_nan = one.isnan() & two.isnan()
    gap = (one.double() - two.double()).masked_fill(both_nan | (one == two), 0.0)
    worst = gap.abs().max().item()
    scale = one.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return None if worst <= numerics.rtol * scale else Difference(place, worst, scale)


def promise_broken(
    gm: fx.GraphModule, example: ExampleInputs, reference: Any, outputs: Any, numerics: Numerics
) -> Difference | None:
    """The first output of `gm` that breaks the promise, given how much the graph amplifies rounding noise.

    A network that multiplies relative differences by k turns a difference of `rtol` inside into k * rtol at its
    outputs. So where the plain bound is exceeded, k is estimated by running the graph on inputs moved by 2**-18 of
    their values.
    """
    found = outputs_differ(reference, outputs, numerics)
    if found is None or numerics.rtol == 0:
        return found
    amplified = numerics.rtol * max(1.0, _amplification(gm, example, outputs))
    return outputs_differ(reference, outputs, replace(numerics, rtol=amplified))


_MOVED_BY = 2.0**-18


def _amplification(gm: fx.GraphModule, example: ExampleInputs, outputs: Any) -> float:
    generator = torch.Generator().manual_seed(0)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
        return value * (1 + _MOVED_BY * signs)

    nearby = ExampleInputs(tree_map(moved, example.args), tree_map(moved, dict(example.kwargs)))
    results = zip(_tensors(outputs, ""), _tensors(run_example(gm, nearby), ""), strict=True)
    factors = [1.0]
    for (_, one), (_, two) in results:
        scale = one.abs().max().item() if one.is_floating_point() and one.numel() else 0.0
        if scale > 0 and one.shape == two.shape:
            factors.append((one.double() - two.double()).abs().max().item() / scale / _MOVED_BY)
    return max(factor for factor in factors if factor < float("inf"))


def check_numerics(owner: Pass, gm: fx.GraphModule, example: ExampleInputs, reference: Any, outputs: Any) -> None:
    """Checks a pass's promise about the outputs of the graph it made.

    Raises:
        NumericCheckError: it is broken.
    """
    found = promise_broken(gm, example, reference, outputs, owner.keeps)
    if found is not None:
        raise NumericCheckError(
            f"the pass {owner.name} changed what the graph computes",
            where=str(found),
            why=f"it declares its result {owner.keeps}",
            fix="pipeline.bisect(gm) names the first node that differs",
        )


def first_differing_node(
    before: fx.GraphModule, after: fx.GraphModule, example: ExampleInputs, numerics: Numerics
) -> tuple[fx.Node, Difference] | None:
    """The first node of `after`, in execution order, whose value differs from that of its site in `before`."""
    values: dict[str, torch.Tensor] = {}

    def remember(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            values[info(node).site] = value

    found: list[tuple[fx.Node, Difference]] = []

    def compare(node: fx.Node, value: Any) -> None:
        # A fused node computes what the last of the nodes it stands for computed; a step of a composite does not.
        record = info(node)
        last = next((site for site in reversed(record.stands_for) if site in values), None)
        known = None if last is None or record.site.startswith(f"{last}.") else values[last]
        if found or known is None or not isinstance(value, torch.Tensor):
            return
        difference = tensors_differ(where(node), known, value, numerics)
        if difference is not None:
            found.append((node, difference))

    with torch.no_grad():
        with _seeded():
            evaluate(_disposable(before), example.args, example.kwargs, observe=remember)
        with _seeded():
            evaluate(_disposable(after), example.args, example.kwargs, observe=compare)
    return found[0] if found else None


def _tensors(value: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{place}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for position, entry in enumerate(value):
            yield from _tensors(entry, f"{place}[{position}]")
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name), f"{place}.{name}")

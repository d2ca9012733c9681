"""Replaying a captured graph against the model it came from: equal to the last bit, or not returned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qgraph.capture.inputs import Inputs, copy_inputs
from qgraph.capture.structure import format_path, leaves
from qgraph.errors import CaptureError

Run = Callable[[Inputs], Any]


@contextmanager
def reproducible() -> Iterator[None]:
    """Numerics as a graph can reproduce them: no attention fast path, which computes in another order."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def model_runner(model: nn.Module, call: Callable[[nn.Module, Inputs], Any], *, keeps_state: bool) -> Run:
    """Runs the user's model; a model whose forward changes itself is run on a fresh copy each time."""
    return lambda inputs: call(model if keeps_state else copy.deepcopy(model), copy_inputs(inputs))


def compare_replay(expected: Any, actual: Any, *, what: str, model: str, suspects: tuple[str, ...]) -> None:
    """Checks that two outputs are the same structure with equal tensors.

    Args:
        expected: the model's output.
        actual: the graph's.
        what: which variant of the inputs was replayed.
        model: the model's class name.
        suspects: waived flags, the likely cause of a difference.

    Raises:
        CaptureError: they differ.
    """
    found = first_difference(expected, actual)
    if found is None:
        return
    raise CaptureError(
        f"the captured graph of {model} does not reproduce the model on {what}",
        where=found,
        why="something the graph cannot see depends on the inputs or changes between calls"
        + (f"; waived: {'; '.join(suspects)}" if suspects else ""),
        fix="make the forward depend on its tensor inputs only, or trace the parts separately",
    )


def first_difference(expected: Any, actual: Any) -> str | None:
    """Where two outputs first differ, in words; None if they are equal bit for bit (NaN equals NaN)."""
    ours, theirs = list(leaves(actual)), list(leaves(expected))
    if type(expected) is not type(actual) or [path for path, _ in ours] != [path for path, _ in theirs]:
        return f"the structure: {type(expected).__name__} against {type(actual).__name__}"
    for (path, one), (_, two) in zip(theirs, ours, strict=True):
        name = format_path("output", path)
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            if one.shape != two.shape or one.dtype != two.dtype:
                return f"{name}: {list(one.shape)} {one.dtype} against {list(two.shape)} {two.dtype}"
            if not torch.equal(one, two) and not _equal_with_nan(one, two):
                gap = (one.double() - two.double()).abs().nan_to_num()
                return f"{name}: {int((gap > 0).sum())} of {one.numel()} elements, by up to {gap.max().item():.3g}"
        elif isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor) or not _same(one, two):
            return f"{name}: {one!r} against {two!r}"
    return None


def _equal_with_nan(one: torch.Tensor, two: torch.Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(torch.equal(one.isnan(), two.isnan())) and torch.equal(one.nan_to_num(), two.nan_to_num())


def _same(one: object, two: object) -> bool:
    return bool(one == two) or (one != one and two != two)

"""Replaying a captured graph against the model it came from: equal to the last bit, or not returned."""

from __future__ import annotations

from typing import Any

import torch

from qgraph.capture.options.flags import Unfaithful
from qgraph.capture.values.structure import format_path, parts

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    error = Unfaithful(
        f"the captured graph of {model} does not reproduce the model on {what}",
        where=found,
        why="something the graph cannot see depends on the inputs or changes between calls"
        + (f"; waived: {'; '.join(suspects)}" if suspects else ""),
        fix="make the forward depend on its tensor inputs only, or trace the parts separately",
    )
    error.kinds = frozenset({"replay"})
    raise error


def first_difference(expected: Any, actual: Any, place: str = "output") -> str | None:
    """Where two outputs first differ, in words; None if they are equal bit for bit (NaN equals NaN)."""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        return _tensor_difference(place, expected, actual)
    if type(expected) is not type(actual):
        return f"{place}: {_described(expected)} against {_described(actual)}"
    ours, theirs = parts(expected), parts(actual)
    if ours is None or theirs is None:
        same = expected == actual or (expected != expected and actual != actual)
        return None if same else f"{place}: {expected!r} against {actual!r}"
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        return f"{place}: {_described(expected)} against {_described(actual)}"
    for (step, one), (_, two) in zip(ours, theirs, strict=True):
        found = first_difference(one, two, format_path(place, (step,)))
        if found is not None:
            return found
    return None


def _tensor_difference(place: str, one: torch.Tensor, two: torch.Tensor) -> str | None:
    if one.shape != two.shape or one.dtype != two.dtype or one.layout != two.layout:
        return f"{place}: {_described(one)} against {_described(two)}"
    one, two = _readable(one), _readable(two)
    if torch.equal(_bits(one), _bits(two)):
        return None
    differs = _bits(one) != _bits(two)
    if one.is_floating_point():
        differs &= ~(one.isnan() & two.isnan())
    if not bool(differs.any()):
        return None
    wide = torch.float64 if one.is_floating_point() else torch.int64
    gap = (one[differs].to(wide) - two[differs].to(wide)).abs().max().item()
    return f"{place}: {int(differs.sum())} of {one.numel()} elements, by up to {gap:.3g}"


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """A dense real tensor with the same values."""
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        form = "" if value.layout is torch.strided else f" {value.layout}"
        return f"a {value.dtype}{form} tensor of shape {list(value.shape)}"
    found = parts(value)
    return repr(value) if found is None else f"a {type(value).__name__} of {len(found)} parts"

"""Masks of attention: what is allowed as 0 and 1, and what is added to the scores.

    boolean mask                 allowed = mask
    additive mask                allowed = mask > THRESHOLD      bias = mask where allowed, else 0
    scores.masked_fill(m, -1e9)  allowed = not m                 the scores as they were before
An additive value below the threshold takes a weight to less than exp(-80), which float32 keeps as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.decompositions.steps import Steps, constant_of, is_float32, shape_of
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info
from qgraph.ir.shapes import tensor_spec

THRESHOLD = -80.0
_MOVES = (
    ops.RESHAPE,
    ops.EXPAND,
    ops.SQUEEZE,
    ops.UNSQUEEZE,
    ops.SLICE,
    ops.TRANSPOSE,
    ops.PERMUTE,
    ops.IDENTITY,
)
_ROWS_STAY = (ops.RESHAPE, ops.EXPAND, ops.UNSQUEEZE)


@dataclass(frozen=True)
class Mask:
    """What a mask does to scores; both parts broadcast against them.

    Args:
        allowed: 1.0 where attention may look, 0.0 elsewhere; None if it may everywhere.
        bias: what is added to the scores; None for nothing.
        complete: whether every row is known to allow something.
    """

    allowed: fx.Node | None = None
    bias: fx.Node | None = None
    complete: bool = False


def read_mask(steps: Steps, mask: Any, *, name: str = "mask", inverted: bool = False) -> Mask:
    """A boolean or additive mask; `inverted` booleans hold where attention must not look.

    Moves and sums are done on the parts, so that what a constant is made of stays constant.
    """
    if mask is None:
        return Mask()
    tensor = constant_of(mask)
    spec = tensor_spec(mask)
    boolean = spec is not None and spec.dtype is torch.bool
    if info(mask).op in _MOVES:
        return _moved(steps, mask, read_mask(steps, bind(mask).operand("input"), name=name, inverted=inverted), name)
    terms = _mask_terms(mask)
    if terms is not None:
        parts = [read_mask(steps, term, name=f"{name}{place}") for place, term in enumerate(terms)]
        return both(steps, *parts, name=name)
    if tensor is not None:
        if boolean:
            return constant_mask(steps, ~tensor if inverted else tensor, name)
        return _constant_additive(steps, tensor, name)
    if boolean:
        return Mask(_allowed(steps, mask, name, inverted=inverted))
    allowed = _allowed(steps, mask, name, above=THRESHOLD)
    if _adds_nothing_else(mask):
        return Mask(allowed)
    bias = steps.step(f"{name}_bias", ops.MASK_BIAS, mask, above=THRESHOLD, inner=False)
    return Mask(allowed, bias)


def constant_mask(steps: Steps, allowed: torch.Tensor, name: str = "mask") -> Mask:
    """A boolean mask that is known now."""
    if bool(allowed.all()):
        return Mask()
    complete = bool(allowed.any(-1).all())
    return Mask(steps.stub(name, steps.constant(name, allowed.float()), 1.0), complete=complete)


def both(steps: Steps, one: Mask, two: Mask, *, name: str = "mask") -> Mask:
    """Two masks at once."""
    bias = _joined(steps, f"{name}_bias_sum", ops.ADD, one.bias, two.bias)
    allowed = _joined(steps, f"{name}_product", ops.MUL, one.allowed, two.allowed)
    complete = (one.complete or one.allowed is None) and (two.complete or two.allowed is None)
    single = one.allowed is None or two.allowed is None
    return Mask(allowed, bias, complete and single)


def reshaped(steps: Steps, mask: Mask, op: Any, name: str, **options: Any) -> Mask:
    """The mask with both parts moved the same way."""

    def moved(part: fx.Node | None, label: str) -> fx.Node | None:
        return None if part is None else steps.step(f"{name}_{label}", op, part, **options)

    return Mask(moved(mask.allowed, "allowed"), moved(mask.bias, "bias"), mask.complete)


def _moved(steps: Steps, move: fx.Node, mask: Mask, name: str) -> Mask:
    """The parts of a mask, moved as `move` moves the whole."""
    source = bind(move).operand("input")
    label = info(move).site.rpartition(".")[2].strip("_")

    def moved(part: fx.Node | None, kind: str) -> fx.Node | None:
        if part is None:
            return None
        args = tuple(part if value is source else value for value in move.args)
        return steps.repeat(f"{name}_{kind}.{label}", move, args, shape_of(move))

    rows_stay = (
        info(move).op in (ops.EXPAND, ops.UNSQUEEZE, ops.RESHAPE) and shape_of(move)[-1:] == shape_of(source)[-1:]
    )
    return Mask(moved(mask.allowed, "allowed"), moved(mask.bias, "bias"), mask.complete and rows_stay)


@dataclass(frozen=True)
class MaskedScores:
    """Scores behind a mask, as users write it before a softmax.

    Args:
        scores: the scores without the mask.
        mask: the mask.
        inverted: whether a boolean mask holds where attention must not look.
    """

    scores: fx.Node
    mask: fx.Node
    inverted: bool = False

    def read(self, steps: Steps) -> Mask:
        """The mask's parts."""
        return read_mask(steps, self.mask, inverted=self.inverted)


def masked_scores(value: Any) -> MaskedScores | None:
    """What a value masks, if it is scores plus an additive mask, or scores filled with a large negative number."""
    if not is_float32(value) or info(value).in_place or info(value).unstable:
        return None
    if info(value).op is ops.ADD and bind(value).option("alpha") == 1:
        first, second = bind(value).operand("input"), bind(value).operand("other")
        for scores, mask in ((first, second), (second, first)):
            if is_float32(scores) and is_float32(mask) and _is_additive(mask) and not _is_additive(scores):
                return MaskedScores(scores, mask)
        return None
    filled = _filled(value)
    if filled is None or not isinstance(filled.kept, fx.Node) or not _is_low(filled.number):
        return None
    if not is_float32(filled.kept):
        return None
    return MaskedScores(filled.kept, filled.condition, inverted=filled.inverted)


@dataclass(frozen=True)
class _Filled:
    """`where(condition, number, kept)`; with `inverted` false, the number stands where the condition fails."""

    kept: Any
    number: Any
    condition: fx.Node
    inverted: bool


def _filled(node: fx.Node) -> _Filled | None:
    """What `masked_fill` or `where` fills with a number, whatever the spelling."""
    given = (*node.args, *node.kwargs.values())
    if len(given) != 3:
        return None
    if _called(node) in ("masked_fill", "masked_fill.Scalar", "masked_fill.Tensor"):
        kept, condition, number = given
        return _filling(kept, number, condition, inverted=True)
    if _called(node) in ("where", "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar"):
        one, condition, two = given
        if node.op != "call_method":
            condition, one, two = given
        return _filling(one, two, condition, inverted=False) or _filling(two, one, condition, inverted=True)
    return None


def _filling(kept: Any, number: Any, condition: Any, *, inverted: bool) -> _Filled | None:
    spec = tensor_spec(condition) if isinstance(condition, fx.Node) else None
    value = _number(number)
    if spec is None or spec.dtype is not torch.bool or value is None:
        return None
    return _Filled(kept, value, condition, inverted)


def _called(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.removesuffix(".default")


def _number(value: Any) -> float | None:
    """A plain number, or a constant of one element."""
    if isinstance(value, (int, float)):
        return float(value)
    tensor = constant_of(value)
    return float(tensor.item()) if tensor is not None and tensor.numel() == 1 else None


def _is_low(number: float | None) -> bool:
    return number is not None and number <= THRESHOLD


def _is_additive(node: fx.Node) -> bool:
    """Whether a value is known to be an additive mask: it holds values below the threshold."""
    tensor = constant_of(node)
    if tensor is not None:
        return tensor.is_floating_point() and bool((tensor <= THRESHOLD).any())
    if info(node).op in _MOVES:
        return _is_additive(bind(node).operand("input"))
    terms = _mask_terms(node)
    if terms is not None:
        return any(map(_is_additive, terms))
    return _adds_nothing_else(node)


def _mask_terms(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two terms of a sum of masks and constants; None for anything else."""
    if info(node).op is not ops.ADD or bind(node).option("alpha") != 1:
        return None
    first, second = bind(node).operand("input"), bind(node).operand("other")
    if not all(is_float32(term) and (_is_constant(term) or _is_additive(term)) for term in (first, second)):
        return None
    return first, second


def _is_constant(node: fx.Node) -> bool:
    """Whether a value is a constant, moved at most."""
    while info(node).op in _MOVES:
        node = bind(node).operand("input")
    return info(node).op is ops.CONSTANT


def _adds_nothing_else(node: fx.Node) -> bool:
    """Whether a computed additive mask is 0 wherever it allows: zeros filled with a low number."""
    filled = _filled(node)
    if filled is None:
        return False
    return (_is_zero(filled.kept) and _is_low(filled.number)) or (filled.number == 0 and _is_low(_number(filled.kept)))


def _is_zero(value: Any) -> bool:
    """Whether a value is known to be 0 everywhere."""
    tensor = constant_of(value)
    if tensor is not None:
        return not bool(tensor.any())
    return _called(value) in ("zeros", "zeros_like", "new_zeros") if isinstance(value, fx.Node) else value == 0


def _allowed(steps: Steps, mask: fx.Node, name: str, *, above: float | None = None, inverted: bool = False) -> fx.Node:
    options: dict[str, Any] = {"above": above} if above is not None else {"inverted": True} if inverted else {}
    made = steps.step(f"{name}_allowed", ops.MASK, mask, inner=False, **options)
    return steps.stub(name, made, 1.0)


def _constant_additive(steps: Steps, tensor: torch.Tensor, name: str) -> Mask:
    allowed = tensor > THRESHOLD
    finite = torch.where(allowed, tensor, 0.0).float()
    bias = steps.constant(f"{name}_bias", finite) if bool(finite.any()) else None
    found = constant_mask(steps, allowed, name)
    return Mask(found.allowed, bias, found.complete)


def _joined(steps: Steps, name: str, op: Any, one: fx.Node | None, two: fx.Node | None) -> fx.Node | None:
    if one is None or two is None:
        return one or two
    return steps.step(name, op, one, two)

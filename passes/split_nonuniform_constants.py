"""Gives constants whose magnitudes differ widely one scale per group.

    x / c   ->   cat([x / c[:k], x / c[k:]])

One scale for `10000 ** (2 * i / d)` leaves the small divisors a relative error of their own size. The error of the
consumer's result is estimated on the example inputs, in steps of the result; where it exceeds `tolerance`, the constant
is cut into the fewest contiguous groups that meet it, and the parts are joined after the consumer. A constant behind
the user's QuantStub gets one stub per group. Bit exact in float.

What is rounded decides: a divisor behind a stub is rounded itself; a bare one becomes a reciprocal before it is rounded
once `decompose-composites` prepares the graph for a target, and that is what is judged if the context has a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.editor import Editor, node_name
from qgraph.ir.evaluate import evaluate
from qgraph.ir.node_info import Refusal, info, module_of, tensor_at
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec
from qgraph.nn import QuantStub
from qgraph.numerics import QType, choose_qparams, fake_quantize, qint8
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.config.query import query_of
from qgraph.quantization.config.resolve import resolve

_CONSUMERS = (ops.DIV, ops.MUL, ops.ADD, ops.SUB)
_FUNCTIONS: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ops.DIV: torch.div,
    ops.MUL: torch.mul,
    ops.ADD: torch.add,
    ops.SUB: torch.sub,
}


@dataclass(frozen=True)
class SplitNonuniformConstants(Pass):
    """Splits constants that one scale represents badly.

    Args:
        tolerance: largest error that quantizing the constant may cause, in steps of the consumer's result.
        most_groups: a constant that needs more groups is left whole, with the reason recorded.
    """

    name: ClassVar[str] = "split-nonuniform-constants"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    tolerance: float = 4.0
    most_groups: int = 8

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        candidates = [node for node in gm.graph.nodes if _candidate(node) is not None and not _stays_float(node, ctx)]
        if not candidates or ctx.example is None:
            return PassResult(gm, False)
        values = _operand_values(gm, ctx, candidates)
        notes, refusals = [], []
        for node in candidates:
            case = _Case(node, gm, values[node], ctx)
            found = self._groups(case)
            if isinstance(found, str):
                refusals.append(Refusal(self.name, found, info(node).site, info(node).source))
            elif len(found) > 1:
                notes.append(f"{info(node).site}: {case.describe(found)}")
                _split(case, found, edit)
        return PassResult(gm, edit.changes > 0, tuple(notes), tuple(refusals))

    def _groups(self, case: _Case) -> list[tuple[int, int]] | str:
        """Bounds of the groups; a single one where no split is needed; a reason where none is possible."""
        whole = [(0, case.length)]
        if not bool(torch.isfinite(case.constant).all()):
            return "it is not finite"
        if case.axis is None:
            return whole if case.error(None) <= self.tolerance else "it varies along several dimensions"
        if case.error(whole[0]) <= self.tolerance:
            return whole
        groups: list[tuple[int, int]] = []
        start = 0
        while start < case.length:
            if len(groups) == self.most_groups:
                return f"it needs more than {self.most_groups} groups"
            end = self._longest(case, start)
            groups.append((start, end))
            start = end
        return groups

    def _longest(self, case: _Case, start: int) -> int:
        """End of the longest group from `start` that meets the tolerance, by bisection; at least one element."""
        good, bad = start + 1, case.length + 1
        while bad - good > 1:
            middle = (good + bad) // 2
            if case.error((start, middle)) <= self.tolerance:
                good = middle
            else:
                bad = middle
        return good


class _Case:
    """One consumer of a constant, with the numbers to judge it."""

    def __init__(self, node: fx.Node, gm: fx.GraphModule, operand: torch.Tensor, ctx: PassContext) -> None:
        self.node = node
        self.operand = operand
        self.candidate = _found(node)
        self.position = self.candidate.position
        self.qtype = _format(self.candidate.stub or node, ctx)
        self.constant = tensor_at(gm, str(self.candidate.constant.target)).detach()
        bare_divisor = info(node).op is ops.DIV and self.position == 1 and self.candidate.stub is None
        self.inverted = bare_divisor and ctx.target is not None
        self.function = _FUNCTIONS[info(node).op]
        self.result = self._compute(self.operand, self.constant)
        self.step = self.result.abs().max().item() / -_format(node, ctx).qmin
        self.axis = self._axis()
        self.length = 1 if self.axis is None else self.constant.shape[self.axis]

    def _axis(self) -> int | None:
        """The dimension of the constant, counted from the end, along which its magnitudes vary; None if several."""
        varying = [axis for axis, size in enumerate(self.constant.shape) if size > 1]
        return varying[0] - self.constant.dim() if len(varying) == 1 else None

    def _compute(self, operand: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        if self.position == 0:
            return self.function(constant, operand)
        return self.function(operand, constant)

    def error(self, group: tuple[int, int] | None) -> float:
        """Largest error in the result, in its steps, if the group of the constant has one scale."""
        constant, operand, exact = self.constant, self.operand, self.result
        if group is not None and self.axis is not None:
            constant = _cut(constant, self.axis, group)
            operand, exact = _cut(operand, self.axis, group), _cut(exact, self.axis, group)
        if self.inverted:
            approximate = operand * self._rounded(1 / constant)
        else:
            approximate = self._compute(operand, self._rounded(constant))
        gap = (approximate - exact).abs().max().item()
        return gap / self.step if gap == gap and self.step else (0.0 if gap == 0 else float("inf"))

    def _rounded(self, constant: torch.Tensor) -> torch.Tensor:
        return fake_quantize(constant, choose_qparams(constant.min(), constant.max(), self.qtype))

    def describe(self, groups: list[tuple[int, int]]) -> str:
        """What the split gains, in words."""
        before = self.error((0, self.length))
        after = max(self.error(group) for group in groups)
        name = self.candidate.constant.target
        return (
            f"constant {name} costs {before:.3g} steps of the result with one {self.qtype} scale, "
            f"{after:.3g} with {len(groups)} groups {groups}"
        )


@dataclass(frozen=True)
class _Candidate:
    """A float constant of several elements next to a computed operand.

    Args:
        position: which operand it is, 0 or 1.
        constant: the node that holds it.
        stub: the user's QuantStub it is read through, if any.
    """

    position: int
    constant: fx.Node
    stub: fx.Node | None


def _candidate(node: fx.Node) -> _Candidate | None:
    if info(node).op not in _CONSUMERS or node.op != "call_function":
        return None
    bound = bind(node)
    if bound.values.get("rounding_mode") is not None or bound.values.get("alpha", 1) != 1:
        return None
    operands = [bound.operand(name) for name in bound.op.operands]
    constants = [_constant(value) for value in operands]
    if sum(found is not None for found in constants) != 1 or not all(isinstance(one, fx.Node) for one in operands):
        return None
    position = 0 if constants[0] is not None else 1
    constant = constants[position]
    assert constant is not None
    spec, other = tensor_spec(constant), tensor_spec(operands[1 - position])
    if spec is None or other is None or spec.numel < 2 or {spec.dtype, other.dtype} != {torch.float32}:
        return None
    return _Candidate(position, constant, None if operands[position] is constant else operands[position])


def _found(node: fx.Node) -> _Candidate:
    candidate = _candidate(node)
    assert candidate is not None
    return candidate


def _constant(value: Any) -> fx.Node | None:
    """The constant `value` is, looking through a QuantStub that observes its scale."""
    if isinstance(value, fx.Node) and info(value).op is ops.QUANT_STUB:
        stub = module_of(value)
        if isinstance(stub, QuantStub) and stub.scale is not None:
            return None
        value = value.all_input_nodes[0]
    return value if isinstance(value, fx.Node) and info(value).op is ops.CONSTANT else None


def _operand_values(gm: fx.GraphModule, ctx: PassContext, candidates: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The computed operand of each candidate on the example inputs."""
    wanted: dict[fx.Node, list[fx.Node]] = {}
    for node in candidates:
        bound = bind(node)
        wanted.setdefault(bound.operand(bound.op.operands[1 - _found(node).position]), []).append(node)
    values: dict[fx.Node, torch.Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        for candidate in wanted.get(node, ()):
            values[candidate] = value

    assert ctx.example is not None
    with torch.no_grad():
        evaluate(gm, ctx.example.args, ctx.example.kwargs, observe=observe)
    return values


def _format(node: fx.Node, ctx: PassContext) -> QType:
    """The integer format the result will have."""
    if not ctx.setters:
        return qint8
    qconfig = resolve(ctx.setters, query_of(node, ctx.classes)).qconfig
    return qconfig.output if qconfig is not None and isinstance(qconfig.output, QType) else qint8


def _stays_float(node: fx.Node, ctx: PassContext) -> bool:
    """Whether the user keeps a call in float, where nothing is rounded."""
    return bool(ctx.setters) and resolve(ctx.setters, query_of(node, ctx.classes)).qconfig is None


def _split(case: _Case, groups: list[tuple[int, int]], edit: Editor) -> None:
    node, axis = case.node, case.axis
    assert axis is not None
    record, bound = info(node), bind(node)
    operand = bound.operand(bound.op.operands[1 - case.position])
    spec = tensor_spec(node)
    assert spec is not None
    parts = []
    for index, group in enumerate(groups):
        site = f"{record.site}.group{index}"
        constant = _constant_part(case, group, index, edit)
        value = _slice(operand, axis, group, f"{site}.slice", node, edit)
        operands = (constant, value) if case.position == 0 else (value, constant)
        part = edit.call(record.op, *operands, like=node, site=site)
        shape = list(spec.shape)
        shape[axis] = group[1] - group[0]
        edit.annotate(part, value=TensorSpec(tuple(shape), spec.dtype), origins=record.stands_for)
        parts.append(part)
    joined = edit.call(ops.CAT, parts, like=node, dim=axis)
    edit.replace(node, joined)
    edit.rename(joined)
    for left in (case.candidate.stub, case.candidate.constant):
        if left is not None and not left.users:
            edit.erase(left)


def _constant_part(case: _Case, group: tuple[int, int], index: int, edit: Editor) -> fx.Node:
    """A group of the constant, behind a stub of its own if the whole had one."""
    assert case.axis is not None
    name = f"{case.candidate.constant.target}_group{index}"
    constant = edit.constant(_cut(case.constant, case.axis, group).clone(), path=name, like=case.node)
    if case.candidate.stub is None:
        return constant
    site = f"{info(case.node).site}.group{index}.{info(case.candidate.stub).site}"
    path = edit.free_path(f"stubs.{node_name(site)}")
    edit.set_module(path, QuantStub().eval())
    stub = edit.call_module(path, constant, op=ops.QUANT_STUB, like=case.candidate.stub, site=site, before=case.node)
    edit.annotate(stub, value=info(constant).value, origins=info(case.candidate.stub).stands_for)
    return stub


def _slice(operand: fx.Node, axis: int, group: tuple[int, int], site: str, like: fx.Node, edit: Editor) -> fx.Node:
    """The operand's part for a group; the operand itself where it is broadcast along the axis."""
    spec = tensor_spec(operand)
    assert spec is not None
    if len(spec.shape) < -axis or spec.shape[axis] == 1:
        return operand
    index = (Ellipsis, slice(*group), *[slice(None)] * (-axis - 1))
    part = edit.call_function(ops.SLICE.target, (operand, index), op=ops.SLICE, like=like, site=site)  # type: ignore[arg-type]
    shape = list(spec.shape)
    shape[axis] = group[1] - group[0]
    edit.annotate(part, value=TensorSpec(tuple(shape), spec.dtype))
    return part


def _cut(tensor: torch.Tensor, axis: int, group: tuple[int, int]) -> torch.Tensor:
    """The group's part of a tensor along an axis counted from the end; all of it where it is broadcast."""
    if tensor.dim() < -axis or tensor.shape[axis] == 1:
        return tensor
    return tensor.narrow(axis, group[0], group[1] - group[0])

"""What all decompositions share: a rule, the steps it creates, and the loop that applies rules.

Steps are named after the composite (`norm.rsqrt`, `attn.softmax.exp`). Inner steps are sites of their own that stay
int16 where nobody says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.eliminate_dead_code import has_effect
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import Refusal, info, tensor_at
from qgraph.ir.op import Op, ShapeRule
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec, ValueSpec, spec_of
from qgraph.lowering import support
from qgraph.nn import Affine, QuantStub
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.rewrite import Verdict, no, yes


@dataclass(frozen=True)
class Decomposition:
    """One rule.

    Args:
        check: what may be taken apart; never changes anything.
        decompose: does it.
        steps: the operators that result, which the target must have.
    """

    check: Callable[[fx.Node], Verdict]
    decompose: Callable[[fx.Node, Steps], None]
    steps: tuple[Op, ...]


def apply_rules(
    owner: Pass, gm: fx.GraphModule, ctx: PassContext, rules: Mapping[str, Decomposition], left_whole: tuple[str, ...]
) -> PassResult:
    """Takes every composite apart that has a rule, passes its check, and that the target does not run as it is.

    Args:
        owner: the pass.
        gm, ctx: what it runs on.
        rules: by the op table's name of the decomposition.
        left_whole: names of operators that are not touched.
    """
    edit = ctx.edit(gm, owner)
    refusals = []
    shared: dict[Any, str] = {}
    read = [node for node in gm.graph.nodes if node.users]
    for node in list(gm.graph.nodes):
        op = info(node).op
        rule = rules.get(op.decomposition or "")
        if rule is None or op.name in left_whole or info(node).in_place or info(node).unstable:
            continue
        if ctx.target is not None and support(node, ctx.target):
            continue
        verdict = rule.check(node)
        lacking = [step.name for step in rule.steps if ctx.target and ctx.target.rule(step.name) is None]
        if verdict and lacking:
            verdict = no(f"the target has no {', '.join(lacking)}", node)
        if verdict:
            edit.annotate(node, float_reason=None)
            rule.decompose(node, Steps(node, edit, shared))
        elif verdict.reason:
            edit.annotate(node, float_reason=verdict.reason)
            refusals.append(Refusal(owner.name, verdict.reason, info(node).site, info(node).source))
    known = set(gm.graph.nodes)
    for node in reversed(read):  # what a composite read and its steps do not, such as scores with a mask added
        if node in known and not node.users and not has_effect(node):
            edit.erase(node)
    return PassResult(gm, edit.changes > 0, refusals=tuple(refusals))


class Steps:
    """Creates the steps of one composite.

    Args:
        node: the composite.
        edit: the graph's editor.
        shared: paths of modules made so far, by what they were made from: a layer called twice has one weight.
    """

    def __init__(self, node: fx.Node, edit: Editor, shared: dict[Any, str]) -> None:
        self.node = node
        self.edit = edit
        self.site = info(node).site
        self._shared = shared

    def step(self, name: str, op: Op, *operands: Any, inner: bool = True, **options: Any) -> fx.Node:
        """A step with a site of its own; `inner` steps stay int16 where no setting says otherwise."""
        created = self.edit.call(op, *operands, like=self.node, site=f"{self.site}.{name}", **options)
        return self._noted(created, _value(op, operands, options), inner)

    def repeat(self, name: str, call: fx.Node, args: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
        """The function `call` calls, on other arguments; the result has `shape`."""
        assert callable(call.target)
        site = f"{self.site}.{name}"
        created = self.edit.call_function(
            call.target, args, dict(call.kwargs), op=info(call).op, like=self.node, site=site
        )
        return self._noted(created, TensorSpec(shape, torch.float32), inner=True)

    def linear(
        self,
        name: str,
        x: fx.Node,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        key: Any,
        inner: bool = False,
    ) -> fx.Node:
        """`x @ weight.T + bias` as a module of its own, the same one for the same `key`."""
        if key not in self._shared:
            path = self.edit.free_path(f"{self.site}.{name}")
            with torch.device("meta"):
                module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            module.weight = weight
            if bias is not None:
                module.bias = bias
            self.edit.set_module(path, module.eval())
            self._shared[key] = path
        path = self._shared[key]
        created = self.edit.call_module(path, x, op=ops.LINEAR, like=self.node, site=f"{self.site}.{name}")
        shape = (*shape_of(x)[:-1], weight.shape[0])
        return self._noted(created, TensorSpec(shape, torch.float32), inner)

    def affine(self, name: str, x: fx.Node, weight: torch.Tensor, bias: torch.Tensor) -> fx.Node:
        """`x * weight + bias` as an inner step: exact factors, not codes."""
        created = self._affine(x, weight, bias, f"{self.site}.{name}")
        return self._noted(created, info(x).value, inner=True)

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A tensor kept by the graph."""
        return self.edit.constant(tensor, path=f"{self.site}.{name}".translate(_PATH), like=self.node)

    def stub(self, name: str, x: fx.Node, scale: float) -> fx.Node:
        """A quant stub with a fixed scale: what comes before it stays float."""
        site = f"{self.site}.{name}"
        path = self.edit.free_path(f"stubs.{site.translate(_PATH)}")
        self.edit.set_module(path, QuantStub(scale).eval())
        created = self.edit.call_module(path, x, op=ops.QUANT_STUB, like=self.node, site=site)
        return self._noted(created, info(x).value, inner=False)

    def finish(self, op: Op, *operands: Any, **options: Any) -> None:
        """The last step, which is the composite's own site."""
        last = self.edit.call(op, *operands, like=self.node, **options)
        self._finish(last)

    def finish_affine(self, value: fx.Node, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """The last step as a scale and shift per channel."""
        self._finish(self._affine(value, weight, bias, None))

    def finish_with(self, value: fx.Node) -> None:
        """An existing step is the result."""
        self.edit.annotate(value, origins=(*info(value).stands_for, *info(self.node).stands_for))
        self.edit.bypass(self.node, value)

    def finish_parts(self, parts: Any) -> None:
        """The result is a structure of steps: readers of its parts read them."""
        self._give(self.node, parts)
        self.edit.erase(self.node)

    def _give(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, fx.Node):
            origins = dict.fromkeys((*info(value).stands_for, *info(node).stands_for))
            self.edit.annotate(value, origins=tuple(origins))
            self.edit.bypass(node, value)
            return
        for user in list(node.users):
            self._give(user, value[bind(user).option("index")])
        if node is not self.node:
            self.edit.erase(node)

    def _affine(self, x: fx.Node, weight: torch.Tensor, bias: torch.Tensor, site: str | None) -> fx.Node:
        path = self.edit.free_path(f"{(site or self.site + '.affine')}")
        self.edit.set_module(path, Affine(weight, bias).eval())
        return self.edit.call_module(path, x, op=ops.AFFINE, like=self.node, site=site)

    def _finish(self, last: fx.Node) -> None:
        self.edit.replace(self.node, last)
        self.edit.rename(last)

    def _noted(self, created: fx.Node, value: ValueSpec | None, inner: bool) -> fx.Node:
        self.edit.annotate(created, inner=inner, value=value, origins=info(self.node).stands_for)
        return created


_PATH = str.maketrans("()[]", "____")


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a tensor node on the example run; numbers have none."""
    spec = tensor_spec(node) if isinstance(node, fx.Node) else None
    return () if spec is None else spec.shape


def constant_of(node: Any) -> torch.Tensor | None:
    """The tensor of a constant node; None for anything else."""
    if not isinstance(node, fx.Node) or info(node).op is not ops.CONSTANT:
        return None
    owner = node.graph.owning_module
    return None if owner is None else tensor_at(owner, str(node.target)).detach()


def is_float32(node: Any) -> bool:
    """Whether a node's value is one float32 tensor."""
    spec = tensor_spec(node) if isinstance(node, fx.Node) else None
    return spec is not None and spec.dtype is torch.float32


def float_input(node: fx.Node, *names: str) -> Verdict:
    """Whether the operands `names` (the first one, if none are given) are float32 tensors."""
    bound = bind(node)
    for name in names or (bound.op.operands[0],):
        if not is_float32(bound.operand(name)):
            return no("it does not compute in float32", node)
    return yes()


def parts_only(node: fx.Node) -> Verdict:
    """Whether everything that reads a tuple reads its parts."""
    for user in node.users:
        if info(user).op is not ops.ITEM:
            return no("its result is used as a whole, not part by part", node)
        if isinstance(info(user).value, tuple) and not (verdict := parts_only(user)):
            return verdict
    return yes()


def reduced(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with 1 at `dims`."""
    axes = {dim % len(shape) for dim in dims}
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _value(op: Op, operands: tuple[Any, ...], options: Mapping[str, Any]) -> ValueSpec | None:
    """What a step gives on the example run; the common rules directly, the rest by a run without values."""
    if op.shape is ShapeRule.SAME:
        return info(operands[0]).value
    if op.shape is ShapeRule.BROADCAST:
        return TensorSpec(tuple(torch.broadcast_shapes(*map(shape_of, operands))), torch.float32)
    if op in (ops.AMAX, ops.MEAN, ops.SUM) and options.get("keepdim"):
        return TensorSpec(reduced(shape_of(operands[0]), options["dim"]), torch.float32)
    assert op.target is not None
    given = fx.node.map_arg(operands, _empty)
    return spec_of(op.target(*given, **options))


def _empty(node: fx.Node) -> torch.Tensor:
    spec = tensor_spec(node)
    assert spec is not None
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

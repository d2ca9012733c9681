"""Fuses what hardware does in one pass: convolution or linear, batch norm, residual add, activation.

    bn(op(x, w, b))          =  op(x, w', b')
        f = g / sqrt(v + eps)     w' = w * f     b' = (b - m) * f + beta        equal within 2e-6 relative
    op(x, w, b) + r          =  fused op with residual r                        bit exact
    relu(op(x, w, b) [+ r])  =  fused op with activation, likewise relu6        bit exact

Every combination arises by applying the three rules until none fires. The fused call keeps the convolution's name and
site. Each refusal carries its reason and the user's line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from qgraph.ir.arguments import bind
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op_table import ADD, BATCH_NORM, FUSABLE, RELU, RELU6, TRANSPOSED
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.stage import Stage
from qgraph.nn import Activation, Fused, as_fused
from qgraph.pipeline import Numerics, PassContext, RewritePass, close
from qgraph.rewrite import Match, Rule, Verdict, any_value, call, no, yes
from qgraph.targets import Target, get_target


@dataclass(frozen=True)
class FuseConvBnAddRelu(RewritePass):
    """{Conv1d-3d, ConvTranspose1d-3d, Linear} x {batch norm, add, relu, relu6} and all combinations."""

    name: ClassVar[str] = "fuse-conv-bn-add-relu"
    result_stage: ClassVar[Stage | None] = Stage.FUSED
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    ensures: ClassVar[frozenset[str]] = frozenset({"fused"})
    keeps: ClassVar[Numerics] = close(1e-4)  # 2e-6 per fold, accumulated over deep networks

    def rules(self, gm: fx.GraphModule, ctx: PassContext) -> Sequence[Rule]:
        sharing = _Sharing(gm)
        target = ctx.target or get_target("bpu")
        return [FoldBatchNorm(sharing), FuseAdd(sharing, target), FuseActivation(sharing)]


class _Sharing:
    """Who else uses a module or a weight, as the graph was when the pass began."""

    def __init__(self, gm: fx.GraphModule) -> None:
        calls = [node for node in gm.graph.nodes if node.op == "call_module"]
        self.calls = Counter(str(node.target) for node in calls)
        self.reads = {str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}
        self.users: dict[int, list[fx.Node]] = {}
        for node in calls:
            if info(node).op in FUSABLE:
                self.users.setdefault(id(module_of(node).weight), []).append(node)

    def others(self, node: fx.Node) -> list[fx.Node]:
        """Other calls whose module holds the same weight."""
        return [other for other in self.users.get(id(module_of(node).weight), []) if other is not node]

    def reader(self, node: fx.Node) -> fx.Node | None:
        """A node that reads the weight or bias of the module that `node` calls."""
        paths = (f"{node.target}.weight", f"{node.target}.bias")
        return next((self.reads[path] for path in paths if path in self.reads), None)


class _Epilogue(Rule):
    """What the three rules have in common: who may be fused into."""

    def __init__(self, sharing: _Sharing) -> None:
        self.sharing = sharing

    def check_convolution(self, conv: fx.Node, *, follower: fx.Node) -> Verdict:
        """Whether `conv` may take over the work of `follower`, its only user."""
        if conv.op != "call_module":
            return no("its weight is computed in the forward, not a constant of the model", conv)
        if self.sharing.calls[str(conv.target)] > 1:
            return no(
                f"its module {conv.target} is called several times: split-shared-modules separates the calls", conv
            )
        others = [user for user in conv.users if user is not follower]
        if any(user.op == "output" for user in others):
            return no("its result is also an output of the graph", conv)
        if others:
            places = ", ".join(f"{info(user).site} ({info(user).source})" for user in others)
            return no(f"its result has other users: {places}", conv)
        return yes()


class FoldBatchNorm(_Epilogue):
    """A batch norm on its own statistics is a scale and a shift per channel: they go into weight and bias."""

    name = "fold-batch-norm"
    conv = call(FUSABLE)
    root = call(BATCH_NORM, conv)

    def __init__(self, sharing: _Sharing) -> None:
        super().__init__(sharing)
        self.weights: dict[tuple[int, ...], nn.Parameter] = {}  # tied parameters stay tied
        self.biases: dict[tuple[int, ...], nn.Parameter] = {}
        self.agreed: set[int] = set()  # weights whose holders all fold the same norm

    def check(self, match: Match) -> Verdict:
        conv, norm = match[self.conv], match.root
        return self._check_call(conv, norm) and self._check_tied_weights(conv, norm)

    def _check_call(self, conv: fx.Node, norm: fx.Node) -> Verdict:
        if norm.op != "call_module":
            return no("its statistics are computed in the forward", norm)
        module = module_of(norm)
        if module.training or getattr(module, "running_mean", None) is None:
            return no("it normalizes with the statistics of the batch", norm)
        verdict = self.check_convolution(conv, follower=norm)
        if not verdict:
            return verdict
        fused: Any = module_of(conv)
        if isinstance(fused, Fused) and (fused.adds or fused.activation is not Activation.NONE):
            return no("an add or activation stands between", norm)
        reader = self.sharing.reader(conv)
        if reader is not None:
            return no(f"the forward reads {reader.target} itself", reader)
        spec = tensor_spec(conv)
        if spec is None or len(spec.shape) != fused.weight.dim():
            return no("dimension 1 of its input, which it normalizes, is not the channels or features", norm)
        return yes()

    def _check_tied_weights(self, conv: fx.Node, norm: fx.Node) -> Verdict:
        """All holders of a weight fold the same norm, or none does: the weight stays one tensor."""
        weight, key = id(module_of(conv).weight), _norm_key(module_of(norm))
        if weight in self.agreed:
            return yes()
        for other in self.sharing.others(conv):
            follower = next(iter(other.users), None)
            normed = follower is not None and follower.op == "call_module" and info(follower).op is BATCH_NORM
            if follower is None or not normed or _norm_key(module_of(follower)) != key:
                site = info(other).site
                return no(f"its weight is shared with {site}, which the same batch norm does not follow", conv)
            verdict = self._check_call(other, follower)
            if not verdict:
                return no(f"its weight is shared with {info(other).site}, where {verdict.reason}", conv)
        self.agreed.add(weight)
        return yes()

    def rewrite(self, match: Match, edit: Editor) -> None:
        conv, norm = match[self.conv], match.root
        fused = as_fused(module_of(conv))
        statistics = module_of(norm)
        axis = 1 if info(conv).op in TRANSPOSED else 0
        weight = (id(fused.weight), axis, getattr(fused, "groups", 1), *_norm_key(statistics))
        bias = (id(fused.bias), *_norm_key(statistics))
        if weight not in self.weights:
            self.weights[weight] = fold_weight(fused, statistics, axis)
        if bias not in self.biases:
            self.biases[bias] = fold_bias(fused, statistics)
        fused._parameters.update(weight=self.weights[weight], bias=self.biases[bias])
        edit.set_module(str(conv.target), fused)
        edit.absorb(norm, conv)


class FuseAdd(_Epilogue):
    """The residual enters the accumulator before the result is rounded."""

    name = "fuse-add"
    conv = call(FUSABLE)
    residual = any_value()
    root = call(ADD, conv, residual)

    def __init__(self, sharing: _Sharing, target: Target) -> None:
        super().__init__(sharing)
        self.target = target

    def check(self, match: Match) -> Verdict:
        conv, residual = match[self.conv], match.value(self.residual)
        if not self.target.residual:
            return no(f"{self.target.name} adds after it has rounded")
        if not isinstance(residual, fx.Node):
            return no("it adds a number, not a tensor")
        if residual is conv:
            return no("it adds the result to itself")
        if bind(match.root).option("alpha") != 1:
            return no("it scales one operand by alpha")
        module = module_of(conv) if conv.op == "call_module" else None
        if isinstance(module, Fused) and (module.adds or module.activation is not Activation.NONE):
            return no("the convolution already has an add or activation", conv)
        ours, theirs = tensor_spec(conv), tensor_spec(residual)
        if ours is None or theirs is None or ours.dtype != theirs.dtype:
            return no("the operands have different dtypes")
        if ours.shape != theirs.shape:
            wide, narrow = tensor_spec(match.root), "residual" if theirs != tensor_spec(match.root) else "convolution"
            shape = list((theirs if narrow == "residual" else ours).shape)
            return no(f"the {narrow} is broadcast: {shape} onto {list(wide.shape) if wide else 'the sum'}")
        if any(info(operand).unstable for operand in conv.all_input_nodes):
            return no("its input is written to before the add", conv)
        return self.check_convolution(conv, follower=match.root)

    def rewrite(self, match: Match, edit: Editor) -> None:
        conv = match[self.conv]
        fused = as_fused(module_of(conv))
        fused.adds = True
        edit.set_module(str(conv.target), fused)
        edit.move_before(conv, match.root)  # the residual may come later than the convolution
        edit.set_arguments(conv, (conv.args[0], match.value(self.residual)))
        edit.absorb(match.root, conv)


class FuseActivation(_Epilogue):
    """relu and relu6 are bounds of the rounding step."""

    name = "fuse-activation"
    conv = call(FUSABLE)
    root = call((RELU, RELU6), conv)

    def check(self, match: Match) -> Verdict:
        conv = match[self.conv]
        verdict = self.check_convolution(conv, follower=match.root)
        module = module_of(conv) if verdict else None
        if isinstance(module, Fused) and module.activation is not Activation.NONE:
            return no("the convolution already has an activation", conv)
        return verdict

    def rewrite(self, match: Match, edit: Editor) -> None:
        conv = match[self.conv]
        fused = as_fused(module_of(conv))
        fused.activation = Activation.RELU if info(match.root).op is RELU else Activation.RELU6
        edit.set_module(str(conv.target), fused)
        edit.absorb(match.root, conv)


def fold_weight(op: Any, norm: Any, axis: int) -> nn.Parameter:
    """The weight of `op` followed by `norm`.

    Args:
        op: a convolution or linear module.
        norm: a batch norm in eval mode.
        axis: the weight's output-channel dimension; 1 for transposed convolutions, whose output channels are split
            over groups.

    Returns:
        A new parameter; the factor is computed in float64 and rounded once. Weights of 2-d convolutions are laid out
        channels_last, which costs nothing while they are written anyway (see the pass use-channels-last).
    """
    weight = op.weight.detach()
    per_channel = _factor(norm).to(weight.dtype)
    if axis == 0:
        view = (-1, *[1] * (weight.dim() - 1))
    else:  # [in, out / groups, ...]: the factors of a group repeat over its input channels
        per_channel = per_channel.reshape(op.groups, 1, -1).expand(-1, weight.shape[0] // op.groups, -1)
        view = (weight.shape[0], -1, *[1] * (weight.dim() - 2))
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    folded = torch.empty_like(weight, memory_format=layout)
    torch.mul(weight, per_channel.reshape(view), out=folded)
    return nn.Parameter(folded, op.weight.requires_grad)


def fold_bias(op: Any, norm: Any) -> nn.Parameter:
    """The bias of `op` followed by `norm`: a new parameter, computed in float64 and rounded once."""
    mean = norm.running_mean.double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    bias = torch.zeros_like(mean) if op.bias is None else op.bias.detach().double()
    folded = (bias - mean) * _factor(norm) + shift
    return nn.Parameter(folded.to(op.weight.dtype), op.weight.requires_grad)


def _factor(norm: Any) -> torch.Tensor:
    variance = norm.running_var.double()
    gain = torch.ones_like(variance) if norm.weight is None else norm.weight.detach().double()
    return gain / torch.sqrt(variance + norm.eps)


def _norm_key(norm: Any) -> tuple[int, ...]:
    return (id(norm.running_mean), id(norm.running_var), id(norm.weight), id(norm.bias), hash(norm.eps))

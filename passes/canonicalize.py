"""One spelling per operator, and nothing that computes nothing.

    x.add(y), x + y, torch.add(x, y)          -> add(x, y)
    nn.ReLU()(x), F.relu(x), x.clamp(min=0)   -> relu(x)
    F.conv2d(x, weight, bias)                 -> a Conv2d module, if the weights are the model's own
    nn.Conv2d(padding_mode="reflect")         -> pad, then a plain convolution
    Identity, eval-mode dropout, clone, contiguous, detach, casts to the same dtype -> gone

Modules with parameters stay modules; everything else becomes a function call with operands by position and options
by name. Bit exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import Bound, bind
from qgraph.ir.editor import Editor, canonical_arguments
from qgraph.ir.node_info import graph_info, info, module_of, tensor_at
from qgraph.ir.op import Op, OpKind
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec
from qgraph.nn import clone_module
from qgraph.pipeline import Pass, PassContext, PassResult

_LEFT_ALONE = (OpKind.INPUT, OpKind.OUTPUT, OpKind.CONSTANT, OpKind.STRUCTURE, OpKind.STUB, OpKind.OPAQUE)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites every known spelling to its canonical form and removes identities."""

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        device = _example_device(gm)
        for node in list(gm.graph.nodes):
            record = info(node)
            if record.op.kind in _LEFT_ALONE or record.in_place or record.unstable:
                continue
            if _is_identity(node, device):
                edit.bypass(node, node.all_input_nodes[0])
                continue
            _canonical_node(node, edit)
        return PassResult(gm, edit.changes > 0)


def _example_device(gm: fx.GraphModule) -> torch.device | None:
    example = graph_info(gm).example
    tensors = [] if example is None else [v for v in example.kwargs.values() if isinstance(v, torch.Tensor)]
    return tensors[0].device if tensors else None


def _is_identity(node: fx.Node, device: torch.device | None) -> bool:
    op, operands = info(node).op, node.all_input_nodes
    if not operands:
        return False
    before, after = tensor_spec(operands[0]), tensor_spec(node)
    if op is ops.IDENTITY:
        return before == after
    if op is ops.CAST:
        devices = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.device)]
        moves = node.target in ("cpu", "cuda") or any(other != device for other in devices)
        return before is not None and before == after and not (moves and device is None)
    if op is ops.TRANSPOSE:
        return before is not None and len(before.shape) < 2
    if op is ops.RESHAPE:
        # A reshape that reads the batch size, or leaves it to -1, keeps its shape only at the example's batch.
        return before is not None and before == after and bind(node).option("shape") == before.shape
    return False


def _canonical_node(node: fx.Node, edit: Editor) -> None:
    op = info(node).op
    special = _SPECIAL.get(op)
    if special is not None and special(node, edit):
        return
    if op.target is None or (node.op == "call_module" and op.parameters):
        return
    _plain_call(node, bind(node), edit)


def _plain_call(node: fx.Node, bound: Bound, edit: Editor) -> None:
    args, kwargs = canonical_arguments(bound)
    if isinstance(args[0] if args else None, (int, float)) and bound.op is ops.SUB:
        args = (args[1], args[0])  # torch.sub takes no number first; rsub is its mirror
        _respell(node, torch.rsub, args, kwargs, ops.SUB, edit)
        return
    _respell(node, bound.op.target, args, kwargs, bound.op, edit)


def _respell(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], op: Op, edit: Editor) -> None:
    same = node.op == "call_function" and node.target is target and info(node).op is op
    if not same or node.args != args or dict(node.kwargs) != kwargs:
        edit.respell(node, "call_function", target, args, kwargs, op=op)


# --- special cases: each returns whether it dealt with the node ----------------------------------------------------


def _clamp(node: fx.Node, edit: Editor) -> bool:
    bound = bind(node)
    low, high = bound.values.get("min"), bound.values.get("max")
    if low == 0 and high is None:
        _respell(node, ops.RELU.target, (bound.operand("input"),), {}, ops.RELU, edit)
    elif low == 0 and high == 6:
        _respell(node, ops.RELU6.target, (bound.operand("input"),), {}, ops.RELU6, edit)
    else:
        return False
    return True


def _divide(node: fx.Node, edit: Editor) -> bool:
    """`c / x` becomes `reciprocal(x) * c`."""
    bound = bind(node)
    numerator, denominator = bound.operand("input"), bound.operand("other")
    if isinstance(numerator, fx.Node) or bound.option("rounding_mode") is not None:
        return False
    if numerator == 1:
        _respell(node, ops.RECIPROCAL.target, (denominator,), {}, ops.RECIPROCAL, edit)
        return True
    record = info(node)
    inverse = edit.call(ops.RECIPROCAL, denominator, like=node, site=f"{record.site}.reciprocal")
    edit.annotate(inverse, value=record.value)
    _respell(node, ops.MUL.target, (inverse, numerator), {}, ops.MUL, edit)
    return True


def _number_first(node: fx.Node, edit: Editor) -> bool:
    """`2 * x` becomes `x * 2`: numbers come second."""
    bound = bind(node)
    first, second = bound.operand("input"), bound.operand("other")
    if isinstance(first, fx.Node) or bound.values.get("alpha", 1) != 1:
        return False
    _respell(node, bound.op.target, (second, first), {}, bound.op, edit)
    return True


def _convolution(node: fx.Node, edit: Editor) -> bool:
    if node.op == "call_function":
        return _module_from_function(node, edit)
    module = module_of(node)
    padding, mode = getattr(module, "padding", 0), getattr(module, "padding_mode", "zeros")
    if mode == "zeros" and not isinstance(padding, str):
        return True
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    amounts = list(module._reversed_padding_repeated_twice)
    plain = clone_module(module)
    plain.padding_mode = "zeros"
    symmetric = all(amounts[i] == amounts[i + 1] for i in range(0, len(amounts), 2))
    if mode == "zeros" and symmetric:
        plain.padding = tuple(amounts[::2][::-1])
    else:
        plain.padding = (0,) * (len(amounts) // 2)
        options: dict[str, Any] = {} if mode == "zeros" else {"mode": mode}
        padded = edit.call(
            ops.PAD, node.args[0], like=node, site=f"{info(node).site}.pad", pad=tuple(amounts), **options
        )
        edit.annotate(padded, value=_padded_spec(node.args[0], amounts))
        edit.replace_input(node, node.all_input_nodes[0], padded)
    plain._reversed_padding_repeated_twice = [n for amount in plain.padding[::-1] for n in (amount, amount)]
    path = edit.free_path(f"{node.target}.plain") if _is_shared(node) else str(node.target)
    edit.set_module(path, plain)
    edit.respell(node, "call_module", path, node.args, node.kwargs)
    return True


def _padded_spec(source: Any, amounts: list[int]) -> TensorSpec | None:
    spec = tensor_spec(source) if isinstance(source, fx.Node) else None
    if spec is None:
        return None
    shape = list(spec.shape)
    for axis in range(len(amounts) // 2):
        shape[-1 - axis] += amounts[2 * axis] + amounts[2 * axis + 1]
    return TensorSpec(tuple(shape), spec.dtype)


def _is_shared(node: fx.Node) -> bool:
    return any(
        other is not node and other.target == node.target
        for other in node.graph.find_nodes(op="call_module", target=str(node.target))
    )


def _module_from_function(node: fx.Node, edit: Editor) -> bool:
    """`F.conv2d(x, w, b)` with the model's own weights becomes a module, so that patterns see one form."""
    bound = bind(node)
    builder = _BUILDERS.get(bound.op)
    held = {name: bound.operand(name) for name in bound.op.parameters}
    if builder is None or any(value is not None and not _is_constant(value) for value in held.values()):
        return False
    tensors = {name: None if v is None else tensor_at(edit.gm, str(v.target)) for name, v in held.items()}
    module = builder(bound, tensors)
    if module is None:
        return False
    for name, tensor in tensors.items():
        _hold(module, name, tensor)
    path = edit.free_path(info(node).site.replace("[", ".").replace("]", ""))
    edit.set_module(path, module.eval())
    edit.respell(node, "call_module", path, (bound.operand("input"),))
    return True


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and info(value).op is ops.CONSTANT


def _hold(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    """Gives a module a tensor under a name it declares, as parameter or buffer as the module does."""
    if name in module._buffers:
        module._buffers[name] = tensor
    elif tensor is None or isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)


def _build_convolution(kind: type[nn.Module]) -> Callable[[Bound, dict[str, Any]], nn.Module | None]:
    def build(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
        weight, groups = tensors["weight"], bound.option("groups")
        transposed = "output_padding" in bound.values
        first, second = weight.shape[0], weight.shape[1] * groups
        channels = (
            {"in_channels": first, "out_channels": second}
            if transposed
            else {"in_channels": second, "out_channels": first}
        )
        options = {name: bound.option(name) for name in ("stride", "padding", "dilation", "groups")}
        if transposed:
            options["output_padding"] = bound.option("output_padding")
        if any(isinstance(value, fx.Node) for value in options.values()):
            return None
        with torch.device("meta"):
            return kind(**channels, kernel_size=tuple(weight.shape[2:]), bias=tensors["bias"] is not None, **options)

    return build


def _build_linear(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
    weight = tensors["weight"]
    if weight.dim() != 2:
        return None
    with torch.device("meta"):
        return nn.Linear(weight.shape[1], weight.shape[0], bias=tensors["bias"] is not None)


def _build_batch_norm(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
    spec = tensor_spec(bound.operand("input"))
    if bound.option("training") or tensors["running_mean"] is None or spec is None:
        return None
    kinds: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    kind = kinds.get(len(spec.shape))
    if kind is None:
        return None
    affine = tensors["weight"] is not None or tensors["bias"] is not None
    with torch.device("meta"):
        module = kind(tensors["running_mean"].numel(), eps=bound.option("eps"), affine=affine)
    module._buffers.pop("num_batches_tracked", None)
    return module


def _build_layer_norm(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
    shape = bound.option("normalized_shape")
    if any(isinstance(size, fx.Node) for size in shape):
        return None
    with torch.device("meta"):
        return nn.LayerNorm(tuple(shape), eps=bound.option("eps"), elementwise_affine=tensors["weight"] is not None)


_BUILDERS: dict[Op, Callable[[Bound, dict[str, Any]], nn.Module | None]] = {
    ops.CONV1D: _build_convolution(nn.Conv1d),
    ops.CONV2D: _build_convolution(nn.Conv2d),
    ops.CONV3D: _build_convolution(nn.Conv3d),
    ops.CONV_TRANSPOSE1D: _build_convolution(nn.ConvTranspose1d),
    ops.CONV_TRANSPOSE2D: _build_convolution(nn.ConvTranspose2d),
    ops.CONV_TRANSPOSE3D: _build_convolution(nn.ConvTranspose3d),
    ops.LINEAR: _build_linear,
    ops.BATCH_NORM: _build_batch_norm,
    ops.LAYER_NORM: _build_layer_norm,
}


def _norm_or_linear(node: fx.Node, edit: Editor) -> bool:
    return node.op == "call_function" and _module_from_function(node, edit)


_SPECIAL: dict[Op, Callable[[fx.Node, Editor], bool]] = {
    ops.CLAMP: _clamp,
    ops.DIV: _divide,
    ops.ADD: _number_first,
    ops.MUL: _number_first,
    ops.LINEAR: _norm_or_linear,
    ops.BATCH_NORM: _norm_or_linear,
    ops.LAYER_NORM: _norm_or_linear,
    **dict.fromkeys(ops.CONVOLUTIONS, _convolution),
}

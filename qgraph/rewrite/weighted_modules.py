"""One form for operators with weights: a module of torch's own class, with explicit symmetric padding.

    F.conv2d(x, weight, bias)                 -> a Conv2d module, if the weights are the model's own
    nn.Conv2d(padding_mode="reflect")         -> pad, then a plain convolution
    nn.Conv2d(padding="same")                 -> numbers, or pad where the two sides differ

Used by the pass `canonicalize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import Bound, bind
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import info, module_of, tensor_at
from qgraph.ir.op import Op
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec
from qgraph.nn import clone_module


def as_plain_module(node: fx.Node, edit: Editor) -> bool:
    """Gives a call of an operator with weights its one form; False where its weights are computed in the forward."""
    if node.op == "call_function" and not _module_from_function(node, edit):
        return False
    if info(node).op in ops.CONVOLUTIONS:
        _pad_explicitly(node, edit)
    return True


def _pad_explicitly(node: fx.Node, edit: Editor) -> None:
    module = module_of(node)
    padding, mode = getattr(module, "padding", 0), getattr(module, "padding_mode", "zeros")
    if mode == "zeros" and not isinstance(padding, str):
        return
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    amounts = tuple(module._reversed_padding_repeated_twice)
    plain = clone_module(module)
    plain.padding_mode = "zeros"
    symmetric = all(amounts[i] == amounts[i + 1] for i in range(0, len(amounts), 2))
    inside = mode == "zeros" and symmetric
    plain.padding = amounts[::2][::-1] if inside else (0,) * (len(amounts) // 2)
    plain._reversed_padding_repeated_twice = [n for amount in plain.padding[::-1] for n in (amount, amount)]
    path = str(node.target)
    for call in list(node.graph.find_nodes(op="call_module", target=path)):
        if not inside and any(amounts):
            _pad(call, amounts, mode, edit)
    edit.set_module(path, plain)


def _pad(node: fx.Node, amounts: tuple[int, ...], mode: str, edit: Editor) -> None:
    source = node.args[0]
    options: dict[str, Any] = {} if mode == "zeros" else {"mode": mode}
    padded = edit.call(ops.PAD, source, like=node, site=f"{info(node).site}.pad", pad=amounts, **options)
    edit.annotate(padded, value=_padded_spec(source, amounts))
    edit.replace_input(node, node.all_input_nodes[0], padded)


def _padded_spec(source: Any, amounts: tuple[int, ...]) -> TensorSpec | None:
    spec = tensor_spec(source) if isinstance(source, fx.Node) else None
    if spec is None:
        return None
    shape = list(spec.shape)
    for axis in range(len(amounts) // 2):
        shape[-1 - axis] += amounts[2 * axis] + amounts[2 * axis + 1]
    return TensorSpec(tuple(shape), spec.dtype)


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


def _build_prelu(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
    with torch.device("meta"):
        return nn.PReLU(tensors["weight"].numel())


def _build_group_norm(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
    spec = tensor_spec(bound.operand("input"))
    if spec is None or (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    with torch.device("meta"):
        return nn.GroupNorm(
            bound.option("num_groups"), spec.shape[1], eps=bound.option("eps"), affine=tensors["weight"] is not None
        )


def _build_instance_norm(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
    spec = tensor_spec(bound.operand("input"))
    kinds: dict[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    if spec is None or len(spec.shape) not in kinds or (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    running = not bound.option("use_input_stats")
    with torch.device("meta"):
        module = kinds[len(spec.shape)](
            spec.shape[1], eps=bound.option("eps"), affine=tensors["weight"] is not None, track_running_stats=running
        )
    module._buffers.pop("num_batches_tracked", None)
    if not running:  # statistics are of no use where those of the input are taken
        tensors["running_mean"] = tensors["running_var"] = None
    return module


def _build_rms_norm(bound: Bound, tensors: dict[str, Any]) -> nn.Module | None:
    shape = bound.option("normalized_shape")
    if any(isinstance(size, fx.Node) for size in shape):
        return None
    with torch.device("meta"):
        return nn.RMSNorm(tuple(shape), eps=bound.option("eps"), elementwise_affine=tensors["weight"] is not None)


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
    ops.PRELU: _build_prelu,
    ops.GROUP_NORM: _build_group_norm,
    ops.INSTANCE_NORM: _build_instance_norm,
    ops.RMS_NORM: _build_rms_norm,
}


WEIGHTED = tuple(_BUILDERS)

"""A frozen graph on torch's quantized CPU operators: the engines of the targets x86, x86-fbgemm and x86-onednn.

Every value of four dimensions is laid out as channels_last before an operator reads it, every other one as
contiguous: the layout these targets stand for. Results depend on the number of threads; the adapter uses one. Weights
are packed anew for each call, because oneDNN's packed weights remember the first operator that used them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import FAKE_QUANT, ITEM
from qgraph.lowering.options import spatial
from qgraph.nn import Activation
from qgraph.numerics import QParams, quantize
from qgraph.targets import target_of

ENGINES = {"x86": "x86", "x86-fbgemm": "fbgemm", "x86-onednn": "onednn"}

_MOVES = frozenset(
    {
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
        "split",
        "chunk",
        "narrow",
    }
)
_OWN = frozenset(
    {"relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate", "sigmoid", "hardsigmoid", "tanh", "gelu"}
)
SUPPORTED = frozenset(
    {
        "conv1d",
        "conv2d",
        "linear",
        "add",
        "mul",
        "cat",
        "relu6",
        "clamp",
        "quant_stub",
        "item",
        "hardswish",
        "leaky_relu",
        "elu",
    }
    | _MOVES
    | _OWN
)


def available() -> str | None:
    """Why these engines cannot be asked here; None if they can."""
    missing = set(ENGINES.values()) - set(torch.backends.quantized.supported_engines)
    if missing:
        return f"this torch has no engine {', '.join(sorted(missing))}"
    if platform.machine() not in ("x86_64", "AMD64") or not _has_vnni():
        return "the processor has no AVX512-VNNI, where the engines' convolutions saturate differently"
    return None


def _has_vnni() -> bool:
    return bool(torch.cpu._is_vnni_supported()) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def run(frozen: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The codes of every quantized site; reals (contiguous) of the others.

    Args:
        frozen: what `freeze` returned, for one of the targets.
        inputs: the model's inputs, float32.
    """
    values: dict[fx.Node, Any] = {}
    found: dict[str, torch.Tensor] = {}
    given = iter(inputs)
    with _engine(ENGINES[target_of(frozen).name]), torch.no_grad():
        for node in frozen.graph.nodes:
            if node.op == "output":
                break
            value = next(given) if node.op == "placeholder" else _value(node, frozen, values)
            values[node] = value
            if isinstance(value, torch.Tensor) and info(node).op is not FAKE_QUANT:
                found[info(node).site] = value.int_repr() if value.is_quantized else value
    return found


@contextmanager
def _engine(name: str) -> Iterator[None]:
    before, threads = torch.backends.quantized.engine, torch.get_num_threads()
    torch.backends.quantized.engine = name
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
        torch.set_num_threads(threads)


def _value(node: fx.Node, frozen: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    record = info(node)
    args: Any = fx.node.map_arg(node.args, lambda used: values[used])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda used: values[used])
    if record.op is FAKE_QUANT or record.op.name in ("guard", "dequant_stub"):
        source = args[0]
        return source.dequantize() if record.op.name == "dequant_stub" and source.is_quantized else source
    if node.op == "get_attr":
        return frozen.get_parameter(str(node.target)).detach()
    if record.op is ITEM or record.op.kind is OpKind.CONSTANT:
        return _call(node, frozen, args, kwargs)
    if record.qparams is None:
        return _call(node, frozen, args, kwargs)
    if record.op.name in _OPERATORS:
        return _OPERATORS[record.op.name](node, values)
    if record.op.name not in _MOVES | _OWN:
        raise NotImplementedError(f"the adapter translates no {record.op}")
    return _call(node, frozen, [_laid(args[0]), *args[1:]], kwargs)


def _call(node: fx.Node, frozen: fx.GraphModule, args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return frozen.get_submodule(str(node.target))(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _laid(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.contiguous()


def _operands(node: fx.Node, values: dict[fx.Node, Any]) -> list[torch.Tensor]:
    return [_laid(values[operand]) for _, operand in bind(node).nodes()]


def _result(node: fx.Node) -> tuple[float, int]:
    qparams = info(node).qparams
    assert qparams is not None
    return qparams.scale.item(), qparams.zero


def _quant_stub(node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor:
    source = _laid(values[node.all_input_nodes[0]])
    real = source.dequantize() if source.is_quantized else source
    return torch.quantize_per_tensor(real, *_result(node), torch.quint8)


def _weight(weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
    codes = quantize(weight.detach(), qparams)
    result: torch.Tensor = torch._make_per_channel_quantized_tensor(
        codes.contiguous(), qparams.scale.double(), torch.zeros(codes.shape[0], dtype=torch.int64), 0
    )
    return result


def _product(node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor:
    module: Any = module_of(node)
    (x,), weights = _operands(node, values), info(node).weight_qparams
    assert weights is not None
    weight, bias = _weight(module.weight, weights), None if module.bias is None else module.bias.detach()
    relu = "_relu" if module.activation is Activation.RELU else ""
    ops = torch.ops.quantized
    if info(node).op.name == "linear":
        y = getattr(ops, f"linear{relu}")(x, ops.linear_prepack(weight, bias), *_result(node))
    else:
        rank = weight.dim() - 2
        geometry = [spatial(given, rank) for given in (module.stride, module.padding, module.dilation)]
        packed = getattr(ops, f"conv{rank}d_prepack")(weight, bias, *geometry, module.groups)
        y = getattr(ops, f"conv{rank}d{relu}")(x, packed, *_result(node))
    result: torch.Tensor = ops.relu6(_laid(y), False) if module.activation is Activation.RELU6 else y
    return result


def _binary(name: str) -> Callable[..., torch.Tensor]:
    def call(node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor:
        operands = _operands(node, values)
        result: torch.Tensor = getattr(torch.ops.quantized, name)(*operands[:1], *operands[-1:], *_result(node))
        return result

    return call


def _cat(node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor:
    result: torch.Tensor = torch.ops.quantized.cat(
        [_laid(values[part]) for part in bind(node).operand("tensors")], bind(node).option("dim"), *_result(node)
    )
    return result


def _clamp(node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor:
    (x,) = _operands(node, values)
    if info(node).op.name == "relu6":
        result: torch.Tensor = torch.ops.quantized.relu6(x, False)
        return result
    return torch.clamp(x, bind(node).option("min"), bind(node).option("max"))


def _function(node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor:
    (x,), bound, result = _operands(node, values), bind(node), _result(node)
    if info(node).op.name == "leaky_relu":
        y: torch.Tensor = torch.ops.quantized.leaky_relu(x, bound.option("negative_slope"), False, *result)
    else:
        y = torch.ops.quantized.hardswish(x, *result)
    return y


_OPERATORS: dict[str, Callable[[fx.Node, dict[fx.Node, Any]], torch.Tensor]] = {
    "quant_stub": _quant_stub,
    "conv1d": _product,
    "conv2d": _product,
    "linear": _product,
    "add": _binary("add"),
    "mul": _binary("mul"),
    "cat": _cat,
    "relu6": _clamp,
    "hardswish": _function,
    "leaky_relu": _function,
    "clamp": _clamp,
}

"""Why a code differs from what fake quantization says, element by element.

The operator is computed once more in float64 from the same operands. Where that agrees with the integers, float32 is
the cause: a sum beyond 2**24, which float32 cannot hold exactly, or a value whose last bit decides a tie.
Where even float64 disagrees, the device computes something else on purpose: a table, an accumulator that does not hold
the sum, two roundings, another rule for ties, or a factor of limited precision.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, cast

import torch
from torch import fx, nn

from qgraph.analysis.consistency import SiteRun, as_codes
from qgraph.ir.evaluate import call_node
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op import OpKind
from qgraph.nn import Fused
from qgraph.nn.fused import clone_module
from qgraph.numerics import RequantizeRule, Rounding, Rule, ScaleForm, parse_arithmetic, qint32

_FLOAT32_HOLDS = 2.0**24
_TIE = 2.0**-40


class Cause(str, Enum):
    """Why an element differs."""

    ACCUMULATION = "accumulation beyond 2^24"
    FLOAT32 = "float32 next to a tie"
    TABLE = "table resolution"
    OVERFLOW = "accumulator overflow"
    DOUBLE_ROUNDING = "double rounding"
    TIES = "another rule for ties"
    FACTOR = "precision of the factor"

    def __str__(self) -> str:
        return self.value


FLOAT64_AGREES = (Cause.ACCUMULATION, Cause.FLOAT32)
"""Causes that fake quantization in float64 would remove."""


def causes(run: SiteRun) -> dict[Cause, int]:
    """How many elements of one site differ for which cause; empty if none differs."""
    differs = run.gap > 0
    if not bool(differs.any()):
        return {}
    exact = _in_double(run.node, run.operands, run.options)
    step = _accumulator_step(run)
    if run.qparams.qtype == qint32 and step is not None:  # the accumulator itself: its scale is rounded to float32
        ideal = torch.round(exact / step)
    else:
        ideal = as_codes(exact, run.qparams)
    ideal = ideal.clamp(run.qparams.qtype.qmin, run.qparams.qtype.qmax)
    float32 = differs & (ideal == run.codes.double())
    beyond = float32 & _sums_beyond(run, differs)
    counts = {
        Cause.ACCUMULATION: int(beyond.sum()),
        Cause.FLOAT32: int((float32 & ~beyond).sum()),
        **_of_the_device(run, differs & ~float32, exact),
    }
    return {cause: count for cause, count in counts.items() if count}


def _of_the_device(run: SiteRun, differs: torch.Tensor, exact: torch.Tensor) -> dict[Cause, int]:
    """Causes that lie in how the device computes."""
    total = int(differs.sum())
    operator, word = integer_name(run.integer.target), run.integer.kwargs.get("arithmetic")
    if operator is not None and operator.startswith("lookup"):
        return {Cause.TABLE: total}
    if info(run.node).op.kind is OpKind.SAMPLE:
        return {Cause.TABLE: total}  # interpolation weights are a table of their own
    if _rounds_operands(run.integer):
        return {Cause.DOUBLE_ROUNDING: total}
    if not isinstance(word, str):
        return {Cause.FACTOR: total}
    arithmetic = parse_arithmetic(word)
    scale = run.qparams.shaped(run.qparams.scale, exact.dim()).double()
    step = _accumulator_step(run)
    full = torch.zeros_like(differs)
    if step is not None:
        full = differs & ~arithmetic.accumulator.contains(torch.round(exact / step))
    steps = exact / scale
    tied = differs & ~full & ((steps - torch.floor(steps) - 0.5).abs() <= _TIE * steps.abs().clamp(min=1.0))
    rest = total - int(full.sum())
    if _rounds_twice(arithmetic.rule):
        return {Cause.OVERFLOW: int(full.sum()), Cause.DOUBLE_ROUNDING: rest}
    ties = 0 if _half_even(arithmetic.rule) else int(tied.sum())
    return {Cause.OVERFLOW: int(full.sum()), Cause.TIES: ties, Cause.FACTOR: rest - ties}


def _rounds_twice(rule: Rule) -> bool:
    if isinstance(rule, RequantizeRule):
        return rule.form is ScaleForm.FIXED_POINT_TWO
    return str(rule) in ("gemmlowp", "tflite_add", "onednn")


def _rounds_operands(integer: fx.Node) -> bool:
    """Whether the lowering rounds operands before it computes: they are sites below the operator's own."""
    site = info(integer).site
    return any(
        info(source).site.startswith(f"{site}.") for source in integer.all_input_nodes if source.op == "call_function"
    )


def _half_even(rule: Rule) -> bool:
    return isinstance(rule, RequantizeRule) and rule.rounding is Rounding.HALF_EVEN


def _in_double(node: fx.Node, operands: tuple[Any, ...], options: Any) -> torch.Tensor:
    """The operator's result in float64."""
    wide, named = _map(operands, _double), {name: _map(value, _double) for name, value in options.items()}
    if node.op != "call_module":
        return cast(torch.Tensor, call_node(cast(fx.GraphModule, node.graph.owning_module), node, wide, named))
    return cast(torch.Tensor, _plain_module(module_of(node), _double)(*wide, **named))


def _sums_beyond(run: SiteRun, differs: torch.Tensor) -> torch.Tensor:
    """Which sums of products have partial sums that float32 may not hold: the sum of magnitudes is above 2**24."""
    none = torch.zeros_like(differs)
    step = _accumulator_step(run)
    if info(run.node).op.kind is not OpKind.MATMUL or step is None:
        return none

    def magnitude(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double().abs()

    operands = _map(run.operands, magnitude)
    if run.node.op == "call_module":
        sums = _plain_module(module_of(run.node), magnitude)(operands[0])
    else:
        sums = torch.matmul(operands[0], operands[1])
    return cast(torch.Tensor, sums / step > _FLOAT32_HOLDS)


def _plain_module(module: nn.Module, change: Any) -> nn.Module:
    """A clone with its (quantized) parameters changed, and for sums of magnitudes without the epilogue."""
    clone: Any = clone_module(module)
    if isinstance(module, Fused):
        weight, bias = module.quantized_weight(), module.quantized_bias()
        clone.__dict__.update(weight_fake_quant=None, bias_fake_quant=None)
        clone._modules.pop("weight_fake_quant", None)
        clone._modules.pop("bias_fake_quant", None)
        clone._parameters["weight"] = nn.Parameter(change(weight.detach()), requires_grad=False)
        if bias is not None:
            clone._parameters["bias"] = nn.Parameter(change(bias.detach()), requires_grad=False)
        return cast(nn.Module, clone)
    for table in (clone._parameters, clone._buffers):
        for name, tensor in table.items():
            if tensor is not None and tensor.is_floating_point():
                changed = change(tensor.detach())
                table[name] = nn.Parameter(changed, requires_grad=False) if table is clone._parameters else changed
    return cast(nn.Module, clone)


def _accumulator_step(run: SiteRun) -> torch.Tensor | None:
    """Value of one unit of a product's accumulator, float64, shaped like the result's channels; None for other ops."""
    sources = [info(node).qparams for node in run.integer.all_input_nodes if info(node).qparams is not None]
    if integer_name(run.integer.target) not in ("conv", "linear", "matmul") or not sources or sources[0] is None:
        return None
    module = module_of(run.node) if run.node.op == "call_module" else None
    if isinstance(module, Fused):
        quantizer: Any = module.weight_fake_quant
        weight = quantizer.qparams().scale.double() if quantizer is not None else torch.ones((), dtype=torch.float64)
        spatial = module.weight.dim() - 2 if isinstance(module.weight, torch.Tensor) else 0
        repeats = run.codes.shape[run.codes.dim() - 1 - spatial] // max(weight.numel(), 1) if weight.dim() else 1
        shaped = weight.repeat(repeats).reshape(-1, *[1] * spatial) if weight.dim() else weight
        return sources[0].scale.double() * shaped
    second = sources[1] if len(sources) > 1 else sources[0]
    assert second is not None
    return sources[0].scale.double() * second.scale.double()


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(entry, change) for entry in value)
    return value

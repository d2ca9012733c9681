"""`prepare`: from a float model to a graph ready for calibration and training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.api import trace_shared
from qgraph.capture.copying import own_tensors
from qgraph.errors import QuantizationError, UserError
from qgraph.ir.node_info import graph_info, update_graph_info
from qgraph.memory import paused_collection
from qgraph.pipeline import CheckLevel, PassContext, PassObserver, Pipeline
from qgraph.quantization.qconfig import as_setters
from qgraph.targets import Target, get_target

# Order matters: constants fold before sharing is looked at; composites are decomposed after fusion took what it can;
# constants are split while a division is still one operator.
PREPARE = (
    "canonicalize,fold-constants,eliminate-dead-code,split-shared-modules,fuse-conv-bn-add-relu,"
    "use-channels-last,split-nonuniform-constants,decompose-composites,insert-quant-stubs,assign-dtypes,high-precision-output,"
    "insert-fake-quant"
)


def prepare_pipeline() -> Pipeline:
    """The passes `prepare` runs, to be changed and given back to it."""
    return Pipeline.parse(PREPARE)


def prepare(
    model: nn.Module,
    example_inputs: Any,
    qconfig_setter: Any = None,
    method: str = "auto",
    target: Target | str = "bpu",
    *,
    pipeline: Pipeline | None = None,
    waive: Iterable[str] = (),
    leaf_modules: Iterable[type[nn.Module] | str] = (),
    verify: bool = True,
    checks: CheckLevel = CheckLevel.NUMERICS,
    observers: Iterable[PassObserver] = (),
) -> fx.GraphModule:
    """Captures a float model and makes it ready for quantization on a target.

    Args:
        model: the float model in eval mode, float32; it is not changed.
        example_inputs: as for `trace`.
        qconfig_setter: a `QConfig`, a setter, or a sequence of setters, most specific first; int8 everywhere if None.
        method: capture method, as for `trace`.
        target: a target or its name.
        pipeline: the passes to run; those of `prepare_pipeline()` if None.
        waive, leaf_modules, verify: as for `trace`.
        checks: how much to check after each pass.
        observers: objects that watch the passes.

    Returns:
        A `GraphModule` in stage PREPARED whose sites are in state FLOAT. It computes what the model does until it is
        calibrated and put into another state.

    Raises:
        CaptureError: the model cannot be captured faithfully.
        QuantizationError: weights are not finite or not float32, or a setting is illegal or without effect.
        UserError: the arguments do not fit.
    """
    chosen = get_target(target)
    setters = as_setters(qconfig_setter)
    if isinstance(model, nn.Module):
        check_tensors(model)
    with paused_collection():
        gm = trace_shared(model, example_inputs, method, waive=waive, leaf_modules=leaf_modules, verify=verify)
        ctx = PassContext(target=chosen, setters=setters)
        result = (pipeline or prepare_pipeline()).run(gm, ctx, checks=checks, observers=observers, in_place=True)
        own_tensors(result.gm, model)
    update_graph_info(result.gm, target=chosen.name)
    if not any(
        True for node in result.gm.graph.nodes if node.op == "call_module" and "quantizers." in str(node.target)
    ):
        raise UserError(
            "nothing in this model can be quantized",
            where="; ".join(graph_info(result.gm).notes[:8]) or type(model).__name__,
            why=f"no operator has an integer form on target {chosen.name}",
            fix="look at the reasons above; float islands need operators of the target's list",
        )
    return result.gm


def check_tensors(model: nn.Module) -> None:
    """Refuses weights that cannot be quantized.

    Raises:
        QuantizationError: a parameter or buffer is NaN, infinite, or of half precision; the message names it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.dtype is not torch.float32:
            raise QuantizationError(
                f"{name} is {tensor.dtype}",
                where=type(model).__name__,
                why="scales are found and checked in float32",
                fix="call model.float() before prepare; the integer result does not depend on it",
            )
        if not bool(torch.isfinite(tensor.detach().sum())) and not bool(torch.isfinite(tensor).all()):
            raise QuantizationError(
                f"{name} holds NaN or infinite values",
                where=type(model).__name__,
                why="no integer stands for them",
                fix="look at the training that made them; masks belong into the forward as tensors or booleans",
            )

"""`prepare`: from a float model to a graph ready for calibration and training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import fx, nn

from qgraph.capture.api import trace_shared
from qgraph.capture.model.copying import own_tensors
from qgraph.errors import QuantizationError, UserError
from qgraph.ir.node_info import KEY, GraphInfo, graph_info, info, tensor_at, update_graph_info, where
from qgraph.ir.op_table import FAKE_QUANT, QUANT_STUB
from qgraph.ir.paths import PathModel
from qgraph.ir.stage import Stage
from qgraph.memory import paused_collection
from qgraph.pipeline import CheckLevel, PassContext, PassObserver, Pipeline
from qgraph.quantization.config.resolve import as_setters
from qgraph.quantization.paths import Examples, prepare_paths
from qgraph.targets import Target, get_target

# Order matters: constants fold before sharing is looked at; layers are taken apart before their linears are fused;
# composites are decomposed after fusion took what it can;
# constants are split while a division is still one operator.
PREPARE = (
    "fold-constants,canonicalize,eliminate-dead-code,decompose-layers,split-shared-modules,fuse-conv-bn-add-relu,"
    "use-channels-last,equalize-channels,split-nonuniform-constants,decompose-composites,insert-quant-stubs,"
    "assign-dtypes,high-precision-output,insert-fake-quant"
)


def prepare_pipeline() -> Pipeline:
    """The passes `prepare` runs, to be changed and given back to it."""
    return Pipeline.parse(PREPARE)


@overload
def prepare(
    model: nn.Module,
    example_inputs: Examples,
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
) -> PathModel: ...


@overload
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
) -> fx.GraphModule: ...


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
) -> fx.GraphModule | PathModel:
    """Captures a float model and makes it ready for quantization on a target.

    With `Examples(first, second, ...)` there is one graph per path of the forward, in a `PathModel` that picks the path
    at every call; `calibrate`, `set_fake_quantize`, `convert` and `Simulator` take it as they take a graph.

    Args:
        model: the float model in eval mode, float32; it is not changed.
        example_inputs: as for `trace`.
        qconfig_setter: a `QConfig`, a setter, a qconfig dict, a `Plan` or the path of one, or a sequence of these, most
            specific first; int8 everywhere if None. `qconfig` attributes of modules beat all but a plan.
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
    if isinstance(example_inputs, Examples):
        options: dict[str, Any] = {"waive": waive, "leaf_modules": leaf_modules, "verify": verify}
        options.update(pipeline=pipeline, checks=checks, observers=observers)
        return prepare_paths(
            example_inputs, lambda example: prepare(model, example, qconfig_setter, method, target, **options)
        )
    chosen = get_target(target)
    require_pipeline(pipeline)
    is_module = isinstance(model, nn.Module)
    setters = as_setters(qconfig_setter, model if is_module else None)
    classes = {path: type(child) for path, child in model.named_modules(remove_duplicate=False)} if is_module else {}
    if isinstance(model, nn.Module):
        _check_not_prepared(model)
        check_tensors(model)
    with paused_collection():
        gm = trace_shared(model, example_inputs, method, waive=waive, leaf_modules=leaf_modules, verify=verify)
        ctx = PassContext(target=chosen, setters=setters, classes=classes)
        steps = pipeline or prepare_pipeline()
        result = steps.run(gm, ctx, checks=checks, observers=observers, in_place=True)
        _check_constants(result.gm)
        own_tensors(result.gm, model)
    require_stage(result.gm, Stage.PREPARED, steps)
    update_graph_info(result.gm, target=chosen)
    if not any(info(node).op is FAKE_QUANT for node in result.gm.graph.nodes):
        raise UserError(
            "nothing in this model can be quantized",
            where="; ".join(graph_info(result.gm).notes[:8]) or type(model).__name__,
            why=f"no operator has an integer form on target {chosen.name}",
            fix="look at the reasons above; float islands need operators of the target's list",
        )
    return result.gm


def _check_not_prepared(model: nn.Module) -> None:
    record = model.meta.get(KEY) if isinstance(model, fx.GraphModule) else None
    if isinstance(record, GraphInfo) and record.stage in (Stage.PREPARED, Stage.INTEGER):
        raise UserError(
            f"the model given to prepare is a graph in stage {record.stage}",
            why="its sites would be quantized twice",
            fix="give the float model",
        )


def require_pipeline(pipeline: object) -> None:
    """Refuses what is no pipeline.

    Raises:
        UserError: it is neither None nor a `Pipeline`.
    """
    if pipeline is not None and not isinstance(pipeline, Pipeline):
        raise UserError(
            f"pipeline is a {type(pipeline).__name__}",
            fix='give a Pipeline, for example Pipeline.parse("canonicalize,...") or a changed prepare_pipeline()',
        )


def require_stage(gm: fx.GraphModule, stage: Stage, pipeline: Pipeline) -> None:
    """Refuses the result of a pipeline that ends too early.

    Raises:
        UserError: the graph is in another stage.
    """
    reached = graph_info(gm).stage
    if reached is not stage:
        raise UserError(
            f"the pipeline ends with a graph in stage {reached}, not {stage}",
            where=str(pipeline),
            fix="change prepare_pipeline() or convert_pipeline() instead of starting from nothing",
        )


def check_tensors(model: nn.Module) -> None:
    """Refuses weights that cannot be quantized; buffers may hold minus infinity, as masks of attention do.

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
        values = tensor.detach()
        if bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all()):
            continue
        if isinstance(tensor, nn.Parameter) or not bool((values < torch.inf).all()):
            raise _not_finite(name, type(model).__name__)


def _check_constants(gm: fx.GraphModule) -> None:
    """Refuses constants that would be quantized and are not finite: masks that no softmax took up."""
    for node in gm.graph.find_nodes(op="get_attr"):
        quantized = any(info(user).op is QUANT_STUB for user in node.users)
        if quantized and not bool(torch.isfinite(tensor_at(gm, str(node.target))).all()):
            raise _not_finite(str(node.target), where(node))


def _not_finite(name: str, place: str) -> QuantizationError:
    return QuantizationError(
        f"{name} holds NaN or infinite values",
        where=place,
        why="no integer stands for them",
        fix="look at the training that made them; an additive mask belongs right before a softmax",
    )

"""`convert`: from a calibrated or trained graph to integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

from torch import fx, nn

from qgraph.capture.model.copying import own_tensors
from qgraph.errors import UserError
from qgraph.ir.copying import copy_graph
from qgraph.ir.node_info import ExampleInputs, graph_info, submodule_at, update_graph_info
from qgraph.ir.paths import PathModel
from qgraph.ir.stage import Stage
from qgraph.memory import paused_collection
from qgraph.nn import Fused, clone_module
from qgraph.pipeline import CheckLevel, PassContext, PassObserver, Pipeline
from qgraph.quantization.prepare import require_pipeline, require_stage
from qgraph.quantization.sites import require_float32, require_prepared, set_fake_quantize
from qgraph.quantization.states import FakeQuantState
from qgraph.simulator import Simulator
from qgraph.targets import target_of

CONVERT = "freeze-qparams,lower-to-integer,clean-up-integer"


def convert_pipeline(*, strict: bool = False) -> Pipeline:
    """The passes `convert` runs, to be changed and given back to it."""
    return Pipeline.parse(CONVERT.replace("lower-to-integer", "lower-to-integer{strict=true}") if strict else CONVERT)


@overload
def convert(
    model: PathModel,
    *,
    strict: bool = False,
    pipeline: Pipeline | None = None,
    checks: CheckLevel = CheckLevel.NUMERICS,
    observers: Iterable[PassObserver] = (),
) -> PathModel: ...


@overload
def convert(
    model: fx.GraphModule,
    *,
    strict: bool = False,
    pipeline: Pipeline | None = None,
    checks: CheckLevel = CheckLevel.NUMERICS,
    observers: Iterable[PassObserver] = (),
) -> fx.GraphModule: ...


def convert(
    model: fx.GraphModule | PathModel,
    *,
    strict: bool = False,
    pipeline: Pipeline | None = None,
    checks: CheckLevel = CheckLevel.NUMERICS,
    observers: Iterable[PassObserver] = (),
) -> fx.GraphModule | PathModel:
    """The integer graph of a prepared model.

    Args:
        model: a calibrated or trained graph; it is not changed.
        strict: refuse graphs in which operators stay in float, or sums may leave their accumulator; without it the
            graph's notes tell of both.
        pipeline: the passes to run; those of `convert_pipeline()` if None.
        checks: how much to check after each pass.
        observers: objects that watch the passes.

    Returns:
        A `GraphModule` in stage INTEGER of `torch.ops.qgraph` operators; it takes and returns what the model does.

    Raises:
        StateError: the model has not been calibrated.
        QuantizationError: a scale cannot be used, or `strict` and what it refuses is found.
        UserError: `model` is not prepared, or `pipeline` does not fit.
    """
    if isinstance(model, PathModel):
        return model.mapped(
            lambda gm: convert(gm, strict=strict, pipeline=pipeline, checks=checks, observers=observers)
        )
    gm = require_prepared(model, "convert")
    require_float32(gm)
    require_pipeline(pipeline)
    if strict and pipeline is not None:
        raise UserError(
            "strict was given together with a pipeline",
            why="a pipeline of your own decides what its passes refuse",
            fix="use pipeline=convert_pipeline(strict=True) with your changes",
        )
    with paused_collection():
        frozen = _settled_copy(gm)
        target = target_of(gm)
        ctx = PassContext(example=graph_info(gm).example, target=target, execute={Stage.INTEGER: _simulated})
        chosen = pipeline or convert_pipeline(strict=strict)
        result = chosen.run(frozen, ctx, checks=checks, observers=observers, in_place=True)
        own_tensors(result.gm, gm)
    require_stage(result.gm, Stage.INTEGER, chosen)
    update_graph_info(result.gm, expected=None)
    return result.gm


def _simulated(gm: fx.GraphModule, example: ExampleInputs) -> Any:
    return Simulator(gm)(*example.args, **example.kwargs)


def freeze(model: fx.GraphModule) -> fx.GraphModule:
    """A copy of a prepared model in which every value's final scale and zero point stands on its node.

    `info(node).qparams` and `info(node).weight_qparams` are what `convert` would use; exporters read them.

    Raises:
        StateError: the model has not been calibrated.
        QuantizationError: a scale cannot be used.
        UserError: `model` is not prepared.
    """
    gm = require_prepared(model, "freeze")
    require_float32(gm)
    with paused_collection():
        twin = _settled_copy(gm)
        ctx = PassContext(example=graph_info(gm).example, target=target_of(gm))
        return Pipeline.parse("freeze-qparams").run(twin, ctx, checks=CheckLevel.NONE, in_place=True).gm


def _settled_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in state VALIDATION and eval mode, so that neither the states nor the scales of the original move.

    It shares the tensors; passes replace tensors and never write to them.
    """
    twin = copy_graph(gm)
    known: dict[int, nn.Module] = {}
    called = {str(node.target) for node in twin.graph.nodes if node.op == "call_module"}
    for path in sorted(called):
        parent, _, name = path.rpartition(".")
        twin.get_submodule(parent)._modules[name] = _own(submodule_at(twin, path), known)
    twin.eval()
    set_fake_quantize(twin, FakeQuantState.VALIDATION)
    update_graph_info(twin, expected=None)
    return twin


def _own(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """A clone of a module and of everything below it, over the same tensors."""
    if id(module) not in known:
        clone = known[id(module)] = clone_module(module)
        for name, child in clone._modules.items():
            if child is not None:
                clone._modules[name] = _own(child, known)
        if isinstance(clone, Fused):  # what a fused module has under these names is no child of it
            for name in ("weight_fake_quant", "bias_fake_quant"):
                quantizer = clone.__dict__.get(name)
                if isinstance(quantizer, nn.Module):
                    clone.__dict__[name] = _own(quantizer, known)
    return known[id(module)]

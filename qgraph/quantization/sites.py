"""The sites of a prepared graph and their states."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from qgraph.errors import StateError, UserError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import graph_info, info, module_of
from qgraph.ir.op_table import FUSABLE
from qgraph.ir.stage import Stage
from qgraph.lowering.products import accumulator_step, scale_repeats
from qgraph.nn import Fused
from qgraph.quantization.fake_quantize import BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from qgraph.quantization.states import FakeQuantState


def require_prepared(model: object, what: str) -> fx.GraphModule:
    """`model` as a prepared graph.

    Raises:
        UserError: it is something else; the message says what to call.
    """
    if not isinstance(model, fx.GraphModule):
        raise UserError(
            f"{what} needs a prepared model, got a {type(model).__name__}",
            fix="call qgraph.prepare(model, example_inputs) first",
        )
    stage = graph_info(model).stage
    if stage is not Stage.PREPARED:
        raise UserError(
            f"{what} needs a prepared graph, this one is {stage}",
            fix="use what qgraph.prepare returned" if stage is Stage.INTEGER else "call qgraph.prepare(model, inputs)",
        )
    return model


def fake_quantizers(gm: fx.GraphModule) -> Iterator[FakeQuantize]:
    """Every activation and weight site, in order of registration, each once."""
    for module in gm.modules():
        if isinstance(module, FakeQuantize):
            yield module


def activation_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, FakeQuantize]]:
    """The node of every rounded activation in execution order, with its fake quantization."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = module_of(node)
            if isinstance(module, FakeQuantize):
                yield node.all_input_nodes[0], module


def set_fake_quantize(model: fx.GraphModule, state: FakeQuantState) -> None:
    """Puts every site of a prepared model into `state`.

    Moving to VALIDATION computes scales that calibration or training left open, and those of the current weights.

    Args:
        model: what `prepare` returned.
        state: FLOAT, CALIBRATION, QAT or VALIDATION.

    Raises:
        StateError: the move needs data the model has not seen.
        UserError: `model` is not prepared or `state` is no state.
    """
    gm = require_prepared(model, "set_fake_quantize")
    if not isinstance(state, FakeQuantState):
        raise UserError(f"{state!r} is no FakeQuantState", fix="use for example FakeQuantState.VALIDATION")
    if state is FakeQuantState.VALIDATION:
        settle(gm)
    for module in gm.modules():
        if isinstance(module, (FakeQuantize, BiasFakeQuantize)):
            module.state = state


def settle(gm: fx.GraphModule) -> None:
    """Computes every scale from what was observed, and the bias steps that follow from them.

    Raises:
        StateError: a site has seen no data.
        QuantizationError: a site has seen NaN or infinite values.
    """
    unseen = []
    for module in fake_quantizers(gm):
        if isinstance(module, WeightFakeQuantize):
            continue
        if module.observer is not None and module.observer.observed:
            module.settle()
        elif not module.has_scale:
            unseen.append(module.site)
    if unseen:
        shown = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        raise StateError(
            f"{len(unseen)} site(s) have not been calibrated",
            where=shown,
            why="a scale is computed from the values that pass a site, and none have",
            fix="run qgraph.calibrate(model, loader) before VALIDATION and convert",
        )
    _settle_weights(gm)
    refresh_bias_steps(gm)


def _settle_weights(gm: fx.GraphModule) -> None:
    done: set[int] = set()
    for module in gm.modules():
        quantizer = getattr(module, "weight_fake_quant", None)
        if not isinstance(module, Fused) or not isinstance(quantizer, FakeQuantize) or id(quantizer) in done:
            continue
        done.add(id(quantizer))
        if quantizer.observer is not None:
            quantizer.observer.reset()
            quantizer.observer(module.weight)
        quantizer.settle()


def refresh_bias_steps(gm: fx.GraphModule) -> None:
    """Writes the accumulator's step, input scale times weight scale, into every bias quantization."""
    for node in gm.graph.nodes:
        if node.op != "call_module" or info(node).op not in FUSABLE:
            continue
        module = module_of(node)
        if not isinstance(module, Fused) or not isinstance(module.bias_fake_quant, BiasFakeQuantize):
            continue
        source = source_quantizer(bind(node).operand("input"))
        weight = module.weight_fake_quant
        if source is not None and isinstance(weight, FakeQuantize):
            module.bias_fake_quant.step = accumulator_step(source.qparams(), weight.qparams(), scale_repeats(node))


def source_quantizer(node: fx.Node) -> FakeQuantize | None:
    """The fake quantization whose grid a value lies on, looking through what only moves it; None if there is none."""
    while True:
        module = module_of(node) if node.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            return module
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]

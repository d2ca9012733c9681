"""The sites of a prepared graph and their states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import fx

from qgraph.errors import QuantizationError, StateError, UserError, did_you_mean
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import graph_info, info, module_of
from qgraph.ir.op_table import FUSABLE
from qgraph.ir.paths import PathModel
from qgraph.ir.stage import Stage
from qgraph.lowering.products import accumulator_step, scale_repeats
from qgraph.nn import Fused
from qgraph.quantization.fake_quantize import BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from qgraph.quantization.observers import Observer
from qgraph.quantization.states import FakeQuantState

Quantizer: TypeAlias = FakeQuantize | BiasFakeQuantize


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


def require_float32(gm: fx.GraphModule) -> None:
    """Refuses a prepared graph that was moved to another dtype.

    Raises:
        QuantizationError: a parameter is not float32; the message names it.
    """
    for name, parameter in gm.named_parameters():
        if parameter.dtype is not torch.float32:
            raise QuantizationError(
                f"{name} of the prepared graph is {parameter.dtype}",
                why="it was moved there after prepare, and scales are found in float32",
                fix="prepare the float32 model again, and leave the dtype as it is",
            )


def set_fake_quantize(
    model: fx.GraphModule | PathModel, state: FakeQuantState, sites: Iterable[str] | None = None
) -> None:
    """Puts the sites of a prepared model into `state`.

    Moving to VALIDATION computes scales that calibration or training left open, and those of the current weights.

    Args:
        model: what `prepare` returned.
        state: FLOAT, CALIBRATION, QAT or VALIDATION.
        sites: names of the sites to move, such as `conv1`, `conv1.weight` and `conv1.bias`; all of them if None.

    Raises:
        StateError: the move needs data the model has not seen.
        UserError: `model` is not prepared, `state` is no state, or there is no such site.
    """
    if isinstance(model, PathModel):
        _set_in_paths(model, state, sites)
        return
    gm = require_prepared(model, "set_fake_quantize")
    if not isinstance(state, FakeQuantState):
        raise UserError(f"{state!r} is no FakeQuantState", fix="use for example FakeQuantState.VALIDATION")
    chosen = list(quantizers(gm)) if sites is None else _named(gm, sites)
    if state is FakeQuantState.VALIDATION:
        settle(gm, chosen)
    for module in chosen:
        module.state = state


def _set_in_paths(model: PathModel, state: FakeQuantState, sites: Iterable[str] | None) -> None:
    wanted = None if sites is None else list(sites)
    for gm in model.graphs:
        own = {module.site for module in quantizers(gm)}
        chosen = None if wanted is None else [site for site in wanted if site in own]
        if chosen is None or chosen:
            set_fake_quantize(gm, state, chosen)
    if wanted is not None:
        known = {module.site for gm in model.graphs for module in quantizers(gm)}
        for site in wanted:
            if site not in known:
                raise UserError(f"no path has a site {site!r}", fix=did_you_mean(str(site), known))


def quantizers(gm: fx.GraphModule) -> Iterator[Quantizer]:
    """Every site of activations, weights and biases, each once."""
    for module in gm.modules():
        if isinstance(module, (FakeQuantize, BiasFakeQuantize)):
            yield module


def _named(gm: fx.GraphModule, sites: Iterable[str]) -> list[Quantizer]:
    if isinstance(sites, str):
        raise UserError(f"sites is the text {sites!r}", fix=f"give a list of names: sites=[{sites!r}]")
    known = {module.site: module for module in quantizers(gm)}
    wanted = list(sites)
    for site in wanted:
        if site not in known:
            raise UserError(f"the prepared graph has no site {site!r}", fix=did_you_mean(str(site), known))
    return [known[site] for site in wanted]


def snapshot(gm: fx.GraphModule) -> Callable[[], None]:
    """Remembers states, ranges and scales; returns the function that brings them back."""
    kept = [
        (module, module.state if isinstance(module, (FakeQuantize, BiasFakeQuantize)) else None, dict(module._buffers))
        for module in gm.modules()
        if isinstance(module, (FakeQuantize, BiasFakeQuantize, Observer))
    ]

    def restore() -> None:
        for module, state, buffers in kept:
            module._buffers.update(buffers)  # they are replaced, never written to
            if state is not None and isinstance(module, (FakeQuantize, BiasFakeQuantize)):
                module.state = state

    return restore


def settle(gm: fx.GraphModule, chosen: Collection[Quantizer]) -> None:
    """Computes the scales of some sites from what was observed, and the bias steps that follow from them.

    Raises:
        StateError: a site has seen no data.
        QuantizationError: a site has seen NaN or infinite values.
    """
    wanted = set(chosen)
    unseen = []
    for module in chosen:
        if isinstance(module, (WeightFakeQuantize, BiasFakeQuantize)):
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
    _settle_weights(gm, wanted)
    _refresh_bias_steps(gm, wanted)


def _settle_weights(gm: fx.GraphModule, wanted: set[Quantizer]) -> None:
    left = {module for module in wanted if isinstance(module, WeightFakeQuantize)}
    for module in gm.modules():
        quantizer = module.weight_fake_quant if isinstance(module, Fused) else None
        if not isinstance(quantizer, WeightFakeQuantize) or quantizer not in left:
            continue
        left.discard(quantizer)
        if quantizer.keeps_scale:
            continue
        if quantizer.observer is not None:
            quantizer.observer.reset()
            quantizer.observer(module.weight)
        quantizer.settle()


def _refresh_bias_steps(gm: fx.GraphModule, wanted: set[Quantizer]) -> None:
    """Writes the accumulator's step, input scale times weight scale, into bias quantizations."""
    for node in gm.graph.nodes:
        if node.op != "call_module" or info(node).op not in FUSABLE:
            continue
        module = module_of(node)
        bias = module.bias_fake_quant if isinstance(module, Fused) else None
        if not isinstance(bias, BiasFakeQuantize) or bias not in wanted:
            continue
        source = source_quantizer(bind(node).operand("input"))
        weight = module.weight_fake_quant
        if source is not None and isinstance(weight, FakeQuantize):
            bias.step = accumulator_step(source.qparams(), weight.qparams(), scale_repeats(node))


def source_quantizer(node: fx.Node) -> FakeQuantize | None:
    """The fake quantization whose grid a value lies on, looking through what only moves it; None if there is none."""
    while True:
        module = module_of(node) if node.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            return module
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]

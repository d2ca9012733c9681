"""Steps that use data to lose less: `equalize` and `correct_bias`. Each says what it gained, site by site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import inf, log10
from typing import Any

import torch
from torch import fx, nn

from qgraph.errors import StateError, UserError, did_you_mean
from qgraph.ir.editor import Editor
from qgraph.ir.evaluate import call_node, evaluate
from qgraph.ir.node_info import ExampleInputs, graph_info, info, module_of, update_graph_info
from qgraph.ir.op_table import FAKE_QUANT, FUSABLE
from qgraph.nn import Activation, Fused, clone_module
from qgraph.numerics import QType, qint8
from qgraph.quantization.calibrate import batch_inputs, calibrate, evaluating, require_batches
from qgraph.quantization.channel_axes import ChannelAxes
from qgraph.quantization.channel_noise import channel_ranges, layer_input
from qgraph.quantization.equalization import apply_factors, choose_factors, describe, layers_of, loses_digits
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.sites import quantizers, require_float32, require_prepared, set_fake_quantize, source_quantizer
from qgraph.quantization.states import FakeQuantState


@dataclass(frozen=True)
class SiteGain:
    """What a step did for one site.

    Args:
        site: its name.
        before, after: power of the signal over that of the error of the site's result, in dB, on the data given.
        applied: whether the site was changed.
    """

    site: str
    before: float
    after: float
    applied: bool

    def __str__(self) -> str:
        return f"{self.site}: {self.before:.1f} -> {self.after:.1f} dB{'' if self.applied else ' (left as it was)'}"


def equalize(
    model: fx.GraphModule, loader: Iterable[Any], num_steps: int | None = None, *, least_gain: float = 1.0
) -> list[SiteGain]:
    """Scales channels by what the data show of their ranges, and calibrates again.

    As the pass `equalize-channels`, which knows only the example inputs; through layer norms it is what SmoothQuant
    does (Xiao et al., 2022). Factors are powers of two, so that the float model stays the same to the last bit.

    Args:
        model: a calibrated graph; its weights and ranges are replaced, and it is left in state VALIDATION.
        loader: batches, as for `calibrate`.
        num_steps: stop after this many batches; None for all.
        least_gain: by how many dB the noise of a group of channels must be expected to fall.

    Returns:
        For every layer that reads scaled channels, the SQNR of its result before and after.

    Raises:
        UserError: `model` is not prepared, or the loader is empty.
        StateError: it has not been calibrated.
    """
    gm = _calibrated(model, "equalize")
    batches = _batches(gm, loader, num_steps, "equalize")
    axes = ChannelAxes(gm, _has_fixed_scale)
    groups = {root: group for root, group in axes.groups().items() if group.pinned is None}
    with _in_state(gm, FakeQuantState.FLOAT):
        ranges = channel_ranges(gm, batches, layers_of(axes, groups.values()))
    chosen = choose_factors(axes, groups, ranges, _formats, sampled=True)
    wanted = {root: choice for root, choice in chosen.items() if choice.gain >= least_gain}
    for root, choice in list(wanted.items()):
        if loses_digits(axes, wanted, (*choice.group.producers, *choice.group.consumers)):
            del wanted[root]
    if not wanted:
        return []
    readers = [call for choice in wanted.values() for w in choice.group.consumers for call in axes.layers[w].calls]
    before = _signal_to_noise(gm, batches, readers)
    notes = [describe(axes, choice) for choice in wanted.values()]
    apply_factors(axes, wanted, Editor(gm, "equalize"))
    for quantizer in quantizers(gm):
        if isinstance(quantizer, FakeQuantize) and quantizer.observer is not None:
            quantizer.observer.reset()
    calibrate(gm, [batch.kwargs or batch.args for batch in batches], progress=False)
    update_graph_info(gm, notes=(*graph_info(gm).notes, *notes))
    after = _signal_to_noise(gm, batches, readers)
    return [SiteGain(info(call).site, before[call], after[call], True) for call in dict.fromkeys(readers)]


def correct_bias(
    model: fx.GraphModule,
    loader: Iterable[Any],
    num_steps: int | None = None,
    *,
    sites: Iterable[str] | None = None,
    least_gain: float = 0.05,
) -> list[SiteGain]:
    """Takes the mean error of every output channel out of the biases, layer by layer in execution order.

        b'  =  b - mean(quantized(w x + b) - (w x + b))

    Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, measured on data. Each
    layer sees inputs that its predecessors' corrections have changed already, which takes two forwards of the data per
    layer.

    Args:
        model: a calibrated graph; biases are replaced, and it is left in state VALIDATION.
        loader: batches, as for `calibrate`.
        num_steps: stop after this many batches; None for all.
        sites: the layers to correct; all that have a bias of their own if None.
        least_gain: a layer whose result gains less than this, in dB, is left as it is.

    Returns:
        For every layer looked at, the SQNR of its result before its activation, before and after.

    Raises:
        UserError: `model` is not prepared, the loader is empty, or a site is no layer with a bias of its own.
        StateError: it has not been calibrated.
    """
    gm = _calibrated(model, "correct_bias")
    batches = _batches(gm, loader, num_steps, "correct_bias")
    layers = {info(node).site: node for node in _biased_layers(gm)}
    wanted = list(layers) if sites is None else list(sites)
    for site in wanted:
        if site not in layers:
            raise UserError(f"{site!r} is no layer with a bias of its own", fix=did_you_mean(str(site), layers))
    set_fake_quantize(gm, FakeQuantState.VALIDATION)
    given: dict[nn.Module, nn.Parameter] = {}
    return [_correct(gm, layers[site], batches, least_gain, given) for site in layers if site in wanted]


def _correct(
    gm: fx.GraphModule,
    node: fx.Node,
    batches: list[ExampleInputs],
    least_gain: float,
    given: dict[nn.Module, nn.Parameter],
) -> SiteGain:
    """Corrects one layer; `given` holds the biases of those corrected before, with which the float graph is run."""
    module: Any = module_of(node)
    dim = -1 - (module.weight.dim() - 2)
    signal, noise, count = 0.0, 0.0, 0
    total = torch.zeros((), dtype=torch.float64, device=module.weight.device)
    for batch in batches:
        with _biases(given):
            exact = _product(gm, node, batch, FakeQuantState.FLOAT)
        error = (_product(gm, node, batch, FakeQuantState.VALIDATION) - exact).double()
        total = total + error.movedim(dim, 0).flatten(1).sum(1)
        signal, noise = signal + float(exact.double().square().sum()), noise + float(error.square().sum())
        count += error.numel() // error.shape[dim]
    mean = total / count
    left = max(noise - count * float(mean.square().sum()), 0.0)
    before, after = _decibels(signal, noise), _decibels(signal, left)
    applied = after - before >= least_gain
    if applied:
        given[module] = module.bias
        bias = module.bias.detach() - mean.to(module.bias.dtype)
        module._parameters["bias"] = nn.Parameter(bias, module.bias.requires_grad)
    return SiteGain(info(node).site, before, after if applied else before, applied)


@contextmanager
def _biases(given: dict[nn.Module, nn.Parameter]) -> Iterator[None]:
    """Some modules hold other biases for a while."""
    kept = {module: module._parameters["bias"] for module in given}
    try:
        for module, bias in given.items():
            module._parameters["bias"] = bias
        yield
    finally:
        for module, own in kept.items():
            module._parameters["bias"] = own


def _product(gm: fx.GraphModule, node: fx.Node, batch: ExampleInputs, state: FakeQuantState) -> torch.Tensor:
    """The layer's result before its activation."""
    found: list[torch.Tensor] = []
    bare = clone_module(module_of(node))
    bare.__dict__.update(activation=Activation.NONE)

    def compute(current: fx.Node, values: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if current is node:
            found.append(bare(*values, **named))
        return call_node(gm, current, values, named)

    with _in_state(gm, state):
        evaluate(gm, batch.args, batch.kwargs, call=compute)
    return found[0]


def _signal_to_noise(gm: fx.GraphModule, batches: list[ExampleInputs], nodes: list[fx.Node]) -> dict[fx.Node, float]:
    """SQNR of some results, in dB."""
    signal: dict[fx.Node, float] = dict.fromkeys(nodes, 0.0)
    noise: dict[fx.Node, float] = dict.fromkeys(nodes, 0.0)
    for batch in batches:
        exact = _values(gm, batch, nodes, FakeQuantState.FLOAT)
        rounded = _values(gm, batch, nodes, FakeQuantState.VALIDATION)
        for node in signal:
            signal[node] += float(exact[node].double().square().sum())
            noise[node] += float((rounded[node] - exact[node]).double().square().sum())
    return {node: _decibels(signal[node], noise[node]) for node in nodes}


def _values(
    gm: fx.GraphModule, batch: ExampleInputs, nodes: list[fx.Node], state: FakeQuantState
) -> dict[fx.Node, torch.Tensor]:
    kept: dict[fx.Node, torch.Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node in nodes:
            kept[node] = value

    with _in_state(gm, state):
        evaluate(gm, batch.args, batch.kwargs, observe=keep)
    return kept


def _decibels(signal: float, noise: float) -> float:
    return inf if noise == 0 else 10 * log10(signal / noise) if signal else -inf


def _calibrated(model: object, what: str) -> fx.GraphModule:
    gm = require_prepared(model, what)
    require_float32(gm)
    for quantizer in quantizers(gm):
        if isinstance(quantizer, FakeQuantize) and not quantizer.has_scale:
            raise StateError(
                f"site {quantizer.site} has no scale yet",
                why=f"{what} compares the calibrated graph with the float one",
                fix="run qgraph.calibrate(model, loader) first",
            )
    return gm


def _batches(gm: fx.GraphModule, loader: Iterable[Any], num_steps: int | None, what: str) -> list[ExampleInputs]:
    require_batches(loader, "the loader", f"{what}(model, [batch])")
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    batches = [ExampleInputs(*batch_inputs(batch, names)) for batch in islice(loader, num_steps)]
    if not batches:
        raise UserError("the loader is empty", fix="give a loader with at least one batch")
    return batches


@contextmanager
def _in_state(gm: fx.GraphModule, state: FakeQuantState) -> Iterator[None]:
    """All sites in a state, in eval mode and without gradients; scales are not computed again."""
    kept = [(quantizer, quantizer.state) for quantizer in quantizers(gm)]
    try:
        for quantizer, _ in kept:
            quantizer.state = state
        with evaluating(gm), torch.no_grad():
            yield
    finally:
        for quantizer, before in kept:
            quantizer.state = before


def _has_fixed_scale(node: fx.Node) -> bool:
    module = module_of(node) if info(node).op is FAKE_QUANT else None
    return isinstance(module, FakeQuantize) and module.fixed_scale is not None


def _formats(call: fx.Node) -> tuple[QType | None, QType]:
    source, weight = source_quantizer(layer_input(call)), getattr(module_of(call), "weight_fake_quant", None)
    return None if source is None else source.qtype, weight.qtype if isinstance(weight, FakeQuantize) else qint8


def _biased_layers(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Quantized layers that hold a bias nobody else holds, called once."""
    calls = [node for node in gm.graph.nodes if node.op == "call_module" and info(node).op in FUSABLE]
    holders = Counter(id(getattr(module_of(node), "bias", None)) for node in calls)
    for node in calls:
        module = module_of(node)
        biased = isinstance(module, Fused) and isinstance(module.weight_fake_quant, FakeQuantize)
        if biased and module.bias is not None and holders[id(module.bias)] == 1:
            yield node

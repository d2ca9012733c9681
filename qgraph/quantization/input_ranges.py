"""Fits the scales of the model's inputs to the values they take.

Images are codes already: 256 grey values, or 17. If their step is no multiple of the scale's, every value is rounded,
and white is clipped, because a symmetric scale of `max / 128` has no code for `max`. A slightly wider range often
removes most of that error. Scales tried are those that put the largest value on a code; one is taken where the mean
square error on the calibration data, of 256 values at least, falls by a factor of four or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, log10
from typing import Any

import torch
from torch import fx

from qgraph.ir.node_info import graph_info, info, module_of, update_graph_info
from qgraph.ir.op_table import FAKE_QUANT, INPUT, QUANT_STUB
from qgraph.numerics import QParams, Scheme, fake_quantize
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.observers import MinMaxObserver

_WIDEST = 1.25
_LEAST_GAIN = 4.0
_LEAST_VALUES = 256
_KEPT, _PER_BATCH = 65536, 4096
_MOST_LEVELS = 256


class InputSamples:
    """Some values of every input whose scale can be fitted: at most 65536 of each, from the first batches.

    Args:
        gm: a prepared graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.sites = [module for module in _input_sites(gm) if _can_be_fitted(module)]
        self._kept: dict[FakeQuantize, list[torch.Tensor]] = {site: [] for site in self.sites}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps values while the graph runs."""
        hooks = [site.register_forward_pre_hook(self._keep) for site in self.sites]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, site: Any, args: tuple[Any, ...]) -> None:
        kept, values = self._kept[site], args[0].detach().flatten()
        if sum(part.numel() for part in kept) < _KEPT:
            kept.append(values[:: -(-values.numel() // _PER_BATCH) or 1].clone())

    def values(self, site: FakeQuantize) -> torch.Tensor:
        """What was kept of a site's values: float32 `[n]`."""
        return torch.cat([*self._kept[site], site.scale.new_zeros(0)])


def fit_input_scales(gm: fx.GraphModule, samples: InputSamples) -> None:
    """Widens the ranges of inputs where that makes their error much smaller; a note of the graph says where.

    Args:
        gm: a prepared graph whose scales are known.
        samples: of the same graph.
    """
    notes = list(graph_info(gm).notes)
    for site in samples.sites:
        values, given = samples.values(site), site.qparams()
        if values.numel() < _LEAST_VALUES:
            continue
        before, found = _error(values, given), given.scale
        after = before
        for scale in _candidates(site):
            error = _error(values, QParams(scale, site.qtype))
            if error < after:
                after, found = error, scale
        if found is given.scale or after * _LEAST_GAIN > before:
            continue
        _widen(site, found)
        gain = inf if after == 0 else 10 * log10(before / after)
        notes.append(
            f"input {site.site}: scale {float(found):.6g} instead of {float(given.scale):.6g}, "
            f"at which the error of the calibration data is {gain:.1f} dB lower"
        )
    update_graph_info(gm, notes=tuple(dict.fromkeys(notes)))


def _input_sites(gm: fx.GraphModule) -> Iterator[FakeQuantize]:
    for node in gm.graph.nodes:
        if info(node).op is not FAKE_QUANT or info(node.all_input_nodes[0]).op is not QUANT_STUB:
            continue
        source, module = node.all_input_nodes[0].all_input_nodes[0], module_of(node)
        if info(source).op is INPUT and isinstance(module, FakeQuantize):
            yield module


def _can_be_fitted(site: FakeQuantize) -> bool:
    observer = site.observer
    whole = type(observer) is MinMaxObserver and observer.ch_axis < 0
    few = site.qtype.qmax - site.qtype.qmin < _MOST_LEVELS
    return whole and few and site.scheme is Scheme.SYMMETRIC and site.zero_point is None


def _candidates(site: FakeQuantize) -> Iterator[torch.Tensor]:
    """Scales that put the largest magnitude on a code."""
    assert site.observer is not None
    largest = torch.maximum(site.observer.max_val.abs(), site.observer.min_val.abs())
    for code in range(site.qtype.qmax, int(site.qtype.qmax / _WIDEST), -1):
        yield largest / code


def _error(values: torch.Tensor, qparams: QParams) -> float:
    return float((fake_quantize(values, qparams) - values).double().square().mean())


def _widen(site: FakeQuantize, scale: torch.Tensor) -> None:
    """Gives the observer the range from which `scale` follows."""
    observer = site.observer
    assert observer is not None
    reach = scale * -site.qtype.qmin
    if bool(observer.max_val >= -observer.min_val):
        observer.max_val = reach
    else:
        observer.min_val = -reach
    site.settle()

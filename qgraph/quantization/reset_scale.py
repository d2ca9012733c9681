"""`reset_scale`: other scales from the histograms a calibration left, without new data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qgraph.errors import QuantizationError, StateError, UserError, did_you_mean
from qgraph.ir.node_info import info, set_info
from qgraph.numerics import Format, as_format
from qgraph.quantization.fake_quantize import BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from qgraph.quantization.observers import FixedScaleObserver, HistogramObserver, MinMaxObserver
from qgraph.quantization.observers.search import MaxSearch, Search
from qgraph.quantization.observers.searches import SEARCHES
from qgraph.quantization.observers.spec import ObserverSpec
from qgraph.quantization.sites import quantizers, require_float32, require_prepared, settle


def reset_scale(
    model: fx.GraphModule,
    method: str = "mse",
    method_kwargs: Mapping[str, Any] | None = None,
    dtype: Format | torch.dtype | str | None = None,
    prefix: str | None = None,
) -> list[str]:
    """Finds the scales of activations anew by another search of their histograms; later moves of state keep it.

    Weights, fixed scales and states stay as they are. After an error the model is as it was before.

    Args:
        model: a calibrated model, prepared with an observer that keeps a histogram; it is changed.
        method: `max`, `percentile`, `mse`, `kl`, `mix` or `clip_std`; options in the text are understood too, such as
            `percentile(percentile=99.9)`.
        method_kwargs: the search's options by name, such as `{"percentile": 99.9}`.
        dtype: sites of this format only, such as `"int8"`; all if None.
        prefix: sites of this name, or in the module of this name, only; all if None.

    Returns:
        The sites whose scales were found anew, in order of the graph.

    Raises:
        QuantizationError: a chosen site keeps no histogram, or there is no such method or option.
        StateError: a chosen site has seen no data.
        UserError: no site has that format and prefix, or `model` is not prepared.
    """
    gm = require_prepared(model, "reset_scale")
    require_float32(gm)
    spec = ObserverSpec.parse(method)
    if method_kwargs is not None:
        if not isinstance(method_kwargs, Mapping):
            raise UserError(f"method_kwargs is {method_kwargs!r}", fix='give names and values: {"percentile": 99.9}')
        spec = ObserverSpec(spec.name, (*spec.options, *method_kwargs.items()))
    search = spec.make(SEARCHES, "method")
    chosen = _chosen(gm, dtype, prefix)
    _require_histograms(chosen, search)
    use_searches(gm, dict.fromkeys(chosen, search))
    return [module.site for module in chosen]


def activation_sites(gm: fx.GraphModule) -> list[FakeQuantize]:
    """The sites of activations whose scale follows from data."""
    return [
        module
        for module in quantizers(gm)
        if isinstance(module, FakeQuantize)
        and not isinstance(module, WeightFakeQuantize)
        and module.fixed_scale is None
        and not isinstance(module.observer, FixedScaleObserver)
    ]


def use_searches(gm: fx.GraphModule, searches: Mapping[FakeQuantize, Search]) -> None:
    """Computes scales of observed sites by new searches, and what follows from them.

    Raises:
        QuantizationError: values were not finite; nothing is changed.
    """
    before = [(module, dict(module._buffers), module.observer) for module in searches]
    earlier = {id(each): each.search for *_, each in before if isinstance(each, HistogramObserver)}
    try:
        for module, search in searches.items():
            if isinstance(module.observer, HistogramObserver):
                module.observer.search = search
        settle(gm, [*searches, *(each for each in quantizers(gm) if isinstance(each, BiasFakeQuantize))])
    except BaseException:
        for module, buffers, observer in before:
            module._buffers.update(buffers)
            if isinstance(observer, HistogramObserver):
                observer.search = earlier[id(observer)]
        raise
    _record(gm, searches)


def _record(gm: fx.GraphModule, changed: Mapping[FakeQuantize, Search]) -> None:
    """Writes the observers now in use into the plans of their sites."""
    texts = {m.site: m.observer.text for m in changed if isinstance(m.observer, HistogramObserver)}
    for node in gm.graph.nodes:
        record = info(node)
        if record.plan is not None and not record.plan.same_scale and record.site in texts:
            set_info(node, replace(record, plan=replace(record.plan, observer=texts[record.site])))


def _chosen(gm: fx.GraphModule, dtype: Format | torch.dtype | str | None, prefix: str | None) -> list[FakeQuantize]:
    sites = activation_sites(gm)
    wanted = None if dtype is None else as_format(dtype)
    chosen = [
        module
        for module in sites
        if (wanted is None or module.qtype == wanted) and (not prefix or _within(module.site, prefix))
    ]
    if chosen:
        return chosen
    named = [module.site for module in sites if not prefix or _within(module.site, prefix)]
    if prefix and not named:
        raise UserError(
            f"no site with a scale from data is {prefix!r} or lies in it",
            fix=did_you_mean(prefix, [module.site for module in sites]),
        )
    formats = sorted({str(module.qtype) for module in sites})
    raise UserError(
        f"no such site has the format {wanted}", why=f"formats of the graph: {', '.join(formats) or 'none'}"
    )


def _within(site: str, prefix: str) -> bool:
    return site == prefix or site.startswith((f"{prefix}.", f"{prefix}(", f"{prefix}["))


def _require_histograms(chosen: list[FakeQuantize], search: Search) -> None:
    bare = [
        module.site
        for module in chosen
        if not isinstance(module.observer, HistogramObserver)
        and not (isinstance(search, MaxSearch) and isinstance(module.observer, MinMaxObserver))
    ]
    if bare:
        raise QuantizationError(
            f"{len(bare)} site(s) keep no histogram",
            where=_few(bare),
            why=f"their observers keep a range only, and {search.name} needs all values",
            fix="prepare with QConfig(activation_observer='histogram') and calibrate, or choose other sites",
        )
    unseen = [module.site for module in chosen if module.observer is None or not module.observer.observed]
    if unseen:
        raise StateError(
            f"{len(unseen)} site(s) have not been calibrated",
            where=_few(unseen),
            fix="run qgraph.calibrate(model, loader) first",
        )


def _few(sites: list[str]) -> str:
    return ", ".join(sites[:5]) + (f" and {len(sites) - 5} more" if len(sites) > 5 else "")

"""`auto_calibrate`: calibrates once, and chooses for every site what turns its histogram into a range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, log10
from typing import Any

from torch import fx

from qgraph.errors import QuantizationError, did_you_mean
from qgraph.quantization.calibrate import calibrate
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.observers import HistogramObserver, MinMaxObserver, ObserverSpec, make_observer
from qgraph.quantization.observers.distribution import METRICS
from qgraph.quantization.observers.registry import ObserverLike, observer_name
from qgraph.quantization.observers.search import MaxSearch, Search
from qgraph.quantization.reset_scale import activation_sites, use_searches
from qgraph.quantization.sites import require_prepared, snapshot

CANDIDATES: tuple[ObserverLike, ...] = (
    "min_max",
    "percentile(percentile=99.999)",
    "percentile(percentile=99.99)",
    "percentile(percentile=99.9)",
    "mse",
    "kl",
)


@dataclass(frozen=True)
class SiteChoice:
    """What was chosen for one site.

    Args:
        site: its name.
        format: format of its codes.
        observer: the chosen candidate.
        errors: mean error of every candidate, in the order they were given.
        min_max_error: mean error if the codes covered everything that was seen.
        decibel: 10 per power of ten of the metric, as for squares; 20 for absolute errors.
    """

    site: str
    format: str
    observer: str
    errors: tuple[tuple[str, float], ...]
    min_max_error: float
    decibel: int

    @property
    def error(self) -> float:
        """Mean error of the chosen candidate."""
        return dict(self.errors)[self.observer]

    @property
    def gain(self) -> float:
        """How much smaller the error is than with the whole range, in dB; infinite if only the chosen one has none."""
        if self.error == self.min_max_error:
            return 0.0
        return inf if self.error == 0 else self.decibel * log10(self.min_max_error / self.error)


@dataclass(frozen=True)
class AutoCalibration:
    """What `auto_calibrate` chose.

    Args:
        metric: what was compared.
        sites: one entry per site, in order of the graph.
    """

    metric: str
    sites: tuple[SiteChoice, ...]

    def __getitem__(self, site: str) -> SiteChoice:
        """The choice for a site.

        Raises:
            KeyError: there is no such site.
        """
        for choice in self.sites:
            if choice.site == site:
                return choice
        raise KeyError(f"{site!r}; {did_you_mean(site, [choice.site for choice in self.sites])}")

    def __str__(self) -> str:
        head = ("site", "format", "observer", self.metric, "gain over min_max")
        rows = [(c.site, c.format, c.observer, f"{c.error:.4g}", f"{c.gain:.2f} dB") for c in self.sites]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        return "\n".join(line.rstrip() for line in lines)


def auto_calibrate(
    model: fx.GraphModule,
    loader: Iterable[Any],
    num_steps: int | None = None,
    observers: Sequence[ObserverLike] = CANDIDATES,
    metric: str = "mse",
    progress: bool = True,
) -> AutoCalibration:
    """`calibrate`, with the best of several observers at every site of activations.

    The data passes once: every site keeps a histogram, on which the error of rounding the site's float values is
    computed for each candidate. Sites with fixed scales, and weights, are left to their own observers. The model ends
    in state VALIDATION; after an error it is as it was before.

    Args:
        model: what `prepare` returned; it is changed: its activation sites keep histograms from now on, so its state
            dict fits a model prepared with `activation_observer="histogram"`.
        loader, num_steps, progress: as for `calibrate`.
        observers: the candidates: `min_max` and observers that search a histogram; of equal ones the first wins.
        metric: `mse`, mean squared error, or `mae`, mean absolute error.

    Returns:
        What was chosen for each site, and its gain; `print` it.

    Raises:
        QuantizationError: a candidate or the metric does not exist or does not fit, or the data is not finite.
        UserError: as for `calibrate`.
    """
    gm = require_prepared(model, "auto_calibrate")
    if metric not in METRICS:
        raise QuantizationError(f"no metric is named {metric!r}", fix=did_you_mean(str(metric), METRICS))
    candidates = _candidates(observers)
    sites = activation_sites(gm)
    restore = snapshot(gm)
    before = [(module, module.observer) for module in sites]
    try:
        for module in sites:
            _keep_histogram(module)
        calibrate(gm, loader, num_steps, progress=progress)
        choices = [_choose(module, candidates, metric) for module in sites]
        chosen = (candidates[choice.observer] for choice in choices)
        use_searches(gm, dict(zip(sites, chosen, strict=True)))
    except BaseException:
        for module, observer in before:
            module.observer = observer
        restore()
        raise
    return AutoCalibration(metric, tuple(choices))


def _candidates(observers: Sequence[ObserverLike]) -> dict[str, Search]:
    given = (observers,) if isinstance(observers, (str, type, ObserverSpec)) else observers
    found: dict[str, Search] = {}
    for each in given:
        text = observer_name(each)
        made = make_observer(text, -1)
        if isinstance(made, HistogramObserver):
            found[text] = made.search
        elif isinstance(made, MinMaxObserver):
            found[text] = MaxSearch()
        else:
            raise QuantizationError(
                f"{text} is no candidate",
                why="candidates are compared on one histogram, from which it does not follow",
                fix="give min_max, percentile, mse, kl, mix or clip_std",
            )
    if not found:
        raise QuantizationError("there are no candidates", fix="give observers such as ('min_max', 'mse')")
    return found


def _keep_histogram(module: FakeQuantize) -> None:
    """Lets a site count its values; what it observed without counting is forgotten."""
    old = module.observer
    if old is not None and not isinstance(old, HistogramObserver):
        new = HistogramObserver(search=MaxSearch(), ch_axis=old.ch_axis).to(old.min_val.device)
        module.observer = new.train(old.training)


def _choose(module: FakeQuantize, candidates: dict[str, Search], metric: str) -> SiteChoice:
    assert isinstance(module.observer, HistogramObserver)
    (seen,) = module.observer.distributions()
    ranges = [search.find(seen, module.qtype, module.scheme) for search in (*candidates.values(), MaxSearch())]
    *errors, whole = seen.errors(ranges, module.qtype, module.scheme, metric).unbind()
    found = [float(error) for error in errors]
    best = list(candidates)[found.index(min(found))]
    decibel = 10 if metric == "mse" else 20
    return SiteChoice(
        module.site, str(module.qtype), best, tuple(zip(candidates, found, strict=True)), float(whole), decibel
    )

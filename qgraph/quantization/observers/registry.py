"""Observers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from qgraph.errors import QuantizationError, did_you_mean
from qgraph.quantization.observers.base import Observer
from qgraph.quantization.observers.fixed import FixedScaleObserver
from qgraph.quantization.observers.histogram import HistogramObserver
from qgraph.quantization.observers.min_max import MinMaxObserver, MovingAverageMinMaxObserver
from qgraph.quantization.observers.searching import (
    ClipStdObserver,
    KLObserver,
    MixObserver,
    MSEObserver,
    PercentileObserver,
)
from qgraph.quantization.observers.spec import ObserverSpec

ObserverLike: TypeAlias = str | type[Observer] | ObserverSpec
"""A name, a text such as `percentile(percentile=99.9)`, a class, or a spec."""

OBSERVERS: dict[str, Callable[..., Observer]] = {
    kind.registered_name: kind
    for kind in (
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        PercentileObserver,
        MSEObserver,
        KLObserver,
        MixObserver,
        HistogramObserver,
        FixedScaleObserver,
        ClipStdObserver,
    )
}
"""Registered name to what makes the observer; it is called with the options and `ch_axis` by name."""


def make_observer(observer: str | ObserverSpec, ch_axis: int) -> Observer:
    """A new observer from its text form or spec.

    Raises:
        QuantizationError: no observer has that name, or it does not take these options.
    """
    spec = ObserverSpec.parse(observer) if isinstance(observer, str) else observer
    return spec.make(OBSERVERS, "observer", ch_axis=ch_axis)


def observer_name(observer: ObserverLike) -> str:
    """The text form of an observer given by text, class or spec; its options are checked.

    Whether a site has one range or one per channel is the plan's choice, so that classes that differ in it only share
    a name.

    Raises:
        QuantizationError: it is not registered, or does not take these options.
    """
    if isinstance(observer, str):
        spec = ObserverSpec.parse(observer)
    elif isinstance(observer, ObserverSpec):
        spec = observer
    elif isinstance(observer, type) and issubclass(observer, Observer):
        # Inherited names do not count: they would put the parent in place of the class that was asked for.
        name = vars(observer).get("registered_name", "")
        if not name:
            raise QuantizationError(
                f"{observer} has no registered name of its own",
                fix=f"give it a registered_name and an entry in OBSERVERS; {did_you_mean(name, OBSERVERS)}",
            )
        spec = ObserverSpec(name)
    else:
        raise QuantizationError(
            f"{observer!r} is no observer", fix="give a registered name such as 'min_max', or a class"
        )
    make_observer(spec, -1)  # says what is wrong with the options
    return str(spec)

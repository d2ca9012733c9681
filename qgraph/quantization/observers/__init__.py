"""Observers: what range of values passed a site.

Memory does not grow with the data, and the result does not depend on anything but the data seen. A NaN or infinity in
the data stays visible in the range: it is refused when the scale is computed, with the site's name.
"""

from qgraph.quantization.observers.base import Observer
from qgraph.quantization.observers.fixed import FixedScaleObserver
from qgraph.quantization.observers.histogram import HistogramObserver
from qgraph.quantization.observers.min_max import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from qgraph.quantization.observers.registry import OBSERVERS, ObserverLike, make_observer, observer_name
from qgraph.quantization.observers.searching import (
    ClipStdObserver,
    KLObserver,
    MixObserver,
    MSEObserver,
    PercentileObserver,
)
from qgraph.quantization.observers.spec import ObserverSpec

__all__ = [
    "OBSERVERS",
    "ClipStdObserver",
    "FixedScaleObserver",
    "HistogramObserver",
    "KLObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MixObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "Observer",
    "ObserverLike",
    "ObserverSpec",
    "PerChannelMinMaxObserver",
    "PercentileObserver",
    "make_observer",
    "observer_name",
]

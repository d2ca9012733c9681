"""From a model to a verified graph; `trace` is the way in."""

from qgraph.capture.api import METHODS, trace
from qgraph.capture.model.blocks import Tracer
from qgraph.capture.options.request import PrepareMethod

__all__ = ["METHODS", "PrepareMethod", "Tracer", "trace"]

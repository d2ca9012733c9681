"""From a model to a verified graph; `trace` is the way in."""

from qgraph.capture.api import METHODS, trace

__all__ = ["METHODS", "trace"]

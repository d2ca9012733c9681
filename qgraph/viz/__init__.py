"""Pictures and dumps of graphs."""

from qgraph.viz.draw import draw, draw_diff, to_dot
from qgraph.viz.dump import DumpObserver

__all__ = ["DumpObserver", "draw", "draw_diff", "to_dot"]

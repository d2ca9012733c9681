"""Pictures and dumps of graphs."""

from qgraph.viz.diff import diff_to_dot, draw_diff
from qgraph.viz.draw import draw, to_dot
from qgraph.viz.dump import DumpObserver

__all__ = ["DumpObserver", "diff_to_dot", "draw", "draw_diff", "to_dot"]

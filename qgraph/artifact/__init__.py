"""Integer graphs as files: saving, loading, and packs of cases that a device is compared with."""

from qgraph.artifact.read import load
from qgraph.artifact.write import save

__all__ = ["load", "save"]

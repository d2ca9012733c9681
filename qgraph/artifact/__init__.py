"""Integer graphs as files: saving, loading, and packs of cases that a device is compared with."""

from qgraph.artifact.conformance import (
    ConformanceCase,
    ConformanceReport,
    SiteComparison,
    pack,
    read_pack,
    run,
)
from qgraph.artifact.read import load
from qgraph.artifact.write import save

__all__ = [
    "ConformanceCase",
    "ConformanceReport",
    "SiteComparison",
    "load",
    "pack",
    "read_pack",
    "run",
    "save",
]

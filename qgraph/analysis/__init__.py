"""Questions about accuracy."""

from qgraph.analysis.consistency import SiteConsistency, compare_sites

__all__ = ["SiteConsistency", "compare_sites"]

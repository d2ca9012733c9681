"""Questions about accuracy."""

from qgraph.analysis.causes import Cause
from qgraph.analysis.check_consistency import ConsistencyReport, SiteReport, check_consistency
from qgraph.analysis.consistency import SiteConsistency, compare_sites

__all__ = ["Cause", "ConsistencyReport", "SiteConsistency", "SiteReport", "check_consistency", "compare_sites"]

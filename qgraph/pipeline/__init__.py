"""Passes and the pipelines that run them."""

from qgraph.pipeline.base import (
    EXACT,
    REDEFINES,
    Numerics,
    Pass,
    PassContext,
    PassReport,
    PassResult,
    RewritePass,
    close,
)
from qgraph.pipeline.observers import PassObserver, ProvenanceObserver, TimingObserver
from qgraph.pipeline.pipeline import BisectResult, CheckLevel, Pipeline, PipelineResult
from qgraph.pipeline.registry import ENTRY_POINT_GROUP, REGISTRY

__all__ = [
    "ENTRY_POINT_GROUP",
    "EXACT",
    "REDEFINES",
    "REGISTRY",
    "BisectResult",
    "CheckLevel",
    "Numerics",
    "Pass",
    "PassContext",
    "PassObserver",
    "PassReport",
    "PassResult",
    "Pipeline",
    "PipelineResult",
    "ProvenanceObserver",
    "RewritePass",
    "TimingObserver",
    "close",
]

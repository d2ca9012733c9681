"""Helpers for tests of passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture import trace
from qgraph.ir.node_info import Refusal, info
from qgraph.ir.op import Op
from qgraph.pipeline import CheckLevel, PassContext, Pipeline, PipelineResult


def run_passes(model: nn.Module, example: Any, passes: str, ctx: PassContext | None = None) -> PipelineResult:
    """Traces a model and runs a pipeline with every check on."""
    gm = trace(model.eval(), example)
    return Pipeline.parse(passes).run(gm, ctx, checks=CheckLevel.CLAIMS)


def count_ops(gm: fx.GraphModule) -> Counter[str]:
    """Operator name to number of nodes."""
    return Counter(info(node).op.name for node in gm.graph.nodes)


def nodes_of(gm: fx.GraphModule, op: Op) -> list[fx.Node]:
    """Nodes of one operator, in execution order."""
    return [node for node in gm.graph.nodes if info(node).op is op]


def reasons(result: PipelineResult) -> list[str]:
    """Reasons of all refusals."""
    return [refusal.reason for refusal in result.refusals]


def refusal_with(result: PipelineResult, words: str) -> Refusal:
    """The refusal whose reason contains `words`; fails if there is none."""
    found = [refusal for refusal in result.refusals if words in refusal.reason]
    assert found, f"no refusal mentions {words!r}; there are {reasons(result)}"
    return found[0]


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected."""
    return ((expected - actual).abs().max() / expected.abs().max()).item()


def assert_idempotent(gm: fx.GraphModule, passes: str, ctx: PassContext | None = None) -> None:
    """Running the passes again changes nothing."""
    again = Pipeline.parse(passes).run(gm, ctx, checks=CheckLevel.CLAIMS)
    assert not again.changed

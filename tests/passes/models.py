"""Models given as functions, and the numeric check that every pass has."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from qgraph.capture import trace
from qgraph.ir.node_info import info
from qgraph.ir.op_table import CONSTANT, GUARD, INPUT, OUTPUT
from qgraph.ir.text import print_graph
from qgraph.pipeline import CheckLevel, Pipeline, PipelineResult
from tests.support.passes import assert_idempotent, relative_error

BATCHES = (1, 2, 5)
FUSE = "canonicalize,fuse-conv-bn-add-relu"
FOLD_RTOL = 2e-6


def randomize_norms(model: nn.Module) -> nn.Module:
    """Gives batch norms statistics and weights that show; about half of the gains are negative."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def capture_and_run(model: nn.Module, example: Any, passes: str, waive: tuple[str, ...] = ()) -> PipelineResult:
    """As `run_passes`, for models with waived flags: only structure is checked, as their outputs may change."""
    gm = trace(model.eval(), example, waive=waive, verify=False)
    return Pipeline.parse(passes).run(gm, checks=CheckLevel.STRUCTURE)


def with_batch(example: Any, batch: int) -> tuple[torch.Tensor, ...]:
    """Random inputs like the example, with another first dimension."""
    inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    return tuple(
        torch.randn(batch, *given.shape[1:], dtype=given.dtype)
        if given.is_floating_point()
        else torch.randint(0, 4, (batch, *given.shape[1:]), dtype=given.dtype)
        for given in inputs
    )


def check_values(model: nn.Module, gm: fx.GraphModule, example: Any, rtol: float = 0.0, batches: Any = BATCHES) -> None:
    """The graph computes what the model does, at each batch size: bit for bit, or within `rtol` of the largest."""
    for batch in batches:
        inputs = with_batch(example, batch)
        with torch.no_grad():
            expected = tree_leaves(model(*[given.clone() for given in inputs]))
            actual = tree_leaves(gm(*[given.clone() for given in inputs]))
        assert len(expected) == len(actual)
        for one, two in zip(expected, actual, strict=True):
            assert (one.shape, one.dtype) == (two.shape, two.dtype), f"at batch {batch}"
            if rtol:
                assert relative_error(one, two) <= rtol, f"at batch {batch}"
            else:
                assert torch.equal(one, two), f"at batch {batch}"


def check_all(model: nn.Module, result: PipelineResult, example: Any, passes: str, rtol: float = 0.0) -> None:
    """Values at three batch sizes, and idempotence."""
    check_values(model, result.gm, example, rtol)
    assert_idempotent(result.gm, passes)


def computing(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute something."""
    return [node for node in gm.graph.nodes if info(node).op not in (INPUT, GUARD, CONSTANT, OUTPUT)]


def printed(gm: fx.GraphModule) -> str:
    """The printed graph, as golden files hold it."""
    return print_graph(gm, source=False)


def before_and_after(model: nn.Module, example: Any, result: PipelineResult) -> str:
    """Golden text of a pass: the captured graph, the resulting one, and why rules did not fire."""
    parts = [printed(trace(model.eval(), example)), printed(result.gm)]
    parts += ["".join(f"note: {note}\n" for note in result.notes)] if result.notes else []
    refused = [f"refused {one.rule} at {one.site}: {one.reason}\n" for one in result.refusals]
    return "\n".join(parts + (["".join(refused)] if refused else []))


def anonymous(gm: fx.GraphModule) -> str:
    """The printed graph with numbered nodes and without sites: what two spellings have in common."""
    text = re.sub(r"  @\S+", "", printed(gm))
    text = re.sub(r" +", " ", text)
    for number, node in enumerate(gm.graph.nodes):
        text = re.sub(rf"%{re.escape(node.name)}\b", f"%{number}", text)
    return text

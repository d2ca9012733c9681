"""Copies of a graph share leaf modules and tensors; edits of one are never seen in another."""

from __future__ import annotations

import torch
from torch import nn

from qgraph import trace
from qgraph.ir.copying import copy_graph, drop_unused_modules
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import graph_info, info
from tests.support.models import Forward, Residual, image

X = image()


def test_a_copy_shares_tensors_and_keeps_records() -> None:
    gm = trace(Residual().eval(), X)
    copied = copy_graph(gm)
    assert copied.stem is gm.stem
    assert [info(node) for node in copied.graph.nodes] == [info(node) for node in gm.graph.nodes]
    assert graph_info(copied) == graph_info(gm)
    assert copied.graph is not gm.graph
    assert torch.equal(copied(X), gm(X))


def test_training_flags_are_kept() -> None:
    model = Forward(lambda m, x: m.inner.drop(m.inner.fc(x)), inner=nn.Module())
    model.inner.fc, model.inner.drop = nn.Linear(4, 4), nn.Identity()
    model.eval()
    gm = trace(model, torch.randn(2, 4))
    gm.train()
    gm.inner.fc.eval()
    assert [module.training for module in copy_graph(gm).modules()] == [module.training for module in gm.modules()]


def test_replacing_a_module_in_a_copy_leaves_the_original() -> None:
    gm = trace(Residual().eval(), X)
    before = gm(X)
    copied = copy_graph(gm)
    Editor(copied, "test").set_module("stem", nn.Conv2d(3, 4, 3, padding=1))
    drop_unused_modules(copied)
    assert torch.equal(gm(X), before)
    assert copied.stem is not gm.stem


def test_nothing_is_put_into_or_dropped_from_a_shared_leaf() -> None:
    """A leaf module belongs to every graph that calls it: what a pass adds at its path goes beside it."""
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.ReLU()).eval()
    gm = trace(model, X)
    copied = copy_graph(gm)
    edit = Editor(copied, "test")
    path = edit.free_path("0.0.affine")
    assert path == "0.0_affine"
    assert edit.add_tensor("0.0.scale", torch.ones(3)) == "0.0_scale"
    edit.set_module("0.0.inside", nn.Identity())
    drop_unused_modules(copied)
    leaf = gm.get_submodule("0.0")
    assert list(leaf._modules) == []
    assert sorted(leaf._buffers) == ["num_batches_tracked", "running_mean", "running_var"]
    assert torch.equal(gm(X), model(X))


def test_dropping_a_module_whose_child_is_still_called() -> None:
    gm = trace(Residual().eval(), X, leaf_modules=[])
    kept = {name for name, _ in gm.named_modules()}
    drop_unused_modules(gm)
    assert {name for name, _ in gm.named_modules()} == kept

"""Results whose scale the device keeps or fixes: one fake quantization for two values, scales nothing moves."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from qgraph.analysis import compare_sites
from qgraph.ir.node_info import info, module_of
from qgraph.numerics import qint8
from qgraph.quantization import FakeQuantState, calibrate, convert, freeze, prepare, set_fake_quantize
from qgraph.quantization.sites import quantizers
from qgraph.targets import Target, get_target
from tests.support.models import Forward, image

FIXED = (1 / 128, -128)


def target(**decides: dict[str, Any]) -> Target:
    bpu = get_target("bpu")
    return replace(bpu, ops={**bpu.ops, **{op: replace(bpu.ops[op], **how) for op, how in decides.items()}})


def model() -> nn.Module:
    return Forward(
        lambda self, x: self.pool(self.conv(x)).sigmoid().flatten(1), conv=nn.Conv2d(3, 4, 1), pool=nn.AvgPool2d(2)
    ).eval()


def calibrated(state: FakeQuantState = FakeQuantState.VALIDATION) -> fx.GraphModule:
    decided = target(avg_pool2d={"same_scale": True}, sigmoid={"fixed_result": {"int8": FIXED}})
    prepared = prepare(model(), image(), target=decided)
    calibrate(prepared, [image(), image()], progress=False)
    set_fake_quantize(prepared, state)
    return prepared


def node_named(gm: fx.GraphModule, site: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if info(node).site == site)


@pytest.fixture(scope="module")
def prepared() -> fx.GraphModule:
    return calibrated()


def test_both_values_pass_one_fake_quantization(prepared: fx.GraphModule) -> None:
    conv, pool = (next(iter(node_named(prepared, site).users)) for site in ("conv", "pool"))
    assert module_of(conv) is module_of(pool)
    assert len({module.site for module in quantizers(prepared)}) == len(list(quantizers(prepared)))
    assert "pool" not in {module.site for module in quantizers(prepared)}


def test_both_values_are_observed() -> None:
    prepared = calibrated()
    module: Any = module_of(next(iter(node_named(prepared, "conv").users)))
    module.state = FakeQuantState.QAT
    before = module.qparams().scale.clone()
    module(torch.full((1,), 1000.0))
    assert module.qparams().scale > before


def test_frozen_parameters_are_the_operands(prepared: fx.GraphModule) -> None:
    frozen = freeze(prepared)
    conv, pool = (info(node_named(frozen, site)).qparams for site in ("conv", "pool"))
    assert conv is not None
    assert pool is not None
    assert conv.same_as(pool)


def test_a_fixed_result_never_moves() -> None:
    prepared = calibrated(FakeQuantState.QAT)
    with torch.no_grad():
        prepared(image() * 100)
    for gm in (prepared, copy.deepcopy(prepared), prepared.to(torch.device("cpu"))):
        found = info(node_named(freeze(gm), "_generated_sigmoid_0")).qparams
        assert found is not None
        assert (found.scale.item(), found.zero, found.qtype) == (*FIXED, qint8)


def test_fixed_results_are_saved_and_loaded() -> None:
    first, second = calibrated(), calibrated()
    second.load_state_dict(first.state_dict())
    x = image()
    assert torch.equal(first(x), second(x))


def test_integers_agree(prepared: fx.GraphModule) -> None:
    found = compare_sites(prepared, convert(prepared), (image(),))
    assert {entry.site for entry in found} >= {"pool", "_generated_sigmoid_0"}
    assert all(entry.differing == entry.near_tie for entry in found)

"""Pictures of two graphs: what is new, removed, changed and unchanged."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.ir.node_info import info, set_info
from qgraph.viz import diff_to_dot
from qgraph.viz.style import Role
from tests.support.models import Residual, image
from tests.viz.pictures import MODELS, STAGES, Picture, read, stages


def compare(before: fx.GraphModule, after: fx.GraphModule) -> Picture:
    return read(diff_to_dot(before, after))


def counts(drawn: Picture) -> tuple[int, ...]:
    """New, removed, changed, unchanged, as the legend has them."""
    return tuple(int(number) for number in re.findall(r">(\d+) \w+<", drawn.legend))


def test_fusion() -> None:
    drawn = compare(stages("residual")["captured"], stages("residual")["fused"])
    assert drawn.heading == "Residual: captured to fused"
    assert drawn.with_role(Role.REMOVED) == {
        f"before%{name}" for name in ("bn1", "bn2", "relu", "relu_1", "generated_add_0")
    }
    assert drawn.with_role(Role.ADDED) == set()
    assert drawn.with_role(Role.CHANGED) == {
        f"{side}%{name}" for side in ("before", "after") for name in ("conv1", "conv2")
    }
    assert {"before%stem", "after%stem", "before%fc", "after%output"} <= drawn.with_role(Role.UNCHANGED)
    assert counts(drawn) == (0, 5, 2, 6)
    assert ("after%conv1", "after%conv2") in drawn.edges
    assert set(drawn.clusters) == {"before: captured", "after: fused"}


def test_preparing_adds_stubs_and_formats() -> None:
    drawn = compare(stages("residual")["fused"], stages("residual")["prepared"])
    assert drawn.with_role(Role.ADDED) == {"after%x_quant", "after%fc_dequant"}
    assert "after%conv1" in drawn.with_role(Role.CHANGED)
    assert "after%x" in drawn.with_role(Role.UNCHANGED)


@pytest.mark.parametrize("model", ["residual", "attention"])
def test_lowering_changes_no_operator(model: str) -> None:
    drawn = compare(stages(model)["prepared"], stages(model)["integer"])
    assert counts(drawn)[:3] == (0, 0, 0)


def test_lowering_adds_the_rescaling_of_a_cat() -> None:
    drawn = compare(stages("shared")["prepared"], stages("shared")["integer"])
    (added,) = drawn.with_role(Role.ADDED)
    assert drawn.boxes[added] == ["cat: requantize", "_generated_cat_0.input1"]
    assert drawn.with_role(Role.CHANGED) == {"before%generated_cat_0", "after%generated_cat_0"}


@pytest.mark.parametrize(("model", "stage"), [(model, stage) for model in MODELS for stage in STAGES])
def test_identical_graphs_say_so(model: str, stage: str) -> None:
    gm = stages(model)[stage]
    for other in (gm, copy.deepcopy(gm)):
        drawn = compare(gm, other)
        assert drawn.heading.split("\n")[1:] == ["no differences"]
        assert drawn.with_role(Role.UNCHANGED) == drawn.boxes.keys()
        assert counts(drawn) == (0, 0, 0, len(drawn.boxes) // 2)


def test_a_difference_is_not_called_none() -> None:
    drawn = compare(stages("residual")["captured"], stages("residual")["fused"])
    assert "no differences" not in drawn.heading


def changed_sites(before: fx.GraphModule, after: fx.GraphModule) -> set[str]:
    drawn = compare(before, after)
    assert counts(drawn)[:2] == (0, 0)
    return {name.removeprefix("after%") for name in drawn.with_role(Role.CHANGED) if name.startswith("after%")}


def test_another_option_is_a_change() -> None:
    model, other = Residual().eval(), Residual().eval()
    other.load_state_dict(model.state_dict())
    other.conv1.dilation, other.conv1.padding = (2, 2), (2, 2)
    assert changed_sites(qgraph.trace(model, image()), qgraph.trace(other, image())) == {"conv1"}


def test_another_weight_is_a_change() -> None:
    before = stages("residual")["captured"]
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_submodule("conv2").weight[0, 0, 0, 0] += 1
    assert changed_sites(before, after) == {"conv2"}
    assert changed_sites(after, before) == {"conv2"}


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor([factor, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumprod(x * self.factor, dim=1)


def test_another_constant_is_a_change() -> None:
    example = torch.randn(2, 2)
    before, after = (qgraph.trace(Scaled(factor).eval(), example) for factor in (2.0, 3.0))
    assert changed_sites(before, after) == {"factor"}


class Cumulated(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumprod(x, self.dim)


def test_another_argument_of_an_unknown_operator_is_a_change() -> None:
    example = torch.randn(2, 3, 4)
    before, after = (qgraph.trace(Cumulated(dim).eval(), example) for dim in (1, 2))
    assert changed_sites(before, after) == {"generated_cumprod_0"}


def test_another_format_is_a_change() -> None:
    model, example = Residual().eval(), image()
    wide = qgraph.ModuleNameQconfigSetter({"conv1": qgraph.get_qconfig(out_dtype="int16")})
    before, after = qgraph.prepare(model, example), qgraph.prepare(model, example, qconfig_setter=wide)
    assert changed_sites(before, after) == {"conv1"}


def test_another_scale_is_a_change() -> None:
    model = Residual().eval()
    before, after = (qgraph.prepare(model, image()) for _ in range(2))
    data = image()
    qgraph.calibrate(before, [data], progress=False)
    qgraph.calibrate(after, [data * 1.00001], progress=False)
    assert "x_quant" in changed_sites(before, after)
    assert changed_sites(qgraph.convert(before), qgraph.convert(after)) >= {"x_quant", "conv1"}
    assert "no differences" not in compare(before, after).heading


def test_another_operand_order_is_a_change() -> None:
    before = qgraph.trace(Ordered(True).eval(), (torch.randn(2, 3), torch.randn(2, 3)))
    after = qgraph.trace(Ordered(False).eval(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert changed_sites(before, after) == {"generated_sub_0"}


class Ordered(nn.Module):
    def __init__(self, forwards: bool) -> None:
        super().__init__()
        self.forwards = forwards

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x - y if self.forwards else y - x


def test_a_float_reason_is_a_change() -> None:
    before = stages("shared")["prepared"]
    after = copy.deepcopy(before)
    (island,) = [node for node in after.graph.nodes if node.name == "generated_cumprod_0"]
    set_info(island, replace(info(island), float_reason="the user said so"))
    assert changed_sites(before, after) == {"generated_cumprod_0"}


def test_weights_that_are_not_a_number_are_equal_to_themselves() -> None:
    gm = copy.deepcopy(stages("residual")["captured"])
    with torch.no_grad():
        gm.get_submodule("conv1").weight[0, 0, 0, 0] = float("nan")
    assert "no differences" in compare(gm, gm).heading


def test_two_models_that_share_nothing() -> None:
    drawn = compare(stages("residual")["captured"], stages("attention")["captured"])
    assert drawn.heading == "Residual (captured) to Attention (captured)"
    assert drawn.with_role(Role.UNCHANGED) == set()
    assert {"before%conv1"} <= drawn.with_role(Role.REMOVED)
    assert {"after%qkv"} <= drawn.with_role(Role.ADDED)
    assert {"before%x", "after%x"} <= drawn.with_role(Role.CHANGED)


@pytest.mark.parametrize("kind", ["dot", "svg", "png"])
def test_files(kind: str, tmp_path: Path) -> None:
    before, after = stages("residual")["captured"], stages("residual")["fused"]
    path = qgraph.draw_diff(before, after, tmp_path / f"d.{kind}", title="what fusion did")
    data = path.read_bytes()
    assert len(data) > 1000
    if kind == "svg":
        ElementTree.fromstring(data)
        assert b"what fusion did" in data

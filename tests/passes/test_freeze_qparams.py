"""freeze-qparams: every value's scale on its node; nothing is computed differently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from qgraph.capture import trace
from qgraph.errors import InternalError, StateError, UserError
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import SitePlan, graph_info, info
from qgraph.ir.op_table import DEQUANT_STUB, FAKE_QUANT
from qgraph.ir.stage import Stage
from qgraph.numerics import QParams, qint8, qint32
from qgraph.pipeline import CheckLevel, Pipeline
from qgraph.quantization import FakeQuantState, calibrate, prepare, set_fake_quantize
from tests.passes.models import check_values, printed
from tests.support.models import Attention, Forward, Residual, image
from tests.support.passes import assert_idempotent


def calibrated(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    gm = prepare(model.eval(), example)
    calibrate(gm, [example, example * 1.5], progress=False)
    return gm


def frozen(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    return Pipeline.parse("freeze-qparams").run(calibrated(model, example), checks=CheckLevel.CLAIMS).gm


def scales(gm: fx.GraphModule) -> dict[str, QParams]:
    return {info(node).site: info(node).qparams for node in gm.graph.nodes if info(node).qparams is not None}


def weight_scales(gm: fx.GraphModule) -> dict[str, QParams]:
    return {info(node).site: info(node).weight_qparams for node in gm.graph.nodes if info(node).weight_qparams}


def test_golden(golden: Callable[[str], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    golden(printed(frozen(Residual(), torch.randn(2, 3, 8, 8, generator=generator))))


@pytest.mark.parametrize(
    ("model", "example"), [(Residual(), image()), (Attention(), torch.randn(2, 5, 8))], ids=["residual", "attention"]
)
def test_exact_and_idempotent(model: nn.Module, example: torch.Tensor) -> None:
    before = calibrated(model, example)
    after = Pipeline.parse("freeze-qparams").run(before, checks=CheckLevel.CLAIMS)
    assert not after.changed
    check_values(before, after.gm, example)
    assert graph_info(after.gm).stage is Stage.PREPARED
    assert scales(before) == {}, "the given graph has no scales"
    assert_idempotent(after.gm, "freeze-qparams")
    assert printed(Pipeline.parse("freeze-qparams").run(after.gm).gm) == printed(after.gm)


def test_rounded_sites_have_the_scale_of_their_fake_quantization() -> None:
    gm = frozen(Residual(), image())
    for node in gm.graph.nodes:
        if info(node).op is FAKE_QUANT:
            quantizer = gm.get_submodule(str(node.target))
            assert torch.equal(info(node).qparams.scale, quantizer.scale)
            assert info(node.all_input_nodes[0]).qparams is info(node).qparams
    for site, qparams in weight_scales(gm).items():
        assert torch.equal(qparams.scale, gm.get_submodule(site).weight_fake_quant.scale)
        assert qparams.axis == 0


def test_what_moves_codes_has_the_scale_of_its_operand() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.split(m.conv(x).sigmoid(), 2, dim=1)
        return torch.flatten(a, 1).flip(1) + b.permute(0, 2, 3, 1).reshape(2, -1)

    gm = frozen(Forward(forward, conv=nn.Conv2d(4, 4, 1)), torch.randn(2, 4, 3, 3))
    found = scales(gm)
    moved = ["_generated_split_0", "_generated_flatten_0", "_generated_flip_0", "_generated_permute_0"]
    for site in [*moved, "_generated_reshape_0"]:
        assert found[site].same_as(found["_generated_sigmoid_0"]), site
    assert not found["_generated_add_0"].same_as(found["_generated_sigmoid_0"])


def test_reals_have_no_scale() -> None:
    model = Forward(lambda m, x: m.fc(torch.cummax(x, -1).values).exp(), fc=nn.Linear(4, 4))
    gm = frozen(model, torch.randn(2, 4))
    found = scales(gm)
    assert "_generated_cummax_0" not in found
    for node in gm.graph.nodes:
        if info(node).op is DEQUANT_STUB or info(node).float_reason or node.op in ("placeholder", "output"):
            assert info(node).qparams is None, node


# --- accumulators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(4, 6), (2, 4), 1),
        (nn.Linear(4, 6), (2, 3, 4), 2),
        (nn.Linear(4, 6), (4,), 0),
        (nn.Conv1d(4, 6, 3), (2, 4, 9), 1),
        (nn.Conv2d(4, 6, 3), (2, 4, 9, 9), 1),
        (nn.Conv2d(4, 6, 3), (4, 9, 9), 0),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 1),
    ],
    ids=["linear", "linear of three", "vector", "conv1d", "conv2d", "unbatched", "transposed groups"],
)
def test_the_step_of_an_accumulator_per_channel(layer: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    gm = frozen(nn.Sequential(layer), torch.randn(shape))
    found = scales(gm)
    weight = weight_scales(gm)["0"].scale
    if isinstance(layer, nn.ConvTranspose2d):
        weight = torch.cat([weight, weight])  # a group's channels share the scales of the weight's second dimension
    step = found["input.quant"].scale.double() * weight.double()
    assert found["0"].qtype == qint32
    assert found["0"].axis == axis
    assert torch.equal(found["0"].scale, step.float())
    assert found["0"].scale.shape == (6,)


def test_the_step_of_a_matrix_product() -> None:
    gm = frozen(Forward(lambda m, x: x.sigmoid() @ x.transpose(1, 2)), torch.randn(2, 3, 4))
    found = scales(gm)
    product = found["_generated_matmul_0"]
    assert product.axis is None
    first, second = found["_generated_sigmoid_0"].scale, found["inputs_0.quant"].scale
    assert product.scale == (first.double() * second.double()).float()


# --- order and wrong use -------------------------------------------------------------------------------------------


def test_a_site_without_data_is_named() -> None:
    with pytest.raises(
        StateError, match=r"site stem\.weight has no scale yet|site x\.quant has no scale yet"
    ) as caught:
        Pipeline.parse("freeze-qparams").run(prepare(Residual().eval(), image()))
    assert "qgraph.calibrate" in str(caught.value)


def test_needs_a_prepared_graph() -> None:
    with pytest.raises(UserError, match="freeze-qparams works on a prepared graph, but gets a captured one"):
        Pipeline.parse("freeze-qparams").run(trace(Residual().eval(), image()))


def test_the_scales_of_training_are_frozen_too() -> None:
    gm = prepare(Residual().eval(), image())
    set_fake_quantize(gm, FakeQuantState.QAT)
    gm(image())
    found = scales(Pipeline.parse("freeze-qparams").run(gm, checks=CheckLevel.STRUCTURE).gm)
    assert torch.equal(found["conv1"].scale, gm.quantizers.conv1.scale)


@pytest.mark.parametrize(
    ("site", "changes", "words"),
    [
        ("fc", {"weight_plan": None, "weight_qparams": None}, "a high-precision output has no accumulator"),
        ("_generated_adaptive_avg_pool2d_0", {"plan": SitePlan(qint32, "none", False, "test")}, "has no accumulator"),
        ("_generated_adaptive_avg_pool2d_0", {"weight_plan": SitePlan(qint8, "min_max", False, "t")}, "planned weight"),
        ("_generated_flatten_0", {"plan": SitePlan(qint8, "min_max", False, "t")}, "a rounded site has no fake"),
    ],
    ids=["no weight", "no product", "no module", "no fake quantization"],
)
def test_plans_that_the_graph_does_not_follow(site: str, changes: dict[str, object], words: str) -> None:
    """As a pass of somebody else may leave them."""
    gm = calibrated(Residual(), image())
    node = next(node for node in gm.graph.nodes if info(node).site == site)
    Editor(gm, "test").annotate(node, **changes)
    with pytest.raises(InternalError, match=words) as caught:
        Pipeline.parse("freeze-qparams").run(gm, checks=CheckLevel.NONE)
    assert site in str(caught.value)

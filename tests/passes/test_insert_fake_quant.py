"""insert-fake-quant: one site per rounded value and weight, nothing computed differently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from qgraph.capture import trace
from qgraph.errors import InternalError, PassError, UserError
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import SitePlan, graph_info, info, module_of
from qgraph.ir.op_table import FAKE_QUANT
from qgraph.ir.stage import Stage
from qgraph.numerics import float16, qint8, qint16
from qgraph.pipeline import CheckLevel, PassContext, Pipeline
from qgraph.quantization import (
    FakeQuantize,
    FakeQuantState,
    MinMaxObserver,
    ModuleNameQconfigSetter,
    MovingAverageMinMaxObserver,
    QConfig,
    get_qconfig,
)
from qgraph.quantization.config.resolve import as_setters
from qgraph.quantization.fake_quantize import BiasFakeQuantize, WeightFakeQuantize
from tests.passes.models import check_values, printed
from tests.support.models import Attention, Forward, Residual, image
from tests.support.passes import nodes_of

BEFORE = (
    "canonicalize,split-shared-modules,fuse-conv-bn-add-relu,decompose-composites,insert-quant-stubs,assign-dtypes,"
    "high-precision-output"
)


def planned(model: nn.Module, example: object, setter: object = None) -> fx.GraphModule:
    return Pipeline.parse(BEFORE).run(trace(model.eval(), example), PassContext(setters=as_setters(setter))).gm


def inserted(model: nn.Module, example: object, setter: object = None) -> fx.GraphModule:
    return Pipeline.parse("insert-fake-quant").run(planned(model, example, setter), checks=CheckLevel.CLAIMS).gm


def sites(gm: fx.GraphModule) -> dict[str, FakeQuantize]:
    return {module.site: module for module in gm.modules() if isinstance(module, FakeQuantize)}


def x() -> torch.Tensor:
    return torch.randn(2, 4)


def test_golden(golden: Callable[[str], None]) -> None:
    golden(printed(inserted(Residual(), image())))


@pytest.mark.parametrize(("model", "example"), [(Residual(), image()), (Attention(), torch.randn(2, 5, 8))])
def test_exact(model: nn.Module, example: torch.Tensor) -> None:
    """In state FLOAT, bit for bit what the graph before computes."""
    before = planned(model, example)
    after = Pipeline.parse("insert-fake-quant").run(before, checks=CheckLevel.CLAIMS).gm
    check_values(before, after, example)
    assert graph_info(after).stage is Stage.PREPARED


def test_one_fake_quant_behind_every_rounded_value() -> None:
    gm = inserted(Residual(), image())
    for node in gm.graph.nodes:
        plan = info(node).plan
        if plan is None or info(node).op is FAKE_QUANT:
            continue
        followers = [user for user in node.users if info(user).op is FAKE_QUANT]
        assert len(followers) == (0 if plan.observer == "none" else 1)
        assert not followers or list(node.users) == followers, "nobody reads the value unrounded"
    assert all(module.state is FakeQuantState.FLOAT for module in sites(gm).values())
    assert not any(module.training for module in gm.modules())


def test_every_reader_reads_the_rounded_value() -> None:
    gm = inserted(Forward(lambda m, x: [m.fc(x).relu().sigmoid() + y for y in (x, x * 2)], fc=nn.Linear(4, 4)), x())
    (node,) = (node for node in gm.graph.nodes if info(node).site == "inputs_0.quant")
    (rounded,) = node.users
    assert len(rounded.users) >= 3


def test_observers_and_formats_are_the_plans() -> None:
    setter = ModuleNameQconfigSetter(
        {
            "conv1": get_qconfig(observer="moving_average", out_dtype="int16"),
            "stem": QConfig(weight=qint16, weight_observer="moving_average"),
        }
    )
    found = sites(inserted(Residual(), image(), setter))
    assert isinstance(found["conv1"].observer, MovingAverageMinMaxObserver)
    assert found["conv1"].qtype == qint16
    assert isinstance(found["conv2"].observer, MinMaxObserver)
    assert found["stem.weight"].qtype == qint16
    assert isinstance(found["stem.weight"].observer, MovingAverageMinMaxObserver)
    assert found["conv1.weight"].qtype == qint8
    assert "fc" not in found, "its accumulator is not rounded"


def test_a_fixed_scale_has_no_observer() -> None:
    found = sites(inserted(Residual(), image(), ModuleNameQconfigSetter({"conv1": get_qconfig(fix_scale=0.25)})))
    assert found["conv1"].observer is None
    assert found["conv1"].scale == 0.25


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(4, 6), (2, 4), 0),
        (nn.Conv1d(4, 6, 3), (2, 4, 9), 0),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9), 0),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9), 1),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 9, 9), 1),
        (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_scales_run_along_the_output_channels(layer: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    gm = inserted(nn.Sequential(layer), torch.randn(shape))
    fused = gm.get_submodule("0")
    assert isinstance(fused.weight_fake_quant, WeightFakeQuantize)
    assert isinstance(fused.bias_fake_quant, BiasFakeQuantize)
    assert fused.weight_fake_quant.axis == axis
    assert (fused.weight_fake_quant.site, fused.bias_fake_quant.site) == ("0.weight", "0.bias")


def test_no_bias_no_site() -> None:
    assert inserted(nn.Sequential(nn.Linear(4, 4, bias=False)), x()).get_submodule("0").bias_fake_quant is None


def test_calls_of_a_shared_module_share_the_weights_site_and_not_the_bias() -> None:
    """The step of a bias depends on the scale of the call's input."""
    gm = inserted(Forward(lambda m, x: m.fc(m.fc(x).relu()), fc=nn.Linear(4, 4)), x())
    first, second = (module_of(node) for node in gm.graph.nodes if info(node).op.name == "linear")
    assert first.weight_fake_quant is second.weight_fake_quant
    assert first.bias_fake_quant is not second.bias_fake_quant
    assert (first.bias_fake_quant.site, second.bias_fake_quant.site) == ("fc.bias", "fc(1).bias")
    assert first.weight is second.weight


def tied(**setting: QConfig) -> tuple[WeightFakeQuantize, WeightFakeQuantize]:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    model = Forward(lambda m, x: m.b(m.a(x).sigmoid()).sigmoid(), a=a, b=b)
    gm = inserted(model, x(), ModuleNameQconfigSetter(setting))
    return gm.a.weight_fake_quant, gm.b.weight_fake_quant


def test_tied_weights_are_one_site_if_they_are_alike() -> None:
    first, second = tied()
    assert first is second
    first, second = tied(b=get_qconfig(weight_dtype="int16"))
    assert (first.qtype, second.qtype) == (qint8, qint16)
    assert (first.site, second.site) == ("a.weight", "b.weight")
    first, second = tied(b=QConfig(weight_observer="moving_average"))
    assert first is not second


def test_a_convolution_and_its_transpose_have_scales_along_different_dimensions() -> None:
    down, up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3)
    up.weight = down.weight
    gm = inserted(nn.Sequential(down, nn.Sigmoid(), up), torch.randn(2, 4, 6, 6))
    assert gm.get_submodule("0").weight is gm.get_submodule("2").weight
    assert [gm.get_submodule(path).weight_fake_quant.axis for path in "02"] == [0, 1]


# --- names, order, wrong plans -------------------------------------------------------------------------------------


def test_names_of_the_model_are_not_taken() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizers = nn.ModuleDict({"inputs_quant": nn.Linear(4, 4)})

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.quantizers["inputs_quant"](inputs).sigmoid()

    model = Model()
    gm = inserted(model, x())
    check_values(model, gm, x())
    paths = {str(node.target) for node in nodes_of(gm, FAKE_QUANT)}
    assert "quantizers.inputs_quant" not in paths
    assert len(paths) == 3


def test_runs_once() -> None:
    gm = inserted(Residual(), image())
    with pytest.raises(UserError, match="insert-fake-quant works on a fused graph, but gets a prepared one"):
        Pipeline.parse("insert-fake-quant").run(gm)


def test_needs_dtypes() -> None:
    fused = Pipeline.parse("canonicalize,fuse-conv-bn-add-relu").run(trace(Residual().eval(), image())).gm
    with pytest.raises(UserError, match="insert-fake-quant needs 'dtypes' first"):
        Pipeline.parse("insert-fake-quant").run(fused)


def test_the_graph_before_is_untouched() -> None:
    before = planned(Residual(), image())
    text, modules = printed(before), dict(before.named_modules())
    Pipeline.parse("insert-fake-quant").run(before)
    assert printed(before) == text
    assert dict(before.named_modules()) == modules


@pytest.mark.parametrize("which", ["plan", "weight_plan"])
def test_a_plan_that_is_no_integer(which: str) -> None:
    """As a pass of somebody else may write it."""
    gm = planned(Residual(), image())
    node = next(node for node in gm.graph.nodes if info(node).site == "conv1")
    Editor(gm, "test").annotate(node, **{which: SitePlan(float16, "min_max", False, "test")})
    with pytest.raises((InternalError, PassError), match="format float16") as caught:
        Pipeline.parse("insert-fake-quant").run(gm)
    assert "node conv1" in str(caught.value)
    assert "models.py:" in str(caught.value)

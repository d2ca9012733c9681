"""use-channels-last: the layout of convolution weights, weights that are shared, and what keeps its layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qgraph.capture import trace
from qgraph.errors import UserError
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op_table import CONV2D, IDENTITY
from qgraph.pipeline import CheckLevel, Pipeline, PipelineResult
from tests.passes.models import FUSE, before_and_after, check_all
from tests.support.models import Forward, Residual, image
from tests.support.passes import nodes_of, relative_error, run_passes

PASSES = f"{FUSE},use-channels-last"


def x() -> torch.Tensor:
    return torch.randn(2, 4, 6, 6)


def laid_out(model: nn.Module, example: torch.Tensor | None = None) -> PipelineResult:
    return run_passes(model, x() if example is None else example, PASSES)


def is_moved(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_golden(golden: Callable[[str], None]) -> None:
    result = laid_out(Residual(), image())
    layouts = [f"{name}: {list(p.shape)} strides {p.stride()}\n" for name, p in result.gm.named_parameters()]
    golden(before_and_after(Residual(), image(), result) + "\n" + "".join(layouts))


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(4, 4, 3, 2, 1)],
    ids=["conv", "groups", "transposed", "stride"],
)
def test_two_dimensional_convolutions(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    result = laid_out(model)
    weight = result.gm.get_submodule("0").weight
    assert is_moved(weight)
    assert torch.equal(weight, layer.weight)
    assert layer.weight.is_contiguous(), "the model's own weight is another tensor"
    check_all(model, result, x(), "use-channels-last", rtol=1e-5)


def test_whole_model_within_its_promise() -> None:
    model = Residual()
    result = laid_out(model, image())
    check_all(model, result, image(), "use-channels-last", rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 9)),
        (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
        (nn.Linear(4, 6), (2, 4)),
        (nn.Conv2d(4, 6, 1), (2, 4, 6, 6)),
        (nn.Conv2d(1, 6, 3), (2, 1, 6, 6)),
        (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 6, 6)),
    ],
    ids=["conv1d", "conv3d", "linear", "one by one", "one channel", "done already"],
)
def test_what_has_the_layout_already_or_no_such_layout(layer: nn.Module, shape: tuple[int, ...]) -> None:
    example = torch.randn(shape)
    fused = run_passes(nn.Sequential(layer), example, FUSE).gm
    result = Pipeline.parse("use-channels-last").run(fused, checks=CheckLevel.CLAIMS)
    assert not result.changed
    assert result.gm.get_submodule("0").weight is fused.get_submodule("0").weight


def test_frozen_weights_stay_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    model[0].weight.requires_grad_(False)
    weight = laid_out(model).gm.get_submodule("0").weight
    assert is_moved(weight)
    assert not weight.requires_grad
    assert isinstance(weight, nn.Parameter)


def test_the_graph_before_is_untouched() -> None:
    fused = run_passes(Residual(), image(), FUSE).gm
    before = {name: (parameter, parameter.stride()) for name, parameter in fused.named_parameters()}
    Pipeline.parse("use-channels-last").run(fused)
    for name, parameter in fused.named_parameters():
        assert parameter is before[name][0]
        assert parameter.stride() == before[name][1]


# --- weights with several readers ----------------------------------------------------------------------------------


def test_convolutions_that_share_a_weight_still_do() -> None:
    down, up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3)
    up.weight = down.weight
    model = nn.Sequential(down, nn.ReLU(), up)
    gm = laid_out(model).gm
    assert gm.get_submodule("0").weight is gm.get_submodule("2").weight
    assert is_moved(gm.get_submodule("0").weight)
    check_all(model, laid_out(model), x(), "use-channels-last", rtol=1e-5)


def test_a_shared_module_is_moved_once() -> None:
    model = Forward(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(4, 4, 3))
    result = run_passes(model, x(), f"canonicalize,split-shared-modules,{FUSE},use-channels-last")
    first, second = (module_of(node) for node in nodes_of(result.gm, CONV2D))
    assert first is not second
    assert first.weight is second.weight
    assert is_moved(first.weight)


def test_a_weight_that_is_also_read_keeps_its_layout() -> None:
    """Moved for the convolution alone, the two would be trained apart."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.alias = self.conv.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + (self.alias * x.mean()).sum()

    model = Model()
    gm = laid_out(model).gm
    assert gm.get_submodule("conv").weight is gm.alias
    assert not is_moved(gm.alias)


def test_a_weight_inside_an_opaque_module_keeps_its_layout() -> None:
    class Odd(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.sum()

    conv = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(conv, Odd(conv.weight)).eval()
    gm = Pipeline.parse(PASSES).run(trace(model, x(), leaf_modules=[Odd])).gm
    assert gm.get_submodule("0").weight is gm.get_submodule("1").weight


# --- order ---------------------------------------------------------------------------------------------------------


def test_needs_a_fused_graph() -> None:
    with pytest.raises(UserError, match="use-channels-last works on a fused graph, but gets a captured one"):
        Pipeline.parse("use-channels-last").run(trace(Residual().eval(), image()))


def test_copies_into_another_layout_stay_until_here() -> None:
    """Behind `contiguous`, a convolution adds in another order: removing it is no longer bit exact."""

    def forward(m, x):
        return m.conv(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))

    model, example = Forward(forward, conv=nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8)
    kept = run_passes(model, example, "canonicalize,fuse-conv-bn-add-relu").gm
    assert [info(node).site for node in nodes_of(kept, IDENTITY)] == ["_generated_identity_0"]
    assert torch.equal(kept(example), model(example))
    gone = run_passes(model, example, "canonicalize,fuse-conv-bn-add-relu,use-channels-last").gm
    assert not nodes_of(gone, IDENTITY)
    assert relative_error(model(example), gone(example)) < 1e-5


def test_copies_into_the_same_layout_go_with_other_identities() -> None:
    model = Forward(lambda m, x: m.conv(x.contiguous().clone().detach()), conv=nn.Conv2d(4, 4, 3))
    assert not nodes_of(run_passes(model, torch.randn(2, 4, 8, 8), "canonicalize").gm, IDENTITY)

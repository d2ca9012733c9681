"""convert: integers of a prepared graph, which stays as it is; pipelines, strictness, wrong use."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from qgraph.analysis import compare_sites
from qgraph.capture import trace
from qgraph.errors import QuantizationError, StateError, UserError
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op_table import DEQUANT_STUB, FAKE_QUANT, QUANT_STUB
from qgraph.ir.stage import Stage
from qgraph.ir.text import print_graph
from qgraph.numerics import qint32
from qgraph.pipeline import Pipeline
from qgraph.quantization import (
    FakeQuantState,
    ModuleNameQconfigSetter,
    calibrate,
    convert,
    convert_pipeline,
    get_qconfig,
    prepare,
    set_fake_quantize,
)
from qgraph.quantization.sites import quantizers
from qgraph.simulator import Simulator
from tests.support.models import Attention, Forward, Residual, image


def calibrated(model: nn.Module | None = None, x: torch.Tensor | None = None, setter: object = None) -> fx.GraphModule:
    model, x = model or Residual(), image() if x is None else x
    prepared = prepare(model.eval(), x, setter)
    calibrate(prepared, [x, torch.randn_like(x)], progress=False)
    return prepared


def run(gm: fx.GraphModule, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return gm(x)


# --- the result ----------------------------------------------------------------------------------------------------


def test_an_integer_graph() -> None:
    prepared, x = calibrated(), image(5)
    integer = convert(prepared)
    assert graph_info(integer).stage is Stage.INTEGER
    assert not list(integer.parameters())
    assert not any(info(node).op is FAKE_QUANT for node in integer.graph.nodes)
    result = integer(x)
    assert not result.requires_grad
    assert torch.equal(result, Simulator(integer)(x))
    assert (result - run(prepared, x)).abs().max() < 0.05 * result.abs().max()


def test_the_prepared_graph_stays_as_it_is() -> None:
    prepared, x = calibrated(), image()
    set_fake_quantize(prepared, FakeQuantState.QAT)
    prepared.train()
    text, record = print_graph(prepared), graph_info(prepared)
    state = {name: (id(value), value.clone()) for name, value in prepared.state_dict(keep_vars=True).items()}
    convert(prepared)
    assert print_graph(prepared) == text
    assert graph_info(prepared) == record
    assert prepared.training
    assert {module.state for module in quantizers(prepared)} == {FakeQuantState.QAT}
    for name, value in prepared.state_dict(keep_vars=True).items():
        assert id(value) == state[name][0], name
        assert torch.equal(value, state[name][1]), name
    run(prepared, x)


def test_the_integer_graph_stays_as_it_is() -> None:
    prepared, x = calibrated(), image()
    integer = convert(prepared)
    expected = integer(x)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1.0)
    calibrate(prepared, [x * 100], progress=False)
    assert torch.equal(integer(x), expected)


@pytest.mark.parametrize("state", list(FakeQuantState), ids=str)
def test_from_every_state_alike(state: FakeQuantState) -> None:
    prepared, x = calibrated(), image()
    expected = convert(prepared)(x)
    set_fake_quantize(prepared, state)
    assert torch.equal(convert(prepared)(x), expected)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    set_fake_quantize(prepared, state, ["conv1", "fc.weight"])
    assert torch.equal(convert(prepared)(x), expected)


def test_converting_twice_gives_the_same() -> None:
    prepared, x = calibrated(), image()
    first, second = convert(prepared), convert(prepared)
    assert print_graph(first) == print_graph(second)
    assert torch.equal(first(x), second(x))
    assert not {id(buffer) for buffer in first.buffers()} & {id(buffer) for buffer in second.buffers()}


def test_training_on_one_batch_is_calibration_enough() -> None:
    prepared = prepare(Residual().eval(), image())
    set_fake_quantize(prepared, FakeQuantState.QAT)
    prepared(image())
    convert(prepared)(image())


# --- weights that several modules share ----------------------------------------------------------------------------


def agree(prepared: fx.GraphModule, x: torch.Tensor) -> None:
    for site in compare_sites(prepared, convert(prepared), (x,)):
        assert site.differing <= (site.elements if site.format == "int32" else 1), site
        assert site.largest <= (2 if site.format == "int32" else 1), site


def test_a_weight_shared_by_a_convolution_and_its_transpose() -> None:
    """Their output channels are different dimensions of the weight: two sites."""
    down, up = nn.Conv2d(3, 6, 3, padding=1), nn.ConvTranspose2d(6, 3, 3, padding=1)
    up.weight = down.weight
    x = torch.randn(2, 3, 6, 6)
    prepared = calibrated(nn.Sequential(down, nn.ReLU(), up, nn.ReLU(), nn.Sigmoid()), x)
    first, second = prepared.get_submodule("0"), prepared.get_submodule("2")
    assert first.weight is second.weight
    assert first.weight_fake_quant.scale.shape == (6,)
    assert second.weight_fake_quant.scale.shape == (3,)
    agree(prepared, x)


def test_a_weight_shared_in_two_formats() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    x = torch.randn(2, 4)
    setter = ModuleNameQconfigSetter({"2": get_qconfig(weight_dtype="int16")})
    prepared = calibrated(nn.Sequential(a, nn.Sigmoid(), b, nn.Sigmoid()), x, setter)
    integer = convert(prepared)
    weights = {node.name: integer.get_buffer(str(node.args[1].target)).dtype for node in products(integer)}
    assert weights == {"n0": torch.int8, "n2": torch.int16}
    agree(prepared, x)


def products(integer: fx.GraphModule) -> list[fx.Node]:
    return [node for node in integer.graph.nodes if integer_name(node.target) in ("conv", "linear")]


# --- samples without a batch ---------------------------------------------------------------------------------------

UNBATCHED = {
    "conv1d": (nn.Conv1d(4, 6, 3), (4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (4, 5, 5)),
    "linear": (nn.Linear(5, 3), (5,)),
}


@pytest.mark.parametrize("high_precision", [False, True])
@pytest.mark.parametrize("name", UNBATCHED)
def test_a_sample_without_a_batch(name: str, high_precision: bool) -> None:
    layer, shape = UNBATCHED[name]
    x = torch.randn(shape)
    model = nn.Sequential(layer) if high_precision else nn.Sequential(layer, nn.ReLU(), nn.Sigmoid())
    prepared = calibrated(model, x)
    integer = convert(prepared)
    assert (info(products(integer)[0]).qparams.qtype == qint32) is high_precision
    assert integer(x).shape == run(prepared, x).shape
    assert torch.equal(integer(x), Simulator(integer)(x))
    assert (integer(x) - run(prepared, x)).abs().max() <= (1e-5 if high_precision else 0.01)
    agree(prepared, x)


# --- pipelines and strictness --------------------------------------------------------------------------------------


def with_islands() -> fx.GraphModule:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = torch.cummax(m.a(x), -1).values
        return torch.cumprod(m.b(y), 1).relu()

    return calibrated(Forward(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4))


def test_islands_are_listed_and_refused_by_strict() -> None:
    prepared = with_islands()
    integer = convert(prepared)
    notes = [note for note in graph_info(integer).notes if note.startswith("float:")]
    assert len(notes) == 2
    text = print_graph(prepared)
    with pytest.raises(QuantizationError, match=r"2 operator\(s\) stay in float") as caught:
        convert(prepared, strict=True)
    for name in ("_generated_cummax_0", "_generated_cumprod_0", "torch.cummax", "test_convert.py:"):
        assert name in str(caught.value)
    assert print_graph(prepared) == text
    convert(calibrated(), strict=True)


def test_a_pipeline_of_ones_own() -> None:
    prepared, x = calibrated(), image()
    pipeline = convert_pipeline().remove("clean-up-integer")
    integer = convert(prepared, pipeline=pipeline)
    assert graph_info(integer).history[-2:] == ("freeze-qparams", "lower-to-integer")
    assert torch.equal(integer(x), convert(prepared)(x))


def test_a_pipeline_that_ends_too_early() -> None:
    with pytest.raises(UserError, match="in stage prepared, not integer"):
        convert(calibrated(), pipeline=Pipeline.parse("freeze-qparams"))


def test_a_pipeline_out_of_order() -> None:
    with pytest.raises(UserError, match="'frozen' first"):
        convert(calibrated(), pipeline=Pipeline.parse("lower-to-integer,freeze-qparams"))


def test_strict_with_a_pipeline() -> None:
    with pytest.raises(UserError, match="strict was given together with a pipeline"):
        convert(calibrated(), strict=True, pipeline=convert_pipeline())
    assert str(convert_pipeline(strict=True)) == "freeze-qparams,lower-to-integer{strict=true},clean-up-integer"


@pytest.mark.parametrize("wrong", ["freeze-qparams", convert_pipeline], ids=["text", "function"])
def test_what_is_no_pipeline(wrong: object) -> None:
    with pytest.raises(UserError, match=r"Pipeline\.parse"):
        convert(calibrated(), pipeline=wrong)  # type: ignore[arg-type]


# --- wrong use -----------------------------------------------------------------------------------------------------


def test_before_calibrate() -> None:
    prepared = prepare(Residual().eval(), image())
    with pytest.raises(StateError, match=r"5 site\(s\) have not been calibrated") as caught:
        convert(prepared)
    assert "run qgraph.calibrate(model, loader)" in str(caught.value)
    assert {module.state for module in quantizers(prepared)} == {FakeQuantState.FLOAT}


def test_an_integer_graph_again() -> None:
    with pytest.raises(UserError, match="convert needs a prepared graph, this one is integer") as caught:
        convert(convert(calibrated()))
    assert "use what qgraph.prepare returned" in str(caught.value)


def test_a_float_model() -> None:
    with pytest.raises(UserError, match="convert needs a prepared model, got a Residual"):
        convert(Residual())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this one is captured") as caught:
        convert(trace(Residual().eval(), image()))
    assert "qgraph.prepare" in str(caught.value)


@pytest.mark.parametrize("name", ["fc", "conv1"])
def test_weights_that_broke_in_training(name: str) -> None:
    prepared = calibrated()
    with torch.no_grad():
        prepared.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=rf"site {name}\.weight"):
        convert(prepared)


def test_a_constant_far_beyond_the_scale() -> None:
    model = Forward(lambda m, x: (m.f(x) + 1e30).relu(), f=nn.Linear(4, 4))
    setter = ModuleNameQconfigSetter({"_generated_add_0": get_qconfig(fix_scale=1e-6)})
    prepared = calibrated(model, torch.randn(2, 4), setter)
    text = print_graph(prepared)
    with pytest.raises(QuantizationError, match="an added constant is too large") as caught:
        convert(prepared)
    assert "_generated_add_0" in str(caught.value)
    assert "test_convert.py:" in str(caught.value)
    assert print_graph(prepared) == text


def test_stubs_are_gone() -> None:
    integer = convert(calibrated(Attention(), torch.randn(2, 5, 8)))
    for node in integer.graph.nodes:
        if info(node).op in (QUANT_STUB, DEQUANT_STUB):
            assert integer_name(node.target) in ("quantize", "dequantize", "requantize")

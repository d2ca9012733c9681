"""States of a prepared graph: every move, for all sites and for some, and what each state does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx

from qgraph.errors import QuantizationError, StateError, UserError
from qgraph.quantization import FakeQuantState, calibrate, convert, prepare, set_fake_quantize
from qgraph.quantization.sites import quantizers
from tests.support.models import Residual, image

FLOAT, CALIBRATION, QAT, VALIDATION = FakeQuantState
SITES = {
    "x.quant",
    "stem",
    "stem.weight",
    "stem.bias",
    "conv1",
    "conv1.weight",
    "conv1.bias",
    "conv2",
    "conv2.weight",
    "conv2.bias",
    "_generated_adaptive_avg_pool2d_0",
    "fc.weight",
    "fc.bias",
}


def prepared(*, calibrated: bool) -> fx.GraphModule:
    gm = prepare(Residual().eval(), image())
    if calibrated:
        calibrate(gm, [image(4) for _ in range(2)], progress=False)
    return gm


def states(gm: fx.GraphModule) -> dict[str, FakeQuantState]:
    return {module.site: module.state for module in quantizers(gm)}


def run(gm: fx.GraphModule) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return gm(torch.randn(4, 3, 8, 8, generator=generator))


# --- all sites -----------------------------------------------------------------------------------------------------


def test_a_prepared_graph_is_in_float_a_calibrated_one_in_validation() -> None:
    assert states(prepared(calibrated=False)) == dict.fromkeys(SITES, FLOAT)
    assert states(prepared(calibrated=True)) == dict.fromkeys(SITES, VALIDATION)


@pytest.mark.parametrize(("start", "end"), list(itertools.product(FakeQuantState, repeat=2)), ids=str)
def test_every_move_of_a_calibrated_graph(start: FakeQuantState, end: FakeQuantState) -> None:
    gm = prepared(calibrated=True)
    for state in (start, end):
        set_fake_quantize(gm, state)
        assert states(gm) == dict.fromkeys(SITES, state)
        run(gm)


@pytest.mark.parametrize("start", [FLOAT, CALIBRATION, QAT], ids=str)
def test_validation_needs_data(start: FakeQuantState) -> None:
    gm = prepared(calibrated=False)
    set_fake_quantize(gm, start)
    with pytest.raises(StateError, match=r"5 site\(s\) have not been calibrated") as caught:
        set_fake_quantize(gm, VALIDATION)
    assert "x.quant, stem, conv1, conv2" in str(caught.value)
    assert "qgraph.calibrate" in str(caught.value)
    assert states(gm) == dict.fromkeys(SITES, start), "a refused move moves nothing"


@pytest.mark.parametrize("state", [CALIBRATION, QAT], ids=str)
def test_one_batch_is_data_enough(state: FakeQuantState) -> None:
    gm = prepared(calibrated=False)
    set_fake_quantize(gm, state)
    run(gm)
    set_fake_quantize(gm, VALIDATION)
    run(gm)


def test_long_lists_are_shortened() -> None:
    gm = prepare(torch.nn.Sequential(*[torch.nn.ReLU6() for _ in range(9)]).eval(), torch.randn(2, 3))
    with pytest.raises(StateError, match="and 5 more"):
        set_fake_quantize(gm, VALIDATION)


def test_what_each_state_computes() -> None:
    gm = prepared(calibrated=True)
    rounded = run(gm)
    set_fake_quantize(gm, FLOAT)
    exact = run(gm)
    assert not torch.equal(exact, rounded)
    set_fake_quantize(gm, CALIBRATION)
    assert torch.equal(run(gm), exact)
    set_fake_quantize(gm, VALIDATION)
    set_fake_quantize(gm, QAT)
    assert not torch.equal(run(gm), exact)


def test_float_and_back_is_the_same_validation() -> None:
    gm = prepared(calibrated=True)
    before = run(gm)
    set_fake_quantize(gm, FLOAT)
    set_fake_quantize(gm, VALIDATION)
    assert torch.equal(run(gm), before)


def test_validation_rounds_the_weights_of_now() -> None:
    gm = prepared(calibrated=True)
    with torch.no_grad():
        gm.conv1.weight.mul_(3.0)
    set_fake_quantize(gm, VALIDATION)
    reach = gm.conv1.weight.detach().abs().amax((1, 2, 3))
    assert torch.equal(gm.conv1.weight_fake_quant.scale, reach / 128)


def test_values_that_are_no_numbers_are_refused_on_the_way_to_validation() -> None:
    gm = prepared(calibrated=False)
    set_fake_quantize(gm, CALIBRATION)
    gm(image() * float("inf"))
    with pytest.raises(QuantizationError, match=r"site x\.quant"):
        set_fake_quantize(gm, VALIDATION)
    assert states(gm) == dict.fromkeys(SITES, CALIBRATION)


# --- some sites ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", sorted(SITES))
@pytest.mark.parametrize("state", list(FakeQuantState), ids=str)
def test_one_site_moves_alone(site: str, state: FakeQuantState) -> None:
    gm = prepared(calibrated=True)
    set_fake_quantize(gm, FLOAT)
    set_fake_quantize(gm, state, sites=[site])
    assert states(gm) == {**dict.fromkeys(SITES, FLOAT), site: state}
    run(gm)


def test_only_the_named_site_rounds() -> None:
    gm = prepared(calibrated=True)
    set_fake_quantize(gm, FLOAT)
    exact = run(gm)
    set_fake_quantize(gm, VALIDATION, ["fc.weight"])
    weight, scale = gm.fc.weight.detach(), gm.fc.weight_fake_quant.scale
    gm.fc.weight_fake_quant.state = FLOAT
    rounded = (torch.round(weight / scale[:, None]).clamp(-128, 127) * scale[:, None]).detach()
    gm.fc.weight.data = rounded
    expected = run(gm)
    gm.fc.weight.data = weight
    gm.fc.weight_fake_quant.state = VALIDATION
    torch.testing.assert_close(run(gm), expected, rtol=0, atol=1e-6)
    assert not torch.equal(run(gm), exact)


def test_some_sites_need_their_data_only() -> None:
    gm = prepared(calibrated=False)
    set_fake_quantize(gm, CALIBRATION, ["stem"])
    run(gm)
    set_fake_quantize(gm, VALIDATION, ["stem", "stem.weight"])
    with pytest.raises(StateError, match=r"1 site\(s\) have not been calibrated\n  where: conv1\n"):
        set_fake_quantize(gm, VALIDATION, ["stem", "conv1"])
    assert states(gm)["stem"] is VALIDATION
    assert states(gm)["conv1"] is FLOAT


def test_a_bias_needs_the_scales_of_input_and_weight() -> None:
    gm = prepared(calibrated=False)
    with pytest.raises(StateError, match=r"site x\.quant has no scale yet"):
        set_fake_quantize(gm, VALIDATION, ["stem.bias"])


def test_no_sites_is_no_move() -> None:
    gm = prepared(calibrated=False)
    set_fake_quantize(gm, VALIDATION, [])
    assert states(gm) == dict.fromkeys(SITES, FLOAT)


def test_unknown_sites() -> None:
    gm = prepared(calibrated=True)
    with pytest.raises(UserError, match="no site 'conv3'") as caught:
        set_fake_quantize(gm, FLOAT, ["stem", "conv3"])
    assert "'conv2'" in str(caught.value)
    assert states(gm) == dict.fromkeys(SITES, VALIDATION)


def test_a_text_is_no_list_of_sites() -> None:
    with pytest.raises(UserError, match=r"sites=\['stem'\]"):
        set_fake_quantize(prepared(calibrated=True), FLOAT, "stem")


# --- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["validation", "VALIDATION", None, 3])
def test_what_is_no_state(state: object) -> None:
    with pytest.raises(UserError, match="is no FakeQuantState"):
        set_fake_quantize(prepared(calibrated=True), state)  # type: ignore[arg-type]


def test_models_that_are_not_prepared() -> None:
    with pytest.raises(UserError, match="got a Residual") as caught:
        set_fake_quantize(Residual(), FLOAT)  # type: ignore[arg-type]
    assert "qgraph.prepare" in str(caught.value)
    with pytest.raises(UserError, match="this one is integer") as caught:
        set_fake_quantize(convert(prepared(calibrated=True)), FLOAT)
    assert "what qgraph.prepare returned" in str(caught.value)
    with pytest.raises(UserError, match="was not captured by qgraph"):
        set_fake_quantize(fx.symbolic_trace(torch.nn.ReLU()), FLOAT)

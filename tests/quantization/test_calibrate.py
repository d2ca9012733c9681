"""calibrate: what a loader may hold, what the ranges become, and that an error changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from qgraph.errors import QuantizationError, StateError, UserError
from qgraph.quantization import (
    FakeQuantState,
    ModuleNameQconfigSetter,
    calibrate,
    convert,
    get_qconfig,
    prepare,
    set_fake_quantize,
)
from qgraph.quantization.sites import quantizers
from qgraph.simulator import Simulator
from tests.support.models import Forward, Residual, image


def small(setter: object = None) -> fx.GraphModule:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return prepare(model.eval(), torch.randn(2, 4), setter)


def two_inputs() -> fx.GraphModule:
    class Model(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right

    return prepare(Model().eval(), (torch.randn(2, 4), torch.randn(2, 4)))


def everything(gm: fx.GraphModule) -> dict[str, Any]:
    """States, scales and ranges."""
    found: dict[str, Any] = {module.site: module.state for module in quantizers(gm)}
    return found | {name: tensor.clone() for name, tensor in gm.state_dict().items()}


def assert_unchanged(before: dict[str, Any], gm: fx.GraphModule) -> None:
    after = everything(gm)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value is after[name]
        assert same, name


def input_scale(gm: fx.GraphModule) -> float:
    return gm.quantizers.input_quant.scale.item()


# --- ranges --------------------------------------------------------------------------------------------------------


def test_the_range_is_that_of_all_batches() -> None:
    data = [torch.randn(2, 4) * factor for factor in (1, 5, 2)]
    gm = small()
    calibrate(gm, data, progress=False)
    assert input_scale(gm) == torch.cat(data).abs().max().item() / 128
    assert {module.state for module in quantizers(gm)} == {FakeQuantState.VALIDATION}


def test_values_pass_unrounded_while_ranges_are_found() -> None:
    gm = small()
    x = torch.randn(3, 4)
    hidden = gm.get_submodule("0")(x).detach()
    calibrate(gm, [x], progress=False)
    torch.testing.assert_close(gm.quantizers.n0.scale, hidden.abs().max() / 128)


def test_calibrating_again_extends_the_ranges() -> None:
    data = [torch.randn(2, 4), torch.randn(2, 4) * 3]
    once, twice = small(), small()
    twice.load_state_dict(once.state_dict())
    calibrate(once, data, progress=False)
    for batch in data:
        calibrate(twice, [batch], progress=False)
    assert_unchanged(everything(once), twice)


def test_ranges_of_values_far_apart() -> None:
    gm = small()
    calibrate(gm, [torch.randn(2, 4) * 1e30], progress=False)
    assert math.isfinite(input_scale(gm))
    calibrate(small(), [torch.randn(2, 4) * 1e-30], progress=False)


@pytest.mark.parametrize("value", [0.0, 1.5, -1e-20])
def test_zero_and_constant_data(value: float) -> None:
    gm = small()
    x = torch.full((2, 4), value)
    calibrate(gm, [x], progress=False)
    assert input_scale(gm) == (abs(torch.tensor(value)) / 128 if value else 1.0)
    integer = convert(gm)
    assert torch.equal(Simulator(integer)(x), integer(x))
    assert integer(x).isfinite().all()


def test_a_model_whose_weights_are_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    gm = prepare(model, torch.randn(2, 4))
    calibrate(gm, [torch.randn(2, 4)], progress=False)
    assert torch.equal(convert(gm)(torch.randn(2, 4)), torch.zeros(2, 4))


# --- loaders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x],
        lambda x: (x, torch.tensor([1, 0])),
        lambda x: {"input": x},
        lambda x: {"input": x, "label": 3},
    ],
    ids=["tensor", "tuple", "list", "labelled", "mapping", "mapping with more"],
)
def test_batches(wrap: Any) -> None:
    gm = small()
    x = torch.randn(2, 4)
    calibrate(gm, [wrap(x), wrap(x * 2)], progress=False)
    assert input_scale(gm) == (x * 2).abs().max().item() / 128


@pytest.mark.parametrize("kind", ["tuple", "mapping", "mapping in another order"])
def test_batches_of_several_inputs(kind: str) -> None:
    gm = two_inputs()
    left, right = torch.randn(2, 4), torch.randn(2, 4) * 9
    batch = {
        "tuple": (left, right, "label"),
        "mapping": {"left": left, "right": right},
        "mapping in another order": {"right": right, "left": left},
    }[kind]
    calibrate(gm, [batch], progress=False)
    assert gm.quantizers.left_quant.scale == left.abs().max() / 128
    assert gm.quantizers.right_quant.scale == right.abs().max() / 128


def test_a_data_loader_of_torch() -> None:
    data = TensorDataset(torch.randn(10, 4), torch.arange(10))
    gm = small()
    calibrate(gm, DataLoader(data, batch_size=4), progress=False)  # the last batch is smaller
    assert input_scale(gm) == data.tensors[0].abs().max().item() / 128


def test_any_batch_size_and_layout() -> None:
    gm = prepare(Residual().eval(), image(2))
    data = [image(1), image(5).contiguous(memory_format=torch.channels_last), image(7)[::2]]
    calibrate(gm, data, progress=False)
    assert gm.quantizers.x_quant.scale == torch.cat(data).abs().max() / 128


def test_iterators_and_num_steps() -> None:
    taken = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            taken.append(1)
            yield torch.full((2, 4), float(len(taken)))

    gm = small()
    calibrate(gm, endless(), num_steps=3, progress=False)
    assert len(taken) == 3, "no batch is taken and thrown away"
    assert input_scale(gm) == 3.0 / 128


def test_more_steps_than_batches() -> None:
    gm = small()
    calibrate(gm, [torch.ones(2, 4)], num_steps=100, progress=False)
    assert input_scale(gm) == 1.0 / 128


def test_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(small(), [torch.randn(2, 4)] * 3)
    assert "calibrate" in capsys.readouterr().err
    calibrate(small(), [torch.randn(2, 4)] * 3, progress=False)
    assert capsys.readouterr().err == ""


# --- modes ---------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Stays in float; multiplies by a million in training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cummax(x, -1).values * (1e6 if self.training else 1.0)


def test_training_mode_is_left_aside_and_brought_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Noisy(), nn.Linear(4, 4)).eval()
    gm = prepare(model, torch.randn(2, 4), leaf_modules=[Noisy])
    gm.train()
    gm.get_submodule("2").eval()
    before = {name: module.training for name, module in gm.named_modules()}
    calibrate(gm, [torch.randn(2, 4)], progress=False)
    assert {name: module.training for name, module in gm.named_modules()} == before
    assert gm.quantizers.n1_quant.scale < 1.0
    integer = convert(gm)
    assert not any(module.training for module in integer.modules())
    assert integer(torch.randn(2, 4)).abs().max() < 100


def test_no_gradients() -> None:
    gm = small()
    calibrate(gm, [torch.randn(2, 4, requires_grad=True)], progress=False)
    assert not any(buffer.requires_grad for buffer in gm.buffers())


# --- wrong use: nothing changes ------------------------------------------------------------------------------------


def failing() -> Iterator[torch.Tensor]:
    yield torch.randn(2, 4) * 100
    raise OSError("disk")


def with_bad(value: float) -> list[torch.Tensor]:
    bad = torch.randn(2, 4) * 100
    bad[1, 2] = value
    return [torch.randn(2, 4), bad]


WRONG = {
    "empty list": ([], UserError, "the calibration loader is empty"),
    "used iterator": (iter([]), UserError, "used up before"),
    "wrong shape": ([torch.randn(2, 4), torch.randn(2, 5)], UserError, r"shape \[2, 5\], expected \[any, 4\]"),
    "no samples": ([torch.randn(0, 4)], UserError, "shape"),
    "half": ([torch.randn(2, 4).half()], UserError, "float16"),
    "integers": ([torch.ones(2, 4, dtype=torch.int64)], UserError, "int64"),
    "labels only": ([{"label": 3}], UserError, r"a batch has no \['input'\]"),
    "empty tuple": ([()], UserError, "a batch holds 0 elements"),
    "numbers": ([3.0], UserError, "a batch is a float"),
    "nan": (with_bad(math.nan), QuantizationError, r"where: site input\.quant"),
    "infinity": (with_bad(math.inf), QuantizationError, "not finite"),
    "broken loader": (failing(), OSError, "disk"),
    "tensor": (torch.randn(2, 4), UserError, r"put a single batch into a list"),
    "batch": ({"input": torch.randn(2, 4)}, UserError, r"put a single batch into a list"),
    "text": ("data", UserError, "the calibration loader is a str"),
    "none": (None, UserError, "the calibration loader is a NoneType"),
    "number": (3, UserError, "it must yield batches"),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_loaders(name: str, calibrated: bool) -> None:
    loader, error, words = WRONG[name]
    if name == "broken loader":
        loader = failing()
    gm = small()
    if calibrated:
        calibrate(gm, [torch.randn(2, 4)], progress=False)
        set_fake_quantize(gm, FakeQuantState.QAT, ["0"])
    before = everything(gm)
    with pytest.raises(error, match=words):
        calibrate(gm, loader, progress=False)
    assert_unchanged(before, gm)
    calibrate(gm, [torch.randn(2, 4)], progress=False)  # nothing bad is remembered
    assert input_scale(gm) < 1


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3"])
def test_wrong_num_steps(steps: Any) -> None:
    with pytest.raises(UserError, match="whole number >= 1"):
        calibrate(small(), [torch.randn(2, 4)], steps, progress=False)


def test_an_error_names_the_batch() -> None:
    with pytest.raises(UserError) as caught:
        calibrate(small(), [torch.randn(2, 4), torch.randn(2, 5)], progress=False)
    assert "in batch 1 of the calibration loader" in caught.value.__notes__


@pytest.mark.parametrize("batch", [torch.randn(2, 4), (torch.randn(2, 4),)], ids=["tensor", "tuple"])
def test_an_input_is_missing(batch: Any) -> None:
    with pytest.raises(UserError, match=r"holds 1 elements, the model takes 2 inputs: \['left', 'right'\]"):
        calibrate(two_inputs(), [batch], progress=False)


def test_inputs_of_different_batch_sizes() -> None:
    with pytest.raises(UserError, match="different batch sizes"):
        calibrate(two_inputs(), [(torch.randn(2, 4), torch.randn(3, 4))], progress=False)


def test_an_operator_that_makes_nan_is_named() -> None:
    model = Forward(lambda m, x: torch.acosh(x.relu()).sigmoid())
    gm = prepare(model.eval(), torch.rand(2, 4) + 1)
    with pytest.raises(QuantizationError, match=r"site _generated_acosh_0\.quant"):
        calibrate(gm, [torch.zeros(2, 4)], progress=False)


def test_models_that_are_not_prepared() -> None:
    with pytest.raises(UserError, match="calibrate needs a prepared model, got a Residual"):
        calibrate(Residual(), [image()], progress=False)  # type: ignore[arg-type]
    gm = small()
    calibrate(gm, [torch.randn(2, 4)], progress=False)
    with pytest.raises(UserError, match="this one is integer"):
        calibrate(convert(gm), [torch.randn(2, 4)], progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_prepared_graph_of_another_dtype(dtype: torch.dtype) -> None:
    gm = small()
    calibrate(gm, [torch.randn(2, 4)], progress=False)
    gm.to(dtype)
    for step in (lambda: calibrate(gm, [torch.randn(2, 4)], progress=False), lambda: convert(gm)):
        with pytest.raises(QuantizationError, match=rf"0\.weight of the prepared graph is {dtype}") as caught:
            step()
        assert "prepare the float32 model again" in str(caught.value)


# --- fixed scales --------------------------------------------------------------------------------------------------


def test_a_fixed_scale_needs_no_data_and_keeps_none() -> None:
    gm = small(ModuleNameQconfigSetter({"input.quant": get_qconfig(fix_scale=0.5)}))
    assert input_scale(gm) == 0.5
    with pytest.raises(StateError, match=r"1 site\(s\) have not been calibrated\n  where: 0\n"):
        set_fake_quantize(gm, FakeQuantState.VALIDATION)
    calibrate(gm, [torch.randn(2, 4) * 1000], progress=False)
    assert input_scale(gm) == 0.5

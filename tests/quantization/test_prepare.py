"""prepare: the given model stays as it was, weights stay shared, and what cannot be prepared is refused."""

from __future__ import annotations

import copy
import io
import random

import numpy as np
import pytest
import torch
from torch import fx, nn

from qgraph.capture import trace
from qgraph.errors import CaptureError, QuantizationError, TargetError, UserError
from qgraph.ir.node_info import graph_info
from qgraph.ir.stage import Stage
from qgraph.ir.text import print_graph
from qgraph.pipeline import Pipeline
from qgraph.quantization import FakeQuantState, calibrate, convert, get_qconfig, prepare, prepare_pipeline
from qgraph.quantization.sites import quantizers
from tests.support.models import Attention, Forward, Residual, image

MODELS = {"residual": (Residual, image), "attention": (Attention, lambda: torch.randn(2, 5, 8))}


def tensors(model: nn.Module) -> dict[str, tuple[int, torch.Tensor, tuple[int, ...]]]:
    """Identity, value and strides of every parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(tensor), tensor.detach().clone(), tensor.stride()) for name, tensor in named}


def run(gm: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return gm(inputs)


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert before[name][0] == after[name][0], f"{name} is another tensor"
        assert torch.equal(before[name][1], after[name][1]), f"{name} has other values"
        assert before[name][2] == after[name][2], f"{name} has another layout"


# --- the given model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_given_model_is_never_changed(name: str) -> None:
    build, example = MODELS[name]
    model, x = build().eval(), example()
    modules, before, expected = dict(model.named_modules()), tensors(model), run(model, x)
    attributes = {path: sorted(vars(module)) for path, module in modules.items()}
    kept = x.clone()

    prepared = prepare(model, x)
    calibrate(prepared, [x, x], progress=False)
    prepared.train()
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1.0)
    convert(prepared)

    assert dict(model.named_modules()) == modules
    assert {path: sorted(vars(module)) for path, module in modules.items()} == attributes
    assert_same(before, tensors(model))
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(run(model, x), expected)
    assert torch.equal(x, kept)


def test_frozen_parameters_stay_frozen() -> None:
    model = Residual().eval()
    model.stem.weight.requires_grad_(False)
    prepared = prepare(model, image())
    assert not prepared.stem.weight.requires_grad
    assert prepared.conv1.weight.requires_grad
    assert not model.stem.weight.requires_grad


def test_hooks_of_the_model_run_in_the_model_only() -> None:
    model, calls = Residual().eval(), []
    handles = [
        model.register_forward_hook(lambda *_: calls.append("model")),
        model.fc.register_forward_pre_hook(lambda *_: calls.append("fc")),
        model.stem.register_full_backward_hook(lambda *_: None),
    ]
    prepared = prepare(model, image())
    calls.clear()
    run(prepared, image())
    assert calls == []
    run(model, image())
    assert calls == ["fc", "model"]
    for handle in handles:
        handle.remove()
    assert not model._forward_hooks
    assert not model.fc._forward_pre_hooks


def test_random_numbers_go_on_as_if_nothing_had_happened() -> None:
    def draws() -> tuple[object, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    model, x = Residual().eval(), image()
    seed()
    expected = draws()
    seed()
    prepared = prepare(model, x)
    calibrate(prepared, [x], progress=False)
    convert(prepared)
    assert draws() == expected


def test_modes_around_the_call_do_not_matter() -> None:
    model, x = Residual().eval(), image()
    with torch.no_grad():
        prepared = prepare(model, x)
    assert all(parameter.requires_grad for parameter in prepared.parameters())
    assert torch.is_grad_enabled()
    prepare(model, x)
    assert torch.is_grad_enabled()


# --- the prepared graph --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_in_state_float_it_computes_what_the_model_does(name: str) -> None:
    build, example = MODELS[name]
    model = build().eval()
    prepared = prepare(model, example())
    for batch in (1, 2, 7):
        x = torch.randn(batch, *example().shape[1:])
        expected = run(model, x)
        assert (run(prepared, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tensors_are_the_graphs_own() -> None:
    model = Residual().eval()
    prepared = prepare(model, image())
    theirs = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    own = {tensor.untyped_storage().data_ptr() for tensor in prepared.state_dict().values() if tensor.numel()}
    assert not theirs & own


def test_tied_weights_stay_tied() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    prepared = prepare(nn.Sequential(a, nn.ReLU(), b).eval(), torch.randn(2, 4))
    first, second = prepared.get_submodule("0"), prepared.get_submodule("2")
    assert first.weight is second.weight
    assert first.weight_fake_quant is second.weight_fake_quant, "one weight, one site"
    assert len(list(prepared.parameters())) == 3


def test_copies_are_independent() -> None:
    x = image()
    prepared = prepare(Residual().eval(), x)
    calibrate(prepared, [x], progress=False)
    expected = run(prepared, x)
    twin = copy.deepcopy(prepared)
    assert torch.equal(run(twin, x), expected)
    assert print_graph(twin) == print_graph(prepared)
    calibrate(twin, [x * 50], progress=False)
    with torch.no_grad():
        twin.fc.weight.zero_()
    assert torch.equal(run(prepared, x), expected)
    assert torch.equal(convert(prepared)(x), convert(copy.deepcopy(prepared))(x))


@pytest.mark.parametrize("saved", ["dict", "file"])
def test_weights_and_scales_are_saved(saved: str) -> None:
    x, model = image(), Residual().eval()
    source, target = prepare(model, x), prepare(Residual().eval(), x)
    calibrate(source, [x, x * 2], progress=False)
    with torch.no_grad():
        source.fc.weight.mul_(1.5)
    source_state = source.state_dict()
    if saved == "file":
        file = io.BytesIO()
        torch.save(source_state, file)
        file.seek(0)
        source_state = torch.load(file, weights_only=True)
    target.load_state_dict(source_state)
    assert {module.state for module in quantizers(target)} == {FakeQuantState.FLOAT}, "states are not saved"
    assert torch.equal(convert(target)(x), convert(source)(x))
    calibrate(target, [x], progress=False)  # ranges go on where they were
    assert torch.equal(target.quantizers.stem.scale, source.quantizers.stem.scale)


def test_an_uncalibrated_state_makes_a_graph_uncalibrated() -> None:
    x, model = image(), Residual().eval()
    fresh, calibrated = prepare(model, x), prepare(model, x)
    calibrate(calibrated, [x], progress=False)
    calibrated.load_state_dict(fresh.state_dict())
    with pytest.raises(UserError, match="have not been calibrated"):
        convert(calibrated)


def test_states_of_other_models_do_not_load() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        prepare(Residual(4).eval(), image()).load_state_dict(prepare(Residual(8).eval(), image()).state_dict())


# --- pipelines -----------------------------------------------------------------------------------------------------


def test_a_changed_pipeline() -> None:
    without = prepare(Residual().eval(), image(), pipeline=prepare_pipeline().remove("use-channels-last"))
    assert without.stem.weight.is_contiguous()
    assert prepare(Residual().eval(), image()).stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_pipeline_that_ends_too_early() -> None:
    with pytest.raises(UserError, match="in stage fused, not prepared") as caught:
        prepare(Residual().eval(), image(), pipeline=prepare_pipeline().remove("insert-fake-quant"))
    assert "high-precision-output" in str(caught.value), "the message shows the pipeline"


@pytest.mark.parametrize("wrong", ["canonicalize", ["canonicalize"], Pipeline], ids=["text", "list", "class"])
def test_what_is_no_pipeline(wrong: object) -> None:
    with pytest.raises(UserError, match=r"Pipeline\.parse"):
        prepare(Residual().eval(), image(), pipeline=wrong)  # type: ignore[arg-type]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_training_mode() -> None:
    with pytest.raises(UserError, match="Residual is in training mode") as caught:
        prepare(Residual().train(), image())
    assert "model.eval()" in str(caught.value)


def test_wrong_example_shape_names_the_line() -> None:
    with pytest.raises(CaptureError, match="fails on the example inputs") as caught:
        prepare(Residual().eval(), torch.randn(2, 5, 8, 8))
    assert "models.py:" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(QuantizationError, match=f"stem.weight is {dtype}") as caught:
        prepare(Residual().to(dtype).eval(), image().to(dtype))
    assert "model.float()" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv1.weight", "fc.bias", "bn1.running_mean"])
def test_weights_that_are_no_numbers(bad: float, name: str) -> None:
    model = Residual().eval()
    model.state_dict()[name].flatten()[1] = bad
    with pytest.raises(QuantizationError, match=f"{name} holds NaN or infinite values"):
        prepare(model, image())


def test_large_finite_weights_are_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    nn.init.constant_(model[0].weight, 3e38)
    prepare(model, torch.zeros(2, 4))


def test_nothing_to_quantize() -> None:
    with pytest.raises(UserError, match="nothing in this model can be quantized") as caught:
        prepare(Forward(lambda m, x: torch.cummax(x, -1).values).eval(), torch.randn(2, 4))
    assert "no integer form of torch.cummax" in str(caught.value)


def test_unknown_targets() -> None:
    with pytest.raises(TargetError, match="did you mean 'bpu'"):
        prepare(Residual().eval(), image(), target="bqu")


def test_what_is_no_model() -> None:
    with pytest.raises(UserError):
        prepare(lambda x: x, image())  # type: ignore[arg-type]
    with pytest.raises(UserError):
        prepare(Residual, image())  # type: ignore[arg-type]


def test_a_prepared_graph_is_not_prepared_again() -> None:
    prepared = prepare(Residual().eval(), image())
    with pytest.raises(UserError, match="a graph in stage prepared"):
        prepare(prepared, image())
    assert graph_info(prepared).stage is Stage.PREPARED
    calibrate(prepared, [image()], progress=False)
    with pytest.raises(UserError, match="a graph in stage integer"):
        prepare(convert(prepared), image())


def test_a_captured_graph_is_a_model() -> None:
    model, x = Residual().eval(), image()
    prepared = prepare(trace(model, x), x)
    calibrate(prepared, [x], progress=False)
    direct = prepare(model, x)
    calibrate(direct, [x], progress=False)
    assert torch.equal(convert(prepared)(x), convert(direct)(x))


@pytest.mark.parametrize("out", ["uint8", "int4", "int32", "float16"])
def test_formats_the_target_does_not_have(out: str) -> None:
    with pytest.raises(QuantizationError):
        prepare(Residual().eval(), image(), get_qconfig(out_dtype=out))


def test_a_module_named_like_ours() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizers = nn.Linear(4, 4)
            self.stubs = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.stubs[0](torch.relu(self.quantizers(x))))

    model, x = Model().eval(), torch.randn(2, 4)
    prepared = prepare(model, x)
    assert isinstance(prepared, fx.GraphModule)
    assert (run(prepared, x) - run(model, x)).abs().max() <= 1e-6
    calibrate(prepared, [x], progress=False)
    convert(prepared)(x)

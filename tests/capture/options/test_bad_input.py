"""What a user can do wrong."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.capture import trace
from qgraph.errors import CaptureError, UserError
from tests.capture.checks import assert_agrees, network, process_state, x
from tests.support.models import Forward

# --- arguments of trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.relu, x()), ["torch.nn.Module", "builtin_function_or_method"]),
        ((nn.Linear, x()), ["torch.nn.Module", "type"]),
        ((None, x()), ["torch.nn.Module", "NoneType"]),
        ((network(), None), ["example_inputs is a NoneType", "tuple of positional"]),
        ((network(), 3), ["example_inputs is a int"]),
        ((network(), np.zeros((2, 6))), ["example_inputs is a ndarray"]),
        ((network(), ()), ["do not fit", "missing a required argument: 'input'"]),
        ((network(), (x(), x())), ["do not fit", "too many positional arguments"]),
        ((network(), {"inptu": x()}), ["do not fit", "input"]),
        ((network(), (3,)), ["hold no tensor"]),
        ((network(), (None,)), ["hold no tensor"]),
        ((network(), ([],)), ["hold no tensor"]),
        ((network(), x(), "jitt"), ["unknown capture method 'jitt'", "did you mean 'jit'"]),
        ((network(), x(), "onnx"), ["unknown capture method 'onnx'", "symbolic"]),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        trace(*arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"waive": ["sclar"]}, ["no capture flag is named 'sclar'", "did you mean 'scalar'"]),
        ({"waive": "sclar"}, ["'sclar'"]),
        ({"waive": ["everything"]}, ["'everything'", "random"]),
        ({"leaf_modules": ["2x"]}, ["'2x'", "no module of the model"]),
        ({"leaf_modules": [3]}, ["leaf_modules holds 3"]),
    ],
)
def test_wrong_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        trace(network(), x(), **options)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_one_waiver_without_a_list() -> None:
    gm = trace(Forward(lambda m, x: x * float(x.max())).eval(), x(), waive="scalar", verify=False)
    assert "scalar" in qgraph.graph_info(gm).notes[0]


class Fails(nn.Module):
    def forward(self, x):
        y = x * 2
        return y @ torch.ones(5, 5)


def test_wrong_example_shape_names_the_line_and_keeps_the_cause() -> None:
    with pytest.raises(CaptureError) as raised:
        trace(Fails().eval(), x())
    message = str(raised.value)
    assert "fails on the example inputs" in message
    assert "test_bad_input.py:" in message
    assert "RuntimeError" in message
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_wrong_example_shape_in_a_leaf() -> None:
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        trace(network(), torch.randn(2, 7))


def test_the_users_own_error_is_the_cause() -> None:
    class Refuses(nn.Module):
        def forward(self, x):
            raise KeyError("of the model")

    with pytest.raises(CaptureError, match="KeyError: 'of the model'") as raised:
        trace(Refuses().eval(), x())
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_through(error: type[BaseException]) -> None:
    def forward(m, x):
        raise error

    before = process_state()
    with pytest.raises(error):
        trace(Forward(forward).eval(), x())
    assert process_state() == before


# --- training mode ---------------------------------------------------------------------------------------------


def test_training_mode() -> None:
    with pytest.raises(UserError, match="training mode") as raised:
        trace(network().train(), x())
    assert "model.eval()" in str(raised.value)


def test_a_submodule_in_training_mode_is_named() -> None:
    model = Forward(lambda m, x: m.net(x), net=nn.Sequential(nn.Linear(6, 6), nn.Dropout())).eval()
    model.net[1].train()
    with pytest.raises(UserError, match=r"where: net\.1"):
        trace(model, x())


def test_many_modules_in_training_mode_are_counted() -> None:
    with pytest.raises(UserError, match="and 16 more"):
        trace(nn.Sequential(*[nn.Linear(6, 6) for _ in range(20)]), x())


def test_hidden_modules_in_training_mode() -> None:
    """A list hides modules from `eval()`: their dropout is random, which is flagged."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Dropout(0.5)]

        def forward(self, x):
            return self.layers[0](x)

    with pytest.raises(CaptureError, match="random"):
        trace(Hidden().eval(), x())


# --- models that cannot be copied ------------------------------------------------------------------------------


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.linear(x)


class ComputedAttribute(nn.Module):
    """A non-leaf tensor kept as an attribute: the usual obstacle to `deepcopy`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.cached = {"weight": self.linear.weight * 2}

    def forward(self, x):
        return F.linear(x, self.cached["weight"])


@pytest.mark.parametrize("build", [Uncopyable, ComputedAttribute])
def test_a_model_that_cannot_be_copied(build: type[nn.Module]) -> None:
    model = build().eval()
    try:
        gm = trace(model, x())
    except CaptureError as error:
        assert "cannot be copied" in str(error)  # noqa: PT017
        assert "deepcopy" in str(error)  # noqa: PT017
        return
    assert_agrees(model, gm, x(5))


# --- odd values ------------------------------------------------------------------------------------------------


def test_nan_and_infinity_in_the_output() -> None:
    model = Forward(lambda m, x: (x / 0 * 0, x.log(), x / 0)).eval()
    gm = trace(model, x())
    assert_agrees(model, gm, x(5))


def test_nan_in_the_example() -> None:
    example = x()
    example[0, 0, 0] = float("nan")
    example[1, 0, 0] = float("inf")
    model = network()
    assert_agrees(model, trace(model, example), x(5))


def test_complex_nan_in_the_output() -> None:
    model = Forward(lambda m, x: torch.complex(x, x) / 0).eval()
    gm = trace(model, x())
    assert gm(x(5)).isnan().all() or gm(x(5)).isinf().any()


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(2, 4, 6),
        torch.ones(2, 4, 6),
        torch.full((2, 4, 6), 1e30),
        torch.randn(1, 1, 6),
        torch.randn(2, 0, 6),
    ],
    ids=["zeros", "ones", "huge", "one row", "empty"],
)
def test_odd_examples(example: torch.Tensor) -> None:
    model = network()
    gm = trace(model, example)
    assert_agrees(model, gm, torch.randn(5, *example.shape[1:]))


def test_examples_that_require_gradients() -> None:
    example = x().requires_grad_()
    gm = trace(network(), example)
    assert example.grad_fn is None
    assert gm(x().requires_grad_()).requires_grad, "the graph can be differentiated"


def test_a_computed_example_with_a_history() -> None:
    example = network()[0](x())
    assert example.grad_fn is not None
    gm = trace(network(), example)
    assert qgraph.graph_info(gm).example.kwargs["input"].grad_fn is None


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
@pytest.mark.parametrize("where", ["around trace", "in the forward"])
def test_grad_modes(mode: str, where: str) -> None:
    context = torch.inference_mode if mode == "inference" else torch.no_grad
    linear = nn.Linear(6, 6)
    if where == "in the forward":
        model = Forward(context()(lambda m, x: (m.linear(x) + 1).relu()), linear=linear).eval()
        gm = trace(model, x())
    else:
        model = Forward(lambda m, x: (m.linear(x) + 1).relu(), linear=linear).eval()
        with context():
            gm = trace(model, x())
    assert_agrees(model, gm, x(5))


def test_an_example_made_in_inference_mode() -> None:
    with torch.inference_mode():
        example = x()
    model = network()
    assert_agrees(model, trace(model, example), x(5))

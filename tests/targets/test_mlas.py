"""onnxruntime's functions, spelled step by step, give onnxruntime's floats to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qgraph.targets import get_target, mlas
from tests.conformance.engine_onnxruntime import available, session_of

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

OPERATORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("Sigmoid", {}, {}),
    "tanh": ("Tanh", {}, {}),
    "exp": ("Exp", {}, {}),
    "erf": ("Erf", {}, {}),
    "sqrt": ("Sqrt", {}, {}),
    "gelu": ("Gelu", {}, {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}, {"approximate": "tanh"}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, {}),
    "hardswish": ("HardSwish", {}, {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.3}, {"negative_slope": 0.3}),
}


def onnxruntime_computes(kind: str, x: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"], **attributes)], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = session_of(model.SerializeToString(), optimized=False)
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_functions(name: str) -> None:
    kind, attributes, options = OPERATORS[name]
    spread = torch.cat([torch.randn(4096) * size for size in (1e-3, 0.1, 1.0, 4.0, 20.0, 200.0)])
    x = torch.cat([spread, torch.arange(-1024, 1024) / 64, torch.tensor([0.0, -0.0])])
    function = getattr(mlas, name.removesuffix("_tanh"))
    x = x.abs() if name == "sqrt" else x  # below zero ours is minus infinity, see below
    ours, theirs = function(x, **options), onnxruntime_computes(kind, x, attributes)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), (ours - theirs).abs().max()


def test_rsqrt_below_zero_is_what_quantizes_to_the_lowest_code() -> None:
    found = mlas.rsqrt(torch.tensor([-1.0, 0.0, 4.0]))
    assert found.tolist() == [float("-inf"), float("inf"), 0.5]


def test_every_function_belongs_to_an_operator_of_the_target() -> None:
    assert mlas.FUNCTIONS.keys() == get_target("onnxruntime").functions.own.keys()

"""canonicalize: the spellings of functions of one value, comparisons and choices have one form each, bit exact."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.arguments import classify
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op_table import OPAQUE
from qgraph.pipeline import Pipeline
from tests.passes.models import anonymous, check_all
from tests.passes.test_canonicalize import Family, example_of, spelled_model
from tests.support.passes import count_ops, run_passes

PASS = "canonicalize"
aten = torch.ops.aten
IN_PLACE = "in place"
PAIR = ((2, 6, 6), (2, 6, 6))


def unary(name: str, *others: Callable[..., Any], positive: bool = False) -> Family:
    """A function of torch that is a method too, has a form in place, and an aten overload."""

    def of(function: Callable[..., Any], factor: float = 1.0) -> Callable[..., Any]:
        if positive:
            return lambda m, x: function((x.abs() + 0.1) * factor if factor != 1.0 else x.abs() + 0.1)
        return lambda m, x: function(x * factor if factor != 1.0 else x)

    spellings = {
        "method": of(lambda x: getattr(x, name)()),
        IN_PLACE: of(lambda x: getattr(x, f"{name}_")(), 1.5),
        "aten": of(lambda x: getattr(aten, name).default(x)),
        **{str(i): of(other) for i, other in enumerate(others)},
    }
    return Family(name, of(getattr(torch, name)), spellings)


def activation(function: Callable[..., Any], module: nn.Module, *others: Callable[..., Any]) -> Family:
    spellings: dict[str, Any] = {"module": module}
    spellings |= {str(i): lambda m, x, other=other: other(x) for i, other in enumerate(others)}
    name = function.__name__.replace("log_sigmoid", "logsigmoid")
    return Family(name, lambda m, x: function(x), spellings)


def comparison(name: str, long: str | None) -> Family:
    spellings: dict[str, Any] = {
        "operator": lambda m, x, y: getattr(operator, name)(x, y),
        "method": lambda m, x, y: getattr(x, name)(y),
        "dunder": lambda m, x, y: getattr(x, f"__{name}__")(y),
        "aten": lambda m, x, y: getattr(aten, name).Tensor(x, y),
    }
    if long is not None:
        spellings |= {
            "long": lambda m, x, y: getattr(torch, long)(x, y),
            "long method": lambda m, x, y: getattr(x, long)(y),
        }
    return Family(name, lambda m, x, y: getattr(torch, name)(x, y), spellings, PAIR)


FAMILIES = {
    "erf": unary("erf", torch.special.erf),
    "exp2": unary("exp2", torch.special.exp2),
    "expm1": unary("expm1", torch.special.expm1),
    "log": unary("log", positive=True),
    "log2": unary("log2", positive=True),
    "log10": unary("log10", positive=True),
    "log1p": unary("log1p", torch.special.log1p, positive=True),
    "sqrt": unary("sqrt", lambda x: x**0.5, positive=True),
    "sin": unary("sin"),
    "cos": unary("cos"),
    "tan": unary("tan"),
    "atan": unary("atan", torch.arctan),
    "asinh": unary("asinh", torch.arcsinh),
    "sign": unary("sign"),
    "floor": unary("floor"),
    "ceil": unary("ceil"),
    "trunc": unary("trunc", torch.fix),
    "round": unary("round"),
    "abs": unary("abs", torch.absolute, abs),
    "neg": unary("neg", torch.negative, operator.neg),
    "reciprocal": unary("reciprocal", lambda x: x**-1, lambda x: 1 / x),
    "square": Family(
        "mul",
        lambda m, x: x * x,
        {
            "torch.square": lambda m, x: torch.square(x),
            "square": lambda m, x: x.square(),
            "power": lambda m, x: x**2,
            "torch.pow": lambda m, x: torch.pow(x, 2),
            "method": lambda m, x: x.pow(2.0),
            "by name": lambda m, x: torch.pow(x, exponent=2),
        },
    ),
    "rsqrt": Family("rsqrt", lambda m, x: torch.rsqrt(x * x), {"power": lambda m, x: (x * x) ** -0.5}),
    "pow": Family(
        "pow",
        lambda m, x: x**3,
        {
            "torch.pow": lambda m, x: torch.pow(x, 3),
            "method": lambda m, x: x.pow(3),
            "dunder": lambda m, x: x.__pow__(3),
            "in place": lambda m, x: (x * 1.5).pow_(3),
            "aten": lambda m, x: aten.pow.Tensor_Scalar(x, 3),
        },
    ),
    "power of a number": Family(
        "pow",
        lambda m, x: 2**x,
        {"torch.pow": lambda m, x: torch.pow(2, x), "dunder": lambda m, x: x.__rpow__(2)},
    ),
    "mish": activation(F.mish, nn.Mish(), lambda x: F.mish(x, inplace=False)),
    "elu": activation(F.elu, nn.ELU(), lambda x: F.elu(x, 1.0), lambda x: aten.elu.default(x)),
    "selu": activation(F.selu, nn.SELU(), torch.selu),
    "celu": activation(F.celu, nn.CELU(), torch.celu),
    "softplus": activation(F.softplus, nn.Softplus(), lambda x: F.softplus(x, 1.0, 20.0)),
    "softsign": activation(F.softsign, nn.Softsign()),
    "logsigmoid": activation(F.logsigmoid, nn.LogSigmoid()),
    "tanhshrink": activation(F.tanhshrink, nn.Tanhshrink()),
    "hardshrink": activation(F.hardshrink, nn.Hardshrink(), torch.hardshrink, lambda x: x.hardshrink()),
    "softshrink": activation(F.softshrink, nn.Softshrink(), lambda x: F.softshrink(x, 0.5)),
    "gt": comparison("gt", "greater"),
    "ge": comparison("ge", "greater_equal"),
    "lt": comparison("lt", "less"),
    "le": comparison("le", "less_equal"),
    "eq": comparison("eq", None),
    "ne": comparison("ne", "not_equal"),
    "maximum": Family(
        "maximum",
        lambda m, x, y: torch.maximum(x, y),
        {"method": lambda m, x, y: x.maximum(y), "aten": lambda m, x, y: aten.maximum.default(x, y)},
        PAIR,
    ),
    "minimum": Family(
        "minimum",
        lambda m, x, y: torch.minimum(x, y),
        {"method": lambda m, x, y: x.minimum(y), "aten": lambda m, x, y: aten.min.other(x, y)},
        PAIR,
    ),
    "where": Family(
        "where",
        lambda m, x, y: torch.where(x > 0, x, y),
        {
            "method": lambda m, x, y: x.where(x > 0, y),
            "aten": lambda m, x, y: aten.where.self(x > 0, x, y),
            "by name": lambda m, x, y: torch.where(x > 0, input=x, other=y),
        },
        PAIR,
    ),
    "masked_fill": Family(
        "masked_fill",
        lambda m, x, y: torch.masked_fill(x, y > 0, 0.5),
        {
            "method": lambda m, x, y: x.masked_fill(y > 0, 0.5),
            "by name": lambda m, x, y: x.masked_fill(mask=y > 0, value=0.5),
            "aten": lambda m, x, y: aten.masked_fill.Scalar(x, y > 0, 0.5),
        },
        PAIR,
    ),
}
SPELLED = [(family, spelling) for family, entry in FAMILIES.items() for spelling in entry.spellings]


@pytest.mark.parametrize(("family", "spelling"), SPELLED, ids=["-".join(pair) for pair in SPELLED])
def test_spelling_has_the_references_form(family: str, spelling: str) -> None:
    entry = FAMILIES[family]
    model, example = spelled_model(entry.spellings[spelling]), example_of(entry)
    result = run_passes(model, example, PASS)
    assert entry.op in count_ops(result.gm)
    if spelling != IN_PLACE:  # it has a product of its own to write to
        reference = run_passes(spelled_model(entry.reference), example, "canonicalize,eliminate-dead-code").gm
        cleaned = Pipeline.parse("eliminate-dead-code").run(result.gm).gm
        assert anonymous(cleaned) == anonymous(reference)
    check_all(model, result, example, PASS)


def test_where_of_a_condition_alone_is_something_else() -> None:
    assert classify("call_function", torch.where, None, (torch.ones(3) > 0,)) is OPAQUE
    assert classify("call_function", torch.where, None, (torch.ones(3) > 0, 1.0, 2.0)).name == "where"


def test_prelu_becomes_a_module() -> None:
    model = spelled_model(lambda m, x: F.prelu(x, m.slopes))
    model.register_parameter("slopes", nn.Parameter(torch.tensor([0.1, 0.7])))
    result = run_passes(model, (torch.randn(3, 2, 4),), PASS)
    (node,) = (node for node in result.gm.graph.nodes if info(node).op.name == "prelu")
    assert node.op == "call_module"
    assert torch.equal(module_of(node).weight, model.slopes)

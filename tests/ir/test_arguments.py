"""Arguments are read under the operator's own names, whatever the spelling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgraph.capture import trace
from qgraph.errors import InternalError, VerifyError
from qgraph.ir.arguments import bind, classify, quant_rule
from qgraph.ir.node_info import info
from qgraph.ir.op import QuantRule
from qgraph.ir.op_table import ITEM, OPAQUE, OPS, SLICE
from tests.support.models import Forward


def captured(function, *example, **children):
    """The last operator of a traced function."""
    gm = trace(Forward(lambda m, *xs: function(m, *xs), **children).eval(), example)
    return [node for node in gm.graph.nodes if node.op != "output"][-1]


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.softmax(1),
        lambda m, x: torch.softmax(x, dim=1),
        lambda m, x: F.softmax(x, 1),
        lambda m, x: m.soft(x),
    ],
)
def test_one_option_four_spellings(function) -> None:
    bound = bind(captured(function, X, soft=nn.Softmax(1)))
    assert bound.op.name == "softmax"
    assert bound.option("dim") == 1
    assert bound.options() == {"dim": 1}


@pytest.mark.parametrize(
    "function",
    [lambda m, x: x.permute(2, 0, 1), lambda m, x: x.permute((2, 0, 1)), lambda m, x: torch.permute(x, (2, 0, 1))],
)
def test_packed_arguments(function) -> None:
    assert tuple(bind(captured(function, X)).option("dims")) == (2, 0, 1)


def test_swapped_operands() -> None:
    bound = bind(captured(lambda m, x: 1 - x, X))
    assert bound.operand("input") == 1
    assert bound.operand("other").name == "inputs_0"


def test_implied_options() -> None:
    bound = bind(captured(lambda m, x: x[0].t(), X))
    assert (bound.option("dim0"), bound.option("dim1")) == (0, 1)


def test_module_options_under_other_names() -> None:
    bound = bind(captured(lambda m, x: m.clip(x), X, clip=nn.Hardtanh(-2, 3)))
    assert bound.options() == {"min": -2, "max": 3}


def test_module_defaults_are_left_out() -> None:
    image = torch.randn(2, 3, 8, 8)
    bound = bind(captured(lambda m, x: m.conv(x), image, conv=nn.Conv2d(3, 4, 3)))
    assert bound.options() == {}, "(1, 1) is the default 1"
    assert bound.option("stride") == (1, 1)
    assert [name for name, _ in bound.nodes()] == ["input"]


def test_operands_in_lists() -> None:
    bound = bind(captured(lambda m, x: torch.cat([x, x * 2], 1), X))
    assert [name for name, _ in bound.nodes()] == ["tensors", "tensors"]


def test_unknown_options_are_an_internal_error() -> None:
    bound = bind(captured(lambda m, x: x.relu(), X))
    with pytest.raises(InternalError, match="no option 'dim'"):
        bound.option("dim")


def test_arguments_that_do_not_fit_are_named() -> None:
    node = captured(lambda m, x: x.relu(), X)
    node.args = (*node.args, 1, 2, 3)
    with pytest.raises(VerifyError, match="takes 1 arguments, got 4"):
        bind(node)


def test_indexing_a_tuple_is_no_slice() -> None:
    node = captured(lambda m, x: x.chunk(2, 2)[1], X)
    assert info(node).op is ITEM
    assert info(captured(lambda m, x: x[:, 1], X)).op is SLICE


def test_opaque_operators() -> None:
    assert info(captured(lambda m, x: torch.linalg.norm(x), X)).op is OPAQUE
    assert classify("call_method", "frobnicate", None) is OPAQUE


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda m, x: F.pad(x, (1, 1)), QuantRule.SAME),
        (lambda m, x: F.pad(x, (1, 1), value=0.5), QuantRule.OWN),
        (lambda m, x: F.pad(x, (1, 1), mode="reflect"), QuantRule.SAME),
        (lambda m, x: F.interpolate(x, scale_factor=2.0), QuantRule.SAME),
        (lambda m, x: x.relu(), QuantRule.SAME),
        (lambda m, x: x + 1, QuantRule.OWN),
    ],
)
def test_scales_that_depend_on_options(function, rule: QuantRule) -> None:
    assert quant_rule(captured(function, X)) is rule


def test_every_module_class_of_the_table_finds_its_options() -> None:
    """An entry whose module lacks an attribute for a required option would fail at the user's."""
    built = {
        nn.Flatten: nn.Flatten(),
        nn.Unflatten: nn.Unflatten(1, (1, 3)),
        nn.ZeroPad1d: nn.ZeroPad1d(1),
        nn.ConstantPad1d: nn.ConstantPad1d(1, 0.5),
        nn.Upsample: nn.Upsample(scale_factor=2),
        nn.AvgPool1d: nn.AvgPool1d(2),
        nn.MaxPool1d: nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d: nn.AdaptiveAvgPool1d(1),
        nn.LeakyReLU: nn.LeakyReLU(0.2),
        nn.GELU: nn.GELU("tanh"),
        nn.Softmax: nn.Softmax(-1),
    }
    for kind, module in built.items():
        node = captured(lambda m, x: m.child(x), X, child=module)
        bound = bind(node)
        assert bound.op is OPS.module(kind)
        assert set(bound.op.options) <= set(bound.values)

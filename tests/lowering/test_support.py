"""What lowerings refuse, and why; lowerings of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph.errors import UserError
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op_table import OPS
from qgraph.lowering import LOWERINGS, register_lowering
from qgraph.lowering.base import Lowering, LoweringContext, lowering_of, support
from qgraph.pipeline import Pipeline
from qgraph.quantization import calibrate, convert, prepare
from qgraph.targets import get_target
from tests.support.models import Forward

IMAGE = (2, 4, 6, 6)


def prepared(forward: Callable[..., Any], shape: tuple[int, ...] = IMAGE, **children: Any) -> fx.GraphModule:
    return prepare(Forward(forward, **children).eval(), torch.randn(shape))


@pytest.mark.parametrize(
    ("forward", "shape", "children", "words"),
    [
        (lambda m, x: F.pad(x.relu(), (1, 1), value=float("-inf")), IMAGE, {}, "it pads with -inf"),
        (lambda m, x: F.pad(x.relu(), (1, 1), value=float("nan")), IMAGE, {}, "it pads with nan"),
        (lambda m, x: x.relu() + float("inf"), IMAGE, {}, "it computes with inf"),
        (lambda m, x: x.relu() * float("nan"), IMAGE, {}, "it computes with nan"),
        (lambda m, x: torch.div(x.relu(), 2.0, rounding_mode="floor"), IMAGE, {}, "rounds its quotient"),
        (lambda m, x: x.relu() / 0.0, IMAGE, {}, "divides"),
        (lambda m, x: torch.clamp(x.relu(), max=x.tanh()), IMAGE, {}, "a bound is computed"),
        (lambda m, x: x.relu().mean(), IMAGE, {}, "averages over the batch"),
        (lambda m, x: x.relu().sum(1, dtype=torch.float64), IMAGE, {}, "float64"),
        (lambda m, x: m.up(x, output_size=[14, 14]), IMAGE, {"up": nn.ConvTranspose2d(4, 4, 3, 2)}, "output size"),
        (lambda m, x: F.conv2d(x.relu(), x.sigmoid()[:1, :, :3, :3]), IMAGE, {}, "computed in the forward"),
        (lambda m, x: F.max_pool2d(x.relu(), 2, return_indices=True)[0], IMAGE, {}, "indices"),
        (
            lambda m, x: F.grid_sample(x, x[:, :2].movedim(1, 3), mode="bicubic", align_corners=True),
            IMAGE,
            {},
            "bicubic",
        ),
        (lambda m, x: x.relu().double() * 2.0, IMAGE, {}, "f64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(forward: Callable[..., Any], shape: tuple[int, ...], children: dict[str, Any], words: str) -> None:
    gm = prepared(lambda m, x: (x.sigmoid(), forward(m, x)), shape, **children)
    reasons = [info(node).float_reason or "" for node in gm.graph.nodes]
    assert any(words in reason for reason in reasons), reasons
    refused = next(node for node in gm.graph.nodes if words in (info(node).float_reason or ""))
    assert info(refused).source is not None
    assert any(words in note for note in graph_info(gm).notes)
    if "inf" not in words and "nan" not in words and "divides" not in words:
        calibrate(gm, [torch.randn(shape)], progress=False)
        x = torch.randn(shape)
        integer, simulated = convert(gm)(x), gm(x)
        for one, two in zip(integer, simulated, strict=True):
            assert (one.shape, one.dtype) == (two.shape, two.dtype)


def test_an_operator_the_target_does_not_have() -> None:
    bpu = get_target("bpu")
    without = replace(bpu, name="bpu without sigmoid", ops={k: v for k, v in bpu.ops.items() if k != "sigmoid"})
    model = Forward(lambda m, x: x.sigmoid().relu() + x).eval()
    gm = prepare(model, torch.randn(2, 4), target=without)
    assert [info(node).float_reason for node in gm.graph.nodes if info(node).op.name == "sigmoid"] == [
        "bpu without sigmoid has no sigmoid"
    ]


# --- lowerings of other packages -----------------------------------------------------------------------------------


class Nothing(Lowering):
    """Hands its operand on."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        operand = node.all_input_nodes[0]
        ctx.moved(operand, operand, ctx.qparams(operand))
        return operand


@pytest.fixture
def registered() -> Iterator[str]:
    yield "of a test"
    LOWERINGS.pop("of a test", None)


def test_registering(registered: str) -> None:
    lowering = register_lowering(registered, Nothing())
    assert LOWERINGS[registered] is lowering
    with pytest.raises(UserError, match="a lowering named 'of a test' exists already"):
        register_lowering(registered, Nothing())


def relu_node(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in gm.graph.nodes if info(node).op.name == "relu")


def test_a_lowering_that_is_not_registered(registered: str) -> None:
    gm = prepared(lambda m, x: x.sigmoid().relu())
    node = relu_node(gm)
    op = replace(info(node).op, lowering="relux")
    Editor(gm, "test").annotate(node, op=op)
    with pytest.raises(UserError, match="no lowering is named 'relux'") as caught:
        lowering_of(node)
    assert "did you mean 'relu'" in str(caught.value)
    assert "test_support.py:" in str(caught.value)


def test_an_operator_without_lowering() -> None:
    gm = Pipeline.parse("canonicalize").run(prepared_capture(lambda m, x: torch.cummax(x, -1).values)).gm
    node = next(node for node in gm.graph.nodes if "cummax" in info(node).site)
    verdict = support(node, get_target("bpu"))
    assert not verdict
    assert verdict.reason == "no integer form of torch.cummax is known"


def prepared_capture(forward: Callable[..., Any]) -> fx.GraphModule:
    from qgraph.capture import trace

    return trace(Forward(forward).eval(), torch.randn(2, 4))


def test_what_is_written_in_place_stays_float() -> None:
    gm = Pipeline.parse("canonicalize").run(prepared_capture(lambda m, x: x.relu())).gm
    node = relu_node(gm)
    assert support(node, get_target("bpu"))
    Editor(gm, "test").annotate(node, unstable=True)
    assert support(node, get_target("bpu")).reason == "its memory is written in place"


@pytest.mark.parametrize(
    ("function", "words"),
    [(lambda values: values.sum(), "is not elementwise"), (lambda values: values.nothing, "the function of erf fails")],
)
def test_functions_of_tables_are_elementwise(function: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3)
    graph = prepare(Forward(lambda m, x: torch.erf(x)).eval(), x)
    calibrate(graph, [x], progress=False)
    entry = OPS.named("erf")
    monkeypatch.setitem(entry.__dict__, "scalar_function", function)
    with pytest.raises(UserError, match=words) as raised:
        convert(graph)
    assert "site _generated_erf_0" in str(raised.value)

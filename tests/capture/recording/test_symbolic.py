"""Capture with torch.fx: leaves, optional arguments, agreement with the recorder, and fx's silent mistakes."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph import ExampleInputs
from qgraph.capture import trace
from qgraph.errors import CaptureError
from qgraph.ir.node_info import info
from qgraph.pipeline import CheckLevel, Pipeline
from tests.capture.checks import assert_agrees, called_modules, calls, line_of, sites, snapshot
from tests.capture.dangers import BufferUpdate, PlainAttributeAccumulates


def x(size: int = 2) -> torch.Tensor:
    return torch.randn(size, 4, 6)


def image(size: int = 2) -> torch.Tensor:
    return torch.randn(size, 3, 8, 8)


@fx.wrap
def by_size(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """fx could not trace this one: it branches on a size."""
    return tensor * factor if tensor.shape[0] > 2 else tensor


@fx.wrap
def by_value(tensor: torch.Tensor) -> torch.Tensor:
    """Nor this one: it branches on a value."""
    return tensor * 2 if float(tensor.sum()) > 0 else tensor


@fx.wrap
def rows(tensor: torch.Tensor) -> int:
    return int(tensor.shape[0])


# --- wrapped functions -----------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def forward(self, x):
        y = by_size(x + 1, 3.0)  # wrapped call
        return y - 1


def test_wrapped_functions_stay_leaves() -> None:
    model = Wrapped().eval()
    gm = trace(model, x(), "symbolic")
    node = calls(gm)[1]
    assert node.target is by_size
    assert info(node).site == "_generated_by_size_0"
    assert info(node).source.line == line_of(__file__, "wrapped call")
    for size in (1, 2, 3, 5):
        assert_agrees(model, gm, x(size))


def test_wrapped_functions_may_branch_on_values() -> None:
    class Values(nn.Module):
        def forward(self, x):
            return by_value(x) + 1

    model = Values().eval()
    gm = trace(model, x(), "symbolic")
    for value in (x(3).abs(), -x(5).abs()):
        assert_agrees(model, gm, value)


def test_wrapped_functions_are_numbered() -> None:
    class Twice(nn.Module):
        def forward(self, x):
            return by_size(by_size(x, 2.0), factor=3.0)

    gm = trace(Twice().eval(), x(), "symbolic")
    assert sites(gm) == ["_generated_by_size_0", "_generated_by_size_1"]
    assert_agrees(Twice().eval(), gm, x(7))


def test_wrapped_function_that_returns_a_number() -> None:
    class Rows(nn.Module):
        def forward(self, x):
            return x.reshape(rows(x), -1) / rows(x)

    gm = trace(Rows().eval(), x(), "symbolic")
    for size in (1, 2, 5):
        assert_agrees(Rows().eval(), gm, x(size))


# --- leaf modules ----------------------------------------------------------------------------------------------


class Router(nn.Module):
    """Cannot be traced: it branches on a size."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, scale=1.0, mask=None):
        y = self.linear(x) * scale
        y = y if mask is None else y * mask
        return self.choose(y)

    def choose(self, y):
        return y if y.shape[0] > 2 else -y


class ValueRouter(Router):
    def choose(self, y):
        return y if float(y.sum()) > 0 else -y


class Routed(nn.Module):
    def __init__(self, kind=Router):
        super().__init__()
        self.first, self.second = kind(), kind()

    def forward(self, x):
        return self.second(self.first(x), 2.0, mask=x)  # routed call


@pytest.mark.parametrize("leaf", [[Router], ["first", "second"], [Router, "first"]], ids=["class", "path", "both"])
def test_leaf_modules(leaf: list[type[nn.Module] | str]) -> None:
    model = Routed().eval()
    gm = trace(model, x(), "symbolic", leaf_modules=leaf)
    assert called_modules(gm) == sites(gm) == ["first", "second"]
    assert {info(node).source.line for node in calls(gm)} == {line_of(__file__, "routed call")}
    for size in (1, 2, 5):
        assert_agrees(model, gm, x(size))
        assert_agrees(model, gm, -x(size))


@pytest.mark.parametrize("method", ["symbolic", "jit"])
def test_leaf_modules_may_branch_on_values(method: str) -> None:
    model = Routed(ValueRouter).eval()
    gm = trace(model, x(), method, leaf_modules=[Router])
    assert called_modules(gm) == ["first", "second"]
    assert_agrees(model, gm, -x())


def test_leaf_modules_keep_their_weights() -> None:
    model = Routed().eval()
    gm = trace(model, x(), "symbolic", leaf_modules=[Router])
    example = x()
    before = gm(example)
    with torch.no_grad():
        model.first.linear.weight.zero_()
    assert torch.equal(gm(example), before)


# --- optional arguments ----------------------------------------------------------------------------------------


class Optional(nn.Module):
    def forward(self, x, mask=None, scale=2.0, name="plain"):
        y = x * scale if name == "plain" else x
        return y if mask is None else y * mask


@pytest.mark.parametrize(
    "example",
    [
        lambda: (x(),),
        lambda: (x(), None),
        lambda: (x(), x()),
        lambda: {"x": x(), "mask": x()},
        lambda: {"x": x(), "scale": 3.0},
        lambda: {"x": x(), "mask": None, "scale": 3.0, "name": "other"},
        lambda: (x(), x(), 1.5, "plain"),
    ],
)
def test_optional_arguments(example: Callable[[], object]) -> None:
    model = Optional().eval()
    given = example()
    named = dict(zip(("x", "mask", "scale", "name"), given, strict=False)) if isinstance(given, tuple) else given
    gm = trace(model, given, "symbolic")
    assert_agrees(
        model, gm, **{name: x(2) if isinstance(value, torch.Tensor) else value for name, value in named.items()}
    )
    free = trace(model, given)
    assert [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"] == [
        str(node.target) for node in free.graph.nodes if node.op == "placeholder"
    ]


def test_other_values_of_optional_arguments_are_refused() -> None:
    gm = trace(Optional().eval(), (x(), None, 3.0), "symbolic")
    with pytest.raises(qgraph.UserError, match=r"scale is 4\.0, expected 3\.0"):
        gm(x(), None, 4.0)
    with pytest.raises(qgraph.UserError, match="mask is a tensor"):
        gm(x(), x(), 3.0)


def test_nested_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, batch, factors):
            return batch["a"] * factors[0] + batch["b"][1] * factors[1]

    model = Nested().eval()
    gm = trace(model, ({"a": x(), "b": [x(), x()]}, (2.0, 3.0)), "symbolic")
    assert_agrees(model, gm, {"a": x(), "b": [x(), x()]}, (2.0, 3.0))


def test_variadic_forwards() -> None:
    class Variadic(nn.Module):
        def forward(self, *tensors, scale=1.0, **named):
            return (tensors[0] - tensors[1] * scale) @ named["a"].transpose(-2, -1)

    model = Variadic().eval()
    gm = trace(model, ExampleInputs((x(), x()), {"scale": 2.0, "a": x()}), "symbolic")
    one, two, a = x(), x(), x()
    expected = model(one, two, scale=2.0, a=a)
    assert torch.equal(gm(tensors_0=one, tensors_1=two, scale=2.0, a=a), expected)


# --- agreement with the recorder -------------------------------------------------------------------------------


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.skip = nn.Conv2d(3, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.body(x)
        y += self.skip(x)
        y = F.relu(y)
        return self.head(self.pool(y).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.position = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        x = x + self.position
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(6)
        return x + self.out(F.softmax(scores, dim=-1) @ v)


class Spellings(nn.Module):
    def forward(self, x):
        y = torch.add(x, 1).sub(x * 2)
        y = y.relu() + torch.sigmoid(x) - x.mean(-1, keepdim=True)
        return torch.cat([y, x.permute(0, 2, 1).transpose(1, 2)], dim=1).clamp(-1, 1)


class Sized(nn.Module):
    def forward(self, x):
        b, n = x.shape[0], x.size(1)
        return x.reshape(b, n * 3, 2).permute(0, 2, 1).contiguous().view(b, -1)


class Outputs(nn.Module):
    def forward(self, x):
        values, index = x.max(-1)
        return {"values": [values, index], "x": (x, None, 2)}


class Halves(nn.Module):
    """One block called twice."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x):
        return self.block(x[..., :3]) * self.block(x[..., 3:])


BOTH: list[tuple[type[nn.Module], Callable[..., torch.Tensor]]] = [
    (Convolutions, image),
    (Attention, x),
    (Spellings, x),
    (Sized, x),
    (Outputs, x),
    (Halves, x),
]


@pytest.mark.parametrize(("build", "example"), BOTH, ids=[case[0].__name__ for case in BOTH])
def test_agrees_with_the_recorder(build: type[nn.Module], example: Callable[..., torch.Tensor]) -> None:
    model = build().eval()
    one, two = trace(model, example(), "symbolic"), trace(model, example(), "jit")
    assert qgraph.graph_info(one).method == "symbolic"
    for size in (1, 2, 5, 7):
        assert_agrees(model, one, example(size))
        assert_agrees(model, two, example(size))


def computing(gm: fx.GraphModule) -> Counter[str]:
    """Operators that are not part of finding or passing on sizes."""
    return Counter(info(node).op.name for node in calls(gm) if info(node).op.name not in ("size", "scalar", "field"))


@pytest.mark.parametrize(("build", "example"), BOTH, ids=[case[0].__name__ for case in BOTH])
def test_the_same_operators_after_canonicalization(
    build: type[nn.Module], example: Callable[..., torch.Tensor]
) -> None:
    model = build().eval()
    counts = []
    for method in ("symbolic", "jit"):
        result = Pipeline.parse("canonicalize").run(trace(model, example(), method), checks=CheckLevel.CLAIMS)
        assert_agrees(model, result.gm, example(3))
        found = computing(result.gm)
        counts.append(found)
    assert counts[0] == counts[1]


# --- failures --------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # branch on a value
            return x * 2
        return x


class Iterates(nn.Module):
    def forward(self, x):
        return sum(row for row in x)  # iteration over a proxy


class Converts(nn.Module):
    def forward(self, x):
        return x * float(x.max())  # conversion to a number


class Writes(nn.Module):
    def forward(self, x):
        y = x * 2
        y[:, 0] = 1.0  # item assignment
        return y


class Zeros(nn.Module):
    def forward(self, x):
        return torch.zeros(x.shape[0], 4, 6) + x  # size of a factory


@pytest.mark.parametrize(
    ("build", "marker"),
    [
        (Branches, "branch on a value"),
        (Iterates, "iteration over a proxy"),
        (Converts, "conversion to a number"),
        (Writes, "item assignment"),
        (Zeros, "size of a factory"),
    ],
)
def test_failures_of_fx_name_the_users_line(build: type[nn.Module], marker: str) -> None:
    with pytest.raises(CaptureError) as raised:
        trace(build().eval(), x(), "symbolic")
    message = str(raised.value)
    assert f"test_symbolic.py:{line_of(__file__, marker)}" in message
    assert 'method="jit"' in message


class Fails(nn.Module):
    def forward(self, x):
        return x @ torch.ones(5)  # fails when it runs


def test_a_model_that_fails_on_the_example_names_the_users_line() -> None:
    with pytest.raises(CaptureError) as raised:
        trace(Fails().eval(), x(), "symbolic")
    assert f"test_symbolic.py:{line_of(__file__, 'fails when it runs')}" in str(raised.value)


# --- fx's silent mistakes --------------------------------------------------------------------------------------


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x).float()


class DrawsOnce(nn.Module):
    """fx runs this `rand` while tracing: no node of the graph depends on the input there."""

    def forward(self, x):
        return x + torch.rand(6)


class DrawsLike(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class PythonState(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class BufferRebound(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.total = self.total + 1
        return x + self.total


class WriteToParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        self.weight.data.mul_(0.5)
        return x * self.weight


SILENT = [
    Autocast,
    DrawsOnce,
    DrawsLike,
    PythonState,
    BufferUpdate,
    BufferRebound,
    PlainAttributeAccumulates,
    WriteToParameter,
]


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("build", SILENT)
def test_silent_mistakes_of_fx_are_refused(build: type[nn.Module], verify: bool) -> None:
    with pytest.raises(CaptureError):
        trace(build().eval(), x(), "symbolic", verify=verify)


@pytest.mark.parametrize("build", SILENT)
def test_the_model_is_not_changed_by_symbolic_capture(build: type[nn.Module]) -> None:
    model = build().eval()
    before = snapshot(model)
    with contextlib.suppress(qgraph.QGraphError):
        trace(model, x(), "symbolic")
    assert snapshot(model) == before


def test_write_that_reaches_a_parameter_without_a_proxy() -> None:
    """fx sees neither the write nor the read."""

    class Renormalizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x):
            self.scale.mul_(2)
            return x + self.scale

    model = Renormalizes().eval()
    with pytest.raises(CaptureError):
        trace(model, x(), "symbolic")
    assert torch.equal(model.scale, torch.ones(1))


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_branch_on_the_batch_size(verify: bool) -> None:
    """fx keeps sizes as nodes, so a comparison of one is control flow and must be refused."""

    class Single(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] == 1 else x

    with pytest.raises(CaptureError):
        trace(Single().eval(), x(), "symbolic", verify=verify)


def test_fixed_sizes_are_noticed() -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 24)

    gm = trace(Fixed().eval(), x(), "symbolic")
    assert "fails at batch" in str(qgraph.graph_info(gm).batch_fixed)
    with pytest.raises(qgraph.UserError, match="batch size is fixed"):
        gm(x(5))


def test_in_place_operations() -> None:
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = x * 2
            y.add_(1)
            y += x
            z = self.relu(y)
            return z + y

    model = InPlace().eval()
    gm = trace(model, x(), "symbolic")
    for size in (1, 2, 5):
        assert_agrees(model, gm, x(size))


def test_in_place_on_a_view() -> None:
    class View(nn.Module):
        def forward(self, x):
            y = x * 2
            y[:, 0].add_(1)
            y.view(-1).mul_(2)
            a, _ = y.chunk(2, -1)
            a.relu_()
            return y

    model = View().eval()
    gm = trace(model, x(), "symbolic")
    for size in (1, 2, 5):
        assert_agrees(model, gm, x(size))

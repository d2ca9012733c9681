"""Wrapped, hooked, reparametrized and already captured models."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import qgraph
from qgraph.capture import trace
from qgraph.errors import UserError
from tests.capture.checks import Mixed, assert_agrees, called_modules, network, run, sites, x
from tests.support.models import Forward

# --- wrapped, hooked and reparametrized models -----------------------------------------------------------------


def test_data_parallel() -> None:
    model = nn.DataParallel(network()).eval()
    gm = trace(model, x())
    assert called_modules(gm) == ["0", "1", "2"]
    assert_agrees(model.module, gm, x(5))


def test_compiled_model_is_not_compiled_for_capture() -> None:
    model = network()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(torch.compile(model, backend="eager"))):
        gm = trace(wrapped.eval(), x())
        assert called_modules(gm) == ["0", "1", "2"]
        assert qgraph.graph_info(gm).model == "Sequential"
        assert_agrees(model, gm, x(5))


def test_compiled_submodule_keeps_its_names() -> None:
    model = Forward(lambda m, x: m.inner(x) + 1, inner=torch.compile(network(), backend="eager")).eval()
    gm = trace(model, x())
    assert_agrees(model, gm, x(5))
    assert called_modules(gm) == ["inner.0", "inner.1", "inner.2"]


def test_a_model_compiled_in_place() -> None:
    model = network()
    model.compile(backend="eager")
    gm = trace(model, x())
    assert called_modules(gm) == ["0", "1", "2"]
    assert_agrees(model, gm, x(5))


def test_a_scripted_model_is_captured_or_refused_clearly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(network())
    try:
        gm = trace(model, x())
    except UserError:
        return
    assert_agrees(model, gm, x(5))


def hooked(kind: str) -> nn.Module:
    model = network()
    if kind == "forward":
        model[0].register_forward_hook(lambda module, args, output: output * 2)
    if kind == "forward with kwargs":
        model[0].register_forward_hook(lambda module, args, named, output: output + 1, with_kwargs=True)
    if kind == "pre":
        model[2].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    if kind == "pre with kwargs":
        model[2].register_forward_pre_hook(lambda module, args, named: ((args[0] * 3,), named), with_kwargs=True)
    if kind == "root":
        model.register_forward_hook(lambda module, args, output: (output, args[0]))
    if kind == "only looks":
        model[0].register_forward_hook(lambda module, args, output: None)
    if kind == "backward":
        model[0].register_full_backward_hook(lambda module, got, gave: None)
    if kind == "always called":
        model[0].register_forward_hook(lambda module, args, output: output.sin(), always_call=True)
    return model


@pytest.mark.parametrize(
    "kind",
    ["forward", "forward with kwargs", "pre", "pre with kwargs", "root", "only looks", "backward", "always called"],
)
def test_hooks(kind: str) -> None:
    model = hooked(kind)
    gm = trace(model, x())
    for size in (1, 2, 5):
        assert_agrees(model, gm, x(size))


class Extractor(nn.Module):
    """Hooks that keep features on the module itself, as feature extractors do."""

    def __init__(self, bound: bool):
        super().__init__()
        self.net = network()
        self.features: dict[str, torch.Tensor] = {}
        hook = self.keep if bound else (lambda module, args, output: self.features.update(first=output))
        self.net[0].register_forward_hook(hook)

    def keep(self, module, args, output):
        self.features["first"] = output

    def forward(self, x):
        y = self.net(x)
        return y + self.features["first"][..., :2]


@pytest.mark.parametrize("used", [True, False], ids=["used before", "fresh"])
@pytest.mark.parametrize("bound", [True, False], ids=["bound method", "closure"])
def test_hooks_that_write_to_their_model(bound: bool, used: bool) -> None:
    model = Extractor(bound).eval()
    if used:
        run(model, (x(),))
    gm = trace(model, x())
    assert_agrees(model, gm, x(5))


class BackReference(nn.Module):
    """A child that knows its parent."""

    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.__dict__["parent"] = parent
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(x) * self.parent.scale + self.parent.norm(x)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.child = BackReference.Child(self)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.child(x) + self.norm(x)


def test_a_child_that_knows_its_parent() -> None:
    model = BackReference().eval()
    gm = trace(model, x())
    assert called_modules(gm) == ["child.linear", "norm", "norm"]
    assert_agrees(model, gm, x(5))


def old_style(kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "weight_norm":
            return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 6)), nn.ReLU()).eval()
        return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 6)), nn.ReLU()).eval()


def new_style(kind: str) -> nn.Module:
    wrap = parametrizations.weight_norm if kind == "weight_norm" else parametrizations.spectral_norm
    return nn.Sequential(wrap(nn.Linear(6, 6)), nn.ReLU()).eval()


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("build", [old_style, new_style])
def test_normalized_weights(build: Callable[[str], nn.Module], kind: str) -> None:
    torch.manual_seed(1)
    model = build(kind)
    run(model, (x(),))
    gm = trace(model, x())
    for size in (1, 2, 5):
        assert_agrees(model, gm, x(size))


def test_cached_parametrizations() -> None:
    model = new_style("weight_norm")
    with parametrize.cached():
        gm = trace(model, x())
    assert_agrees(model, gm, x(5))


class InPlaceModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.acts = nn.ModuleList(
            [nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True), nn.SiLU(inplace=True), nn.Hardswish(inplace=True)]
        )
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        y = self.conv(x)
        for act in self.acts:
            act(y)
        identity = y
        y = self.drop(self.acts[0](y))
        y += identity
        return y


def test_in_place_modules() -> None:
    model = InPlaceModules().eval()
    gm = trace(model, torch.randn(2, 3, 4, 4))
    for size in (1, 2, 5):
        assert_agrees(model, gm, torch.randn(size, 3, 4, 4))
    assert model.acts[0].inplace, "the user's module stays in place"


@pytest.mark.parametrize("order", ["pure first", "pure last"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_one_in_place_module_used_where_it_may_and_where_it_may_not_become_pure(order: str, verify: bool) -> None:
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def alone(self, x):
            return self.relu(x * 1)

        def seen(self, x):
            y = x - 0.5
            view = y.view(-1)
            self.relu(y)
            return view

        def forward(self, x):
            if order == "pure first":
                a = self.alone(x)
                return a.view(-1) + self.seen(x)
            b = self.seen(x)
            return b + self.alone(x).view(-1)

    model = Shared().eval()
    gm = trace(model, x(), verify=verify)
    assert_agrees(model, gm, x())


# --- graphs of graphs ------------------------------------------------------------------------------------------


def test_a_captured_graph_can_be_copied() -> None:
    model = network()
    gm = copy.deepcopy(trace(model, x()))
    assert_agrees(model, gm, x(5))


def test_a_captured_graph_can_be_saved() -> None:
    torch.save(trace(network(), x()), io.BytesIO())


def test_a_forward_that_renews_its_own_table() -> None:
    class Renews(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("grid", torch.zeros(4, 1))
            self.register_buffer("position", torch.randn(4, 6))

        def forward(self, x):
            self.grid = torch.arange(4.0).view(4, 1)
            return x + self.grid + self.position.to(x.dtype)

    model = Renews().eval()
    gm = trace(model, x())
    assert_agrees(model, gm, x(5))


def test_tracing_a_traced_graph() -> None:
    model = Mixed().eval()
    first = trace(model, torch.randn(2, 3, 6, 6))
    second = trace(first, torch.randn(2, 3, 6, 6))
    assert called_modules(second) == called_modules(first)
    for size in (1, 2, 5):
        assert_agrees(model, second, torch.randn(size, 3, 6, 6))
    with pytest.raises(UserError):
        second(torch.randn(2, 3, 7, 7))


def test_a_traced_graph_inside_a_model() -> None:
    inner = trace(network(), x())
    model = Forward(lambda m, x: m.inner(x) + m.inner(x * 2), inner=inner).eval()
    gm = trace(model, x())
    assert called_modules(gm) == ["inner.0", "inner.1", "inner.2"] * 2
    assert_agrees(model, gm, x(5))


def test_constants_of_a_traced_graph_do_not_collide_with_new_ones() -> None:
    table = torch.from_numpy(np.arange(6, dtype="float32"))
    other = torch.from_numpy(np.ones(6, dtype="float32") * 5)
    inner = trace(Forward(lambda m, x: x + torch.from_numpy(np.arange(6, dtype="float32"))).eval(), x())
    assert "_constant_0" in dict(inner.named_buffers())
    inner.register_forward_hook(lambda module, args, output: output * other)
    gm = trace(inner, x())
    example = x()
    assert torch.equal(gm(example), (example + table) * other)


def test_symbolically_traced_graph_is_a_model_like_any_other() -> None:
    model = network()
    gm = trace(torch.fx.symbolic_trace(model).eval(), x())
    assert_agrees(model, gm, x(5))


def test_deep_nesting() -> None:
    model: nn.Module = nn.Linear(6, 6)
    for _ in range(60):
        model = nn.Sequential(model)
    model = model.eval()
    gm = trace(model, x())
    assert called_modules(gm) == [".".join(["0"] * 60)]
    assert_agrees(model, gm, x(5))


def test_a_long_chain() -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(200)]).eval()
    gm = trace(model, x())
    assert len(sites(gm)) == 200
    assert_agrees(model, gm, x(5))


def test_a_deeply_nested_input() -> None:
    nested: Any = x()
    for _ in range(50):
        nested = [nested]

    def forward(m, value):
        while isinstance(value, list):
            value = value[0]
        return value * 2

    model = Forward(forward).eval()
    gm = trace(model, (nested,))
    assert_agrees(model, gm, nested)


def test_a_leaf_module_as_the_model() -> None:
    model = nn.Linear(6, 3).eval()
    gm = trace(model, x())
    assert_agrees(model, gm, x(5))


def test_an_uninitialized_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(3)).eval()
    with pytest.raises(UserError) as raised:
        trace(model, x())
    assert "cannot be copied" not in str(raised.value)
    assert model[0].has_uninitialized_params(), "and stays uninitialized"


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = network()
    with pytest.raises(UserError):
        trace(model, x())


@pytest.mark.parametrize("name", ['a"q', "back\\slash", "two\nlines"])
def test_names_that_code_cannot_hold(name: str) -> None:
    model = nn.Sequential(nn.Sequential()).eval()
    model[0].add_module(name, nn.Identity().eval())
    with pytest.raises(UserError) as raised:
        trace(model, x())
    assert repr(name) in str(raised.value)
    assert "where: 0" in str(raised.value)


def test_names_that_are_no_identifiers() -> None:
    model = nn.Sequential()
    model.add_module("a b-c", nn.Linear(6, 3))
    model.add_module("class", nn.ReLU())
    model.add_module("größe'", nn.Linear(3, 3))
    gm = trace(model.eval(), x())
    assert_agrees(model, gm, x(5))

"""`Tracer.dynamic_block`: names of calls whose number varies, and what is wrong with a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import fx, nn

from qgraph import Tracer, UserError, graph_info, info, trace

METHODS = ("jit", "symbolic")


class _Model(nn.Module):
    """A forward given from outside, with a convolution and a small branch."""

    def __init__(self, run: Callable[[_Model, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def _looped(model: _Model, x: torch.Tensor) -> torch.Tensor:
    out = x
    for _ in range(3):
        with Tracer.dynamic_block(model, "camera"):
            out = model.conv(x) + out
    return out + x


def _repeats(gm: fx.GraphModule) -> dict[str, str]:
    records = [info(node) for node in gm.graph.nodes]
    return {record.site: record.repeated.identity for record in records if record.repeated is not None}


def _traced(run: Callable[[_Model, torch.Tensor], torch.Tensor], method: str) -> fx.GraphModule:
    return trace(_Model(run).eval(), torch.randn(2, 3, 4, 4), method)


def test_outside_of_a_capture_a_block_does_nothing() -> None:
    model, x = _Model(_looped), torch.randn(2, 3, 4, 4)
    conv = model.conv(x)
    assert torch.equal(model(x), conv + (conv + (conv + x)) + x)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_of_every_iteration_is_one_site(method: str) -> None:
    gm = _traced(_looped, method)
    sites = [info(node).site for node in gm.graph.nodes if info(node).op.name == "add"]
    add = "camera._generated_add_0"
    assert sites == [add, f"{add}(1)", f"{add}(2)", "_generated_add_0"]
    repeats = _repeats(gm)
    assert {repeats[site] for site in ("conv", "conv(1)", "conv(2)")} == {"camera:conv#0"}
    assert {repeats[site] for site in sites[:3]} == {add}
    assert "_generated_add_0" not in repeats
    assert not graph_info(gm).notes


@pytest.mark.parametrize("method", METHODS)
def test_two_calls_on_one_line_are_two_sites(method: str) -> None:
    def run(model: _Model, x: torch.Tensor) -> torch.Tensor:
        out = x
        for _ in range(2):
            with Tracer.dynamic_block(model, "step"):
                out = model.conv(out) + model.conv(x) + x
        return out

    repeats = _repeats(_traced(run, method))
    assert repeats["conv"] == repeats["conv(2)"] == "step:conv#0"
    assert repeats["conv(1)"] == repeats["conv(3)"] == "step:conv#1"
    assert repeats["step._generated_add_1(1)"] == "step._generated_add_1"


@pytest.mark.parametrize("method", METHODS)
def test_calls_that_some_iterations_leave_out_do_not_shift_the_others(method: str) -> None:
    def run(model: _Model, x: torch.Tensor) -> torch.Tensor:
        out = x
        for number in range(3):
            with Tracer.dynamic_block(model, "step"):
                if number == 1:
                    out = out + 1
                out = out + x
        return out

    gm = _traced(run, method)
    sites = [info(node).site for node in gm.graph.nodes if info(node).op.name == "add"]
    first, second = "step._generated_add_0", "step._generated_add_1"
    assert sites == [first, second, f"{first}(1)", f"{first}(2)"]


@pytest.mark.parametrize("method", METHODS)
def test_calls_inside_submodules_belong_to_the_block(method: str) -> None:
    def run(model: _Model, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            with Tracer.dynamic_block(model, "step"):
                x = model.branch(x)
        return x

    repeats = _repeats(_traced(run, method))
    assert repeats["branch.0"] == repeats["branch.0(1)"]
    assert repeats["branch.1"] == repeats["branch.1(1)"]
    assert repeats["branch.0"] != repeats["branch.1"]


@pytest.mark.parametrize("method", METHODS)
def test_blocks_nest_and_need_no_name(method: str) -> None:
    def nested(model: _Model, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            with Tracer.dynamic_block(model, "outer"):
                for _ in range(2):
                    with Tracer.dynamic_block(model, "inner"):
                        x = x + 1
        return x

    def anonymous(model: _Model, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            with Tracer.dynamic_block():
                x = x + 1
        for _ in range(2):
            with Tracer.dynamic_block():
                x = x + 2
        return x

    assert set(_repeats(_traced(nested, method)).values()) == {"outer.inner._generated_add_0"}
    expected = {"_dynamic_block_0._generated_add_0", "_dynamic_block_1._generated_add_0"}
    assert set(_repeats(_traced(anonymous, method)).values()) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_block_around_the_loop_is_noted_with_its_line(method: str) -> None:
    def run(model: _Model, x: torch.Tensor) -> torch.Tensor:
        with Tracer.dynamic_block(model, "step"):
            for _ in range(3):
                x = x + 1
        return x

    (note,) = graph_info(_traced(run, method)).notes
    assert "dynamic block step contains a loop" in note
    line = run.__code__.co_firstlineno + 3
    assert f"test_blocks.py:{line}" in note


@pytest.mark.parametrize("method", METHODS)
def test_a_block_that_ran_once_is_noted(method: str) -> None:
    def run(model: _Model, x: torch.Tensor) -> torch.Tensor:
        with Tracer.dynamic_block(model, "step"):
            return x + 1

    (note,) = graph_info(_traced(run, method)).notes
    assert "dynamic block step ran once" in note


def _misuses() -> Iterator[tuple[str, Callable[[_Model], object], str]]:
    yield "text first", lambda model: Tracer.dynamic_block("step", model), "the text 'step'"  # type: ignore[arg-type]
    yield "no module", lambda model: Tracer.dynamic_block(3, "step"), "is a int"  # type: ignore[arg-type]
    yield "another module", lambda model: Tracer.dynamic_block(model.conv, "step"), "given the module conv"
    yield "a foreign module", lambda model: Tracer.dynamic_block(nn.ReLU(), "step"), "is no part of the model"
    yield "a bad name", lambda model: Tracer.dynamic_block(model, "a.b"), "name of a dynamic block is 'a.b'"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "message"), [pytest.param(*rest, id=name) for name, *rest in _misuses()])
def test_misuse_is_an_error(make: Callable[[_Model], object], message: str, method: str) -> None:
    def run(model: _Model, x: torch.Tensor) -> torch.Tensor:
        with make(model):  # type: ignore[attr-defined]
            return x + 1

    with pytest.raises(UserError, match=message) as caught:
        _traced(run, method)
    assert "test_blocks.py" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_nested_blocks_of_one_name_are_refused(method: str) -> None:
    def run(model: _Model, x: torch.Tensor) -> torch.Tensor:
        with Tracer.dynamic_block(model, "step"), Tracer.dynamic_block(model, "step"):
            return x + 1

    with pytest.raises(UserError, match="inside another one of this name"):
        _traced(run, method)

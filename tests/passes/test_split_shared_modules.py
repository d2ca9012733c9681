"""split-shared-modules: one module per call over the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from passes.split_shared_modules import SplitSharedModules
from qgraph.capture import trace
from qgraph.errors import UserError
from qgraph.ir.node_info import info, module_of
from qgraph.pipeline import Pipeline
from tests.passes.models import before_and_after, check_all, check_values, computing, randomize_norms
from tests.passes.test_detect_shared_modules import EXAMPLE, Shared
from tests.support.models import Forward
from tests.support.passes import run_passes

PASS = "split-shared-modules"


def repeated(calls: int) -> nn.Module:
    def forward(m, x):
        for _ in range(calls):
            x = m.norm(m.conv(x))
        return x

    children = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    return randomize_norms(Forward(forward, **children)).eval()


IMAGE = torch.zeros(2, 4, 5, 5)


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_one_module_per_call_with_the_same_tensors(calls: int) -> None:
    model = repeated(calls)
    gm = trace(model, IMAGE)
    result = Pipeline.parse(PASS).run(gm)
    assert result.changed == (calls > 1)
    nodes = computing(result.gm)
    paths = [name + (f"({call})" if call else "") for call in range(calls) for name in ("conv", "norm")]
    assert [node.target for node in nodes] == paths
    assert [info(node).site for node in nodes] == paths
    assert len({id(module_of(node)) for node in nodes}) == len(nodes)
    for name, tensors in (("conv", ("weight", "bias")), ("norm", ("weight", "bias", "running_mean", "running_var"))):
        for node in nodes:
            if str(node.target).startswith(name):
                for tensor in tensors:
                    assert getattr(module_of(node), tensor) is getattr(getattr(gm, name), tensor)
    assert sum(1 for _ in result.gm.parameters()) == 4
    check_all(model, result, IMAGE, PASS)


def test_clones_are_apart() -> None:
    gm = run_passes(repeated(2), IMAGE, PASS).gm
    first, second = gm.get_submodule("conv"), gm.get_submodule("conv(1)")
    second.extra = 1
    second.weight = nn.Parameter(torch.zeros_like(first.weight))
    assert not hasattr(first, "extra")
    assert first.weight.abs().max() > 0


def test_the_captured_graph_is_left_alone() -> None:
    gm = trace(repeated(3), IMAGE)
    before = [name for name, _ in gm.named_modules()]
    Pipeline.parse(PASS).run(gm)
    assert [name for name, _ in gm.named_modules()] == before
    assert [node.target for node in computing(gm)] == ["conv", "norm"] * 3


def test_notes_and_golden(golden: Callable[[str], None]) -> None:
    model = Shared()
    result = run_passes(model, EXAMPLE, PASS)
    assert len(result.notes) == 5
    assert result.notes[0] == "split act (ReLU, without weights) is called 3 times: act, act(1), act(2)"
    called = [f"%{node.name} calls {node.target}\n" for node in computing(result.gm) if node.op == "call_module"]
    golden(before_and_after(model, EXAMPLE, result) + "\n" + "".join(called))
    check_all(model, result, EXAMPLE, PASS)
    assert run_passes(model, EXAMPLE, f"{PASS},detect-shared-modules").notes == result.notes


def test_nested_clones_stand_beside_the_original() -> None:
    gm = run_passes(Shared(), EXAMPLE, PASS).gm
    assert gm.get_submodule("block.conv(1)").weight is gm.get_submodule("block.conv").weight
    assert gm.get_submodule("head.0(1)").bias is gm.get_submodule("head.0").bias


@pytest.mark.parametrize(
    ("only", "split"),
    [
        ("act", {"act(1)", "act(2)"}),
        ("block.conv+head.2", {"block.conv(1)", "head.2(1)"}),
        ("stem", set()),
    ],
)
def test_only(only: str, split: set[str]) -> None:
    text = f"{PASS}{{only={only}}}"
    model = Shared()
    result = run_passes(model, EXAMPLE, text)
    assert {str(node.target) for node in computing(result.gm) if "(" in str(node.target)} == split
    check_all(model, result, EXAMPLE, text)


# BUG: a misspelled path is ignored without a word.
def test_only_with_an_unknown_path() -> None:
    with pytest.raises(UserError, match=r"block\.conf"):
        run_passes(Shared(), EXAMPLE, f"{PASS}{{only=block.conf}}")


def test_text_form() -> None:
    pipeline = Pipeline.parse(f"{PASS}{{only=a+b}}")
    assert pipeline.passes == (SplitSharedModules(only=("a", "b")),)
    assert str(pipeline) == f"{PASS}{{only=a+b}}"
    assert str(SplitSharedModules()) == PASS


def test_a_taken_name_is_avoided() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.add_module("fc(1)", nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.fc(x))

    model = Net().eval()
    result = run_passes(model, torch.randn(2, 3), PASS)
    check_values(model, result.gm, torch.randn(2, 3))

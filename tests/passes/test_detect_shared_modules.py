"""detect-shared-modules: reports every module that is called more than once, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from passes.detect_shared_modules import SharedModule, find_shared_modules
from qgraph.capture import trace
from qgraph.ir.stage import Stage
from qgraph.pipeline import Pipeline
from tests.passes.models import before_and_after, check_all
from tests.support.models import Forward
from tests.support.passes import run_passes

PASS = "detect-shared-modules"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


class Shared(nn.Module):
    """A detection head run on two levels, with one activation module for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block()
        self.act = nn.ReLU()
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), self.act, nn.Conv2d(4, 2, 1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        high = self.block(self.act(self.stem(x)))
        low = self.block(nn.functional.max_pool2d(high, 2))
        return [self.head(level) for level in (high, low)]


EXAMPLE = torch.zeros(2, 3, 4, 4)
REPORT = [
    "act (ReLU, without weights) is called 3 times: act, act(1), act(2)",
    "block.conv (Conv2d, with weights) is called 2 times: block.conv, block.conv(1)",
    "block.act (ReLU, without weights) is called 2 times: block.act, block.act(1)",
    "head.0 (Conv2d, with weights) is called 2 times: head.0, head.0(1)",
    "head.2 (Conv2d, with weights) is called 2 times: head.2, head.2(1)",
]


def test_report() -> None:
    result = run_passes(Shared(), EXAMPLE, PASS)
    assert list(result.notes) == REPORT
    assert not result.changed


def test_golden(golden: Callable[[str], None]) -> None:
    model = Shared()
    result = run_passes(model, EXAMPLE, PASS)
    golden(before_and_after(model, EXAMPLE, result))
    check_all(model, result, EXAMPLE, PASS)


def test_found_modules_are_data() -> None:
    first = find_shared_modules(trace(Shared().eval(), EXAMPLE))[1]
    assert first == SharedModule("block.conv", "Conv2d", True, ("block.conv", "block.conv(1)"))


def alias(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.second(m.first(x))


def test_two_names_of_one_module() -> None:
    linear = nn.Linear(4, 4)
    result = run_passes(Forward(alias, first=linear, second=linear), torch.randn(2, 4), PASS)
    assert list(result.notes) == ["first (Linear, with weights) is called 2 times: first, first(1)"]


@pytest.mark.parametrize(
    "second", [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], ids=["another module", "a tied weight"]
)
def test_not_reported(second: nn.Linear) -> None:
    """Two modules that hold one weight are two modules."""
    first = nn.Linear(4, 4)
    if second.bias is None:
        second.weight = first.weight
    result = run_passes(Forward(alias, first=first, second=second), torch.randn(2, 4), PASS)
    assert result.notes == ()


def test_later_stages() -> None:
    gm = run_passes(Shared(), EXAMPLE, f"canonicalize,fuse-conv-bn-add-relu,{PASS}").gm
    assert gm.meta["qgraph"].stage is Stage.FUSED
    # canonicalize turned the activations into functions
    assert list(Pipeline.parse(PASS).run(gm).notes) == [line for line in REPORT if "with weights" in line]

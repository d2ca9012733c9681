"""clean-up-integer: constants are folded and kept once, equal rescalings are done once, the rest goes; bit exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from qgraph.errors import UserError
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info
from qgraph.pipeline import CheckLevel, Pipeline
from qgraph.quantization import ModuleNameQconfigSetter, calibrate, get_qconfig, prepare, prepare_pipeline
from tests.passes.models import check_values, printed
from tests.support.models import Attention, Forward, Residual, image
from tests.support.passes import assert_idempotent


def lowered(model: nn.Module, example: Any, setter: object = None, **options: Any) -> fx.GraphModule:
    gm = prepare(model.eval(), example, setter, **options)
    calibrate(gm, [example], progress=False)
    return Pipeline.parse("freeze-qparams,lower-to-integer").run(gm).gm


def cleaned(gm: fx.GraphModule) -> fx.GraphModule:
    return Pipeline.parse("clean-up-integer").run(gm, checks=CheckLevel.CLAIMS).gm


def calls(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if integer_name(node.target) == name]


def x() -> torch.Tensor:
    return torch.randn(2, 4)


def of_all_kinds() -> nn.Module:
    """A constant to quantize, one value rescaled alike for two joins, and a shared weight."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.fc(m.fc(x).relu()).sigmoid() + m.offset
        return torch.cat([y, x * 3], 1) + torch.cat([y, x * 3], 1)

    return Forward(forward, fc=nn.Linear(16, 16), offset=torch.linspace(-1, 1, 16))


def test_golden(golden: Callable[[str], None]) -> None:
    example = torch.linspace(-2, 2, 32).reshape(2, 16)
    before = lowered(of_all_kinds(), example)
    golden(printed(before) + "\n" + printed(cleaned(before)))


@pytest.mark.parametrize(
    ("model", "example"),
    [(Residual(), image()), (Attention(), torch.randn(2, 5, 8)), (of_all_kinds(), torch.randn(2, 16))],
    ids=["residual", "attention", "all kinds"],
)
def test_exact_and_idempotent(model: nn.Module, example: torch.Tensor) -> None:
    before = lowered(model, example)
    text = printed(before)
    after = cleaned(before)
    check_values(before, after, example)
    assert_idempotent(after, "clean-up-integer")
    assert printed(before) == text, "the given graph is untouched"


def test_constants_are_quantized_once_and_for_all() -> None:
    before = lowered(Forward(lambda m, x: x + m.offset, offset=torch.tensor([1.0, -2.0, 0.5, 4.0])), x())
    assert len(calls(before, "quantize")) == 2
    after = cleaned(before)
    assert len(calls(after, "quantize")) == 1
    (add,) = calls(after, "add")
    folded = add.all_input_nodes[1]
    assert folded.op == "get_attr"
    assert info(folded).qparams is not None
    assert after.get_buffer(str(folded.target)).tolist() == [32, -64, 16, 127]


def test_equal_rescalings_are_done_once() -> None:
    setter = ModuleNameQconfigSetter({f"_generated_cat_{n}": get_qconfig(fix_scale=0.125) for n in range(2)})
    model = Forward(lambda m, x: torch.cat([x, x.tanh()], 1) * torch.cat([x, x.sigmoid()], 1))
    before = lowered(model, x(), setter)
    assert len(calls(before, "requantize")) == 4
    after = cleaned(before)
    merged = calls(after, "requantize")
    assert len(merged) == 3
    assert info(merged[0]).origins == ("_generated_cat_0", "_generated_cat_1"), "it stands for both"
    check_values(before, after, x())


def test_different_rescalings_are_not() -> None:
    setter = ModuleNameQconfigSetter({f"_generated_cat_{n}": get_qconfig(fix_scale=0.125 * (n + 1)) for n in range(2)})
    model = Forward(lambda m, x: torch.cat([x, x.tanh()], 1) * torch.cat([x, x.sigmoid()], 1))
    assert len(calls(cleaned(lowered(model, x(), setter)), "requantize")) == 4


def test_a_shared_weight_is_kept_once() -> None:
    model = Forward(lambda m, x: m.fc(m.fc(x).sigmoid()), fc=nn.Linear(16, 16))
    before = lowered(model, torch.randn(2, 16))
    after = cleaned(before)
    weights = [{node.args[1] for node in calls(gm, "linear")} for gm in (before, after)]
    assert [len(found) for found in weights] == [2, 1]
    assert sum(buffer.shape == (16, 16) for buffer in after.buffers()) == 1
    check_values(before, after, torch.randn(2, 16))


def test_constants_that_look_alike_and_are_not() -> None:
    """The same bytes in another shape or dtype, and constants too small to be worth it."""
    a, b = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        a.weight.fill_(0.5)
        b.weight.fill_(0.5)
    after = cleaned(lowered(Forward(lambda m, x: m.b(m.a(x).sigmoid()), a=a, b=b), torch.randn(2, 8)))
    assert sorted(tuple(buffer.shape) for buffer in after.buffers() if buffer.dim() == 2) == [(8, 16), (16, 8)]


def test_what_nobody_reads_goes() -> None:
    model = Forward(lambda m, x: (x.tanh(), x.relu())[1])
    before = lowered(model, x(), pipeline=prepare_pipeline().remove("eliminate-dead-code"))
    assert calls(before, "lookup")
    after = cleaned(before)
    assert not calls(after, "lookup")
    targets = {str(node.target) for node in after.graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in after.named_buffers(remove_duplicate=False)} == targets, (
        "no tensor is left that no node reads"
    )


class Counting(nn.Module):
    """Two buffers with equal numbers, of which one counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(64))
        self.register_buffer("zero", torch.zeros(64))
        self.fc = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1.0)
        return torch.atan2(self.fc(x), self.count) + torch.atan2(torch.cummax(x, -1).values, self.zero)


def test_a_buffer_that_is_written_to_is_not_merged() -> None:
    example = torch.randn(2, 64)
    before = lowered(Counting(), example, waive=("state",))
    before.count.zero_()
    after, expected = copy.deepcopy(cleaned(before)), copy.deepcopy(before)
    for _ in range(3):
        assert torch.equal(after(example), expected(example))
    assert after.count.eq(3).all()
    assert after.zero.eq(0).all()


def test_needs_an_integer_graph() -> None:
    gm = prepare(Residual().eval(), image())
    with pytest.raises(UserError, match="clean-up-integer works on a integer graph, but gets a prepared one"):
        cleaned(gm)

"""Patterns, rules and the driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from qgraph.capture import trace
from qgraph.errors import PassError, UserError
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import info
from qgraph.ir.op_table import ADD, CONV2D, MUL, RELU, SIGMOID, TANH
from qgraph.rewrite import Call, Match, Rule, Verdict, any_value, call, constant, no, optional, rewrite_graph, skip, yes
from qgraph.rewrite.pattern import matches
from tests.support.models import Forward, Residual, image
from tests.support.passes import count_ops, nodes_of

X = torch.randn(2, 4)


def captured(function: Callable[..., torch.Tensor], *example: torch.Tensor) -> fx.GraphModule:
    return trace(Forward(lambda m, *xs: function(*xs)).eval(), example or (X,))


def all_matches(pattern: Call, gm: fx.GraphModule) -> list[Match]:
    return [match for node in gm.graph.nodes for match in matches(pattern, node)]


def test_commutative_operands_match_in_either_order() -> None:
    relu, other = call(RELU, any_value()), any_value()
    pattern = call(ADD, relu, other)
    for function in (lambda x: x.relu() + x, lambda x: x + x.relu()):
        (match,) = all_matches(pattern, captured(function))
        assert info(match[relu]).op is RELU
        assert match.value(other).name == "inputs_0"


def test_both_orders_are_offered_where_both_match() -> None:
    left, right = call((RELU, TANH)), call((RELU, TANH))
    found = all_matches(call(ADD, left, right), captured(lambda x: x.relu() + x.tanh()))
    assert [info(match[left]).op for match in found] == [RELU, TANH]


def test_a_pattern_used_twice_must_match_one_value() -> None:
    x = any_value()
    square = call(MUL, x, x)
    assert len(all_matches(square, captured(lambda x: x * x))) == 1
    assert all_matches(square, captured(lambda x: x * x.relu())) == []


def test_constants_are_numbers_and_held_tensors() -> None:
    factor = constant()
    pattern = call(MUL, any_value(), factor)
    assert all_matches(pattern, captured(lambda x: x * 2))[0].value(factor) == 2
    assert len(all_matches(pattern, captured(lambda x, w: x * w, X, X))) == 0
    model = Forward(lambda m, x: x * m.weight, weight=torch.nn.Parameter(torch.ones(4)))
    assert len(all_matches(pattern, trace(model.eval(), X))) == 1


def test_optional_operands() -> None:
    residual = optional(any_value())
    pattern = call(CONV2D, any_value(), residual)
    found = all_matches(pattern, trace(Residual().eval(), image()))
    assert len(found) == 3
    assert all(match.value(residual) is None for match in found)


def test_matches_are_asked_by_pattern_objects() -> None:
    x = any_value()
    (match,) = all_matches(call(RELU, x), captured(torch.relu))
    with pytest.raises(PassError, match="not part of the match"):
        match.value(any_value())


class Swap(Rule):
    """relu -> sigmoid, unless told not to."""

    name = "swap"
    x = any_value()
    root = call(RELU, x)

    def __init__(self, verdict: Callable[[Match], Verdict] = lambda match: yes()) -> None:
        self.verdict = verdict

    def check(self, match: Match) -> Verdict:
        return self.verdict(match)

    def rewrite(self, match: Match, edit: Editor) -> None:
        edit.replace(match.root, edit.call(SIGMOID, match.value(self.x), like=match.root))


class SwapBack(Rule):
    name = "swap-back"
    x = any_value()
    root = call(SIGMOID, x)

    def rewrite(self, match: Match, edit: Editor) -> None:
        edit.replace(match.root, edit.call(RELU, match.value(self.x), like=match.root))


def test_rules_fire_until_none_matches() -> None:
    gm = captured(lambda x: (x.relu() + 1).relu())
    done = rewrite_graph(Editor(gm, "test"), [Swap()])
    assert done.fired == {"swap": 2}
    assert count_ops(gm)["sigmoid"] == 2
    assert done.refusals == {}


def test_refusals_say_rule_reason_site_and_line() -> None:
    gm = captured(lambda x: x.relu() + x.relu())
    done = rewrite_graph(Editor(gm, "test"), [Swap(lambda match: no("not today"))])
    refusals = list(done.refusals.values())
    assert [refusal.site for refusal in refusals] == ["_generated_relu_0", "_generated_relu_1"]
    assert refusals[0].source.file.endswith("test_rewrite.py")
    assert str(refusals[0]).startswith("swap not applied at _generated_relu_0 (")
    assert refusals[0].members == ("_generated_relu_0",)


def test_what_has_nothing_to_do_with_a_rule_is_not_recorded() -> None:
    gm = captured(torch.relu)
    assert rewrite_graph(Editor(gm, "test"), [Swap(lambda match: skip())]).refusals == {}


def test_a_refusal_is_withdrawn_when_the_rule_fires_later() -> None:
    """Refused at first sight, allowed once its neighbour has changed."""

    def after_sigmoid(match: Match) -> Verdict:
        before = match.root.all_input_nodes[0]
        return yes() if info(before).op is not RELU else no("its operand is still a relu")

    gm = captured(lambda x: x.relu().relu())
    order = [node for node in gm.graph.nodes if info(node).op is RELU]
    assert len(order) == 2
    done = rewrite_graph(Editor(gm, "test"), [Swap(after_sigmoid)])
    assert done.fired == {"swap": 2}
    assert done.refusals == {}


def test_rules_that_undo_each_other_are_stopped_with_their_names() -> None:
    with pytest.raises(PassError, match="do not come to an end") as raised:
        rewrite_graph(Editor(captured(torch.relu), "loop"), [Swap(), SwapBack()])
    assert "swap, swap-back" in str(raised.value) or "swap-back, swap" in str(raised.value)
    assert "loop" in str(raised.value)


def test_what_is_written_in_place_is_never_matched() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.view(-1).relu_()  # read below under another name, so the write must stay
        return y + 1

    gm = captured(forward)
    done = rewrite_graph(Editor(gm, "test"), [Swap()])
    assert done.fired == {}
    assert [refusal.reason for refusal in done.refusals.values()] == ["its memory is written in place"]


def test_the_first_rule_that_may_fire_wins() -> None:
    gm = captured(torch.relu)
    first, second = Swap(lambda match: no("first refuses")), Swap()
    second.name = "second"
    done = rewrite_graph(Editor(gm, "test"), [first, second])
    assert done.fired == {"second": 1}
    assert nodes_of(gm, SIGMOID)


def test_malformed_patterns_and_rules_are_refused() -> None:
    with pytest.raises(UserError, match="cannot call 'mul'"):
        call("mul", any_value())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no pattern"):
        call(MUL, any_value(), 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has 1 operand"):
        call(RELU, any_value(), any_value())

    class Rootless(Rule):
        name = "rootless"

        def rewrite(self, match: Match, edit: Editor) -> None: ...

    with pytest.raises(PassError, match="Rootless has no name or no root"):
        rewrite_graph(Editor(captured(lambda x: x.relu()), "test"), [Rootless()])

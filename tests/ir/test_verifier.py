"""Every rule of the verifier: a graph that breaks it is refused, with the rule, the node and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from qgraph import calibrate, convert, prepare, trace
from qgraph.errors import VerifyError
from qgraph.ir.node_info import SitePlan, info, set_info, update_graph_info
from qgraph.ir.op_table import DEQUANT_STUB, FAKE_QUANT, IDENTITY
from qgraph.ir.stage import Stage
from qgraph.ir.verifier import VERIFIER_RULES, VerifierRule, neighbourhood, structural_hash, verify, violations_of
from qgraph.numerics import qint8
from qgraph.pipeline import Pipeline
from tests.support.models import Residual, image


def graph_at(stage: Stage) -> fx.GraphModule:
    if stage is Stage.CAPTURED:
        return trace(Residual().eval(), image())
    if stage is Stage.FUSED:
        passes = "canonicalize,fuse-conv-bn-add-relu"
        return Pipeline.parse(passes).run(graph_at(Stage.CAPTURED)).gm
    prepared = prepare(Residual().eval(), image())
    if stage is Stage.PREPARED:
        return prepared
    calibrate(prepared, [image()], progress=False)
    return convert(prepared)


@pytest.mark.parametrize("stage", list(Stage), ids=str)
def test_graphs_of_every_stage_keep_their_rules(stage: Stage) -> None:
    assert list(violations_of(graph_at(stage))) == []


def node_at(gm: fx.GraphModule, site: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if info(node).site == site)


def read_too_early(gm: fx.GraphModule) -> None:
    first, last = node_at(gm, "stem"), node_at(gm, "fc")
    first.args = (last,)


def second_output(gm: fx.GraphModule) -> None:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    record = info(output)
    set_info(gm.graph.create_node("output", "output", output.args), record)


def without_record(gm: fx.GraphModule) -> None:
    node_at(gm, "conv1").meta.clear()


def module_missing(gm: fx.GraphModule) -> None:
    node_at(gm, "conv1").target = "conv7"


def same_site_twice(gm: fx.GraphModule) -> None:
    node = node_at(gm, "conv1")
    set_info(node, replace(info(node), site="stem"))


def argument_too_many(gm: fx.GraphModule) -> None:
    node = node_at(gm, "_generated_flatten_0")
    node.kwargs = {**node.kwargs, "keep": True}


def identity_left(gm: fx.GraphModule) -> None:
    node = node_at(gm, "_generated_flatten_0")
    node.target, node.kwargs = torch.clone, {}
    set_info(node, replace(info(node), op=IDENTITY))


def unplanned_value(gm: fx.GraphModule) -> None:
    node = node_at(gm, "conv1")
    set_info(node, replace(info(node), plan=None))


def value_around_its_quantizer(gm: fx.GraphModule) -> None:
    node = node_at(gm, "conv2")
    quantizer = next(user for user in node.users if info(user).op is FAKE_QUANT)
    reader = next(iter(quantizer.users))
    reader.replace_input_with(quantizer, node)


def stub_left(gm: fx.GraphModule) -> None:
    node = next(node for node in gm.graph.nodes if node.op == "call_function" and "flatten" in str(node.target))
    set_info(node, replace(info(node), op=DEQUANT_STUB))


def codes_and_floats(gm: fx.GraphModule) -> None:
    flatten = next(node for node in gm.graph.nodes if node.op == "call_function" and "flatten" in str(node.target))
    entry = next(node for node in gm.graph.nodes if node.op == "placeholder")
    flatten.target, flatten.args, flatten.kwargs = torch.add, (*flatten.args, entry), {}


BROKEN: list[tuple[str, Stage, Callable[[fx.GraphModule], None], str, str]] = [
    ("well-formed", Stage.CAPTURED, read_too_early, "reads fc", "stem"),
    ("well-formed", Stage.CAPTURED, second_output, "2 output nodes", ""),
    ("recorded", Stage.CAPTURED, without_record, "carries no record", "conv1"),
    ("resolvable", Stage.CAPTURED, module_missing, "no module at 'conv7'", "conv1"),
    ("unique-sites", Stage.CAPTURED, same_site_twice, "'stem' is also that of stem", "conv1"),
    ("arguments-fit", Stage.FUSED, argument_too_many, "keep", "_generated_flatten_0"),
    ("no-identities", Stage.FUSED, identity_left, "removed by canonicalize", "_generated_flatten_0"),
    ("fake-quant-follows-plan", Stage.PREPARED, unplanned_value, "without a plan", "conv1"),
    ("fake-quant-follows-plan", Stage.PREPARED, value_around_its_quantizer, "unquantized", "conv2"),
    ("floats-behind-stubs", Stage.INTEGER, stub_left, "stub of the prepared stage", "_generated_flatten_0"),
    ("floats-behind-stubs", Stage.INTEGER, codes_and_floats, "mixes integer codes and floats", "_generated_flatten_0"),
]


@pytest.mark.parametrize(
    ("rule", "stage", "spoil", "words", "place"), BROKEN, ids=[spoil.__name__ for _, _, spoil, _, _ in BROKEN]
)
def test_a_broken_rule_is_named_with_its_node(
    rule: str, stage: Stage, spoil: Callable[[fx.GraphModule], None], words: str, place: str
) -> None:
    gm = graph_at(stage)
    spoil(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm, context="after the pass spoil")
    text = str(caught.value)
    assert f"[{rule}]" in text
    assert words in text
    assert place in text
    assert "after the pass spoil" in text
    assert f"rule(s) of stage {stage}" in text


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {rule.name for rule in VERIFIER_RULES} == {rule for rule, *_ in BROKEN}


def test_the_neighbourhood_shows_inputs_and_users() -> None:
    gm = graph_at(Stage.CAPTURED)
    lines = neighbourhood(node_at(gm, "conv1")).splitlines()
    assert [line.split("=")[0].strip() for line in lines] == ["%stem", "--> %conv1", "%bn1"]


def test_many_violations_are_counted_not_listed() -> None:
    gm = graph_at(Stage.CAPTURED)
    for node in gm.graph.nodes:
        if node.op == "call_module":
            node.target = f"missing_{node.name}"
    with pytest.raises(VerifyError, match=r"and \d+ more"):
        verify(gm)


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = VerifierRule("no-relu", (Stage.CAPTURED,), lambda gm: iter([("it is a relu", node_at(gm, "relu"))]))
    monkeypatch.setattr("qgraph.ir.verifier.VERIFIER_RULES", [*VERIFIER_RULES, rule])
    with pytest.raises(VerifyError, match=r"\[no-relu\] it is a relu at"):
        verify(graph_at(Stage.CAPTURED))


def test_the_structural_hash_sees_edits_and_replaced_modules() -> None:
    gm = graph_at(Stage.CAPTURED)
    before = structural_hash(gm)
    assert structural_hash(gm) == before
    gm.stem = nn.Conv2d(3, 4, 3, padding=1)
    assert structural_hash(gm) != before


def test_stages_have_rules_of_their_own() -> None:
    gm = graph_at(Stage.CAPTURED)
    set_info(node_at(gm, "conv1"), replace(info(node_at(gm, "conv1")), plan=SitePlan(qint8, "min_max", False, "test")))
    assert list(violations_of(gm)) == []
    update_graph_info(gm, stage=Stage.PREPARED)
    assert "fake-quant-follows-plan" in {violation.rule for violation in violations_of(gm)}

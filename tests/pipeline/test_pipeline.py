"""Pipelines: text, order, checks, reports, bisection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from qgraph.capture import trace
from qgraph.errors import NumericCheckError, PassError, QGraphError, UserError, VerifyError
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op_table import RELU, RESHAPE, SIGMOID
from qgraph.ir.stage import Stage
from qgraph.ir.text import print_graph
from qgraph.passes import Canonicalize, DecomposeComposites, EliminateDeadCode, FoldConstants, FuseConvBnAddRelu
from qgraph.pipeline import (
    CheckLevel,
    Numerics,
    Pass,
    PassContext,
    PassObserver,
    PassResult,
    Pipeline,
    ProvenanceObserver,
    RewritePass,
    TimingObserver,
    close,
)
from qgraph.rewrite import Match, Rule, Verdict, any_value, call, no
from tests.support.models import Residual, image
from tests.support.passes import count_ops, nodes_of, relative_error

FUSE = "canonicalize,fold-constants,fuse-conv-bn-add-relu"


@pytest.fixture
def gm() -> fx.GraphModule:
    return trace(Residual().eval(), image())


@dataclass(frozen=True)
class Meddle(Pass):
    """Does what its options say, right or wrong."""

    name: ClassVar[str] = "meddle"

    how: str = "nothing"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = Editor(gm, self.name)
        relu = nodes_of(gm, RELU)[0]
        if self.how == "sigmoid":
            edit.replace(relu, edit.call(SIGMOID, relu.args[0], like=relu))
        elif self.how == "stray":
            with gm.graph.inserting_after(relu):
                stray = gm.graph.call_function(torch.neg, (relu,))
            relu.replace_all_uses_with(stray)
            stray.args = (relu,)
        elif self.how == "lie":
            edit.replace(relu, edit.call(SIGMOID, relu.args[0], like=relu))
            return PassResult(gm, False)
        elif self.how == "crash":
            raise ZeroDivisionError("a bug")
        elif self.how == "none":
            return None  # type: ignore[return-value]
        return PassResult(gm, edit.changes > 0 or self.how == "stray")


@dataclass(frozen=True)
class Loose(Meddle):
    name: ClassVar[str] = "loose"
    keeps: ClassVar[Numerics] = close(10.0)


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "canonicalize",
        FUSE,
        "canonicalize,[fold-constants,eliminate-dead-code]*3,fuse-conv-bn-add-relu",
        "canonicalize,fold-constants{largest=10}",
        "canonicalize,decompose-composites{skip=softmax+layer_norm}",
        "[[canonicalize]*2,fold-constants]*2",
        "split-nonuniform-constants{tolerance=2.5,most_groups=3}",
    ],
)
def test_text_round_trip(text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_options_become_typed_fields() -> None:
    pipeline = Pipeline.parse(" canonicalize , decompose-composites{ skip = softmax } ")
    assert pipeline.passes == (Canonicalize(), DecomposeComposites(skip=("softmax",)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "pass name is missing"),
        ("canonicalize,", "pass name is missing"),
        ("canonicalise", "'canonicalize'"),
        ("fold-constants{bigest=1}", "'largest'"),
        ("fold-constants{largest=many}", "takes a int"),
        ("fold-constants{largest}", "has no value"),
        ("[canonicalize", "expected ','"),
        ("[canonicalize]*0", "repeat count"),
        ("[canonicalize]*x", "repeat count"),
        ("canonicalize}", "expected ','"),
        ("lower-to-integer{strict=maybe}", "takes a bool"),
    ],
)
def test_malformed_text_is_explained(text: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        Pipeline.parse(text)
    assert words in str(raised.value)


# --- editing ---------------------------------------------------------------------------------------------------------


def test_insert_replace_remove() -> None:
    pipeline = Pipeline.parse(FUSE)
    dead = EliminateDeadCode()
    assert str(pipeline.insert_before("fold-constants", dead)) == (
        "canonicalize,eliminate-dead-code,fold-constants,fuse-conv-bn-add-relu"
    )
    assert str(pipeline.insert_after("fuse-conv-bn-add-relu", dead)).endswith(",eliminate-dead-code")
    assert str(pipeline.replace_pass("fold-constants", dead)) == (
        "canonicalize,eliminate-dead-code,fuse-conv-bn-add-relu"
    )
    assert str(pipeline.remove("fold-constants")) == "canonicalize,fuse-conv-bn-add-relu"
    assert str(pipeline) == FUSE, "pipelines are values"


def test_editing_by_a_name_that_is_not_there() -> None:
    with pytest.raises(UserError, match="is not in the pipeline") as raised:
        Pipeline.parse(FUSE).remove("fold-constant")
    assert "'fold-constants'" in str(raised.value)
    with pytest.raises(UserError, match="more than once"):
        Pipeline((Canonicalize(), Canonicalize())).remove("canonicalize")


def test_a_pipeline_holds_passes() -> None:
    with pytest.raises(UserError, match="holds passes"):
        Pipeline((Canonicalize,))  # type: ignore[arg-type]


def test_a_pipeline_is_a_pass(gm: fx.GraphModule) -> None:
    inner = Pipeline((FoldConstants(), EliminateDeadCode()), repeat=4)
    result = Pipeline((Canonicalize(), inner, FuseConvBnAddRelu())).run(gm)
    ran = [report.name for report in result.reports]
    assert ran == ["canonicalize", "fold-constants", "eliminate-dead-code", "fuse-conv-bn-add-relu"], (
        "the inner list changed nothing, so it was not repeated"
    )


# --- running ---------------------------------------------------------------------------------------------------------


def test_the_given_graph_is_not_changed(gm: fx.GraphModule) -> None:
    before, example = print_graph(gm), image()
    expected = gm(example)
    result = Pipeline.parse(FUSE).run(gm)
    assert print_graph(gm) == before
    assert torch.equal(gm(example), expected)
    assert result.gm is not gm
    assert count_ops(result.gm)["batch_norm"] == 0


def test_history_stage_and_properties(gm: fx.GraphModule) -> None:
    record = graph_info(Pipeline.parse(FUSE).run(gm).gm)
    assert record.history == ("canonicalize", "fold-constants", "fuse-conv-bn-add-relu")
    assert record.stage is Stage.FUSED
    assert {"canonical", "fused"} <= record.properties


def test_order_problems_are_all_listed_before_anything_runs(gm: fx.GraphModule) -> None:
    with pytest.raises(UserError) as raised:
        Pipeline.parse("fuse-conv-bn-add-relu,lower-to-integer,canonicalize").run(gm)
    message = str(raised.value)
    assert "0. fuse-conv-bn-add-relu needs 'canonical' first (established by canonicalize)" in message
    assert "1. lower-to-integer works on a prepared graph, but gets a fused one" in message
    assert "1. lower-to-integer needs 'frozen' first" in message
    assert graph_info(gm).history == ()


def test_a_pass_that_changes_numbers_is_named(gm: fx.GraphModule) -> None:
    with pytest.raises(NumericCheckError, match="the pass meddle changed") as raised:
        Pipeline((Canonicalize(), Meddle("sigmoid"))).run(gm)
    assert "declares its result exact" in str(raised.value)
    assert "passes that ran before meddle: canonicalize" in raised.value.__notes__[0]


def test_checks_can_be_switched_off(gm: fx.GraphModule) -> None:
    for level in (CheckLevel.NONE, CheckLevel.STRUCTURE):
        result = Pipeline((Meddle("sigmoid"),)).run(gm, checks=level)
        assert count_ops(result.gm)["sigmoid"] == 1


def test_a_pass_may_differ_as_far_as_it_declares(gm: fx.GraphModule) -> None:
    result = Pipeline((Loose("sigmoid"),)).run(gm)
    assert result.reports[0].checks == ("structure", "numerics")


def test_a_broken_structure_is_named_with_its_neighbourhood(gm: fx.GraphModule) -> None:
    with pytest.raises(VerifyError, match="after meddle") as raised:
        Pipeline((Meddle("stray"),)).run(gm)
    assert "carries no record" in str(raised.value)
    assert "--> %neg" in raised.value.__notes__[0]


def test_a_false_claim_is_found_out(gm: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="said it did not"):
        Pipeline((Meddle("lie"),)).run(gm, checks=CheckLevel.CLAIMS)


def test_a_crash_names_the_pass_and_what_ran_before(gm: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="the pass meddle failed") as raised:
        Pipeline((Canonicalize(), Meddle("crash"))).run(gm)
    assert "ZeroDivisionError: a bug" in str(raised.value)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert "canonicalize" in raised.value.__notes__[0]


def test_a_pass_must_return_a_result(gm: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="returned a NoneType"):
        Pipeline((Meddle("none"),)).run(gm)


def test_graphs_of_others_are_refused() -> None:
    plain = fx.symbolic_trace(Residual().eval())
    with pytest.raises(UserError, match=r"qgraph\.trace"):
        Pipeline.parse("canonicalize").run(plain)


def test_observers_see_every_pass(gm: fx.GraphModule) -> None:
    seen: list[str] = []

    class Watch(PassObserver):
        def before(self, owner: Pass, gm: fx.GraphModule) -> None:
            seen.append(f"before {owner.name}")

        def after(self, owner: Pass, gm: fx.GraphModule, report: object) -> None:
            seen.append(f"after {owner.name}")

    timing = TimingObserver()
    Pipeline.parse("canonicalize,fold-constants").run(gm, observers=[Watch(), timing])
    assert seen == ["before canonicalize", "after canonicalize", "before fold-constants", "after fold-constants"]
    assert set(timing.seconds) == {"canonicalize", "fold-constants"}


def test_provenance(gm: fx.GraphModule) -> None:
    provenance = ProvenanceObserver()
    result = Pipeline.parse(FUSE).run(gm, observers=[provenance])
    fused = next(step for step in provenance.steps if step.pass_name == "fuse-conv-bn-add-relu")
    assert set(fused.removed) == {"bn1", "relu", "bn2", "_generated_add_0", "relu(1)"}
    (conv2,) = (node for node in result.gm.graph.nodes if info(node).site == "conv2")
    assert info(conv2).stands_for == ("conv2", "bn2", "_generated_add_0", "relu(1)")


def test_bisect_names_pass_and_node(gm: fx.GraphModule) -> None:
    pipeline = Pipeline((Canonicalize(), Pipeline((FoldConstants(), Meddle("sigmoid"))), EliminateDeadCode()))
    found = pipeline.bisect(gm)
    assert found is not None
    assert (found.pass_name, found.position) == ("meddle", 2)
    assert (found.site, found.node) == ("relu", "relu_2")
    assert "models.py" in str(found)


def test_bisect_finds_nothing_in_a_sound_pipeline(gm: fx.GraphModule) -> None:
    assert Pipeline.parse(FUSE).bisect(gm) is None


def test_bisect_with_a_bound_of_ones_own(gm: fx.GraphModule) -> None:
    found = Pipeline.parse(FUSE).bisect(gm, rtol=0.0)
    assert found is not None
    assert found.pass_name == "fuse-conv-bn-add-relu", "folding rounds differently"


def test_every_error_of_a_pipeline_is_of_the_family(gm: fx.GraphModule) -> None:
    for how in ("sigmoid", "stray", "crash", "none"):
        with pytest.raises(QGraphError):
            Pipeline((Meddle(how),)).run(gm)


def test_promises_allow_for_what_the_network_amplifies() -> None:
    """Rows of nearly equal numbers: normalizing them multiplies the rounding errors of any two ways to compute it."""
    example = 1000 + 0.1 * torch.randn(4, 8)
    gm = trace(nn.LayerNorm(8).eval(), example)
    steps = Pipeline.parse("canonicalize,decompose-composites")
    changed = steps.run(gm, checks=CheckLevel.NUMERICS).gm
    (claimed,) = (member.keeps.rtol for member in steps.flat() if member.name == "decompose-composites")
    assert relative_error(gm(example), changed(example)) > claimed
    assert steps.bisect(gm, rtol=claimed) is not None, "a bound given by hand is taken as it is"


class _AroundTheEditor(Rule):
    name = "around-the-editor"
    root = call(RELU)

    def rewrite(self, match: Match, edit: Editor) -> None:
        with edit.graph.inserting_before(match.root):
            edit.graph.call_function(torch.neg, match.root.args)


class _NoVerdict(_AroundTheEditor):
    name = "no-verdict"

    def check(self, match: Match) -> Verdict:
        return True  # type: ignore[return-value]


@dataclass(frozen=True)
class _RuleOf(RewritePass):
    name: ClassVar[str] = "rule-of"
    kind: type[Rule] = _AroundTheEditor

    def rules(self, gm: fx.GraphModule, ctx: PassContext) -> list[Rule]:
        return [self.kind()]


def test_a_rule_that_goes_around_the_editor_is_caught(gm: fx.GraphModule) -> None:
    steps = Pipeline((Canonicalize(), _RuleOf()))
    with pytest.raises(VerifyError, match="carries no record"):
        steps.run(gm)


def test_a_check_must_give_a_verdict(gm: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="check of rule no-verdict returned True"):
        Pipeline((Canonicalize(), _RuleOf(_NoVerdict))).run(gm)


def test_a_refusal_needs_a_reason() -> None:
    with pytest.raises(PassError, match="no reason"):
        no("")


class _BreaksShapes(Rule):
    name = "breaks-shapes"
    x = any_value()
    root = call(RELU, x)

    def rewrite(self, match: Match, edit: Editor) -> None:
        new = edit.call(RESHAPE, match.value(self.x), like=match.root, shape=(-1, 1))
        edit.replace(match.root, new)


@dataclass(frozen=True)
class _Breaking(RewritePass):
    """For tests."""

    name: ClassVar[str] = "breaking"

    def rules(self, gm: fx.GraphModule, ctx: PassContext) -> list[Rule]:
        return [_BreaksShapes()]


def test_a_graph_that_cannot_run_any_more_names_the_pass() -> None:
    graph = trace(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)).eval(), torch.randn(2, 4))
    pipeline = Pipeline((Canonicalize(), _Breaking()))
    for how in (pipeline.run, pipeline.bisect):
        with pytest.raises(PassError, match="cannot run any more after the pass breaking") as raised:
            how(graph)
        assert "shapes cannot be multiplied" in str(raised.value)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"name": None}, "has no name"),
        ({"requires": "canonical"}, "requires of the pass odd"),
        ({"keeps": 1e-3}, "keeps of the pass odd"),
    ],
)
def test_passes_that_declare_themselves_wrongly(declared: dict[str, object], words: str) -> None:
    odd = type("Odd", (_Breaking,), {"name": "odd", **declared})
    with pytest.raises(UserError, match=words):
        Pipeline((odd(),))


@pytest.mark.parametrize("text", [None, ["canonicalize"]])
def test_only_texts_are_parsed(text: object) -> None:
    with pytest.raises(UserError, match="a pipeline's text cannot be"):
        Pipeline.parse(text)  # type: ignore[arg-type]

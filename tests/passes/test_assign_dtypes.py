"""assign-dtypes: the user's settings meet the target's legal combinations, and every decision keeps its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph import QuantStub
from qgraph.capture import trace
from qgraph.errors import QuantizationError
from qgraph.ir.node_info import SitePlan, info
from qgraph.ir.text import print_graph
from qgraph.numerics import qint8, qint16
from qgraph.pipeline import CheckLevel, PassContext, Pipeline, PipelineResult
from qgraph.quantization import DefaultQconfigSetter, ModuleNameQconfigSetter, QConfig, get_qconfig
from qgraph.quantization.config.resolve import as_setters
from qgraph.targets import LegalFormats, OpRule, Target, get_target
from tests.support.models import Attention, Forward, Residual, image
from tests.support.passes import assert_idempotent

BEFORE = "canonicalize,split-shared-modules,fuse-conv-bn-add-relu,decompose-composites,insert-quant-stubs"
ASSIGN = f"{BEFORE},assign-dtypes"


def assign(model: nn.Module, example: Any, setter: Any = None, target: Target | None = None) -> PipelineResult:
    ctx = PassContext(target=target or get_target("bpu"), setters=as_setters(setter))
    return Pipeline.parse(ASSIGN).run(trace(model.eval(), example), ctx, checks=CheckLevel.CLAIMS)


def plans(gm: fx.GraphModule) -> dict[str, SitePlan]:
    return {info(node).site: info(node).plan for node in gm.graph.nodes if info(node).plan is not None}


def weight_plans(gm: fx.GraphModule) -> dict[str, SitePlan]:
    return {info(node).site: info(node).weight_plan for node in gm.graph.nodes if info(node).weight_plan is not None}


def test_golden(golden: Callable[[str], None]) -> None:
    setter = ModuleNameQconfigSetter({"conv1": get_qconfig(out_dtype="int16"), "fc": get_qconfig(weight_dtype="int16")})
    golden(print_graph(assign(Residual(), image(), setter).gm, source=False))


def test_everything_int8_by_default() -> None:
    gm = assign(Residual(), image()).gm
    assert {plan.format for plan in plans(gm).values()} == {qint8}
    assert {plan.rule for plan in plans(gm).values()} == {"default_calibration_qconfig_setter"}
    assert all(plan.per_channel for plan in weight_plans(gm).values())
    assert not any(plan.per_channel for plan in plans(gm).values())


def test_what_only_moves_codes_has_no_site() -> None:
    gm = assign(Residual(), image()).gm
    assert "_generated_flatten_0" not in plans(gm)


def test_idempotent() -> None:
    ctx = PassContext(target=get_target("bpu"), setters=as_setters(None))
    assert_idempotent(assign(Residual(), image()).gm, "assign-dtypes", ctx)


# --- who decides -------------------------------------------------------------------------------------------------


def test_the_longest_name_wins_and_members_answer() -> None:
    setter = ModuleNameQconfigSetter(
        {"": get_qconfig(out_dtype="int16"), "conv1": get_qconfig(), "bn2": get_qconfig(observer="moving_average")}
    )
    found = plans(assign(Residual(), image(), setter).gm)
    assert found["stem"].format == qint16
    assert found["conv1"].format == qint8
    assert found["conv2"].observer == "moving_average", "bn2 was fused into conv2 and still answers for it"
    assert found["conv2"].rule == "module name"


def test_setters_are_asked_in_order() -> None:
    first = ModuleNameQconfigSetter({"conv1": get_qconfig(out_dtype="int16")})
    default = DefaultQconfigSetter(QConfig(activation_observer="moving_average"), "mine")
    found = plans(assign(Residual(), image(), (first, default)).gm)
    assert (found["conv1"].format, found["conv1"].rule) == (qint16, "module name")
    assert (found["stem"].observer, found["stem"].rule) == ("moving_average", "mine")


def test_a_setting_without_effect_is_refused_with_close_matches() -> None:
    with pytest.raises(QuantizationError, match="conv11") as caught:
        assign(Residual(), image(), ModuleNameQconfigSetter({"conv11": get_qconfig()}))
    assert "conv1" in str(caught.value)


def test_a_setting_that_a_longer_name_always_beats_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    setter = ModuleNameQconfigSetter({"0": get_qconfig(), "0.0": get_qconfig()})
    with pytest.raises(QuantizationError, match="'0' has no effect"):
        assign(model, torch.randn(2, 3), setter)


def test_calls_of_a_shared_module_can_be_told_apart() -> None:
    model = Forward(lambda m, x: m.fc(m.fc(x)), fc=nn.Linear(4, 4))
    found = plans(
        assign(model, torch.randn(2, 4), ModuleNameQconfigSetter({"fc(1)": get_qconfig(out_dtype="int16")})).gm
    )
    assert (found["fc"].format, found["fc(1)"].format) == (qint8, qint16)
    found = plans(assign(model, torch.randn(2, 4), ModuleNameQconfigSetter({"fc": get_qconfig(out_dtype="int16")})).gm)
    assert (found["fc"].format, found["fc(1)"].format) == (qint16, qint16)


def test_inner_steps_are_int16_unless_named() -> None:
    found = plans(assign(Attention(), torch.randn(2, 5, 8)).gm)
    assert found["norm.rsqrt"].format == qint16
    assert found["norm.rsqrt"].rule == "inner step of a composite"
    assert found["norm"].format == qint8, "the composite's own result follows the setting"
    named = ModuleNameQconfigSetter({"norm.var_mean.mul": get_qconfig(out_dtype="int8")})
    assert plans(assign(Attention(), torch.randn(2, 5, 8), named).gm)["norm.var_mean.mul"].format == qint8


def test_the_scale_of_a_stub_wins() -> None:
    model = Forward(lambda m, x: m.quant(x).relu(), quant=QuantStub(scale=0.25))
    plan = plans(assign(model, torch.randn(2, 4)).gm)["quant"]
    assert plan.fixed_scale == 0.25
    assert plan.rule == "fixed scale of the QuantStub"


def test_a_fixed_scale_from_a_setting() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    found = plans(assign(model, torch.randn(2, 4), ModuleNameQconfigSetter({"0": get_qconfig(fix_scale=0.5)})).gm)
    assert found["0"].fixed_scale == 0.5


# --- legality ----------------------------------------------------------------------------------------------------


def restricted(op: str, legal: LegalFormats) -> Target:
    """bpu with other legal formats for one operator."""
    bpu = get_target("bpu")
    return replace(bpu, name="restricted", ops={**bpu.ops, op: OpRule(bpu.ops[op].unit, (legal,))})


def test_an_illegal_default_changes_to_the_nearest_weight_format() -> None:
    both_int16 = DefaultQconfigSetter(QConfig(output=qint16, weight=qint16), "all int16")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    result = assign(model, torch.randn(2, 4), both_int16)
    assert "0: weight int8 instead of int16" in result.notes
    plan = weight_plans(result.gm)["0"]
    assert plan.format == qint8, "bpu multiplies int16 by int8"
    assert plan.overrode == ("all int16: int16, int16 -> int16 is illegal on bpu",)


def test_an_illegal_default_converts_an_operand() -> None:
    model = Forward(lambda m, x, y: x @ y)
    result = assign(model, (torch.randn(2, 3, 4), torch.randn(2, 4, 3)), QConfig(output=qint16))
    (stub,) = [site for site in plans(result.gm) if site.endswith("_as_int8")]
    assert plans(result.gm)[stub].format == qint8
    assert plans(result.gm)["_generated_matmul_0"].format == qint16
    assert any("converted to int8" in note for note in result.notes)


def test_an_illegal_default_changes_the_result_last() -> None:
    target = restricted("sigmoid", LegalFormats(((qint8,),), (qint16,)))
    gm = assign(nn.Sequential(nn.Sigmoid()), torch.randn(2, 4), None, target).gm
    assert plans(gm)["0"].format == qint16
    assert "illegal on restricted" in plans(gm)["0"].overrode[0]


def test_an_explicit_illegal_choice_is_refused_with_the_nearest_legal_one() -> None:
    setter = ModuleNameQconfigSetter({"0": get_qconfig(weight_dtype="int16"), "": get_qconfig(out_dtype="int16")})
    with pytest.raises(QuantizationError) as caught:
        assign(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), (setter, QConfig(output=qint16)))
    text = str(caught.value)
    assert "is illegal for linear on bpu" in text
    assert "nearest legal" in text
    assert "decided by: module name" in text


def test_a_format_that_is_not_lowered_is_refused() -> None:
    with pytest.raises(QuantizationError, match="not available"):
        assign(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), get_qconfig(out_dtype=torch.float16))


def test_input_formats_are_converted_to() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    setter = ModuleNameQconfigSetter({"2": get_qconfig(in_dtype="int16")})
    found = plans(assign(model, torch.randn(2, 4), setter).gm)
    (converted,) = [site for site in found if site.endswith("_as_int16")]
    assert found[converted].format == qint16
    assert found["2"].format == qint8, "the setting names the input only"


# --- scales that the device decides ----------------------------------------------------------------------------------


def deciding(op: str, **decides: Any) -> Target:
    bpu = get_target("bpu")
    return replace(bpu, name="deciding", ops={**bpu.ops, op: replace(bpu.ops[op], **decides)})


def pooled(setter: Any = None, **decides: Any) -> SitePlan:
    model = Forward(lambda self, x: self.pool(self.conv(x)), conv=nn.Conv2d(3, 4, 1), pool=nn.AvgPool2d(2))
    return plans(assign(model, image(), setter, deciding("avg_pool2d", **decides)).gm)["pool"]


@pytest.mark.parametrize("output", [qint8, qint16])
def test_a_result_takes_format_and_scale_of_its_operand(output: Any) -> None:
    setter = ModuleNameQconfigSetter({"conv": QConfig(output=output)})
    plan = pooled(setter, same_scale=True)
    assert (plan.format, plan.same_scale, plan.fixed_scale) == (output, True, None)
    assert bool(plan.overrode) == (output != qint8)


def test_another_format_than_the_operands_is_refused_where_the_device_keeps_it() -> None:
    setter = ModuleNameQconfigSetter({"pool": QConfig(output=qint16)})
    with pytest.raises(QuantizationError, match="int8 -> int16 is illegal for avg_pool2d on deciding") as raised:
        pooled(setter, same_scale=True)
    assert "decided by: module name" in str(raised.value)
    assert "nearest legal: int8 -> int8;" in str(raised.value)


def test_the_device_fixes_a_scale() -> None:
    plan = pooled(fixed_result={"int8": (0.5, -3)})
    assert (plan.fixed_scale, plan.fixed_zero, plan.same_scale) == (0.5, -3, False)
    other = pooled(ModuleNameQconfigSetter({"pool": QConfig(output=qint16)}), fixed_result={"int8": (0.5, -3)})
    assert (other.format, other.fixed_scale) == (qint16, None)


@pytest.mark.parametrize(
    ("decides", "words"),
    [({"same_scale": True}, "keeps the operand's scale"), ({"fixed_result": {"int8": (0.5, 0)}}, "has a fixed scale")],
)
def test_a_scale_of_the_user_against_the_devices(decides: Any, words: str) -> None:
    setter = ModuleNameQconfigSetter({"pool": QConfig(fixed_scale=0.25)})
    with pytest.raises(QuantizationError, match=r"a scale of 0\.25 is illegal for avg_pool2d") as raised:
        pooled(setter, **decides)
    assert words in str(raised.value)


# --- positions -----------------------------------------------------------------------------------------------------


def planned_sites(forward: Callable[..., Any], *setters: Any, **children: Any) -> dict[str, tuple[str, str]]:
    """Format and rule of every planned site."""
    gm = assign(Forward(forward, **children), torch.randn(2, 3, 4, 4), *setters).gm
    return {site: (str(plan.format), plan.rule) for site, plan in plans(gm).items()}


def test_what_computes_a_grid_has_16_bits() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        shift = m.conv(x.sigmoid())
        return F.grid_sample(x, (shift.tanh() + 0.1).movedim(1, 3), align_corners=False) * 2

    found = planned_sites(forward, conv=nn.Conv2d(3, 2, 1))
    positions = {site for site, (_, rule) in found.items() if rule == "it computes sampling positions"}
    assert positions == {"conv", "_generated_tanh_0", "_generated_add_0"}
    assert {found[site][0] for site in positions} == {"int16"}
    assert found["_generated_sigmoid_0"][0] == found["_generated_grid_sample_0"][0] == "int8"


def test_a_wish_for_one_site_is_stronger_than_positions() -> None:
    setters = [ModuleNameQconfigSetter({"tanh": QConfig(output="int16", fixed_scale=0.001)})]
    forward = lambda m, x: F.grid_sample(x, m.tanh(x[:, :2]).movedim(1, 3), align_corners=True)  # noqa: E731
    assert planned_sites(forward, setters, tanh=nn.Tanh())["tanh"] == ("int16", "module name")


def test_the_table_of_an_embedding_has_the_format_of_weights() -> None:
    forward = lambda m, x: m.table((x[:, 0, 0] > 0).long())  # noqa: E731
    found = planned_sites(forward, QConfig(output="int16", weight="int8"), table=nn.Embedding(2, 3))
    assert found["table.weight.quant"][0] == "int8"

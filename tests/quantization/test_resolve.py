"""One resolver: attributes, names, types, dicts, tables and templates, merged field by field."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qgraph
from qgraph import ModuleNameQconfigSetter, ModuleTypeQconfigSetter, QConfig, Setting, get_qconfig, prepare
from qgraph.errors import QuantizationError, UserError
from qgraph.ir.node_info import NodeInfo, SitePlan, graph_info, info
from qgraph.numerics import qint8, qint16, qint32
from qgraph.quantization.config.query import SiteQuery, deepest, enclosing
from qgraph.quantization.config.resolve import as_setters, check_all_used, resolve
from tests.support.models import Forward, Residual, image

INT16 = get_qconfig(out_dtype="int16")
DEFAULT = "default_calibration_qconfig_setter"


def query(site: str, op: str = "conv2d") -> SiteQuery:
    return SiteQuery(site, site.rpartition(".")[0], (site,), op)


def records(model: nn.Module, setter: Any = None, x: Any = None, target: str = "bpu") -> dict[str, NodeInfo]:
    gm = prepare(model.eval(), image() if x is None else x, setter, target=target)
    return {info(node).site: info(node) for node in gm.graph.nodes}


def plan_of(model: nn.Module, site: str, setter: Any = None, x: Any = None) -> SitePlan:
    found = records(model, setter, x)[site].plan
    assert found is not None
    return found


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid())


def vector() -> torch.Tensor:
    return torch.linspace(-1, 1, 8).reshape(2, 4)


# --- names ---------------------------------------------------------------------------------------------------------


def test_what_a_name_lies_in() -> None:
    assert list(enclosing("a.b(1).c[2]")) == ["a.b(1).c[2]", "a.b(1).c", "a.b(1)", "a.b", "a", ""]
    assert list(enclosing("")) == [""]


def test_the_sites_own_name_comes_before_a_members() -> None:
    fused = SiteQuery("conv", "", ("conv", "batch_norm"), "conv2d")
    assert deepest({"conv": 1, "batch_norm": 2}, fused) == "conv"
    assert deepest({"": 1, "batch_norm": 2}, fused) == "batch_norm"


# --- merging -------------------------------------------------------------------------------------------------------


def test_fields_come_from_different_setters() -> None:
    setters = as_setters(
        (
            ModuleNameQconfigSetter({"a": Setting(output=qint16)}),
            ModuleTypeQconfigSetter({"conv2d": Setting(activation_observer="moving_average")}),
            QConfig(weight=qint16),
        )
    )
    decision = resolve(setters, query("a"))
    assert decision.qconfig == QConfig(qint16, qint16, activation_observer="moving_average")
    assert decision.rule == "module name"
    assert decision.rules["activation_observer"] == "module type"
    assert decision.rules["weight"] == "qconfig"
    assert decision.overrode == ("qconfig: int8, activation_observer min_max",)
    assert not decision.preference


def test_a_partial_setting_without_formats_leaves_them_a_preference() -> None:
    setters = as_setters(ModuleNameQconfigSetter({"a": Setting(activation_observer="moving_average")}))
    assert resolve(setters, query("a")).preference


def test_two_ways_to_give_a_scale_exclude_each_other() -> None:
    setters = (ModuleNameQconfigSetter({"a": Setting(threshold=4.0)}), QConfig(fixed_scale=0.5))
    found = resolve(as_setters(setters), query("a")).qconfig
    assert found is not None
    assert (found.fixed_scale, found.threshold) == (None, qgraph.Threshold(output=4.0))
    with pytest.raises(QuantizationError, match="a fixed scale and a threshold"):
        QConfig(fixed_scale=0.5, threshold=1.0)  # type: ignore[arg-type]


def test_overridden_setters_are_named() -> None:
    first = ModuleNameQconfigSetter({"fc": None, "conv1": INT16})
    kinds = ModuleTypeQconfigSetter({nn.Conv2d: get_qconfig(weight_dtype="int8", observer="moving_average")})
    found = records(Residual(), (first, kinds))
    plan = found["conv1"].plan
    assert plan is not None
    assert (plan.rule, plan.format) == ("module name", qint16)
    assert plan.overrode == ("module type: int8, activation_observer moving_average", f"{DEFAULT}: int8")
    assert found["stem"].plan is not None
    assert found["stem"].plan.rule == "module type"


def test_a_partial_setting_that_changes_nothing_is_refused() -> None:
    first = ModuleNameQconfigSetter({"a": Setting(output=qint16)})
    second = ModuleNameQconfigSetter({"a.b": Setting(output=qint8)})
    check_all_used(as_setters((second, first)), [query("a.b"), query("a.c")])
    with pytest.raises(QuantizationError, match=r"'a\.b' has no effect"):
        check_all_used(as_setters((first, second)), [query("a.b"), query("a.c")])
    other = ModuleNameQconfigSetter({"a.b": Setting(weight=qint16)})
    check_all_used(as_setters((first, other)), [query("a.b")])


# --- None: float ---------------------------------------------------------------------------------------------------


def test_none_keeps_an_operator_in_float_and_its_neighbours_quantized() -> None:
    model = linears()
    gm = prepare(model.eval(), vector(), ModuleNameQconfigSetter({"1": None}))
    found = {info(node).site: info(node) for node in gm.graph.nodes}
    assert found["1"].float_reason == "qconfig is None (module name)"
    assert found["1"].plan is None
    assert {site for site, record in found.items() if record.plan is not None} == {
        "input.quant",
        "0",
        "1.quant",
        "2",
        "3",
    }
    assert "float: 1 (sigmoid): qconfig is None (module name)" in graph_info(gm).notes
    qgraph.calibrate(gm, [vector()], progress=False)
    integer = qgraph.convert(gm)
    assert torch.allclose(integer(vector()), model(vector()), atol=0.05)


def test_none_on_a_stub_of_the_user_removes_it() -> None:
    model = Forward(lambda m, x: m.fc(m.quant(x)).sigmoid(), quant=qgraph.QuantStub(), fc=nn.Linear(4, 4))
    found = records(model, ModuleNameQconfigSetter({"quant": None, "fc": None}), vector())
    assert "quant" not in found
    assert found["fc"].float_reason == "qconfig is None (module name)"
    assert found["fc.quant"].plan is not None


def test_none_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(QuantizationError, match="'nothing' has no effect"):
        prepare(linears().eval(), vector(), ModuleNameQconfigSetter({"nothing": None}))


# --- types ---------------------------------------------------------------------------------------------------------


class Wide(nn.Linear):
    """A linear of the user's own."""


@pytest.mark.parametrize("key", [Wide, nn.Linear, "Wide", "Linear", "linear", nn.Module], ids=str)
def test_types_cover_subclasses_names_and_operators(key: Any) -> None:
    model = nn.Sequential(Wide(4, 4), nn.Sigmoid())
    plan = plan_of(model, "0._generated_linear_0", ModuleTypeQconfigSetter({key: INT16}), vector())
    assert plan.format == qint16


def test_the_nearest_ancestor_and_the_innermost_module_win() -> None:
    model = nn.Sequential(nn.Sequential(Wide(4, 4), nn.Sigmoid()), nn.Linear(4, 4), nn.Sigmoid())
    setter = ModuleTypeQconfigSetter(
        {nn.Linear: get_qconfig(), Wide: INT16, nn.Sequential: get_qconfig(fix_scale=0.5), "sigmoid": get_qconfig()}
    )
    found = records(model, setter, vector())
    plans = {site: record.plan for site, record in found.items() if record.plan is not None}
    wide = plans["0.0._generated_linear_0"]
    assert (wide.format, wide.fixed_scale) == (qint16, None)
    assert (plans["1"].format, plans["1"].fixed_scale) == (qint8, None)
    assert plans["input.quant"].fixed_scale == 0.5, "it lies in the model, which is a Sequential"
    assert plans["2"].fixed_scale is None, "the operator's name comes before any class"


def test_a_type_the_model_has_not_is_refused() -> None:
    with pytest.raises(QuantizationError, match="'Conv3d' has no effect") as caught:
        prepare(Residual().eval(), image(), ModuleTypeQconfigSetter({nn.Conv3d: INT16}))
    assert "did you mean 'Conv2d'" in str(caught.value)
    with pytest.raises(UserError, match="is no module class"):
        ModuleTypeQconfigSetter({int: INT16})  # type: ignore[dict-item]


# --- dicts ---------------------------------------------------------------------------------------------------------


def test_names_beat_types_beat_the_whole_model() -> None:
    given = {
        "": get_qconfig(observer="moving_average"),
        "module_type": [(nn.Linear, INT16)],
        "module_name": [("2", get_qconfig(fix_scale=0.25))],
    }
    found = {
        site: record.plan for site, record in records(linears(), given, vector()).items() if record.plan is not None
    }
    assert {site: (str(plan.format), plan.rule) for site, plan in found.items()} == {
        "input.quant": ("int8", "qconfig dict"),
        "0": ("int16", "module type"),
        "1": ("int8", "qconfig dict"),
        "2": ("int8", "module name"),
        "3": ("int8", "qconfig dict"),
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"module_nmae": []}, "did you mean 'module_name'"),
        ({"module_name": "conv"}, "give a list of pairs"),
        ({"module_name": [("conv", INT16, 3)]}, "give pairs"),
        ({"module_name": [("conv", INT16), ("conv", None)]}, "names 'conv' twice"),
        ({"module_type": [(nn.Linear, "int16")]}, "the configuration for 'Linear' is a str"),
    ],
)
def test_wrong_dicts(given: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        as_setters(given)
    assert words in str(caught.value).replace("for Linear", "for 'Linear'")


# --- attributes ----------------------------------------------------------------------------------------------------


def test_attributes_beat_setters_and_leave_the_model_alone() -> None:
    model = Residual()
    model.conv1.qconfig = INT16
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    plan = plan_of(
        model,
        "conv1",
        ModuleNameQconfigSetter({"": get_qconfig()}),
    )
    assert (plan.rule, plan.format) == ("attribute conv1.qconfig", qint16)
    assert plan.overrode == ("module name: int8", f"{DEFAULT}: int8")
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[name].keys() == after[name].keys() for name in before)
    assert model.conv1.qconfig is INT16


def test_a_leftover_attribute_is_told() -> None:
    """A stub that stays int8 in an int16 run because of its attribute."""
    model = Forward(lambda m, x: m.fc(m.quant(x)).sigmoid(), quant=qgraph.QuantStub(), fc=nn.Linear(4, 4))
    model.quant.qconfig = qgraph.default_calib_8bit_fake_quant_qconfig
    plan = plan_of(model, "quant", qgraph.calibration_8bit_weight_16bit_act_qconfig_setter, vector())
    assert (plan.format, plan.rule) == (qint8, "attribute quant.qconfig")
    assert plan.overrode == ("calibration_8bit_weight_16bit_act_qconfig_setter: int16",)


def test_attributes_are_inherited_and_none_is_float() -> None:
    model = nn.Sequential(linears(), linears())
    model[0].qconfig = None
    model[0][1].qconfig = INT16
    found = records(model, None, vector())
    assert found["0.0"].float_reason == "qconfig is None (attribute 0.qconfig)"
    assert found["0.2"].float_reason == "qconfig is None (attribute 0.qconfig)"
    assert found["0.1"].plan is not None
    assert found["0.1"].plan.format == qint16
    assert found["1.0"].plan is not None


def test_wrong_and_idle_attributes() -> None:
    model = linears()
    model[0].qconfig = "int16"
    with pytest.raises(UserError, match=r"the configuration for 0.qconfig is a str"):
        prepare(model.eval(), vector())
    model = Forward(lambda m, x: m.fc(x), fc=nn.Linear(4, 4), unused=nn.Linear(4, 4))
    model.unused.qconfig = INT16
    with pytest.raises(QuantizationError, match=r"the attribute setting for 'unused.qconfig' has no effect"):
        prepare(model.eval(), vector())


# --- accumulators --------------------------------------------------------------------------------------------------

HIGH = qgraph.default_calib_8bit_weight_32bit_out_fake_quant_qconfig


def test_an_accumulator_can_be_asked_for() -> None:
    model = linears()[:3]
    model[2].qconfig = HIGH
    plan = plan_of(model, "2", None, vector())
    assert (plan.format, plan.rule, plan.observer) == (qint32, "attribute 2.qconfig", "none")


@pytest.mark.parametrize(
    ("model", "site", "reason"),
    [
        (linears(), "0", "does not go straight to a dequant stub"),
        (linears(), "1", "it is no matrix product"),
        (Forward(lambda m, x: (lambda y: (y, y.sigmoid()))(m.fc(x)), fc=nn.Linear(4, 4)), "fc", "has other users"),
        (Forward(lambda m, x: m.fc(x) + x, fc=nn.Linear(4, 4)), "fc", "a residual or relu6"),
    ],
    ids=["inner", "table", "users", "residual"],
)
def test_an_accumulator_where_there_is_none(model: nn.Module, site: str, reason: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        prepare(model.eval(), vector(), ModuleNameQconfigSetter({site: HIGH}))
    assert f"{site} cannot keep its accumulator" in str(caught.value)
    assert reason in str(caught.value)
    assert "decided by: module name" in str(caught.value)


# --- thresholds, operands, frozen scales ---------------------------------------------------------------------------


def test_thresholds_by_port() -> None:
    setter = ModuleNameQconfigSetter({"2": get_qconfig(threshold={"input": 2.0, "weight": 1.0, "output": 4.0})})
    found = records(linears(), setter, vector())
    plan, weight = found["2"].plan, found["2"].weight_plan
    assert plan is not None
    assert weight is not None
    assert plan.fixed_scale == 4.0 / -qint8.qmin
    assert (weight.fixed_scale, weight.per_channel) == (1.0 / -qint8.qmin, False)
    stub = next(record.plan for site, record in found.items() if site.startswith("2.") and site.endswith("_as_int8"))
    assert stub is not None
    assert stub.fixed_scale == 2.0 / -qint8.qmin


def test_thresholds_follow_the_format_and_reach_the_integers() -> None:
    model = linears()[:2]
    setter = ModuleNameQconfigSetter({"0": get_qconfig(out_dtype="int16", threshold=8.0)})
    assert plan_of(model, "0", setter, vector()).fixed_scale == 8.0 / -qint16.qmin
    gm = prepare(model.eval(), vector(), ModuleNameQconfigSetter({"0": get_qconfig(threshold={"weight": 1.0})}))
    qgraph.calibrate(gm, [vector()], progress=False)
    assert torch.allclose(qgraph.convert(gm)(vector()), model(vector()), atol=0.05)


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        ({"ouput": 1.0}, "did you mean 'output'"),
        (0.0, "not usable"),
        (-1.0, "not usable"),
        (float("inf"), "not usable"),
        ("1", "is no number"),
        ({"input": True}, "is no number"),
    ],
)
def test_wrong_thresholds(threshold: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        get_qconfig(threshold=threshold)
    assert words in str(caught.value)


def test_formats_per_operand() -> None:
    model = Forward(lambda m, x: torch.matmul(m.a(x), m.b(x).t()).sigmoid(), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    found = records(model, ModuleTypeQconfigSetter({"matmul": Setting(inputs=("int16", None))}), vector())  # type: ignore[arg-type]
    stubs = [site for site in found if "_as_" in site and "fake_quant" not in site]
    assert stubs == ["_generated_matmul_0.a_as_int16"]
    with pytest.raises(QuantizationError, match="3 input formats are given for matmul"):
        prepare(model, vector(), ModuleTypeQconfigSetter({"matmul": Setting(inputs=("int8",) * 3)}))  # type: ignore[arg-type]


def test_training_leaves_frozen_scales_alone() -> None:
    setter = ModuleNameQconfigSetter({"0": get_qconfig(fix_scale=True, observer="moving_average")})
    gm = prepare(linears().eval(), vector(), (setter, qgraph.default_qat_qconfig_setter))
    qgraph.calibrate(gm, [vector()], progress=False)
    scales = {
        module.site: module.scale.clone()
        for module in gm.modules()
        if isinstance(module, qgraph.quantization.FakeQuantize)
    }
    qgraph.set_fake_quantize(gm, qgraph.FakeQuantState.QAT)
    gm.train()
    for _ in range(3):
        gm(vector() * 10)
    after = {
        module.site: module.scale for module in gm.modules() if isinstance(module, qgraph.quantization.FakeQuantize)
    }
    assert torch.equal(after["0"], scales["0"])
    assert not torch.equal(after["1"], scales["1"])
    qgraph.set_fake_quantize(gm, qgraph.FakeQuantState.VALIDATION)
    assert torch.equal(after["0"], scales["0"])
    qgraph.calibrate(gm, [vector() * 10], progress=False)
    found = {
        module.site: module.scale for module in gm.modules() if isinstance(module, qgraph.quantization.FakeQuantize)
    }
    assert not torch.equal(found["0"], scales["0"]), "calibrating again is how a frozen scale is moved"


def test_kinds_of_fake_quantization() -> None:
    with pytest.raises(QuantizationError, match="did you mean 'fake_quant'"):
        QConfig(fake_quant="fake_qaunt")


# --- sensitivity ---------------------------------------------------------------------------------------------------

ROWS = [
    ("1", "activation", "Sigmoid", 0.1, "int8"),
    ("0", "activation", "Linear", 0.9, "int8"),
    ("2", "activation", "Linear", 0.5, "int8"),
    ("2", "weight", "Linear", 0.7, "int8"),
]
DICTS = [dict(zip(("op_name", "sensitive_type", "op_type", "L1", "quant_dtype"), row, strict=True)) for row in ROWS]
CALIBRATION = qgraph.sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter


def raised(model: nn.Module, setter: Any) -> set[str]:
    return {
        site
        for site, record in records(model, setter, vector()).items()
        if record.plan and record.plan.format == qint16
    }


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ({"topk": 1}, ["0"]),
        ({"ratio": 0.25}, ["0"]),
        ({"ratio": 0.26}, ["0"]),
        ({"topk": 3}, ["0", "2"]),
        ({"topk": 0}, []),
    ],
)
def test_the_most_sensitive_rows(options: dict[str, Any], sites: list[str]) -> None:
    assert sorted(raised(linears(), CALIBRATION(ROWS, **options))) == sites


def test_tables_of_every_form_agree(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps(DICTS), encoding="utf-8")
    with (tmp_path / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, DICTS[0].keys())
        writer.writeheader()
        writer.writerows(DICTS)
    forms = [ROWS, DICTS, tmp_path / "table.json", str(tmp_path / "table.csv")]
    assert all(CALIBRATION(form, topk=2) == CALIBRATION(ROWS, topk=2) for form in forms)
    assert dict(CALIBRATION(ROWS, topk=2).formats) == {("0", "activation"): qint16, ("2", "weight"): qint16}


def test_both_spellings_and_one_table_for_both_steps() -> None:
    assert qgraph.sensitive_op_8bit_weight_16bit_act_calibration_setter(ROWS, 0.5) == CALIBRATION(ROWS, 0.5)
    qat = qgraph.sensitive_op_8bit_weight_16bit_act_qat_setter(ROWS, ratio=0.5)
    assert qat == qgraph.sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(ROWS, ratio=0.5)
    plan = plan_of(linears(), "0", (qat, qgraph.default_qat_qconfig_setter), vector())
    assert (plan.rule, plan.observer) == (qat.name, "moving_average")
    assert plan.overrode == ("default_qat_qconfig_setter: int8",)


def test_a_sensitive_weight_behind_int16_is_resolved_on_record() -> None:
    rows = [("1", "activation", "", 2.0, ""), ("2", "weight", "", 1.0, "")]
    gm = prepare(linears().eval(), vector(), CALIBRATION(rows))
    (weight,) = (info(node).weight_plan for node in gm.graph.nodes if info(node).site == "2" and info(node).weight_plan)
    (note,) = graph_info(gm).notes
    assert note.startswith("2: weight int8 instead of int16: sensitive_op_calibration_8bit_weight_16bit_act")
    assert weight is not None
    assert weight.format == qint8
    assert any("int16, int16 -> int8 is illegal" in entry for entry in weight.overrode)
    alone = records(linears(), CALIBRATION(rows[1:]), vector())["2"].weight_plan
    assert alone is not None
    assert (alone.format, alone.rule) == (qint16, CALIBRATION(rows).name)


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        (ROWS, {"ratio": 1.5}, "from 0 to 1"),
        (ROWS, {"topk": 5}, "from 0 to 4"),
        (ROWS, {"topk": 1, "ratio": 0.5}, "give one of them"),
        ([], {}, "without rows"),
        ("nowhere.csv", {}, "cannot be read"),
        ("table.txt", {}, "cannot be read"),
        ([("a", "activtion", "", 1.0)], {}, "did you mean 'activation'"),
        ([("a", "weight", "", "much")], {}, "the metric 'much'"),
        ([{"op_name": "a", "L1": 1.0}], {}, "needs op_name, sensitive_type"),
    ],
)
def test_wrong_tables(table: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        CALIBRATION(table, **options)
    assert words in str(caught.value)


def test_a_row_of_another_model_is_refused() -> None:
    with pytest.raises(QuantizationError, match="'gone' has no effect"):
        prepare(linears().eval(), vector(), CALIBRATION([("gone", "activation", "", 1.0, "")]))

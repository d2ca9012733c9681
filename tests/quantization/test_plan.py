"""Plans: what they record, TOML both ways, edits by hand, and the same graph again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qgraph
from qgraph import ModuleNameQconfigSetter, Plan, get_qconfig, prepare
from qgraph.errors import QuantizationError, UserError
from qgraph.ir.text import print_graph
from qgraph.numerics import float32, qint8, qint16, qint32
from tests.support.models import Attention, Forward, Residual, image


def linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid()).eval()


def vector() -> torch.Tensor:
    return torch.linspace(-1, 1, 8).reshape(2, 4)


def stubbed() -> nn.Module:
    return Forward(lambda m, x: m.fc(m.quant(x)).sigmoid(), quant=qgraph.QuantStub(1 / 64), fc=nn.Linear(4, 4)).eval()


class Divides(nn.Module):
    """By a constant that one scale represents badly: its consumer is split into groups."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("divisor", 10000.0 ** (torch.arange(8) / 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / self.divisor).sigmoid()


WITH_ATTRIBUTE = linears()
WITH_ATTRIBUTE[1].qconfig = None
WITH_ATTRIBUTE[2].qconfig = get_qconfig(out_dtype="int16")
NAMES = ModuleNameQconfigSetter(
    {
        "conv1": None,
        "conv2": get_qconfig(threshold={"input": 3.0, "weight": 1.0, "output": 2.0}),
        "fc": get_qconfig(in_dtype="int16", fix_scale=True),
    }
)
CASES = [
    pytest.param(Residual, image, None, "bpu", id="residual"),
    pytest.param(Residual, image, None, "x86", id="x86"),
    pytest.param(Residual, image, NAMES, "bpu", id="names"),
    pytest.param(Attention, lambda: torch.randn(2, 5, 8), None, "bpu", id="attention"),
    pytest.param(
        Attention,
        lambda: torch.randn(2, 5, 8),
        qgraph.calibration_8bit_weight_16bit_act_qconfig_setter,
        "bpu",
        id="int16",
    ),
    pytest.param(stubbed, vector, None, "bpu", id="stub"),
    pytest.param(stubbed, vector, ModuleNameQconfigSetter({"quant": None}), "bpu", id="no-stub"),
    pytest.param(lambda: WITH_ATTRIBUTE, vector, None, "bpu", id="attributes"),
    pytest.param(Divides, lambda: torch.rand(2, 8), get_qconfig(out_dtype="int16"), "bpu", id="groups"),
    pytest.param(
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Sigmoid()),
        lambda: torch.tensor([[1, 2]]),
        ModuleNameQconfigSetter({"0": get_qconfig(weight_dtype="int8", out_dtype="int16")}),
        "bpu",
        id="embedding",
    ),
]


@pytest.mark.parametrize(("model", "example", "setter", "target"), CASES)
def test_an_unedited_plan_gives_the_same_graph(model: Any, example: Any, setter: Any, target: str) -> None:
    net, x = model().eval(), example()
    first = prepare(net, x, setter, target=target)
    plan = Plan.of(first)
    read = Plan.from_toml(plan.to_toml())
    assert read == plan
    assert read.to_toml() == plan.to_toml()
    second = prepare(net, x, read, target=target)
    assert print_graph(second, source=False) == print_graph(first, source=False)
    assert Plan.of(second) == plan
    assert not plan.diff(Plan.of(second))


def test_what_a_plan_records() -> None:
    plan = Plan.of(prepare(Residual().eval(), image(), NAMES))
    assert list(plan)[:4] == ["x.quant", "stem", "stem.weight", "conv1"]
    conv1, conv2, weight, fc = plan["conv1"], plan["conv2"], plan["conv2.weight"], plan["fc"]
    assert (conv1.format, conv1.scale, conv1.rule) == (float32, "none", "module name")
    assert (conv2.scale, conv2.fixed_scale, conv2.role) == ("fixed", 2.0 / -qint8.qmin, "activation")
    assert (weight.scale, weight.per_channel, weight.role) == ("fixed", False, "weight")
    assert conv2.overrode == ("default_calibration_qconfig_setter: int8",) or conv2.overrode == ()
    assert conv2.line.startswith("models.py:")
    assert (fc.format, fc.scale, fc.rule) == (qint32, "accumulator", "high-precision output")
    (conversion,) = (one for one in plan.values() if one.role == "input" and one.format == qint16)
    assert conversion.feeds == "fc[0]"
    assert Plan.of(prepare(stubbed(), vector()))["quant"].scale == "stub"
    with pytest.raises(KeyError, match="did you mean 'conv1'"):
        plan["conv_1"]
    table = str(plan)
    assert "decided by" in table
    assert "accumulator" in table


def edited(gm: Any, site: str, old: str, new: str) -> Plan:
    """The plan with one line of one entry changed."""
    head, found, rest = Plan.of(gm).to_toml().partition(f'[sites."{site}"]')
    assert found
    assert old in rest
    return Plan.from_toml(head + found + rest.replace(old, new, 1))


@pytest.mark.parametrize(
    ("site", "old", "new", "field", "value"),
    [
        ("1", 'format = "int8"', 'format = "int16"', "format", qint16),
        ("0", 'observer = "min_max"', 'observer = "moving_average"', "observer", "moving_average"),
        ("0", 'scale = "observed"', 'scale = "observed"\nfrozen = true', "frozen", True),
    ],
)
def test_an_edit_changes_exactly_that(site: str, old: str, new: str, field: str, value: object) -> None:
    first = prepare(linears(), vector())
    plan = edited(first, site, old, new)
    second = Plan.of(prepare(linears(), vector(), plan))
    (change,) = Plan.of(first).diff(second)
    assert (change.site, change.field, change.after) == (site, field, value)
    assert second[site].rule == "plan"
    assert second[site].overrode[-1].startswith("default_calibration_qconfig_setter: int8, min_max")
    assert Plan.from_toml(second.to_toml()) == second, "what the plan decided stays decided"


def test_editing_a_scale_fixes_it() -> None:
    first = prepare(linears(), vector())
    second = Plan.of(prepare(linears(), vector(), edited(first, "0", 'scale = "observed"', "scale = 0.25")))
    assert {str(change) for change in Plan.of(first).diff(second)} == {
        "0: scale observed -> fixed",
        "0: fixed_scale None -> 0.25",
    }


def test_moving_in_and_out_of_float_and_accumulators() -> None:
    model = linears()[:3].eval()
    first = prepare(model, vector())
    assert Plan.of(first)["2"].format == qint32
    rounded = Plan.of(prepare(model, vector(), edited(first, "2", 'format = "int32"', 'format = "int8"')))
    assert (rounded["2"].format, rounded["2"].scale) == (qint8, "observed")
    in_float = Plan.of(prepare(model, vector(), edited(first, "1", 'format = "int8"', 'format = "float32"')))
    assert (in_float["1"].format, in_float["1"].rule) == (float32, "plan")
    assert in_float["0"].format == qint8
    with pytest.raises(QuantizationError, match="cannot keep its accumulator"):
        prepare(model, vector(), edited(first, "0", 'format = "int8"', 'format = "int32"'))


def test_a_plan_survives_training_and_a_short_plan_leaves_the_rest() -> None:
    plan = Plan.from_toml('version = 1\n[sites."0"]\nformat = "int16"\n')
    model = copy.deepcopy(linears())
    with torch.no_grad():
        model[0].weight.mul_(2)
    found = Plan.of(prepare(model, vector(), (plan, qgraph.default_qat_qconfig_setter)))
    assert (found["0"].format, found["0"].rule, found["0"].observer) == (qint16, "plan", "moving_average")
    assert found["1"].rule == "default_qat_qconfig_setter"


def test_unknown_sites_and_what_cannot_be_followed() -> None:
    with pytest.raises(QuantizationError, match="the plan setting for 'conv3' has no effect") as caught:
        prepare(Residual().eval(), image(), Plan.from_toml('version = 1\n[sites.conv3]\nformat = "int8"\n'))
    assert "'conv2'" in str(caught.value)
    first = prepare(linears(), vector())
    with pytest.raises(QuantizationError, match="the plan wants per_channel True for site 0, which has False"):
        prepare(linears(), vector(), edited(first, "0", "per_channel = false", "per_channel = true"))
    weight = '[sites."2.weight"]\nrole = "weight"\nformat = "int16"\n'
    plan = Plan.from_toml(f'version = 1\n[sites."1"]\nformat = "int16"\n{weight}')
    with pytest.raises(QuantizationError, match="int16, int16 -> int8 is illegal for linear"):
        prepare(linears(), vector(), plan)


def test_files(tmp_path: Path) -> None:
    plan = Plan.of(prepare(linears(), vector()))
    file = tmp_path / "plan.toml"
    plan.save(file)
    assert Plan.load(file) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"], "nothing is left behind"
    assert Plan.of(prepare(linears(), vector(), str(file))) == plan
    assert Plan.of(prepare(linears(), vector(), file)) == plan
    with pytest.raises(UserError, match="cannot be read"):
        Plan.load(tmp_path / "nothing.toml")
    with pytest.raises(UserError, match="cannot be written"):
        plan.save(tmp_path / "nowhere" / "plan.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version = 1\n[sites.a\n", ["is not TOML", "line 2"]),
        ("version = 2\n", ["version 2", "line 1"]),
        ("version = 1\nsitse = 1\n", ["no key 'sitse'", "line 2", "did you mean 'sites'"]),
        ("version = 1\n", ["has no sites"]),
        ('version = 1\n[sites.a]\nfromat = "int8"\n', ["no key 'fromat'", "line 3", "did you mean 'format'"]),
        ('version = 1\n[sites.a]\nrole = "weight"\n', ["lacks its format", "line 2"]),
        ('version = 1\n[sites.a]\nformat = "itn8"\n', ["line 3, format of site a", "did you mean 'int8'"]),
        ('version = 1\n[sites.a]\nformat = "int8"\nobserver = "minmax"\n', ["line 4", "did you mean 'min_max'"]),
        ('version = 1\n[sites.a]\nformat = "int8"\nscale = "obsevred"\n', ["line 4", "did you mean 'observed'"]),
        ('version = 1\n[sites.a]\nformat = "int8"\nscale = -1.0\n', ["line 4", "finite scale > 0"]),
        ('version = 1\n[sites.a]\nformat = "int8"\nscale = "fixed"\n', ["a fixed scale has no number", "line 4"]),
        ('version = 1\n[sites.a]\nformat = "int32"\nscale = 0.5\n', ["int32 has a fixed scale", "line 4"]),
        ('version = 1\n[sites.a]\nformat = "int8"\nfrozen = 1\n', ["line 4", "neither true nor false"]),
        ('version = 1\n[sites.a]\nformat = "int8"\nfake_quant = "lqs"\n', ["line 4", "fake_quant"]),
        ('version = 1\n[sites.a]\nformat = "int8"\nrole = "input"\nfeeds = "b"\n', ["line 5", "operator and position"]),
        ('version = 1\n[sites.a.b]\nformat = "int8"\n', ["[sites.a.b] is a table inside", '[sites."a.b"]']),
        ('version = 1\n[sites]\na = "int8"\n', ["site 'a' is 'int8'", '[sites."a"]']),
    ],
)
def test_wrong_files(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Plan.from_toml(text, "plan.toml")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "plan.toml" in str(caught.value)


def test_strange_names_survive() -> None:
    entry = qgraph.PlannedSite('a"b\\c\x7f\n\u00e9', qint8, rule="x\ty")
    plan = Plan({entry.site: entry})
    assert Plan.from_toml(plan.to_toml()) == plan


def test_graphs_without_a_plan() -> None:
    with pytest.raises(UserError, match="the graph has no plan"):
        Plan.of(qgraph.trace(linears(), vector()))


def test_diff_names_missing_sites() -> None:
    one, two = Plan.of(prepare(linears(), vector())), Plan.of(prepare(linears()[:3].eval(), vector()))
    shown = [str(change) for change in one.diff(two)]
    assert "3: only in the first plan" in shown
    assert "3: only in the second plan" in [str(change) for change in two.diff(one)]
    assert "2: format int8 -> int32" in shown

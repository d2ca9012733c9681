"""Templates: from broad to narrow, protected by `freeze`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qgraph import (
    ConvDtypeTemplate,
    MatmulDtypeTemplate,
    ModuleNameTemplate,
    QconfigSetter,
    SensitivityTemplate,
    get_qconfig,
    prepare,
)
from qgraph.errors import QuantizationError, UserError
from qgraph.ir.node_info import SitePlan, info
from qgraph.numerics import qint8, qint16
from tests.support.models import Attention, Forward

TABLE = [("2", "activation", "Linear", 0.9, "int8"), ("0", "activation", "Linear", 0.5, "int8")]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid()).eval()


def vector() -> torch.Tensor:
    return torch.linspace(-1, 1, 8).reshape(2, 4)


def plans(*templates: Any, net: nn.Module | None = None, x: Any = None) -> dict[str, SitePlan]:
    gm = prepare((net or model()).eval(), vector() if x is None else x, QconfigSetter(get_qconfig(), templates))
    return {info(node).site: plan for node in gm.graph.nodes if (plan := info(node).plan) is not None}


def formats(*templates: Any) -> dict[str, str]:
    return {site: str(plan.format) for site, plan in plans(*templates).items()}


def test_the_reference_decides_what_no_template_does() -> None:
    found = plans(ModuleNameTemplate({"0": "int16"}))
    assert {(plan.rule, plan.format) for plan in found.values()} == {
        ("reference_qconfig", qint8),
        ("ModuleNameTemplate", qint16),
    }


def test_later_templates_win_unless_frozen() -> None:
    broad, narrow = ModuleNameTemplate({"": "int16"}), ModuleNameTemplate({"0": "int8"})
    assert formats(broad, narrow)["0"] == "int8"
    assert formats(broad, narrow)["1"] == "int16"
    assert plans(broad, narrow)["0"].overrode == ("ModuleNameTemplate: int16",)
    protected = ModuleNameTemplate({"0": "int8"}, freeze=True)
    assert formats(protected, ModuleNameTemplate({"": "int16"}))["0"] == "int8"


def test_the_whole_model_in_int16_changes_what_the_target_cannot() -> None:
    """A name of its own is refused where the whole model gives way."""
    found = plans(ModuleNameTemplate({"": "int8"}), net=Attention(), x=torch.randn(2, 5, 8))
    assert found["norm.rsqrt"].format == qint16, "inner steps keep 16 bits, as under a default"


def test_ports_and_thresholds() -> None:
    template = ModuleNameTemplate({"2": {"dtype": {"input": "int16", "output": "int16"}, "threshold": {"output": 2.0}}})
    found = plans(template)
    assert (found["2"].format, found["2"].fixed_scale) == (qint16, 2.0 / -qint16.qmin)
    assert [site for site in found if site.endswith("_as_int16")]
    assert plans(ModuleNameTemplate({"0": {"dtype": "int16", "threshold": 4.0}}))["0"].fixed_scale == 4.0 / -qint16.qmin
    assert plans(ModuleNameTemplate({"0": {"threshold": 4.0}}))["0"].fixed_scale == 4.0 / -qint8.qmin


def test_none_is_float() -> None:
    assert "1" not in plans(ModuleNameTemplate({"1": None}))


def test_dtypes_of_convolutions_and_products() -> None:
    gm = prepare(model(), vector(), QconfigSetter(get_qconfig(), [ConvDtypeTemplate("int8", "int16")]))
    weights = {info(node).site: info(node).weight_plan.format for node in gm.graph.nodes if info(node).weight_plan}
    assert weights == {"0": qint16, "2": qint16}
    net = Forward(lambda m, x: torch.matmul(m.a(x), m.b(x).t()).sigmoid(), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    found = plans(MatmulDtypeTemplate(["int8", "int16"]), net=net)
    assert [site.rpartition("_")[2] for site in found if "_as_" in site] == ["int16"]


def test_an_illegal_pair_is_refused() -> None:
    with pytest.raises(QuantizationError, match="illegal"):
        plans(ConvDtypeTemplate("int16", "int16"))


def test_sensitivity() -> None:
    assert formats(SensitivityTemplate(TABLE, 1))["2"] == "int16"
    assert formats(SensitivityTemplate(TABLE, 1))["0"] == "int8"
    assert formats(SensitivityTemplate(TABLE, 1.0))["0"] == "int16"
    low = formats(ModuleNameTemplate({"": "int16"}), SensitivityTemplate(TABLE, 1, low_precision_dtype="int8"))
    assert (low["0"], low["1"], low["2"]) == ("int8", "int16", "int16")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModuleNameTemplate([("a", "int8")]), "was given a list"),
        (lambda: ModuleNameTemplate({"a": {"outptu": "int8"}}), "did you mean 'output'"),
        (lambda: ModuleNameTemplate({"a": {"dtype": "int8", "treshold": 1}}), "did you mean 'threshold'"),
        (lambda: ModuleNameTemplate({"a": "itn8"}), "did you mean 'int8'"),
        (lambda: SensitivityTemplate(TABLE, 1, "activations"), "did you mean 'activation'"),
        (lambda: SensitivityTemplate(TABLE, 3), "from 0 to 2"),
        (lambda: QconfigSetter("int8"), "reference_qconfig is a str"),  # type: ignore[arg-type]
        (lambda: QconfigSetter(get_qconfig(), ["int8"]), "templates holds 'int8'"),  # type: ignore[list-item]
    ],
)
def test_wrong_templates(make: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value)


def test_templates_without_effect() -> None:
    with pytest.raises(QuantizationError, match="'matmul' has no effect"):
        plans(MatmulDtypeTemplate("int16"))
    with pytest.raises(QuantizationError, match="'9' has no effect"):
        plans(ModuleNameTemplate({"9": "int16"}))

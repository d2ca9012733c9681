"""QConfig and setters: what they accept, who wins, what has no effect, and reuse on several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.errors import QuantizationError, UserError
from qgraph.ir.node_info import info
from qgraph.numerics import qint8, qint16
from qgraph.quantization import (
    DefaultQconfigSetter,
    MinMaxObserver,
    ModuleNameQconfigSetter,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigSetter,
    get_qconfig,
    prepare,
)
from qgraph.quantization.config.query import SiteQuery
from qgraph.quantization.config.resolve import as_setters, check_all_used, resolve
from tests.support.models import Residual, image

INT16 = get_qconfig(out_dtype="int16")


def query(site: str, *origins: str, op: str = "conv2d") -> SiteQuery:
    return SiteQuery(site, site.rpartition(".")[0], origins or (site,), op)


def formats(gm: fx.GraphModule) -> dict[str, object]:
    return {info(node).site: info(node).plan.format for node in gm.graph.nodes if info(node).plan is not None}


# --- QConfig -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [qint16, "int16", "qint16", torch.int16], ids=str)
def test_formats_by_any_name(spelling: object) -> None:
    expected = QConfig(output=qint16, weight=qint16, input=qint16)
    assert QConfig(output=spelling, weight=spelling, input=spelling) == expected
    assert get_qconfig(in_dtype=spelling, weight_dtype=spelling, out_dtype=spelling) == expected


def test_torch_quantized_dtypes_are_formats() -> None:
    assert get_qconfig(out_dtype=torch.qint8).output == qint8


@pytest.mark.parametrize(
    ("spelling", "name"), [(MinMaxObserver, "min_max"), (MovingAveragePerChannelMinMaxObserver, "moving_average")]
)
def test_observers_by_class(spelling: type, name: str) -> None:
    assert get_qconfig(observer=spelling).activation_observer == name
    assert QConfig(weight_observer=spelling).weight_observer == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: get_qconfig(out_dtype="int17x"), "unknown number format 'int17x'"),
        (lambda: get_qconfig(out_dtype="itn8"), "did you mean 'int8'"),
        (lambda: QConfig(output=None), "unknown number format"),
        (lambda: QConfig(weight=8), "unknown number format"),
        (lambda: get_qconfig(observer="minmax"), "did you mean 'min_max'"),
        (lambda: QConfig(weight_observer="histograms"), "no observer is named 'histograms'"),
        (lambda: get_qconfig(fix_scale=0.0), "fixed scale of 0.0 is not usable"),
        (lambda: get_qconfig(fix_scale=-1), "give a finite scale > 0"),
        (lambda: get_qconfig(fix_scale=float("nan")), "is not usable"),
        (lambda: get_qconfig(fix_scale=float("inf")), "is not usable"),
        (lambda: get_qconfig(fix_scale=1e-45), "subnormal"),
        (lambda: get_qconfig(fix_scale="0.5"), "is no number"),
        (lambda: QConfig(fixed_scale=True), "is no number"),
        (lambda: get_qconfig(fix_scale=torch.tensor(0.5)), "is no number"),
    ],
)
def test_wrong_settings(call: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value)


def test_numpy_scales_are_numbers() -> None:
    assert get_qconfig(fix_scale=np.float32(0.25)).fixed_scale == 0.25


def test_settings_are_values() -> None:
    assert QConfig() == get_qconfig()
    assert len({QConfig(), get_qconfig(), INT16}) == 2
    with pytest.raises(FrozenInstanceError):
        QConfig().output = qint16  # type: ignore[misc]


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "site", "covers"),
    [
        ("conv", "conv", True),
        ("conv", "conv(1)", True),
        ("conv(1)", "conv(1)", True),
        ("conv(1)", "conv", False),
        ("conv(1)", "conv(11)", False),
        ("conv", "conv1", False),
        ("layer", "layer.0.conv", True),
        ("layer.0", "layer.0.conv", True),
        ("layer.0", "layer.01.conv", False),
        ("ayer.0", "layer.0.conv", False),
        ("chunk", "chunk[1]", True),
        ("", "anything", True),
    ],
)
def test_what_a_name_covers(key: str, site: str, covers: bool) -> None:
    assert (ModuleNameQconfigSetter({key: INT16}).decide(query(site)) is not None) is covers


def test_the_longest_name_wins_whatever_the_order() -> None:
    one, two = get_qconfig(), INT16
    for names in ({"a": one, "a.b": two}, {"a.b": two, "a": one}):
        setter = ModuleNameQconfigSetter(names)
        assert setter.decide(query("a.b.c")) is two
        assert setter.decide(query("a.c")) is one


def test_members_of_a_fused_call_answer() -> None:
    setter = ModuleNameQconfigSetter({"bn": INT16})
    assert setter.decide(query("conv", "conv", "bn", "relu")) is INT16


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([("conv", INT16)], "was given a list"),
        ({1: INT16}, "the name 1 of a setting"),
        ({"conv": "int16"}, "the configuration for 'conv' is a str"),
        ({"conv": 3}, "the configuration for 'conv' is a int"),
    ],
)
def test_wrong_names(names: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ModuleNameQconfigSetter(names)  # type: ignore[arg-type]


# --- several setters -----------------------------------------------------------------------------------------------


def test_none_is_the_default() -> None:
    assert as_setters(None) == (qgraph.default_calibration_qconfig_setter,)


def test_a_default_is_added_at_the_end() -> None:
    names = ModuleNameQconfigSetter({"a": INT16})
    assert as_setters(names) == (names, qgraph.default_calibration_qconfig_setter)
    assert as_setters([names, INT16]) == (names, DefaultQconfigSetter(INT16, "qconfig"))


@pytest.mark.parametrize(
    "wrong",
    [{"conv": INT16}, "int16", DefaultQconfigSetter, [INT16, None], qint16, 3],
    ids=lambda wrong: str(wrong)[:20],
)
def test_what_is_no_setter(wrong: object) -> None:
    with pytest.raises(UserError, match="qconfig_setter holds"):
        as_setters(wrong)


def test_the_first_answer_counts() -> None:
    first, second = ModuleNameQconfigSetter({"a": INT16}), DefaultQconfigSetter(QConfig(), "mine")
    decision = resolve((first, second), query("a"))
    assert (decision.qconfig, decision.rule, decision.overrode) == (INT16, "module name", ("mine: int8",))
    decision = resolve((first, second), query("b"))
    assert (decision.qconfig, decision.rule, decision.overrode) == (QConfig(), "mine", ())


def test_nobody_answers() -> None:
    with pytest.raises(QuantizationError, match="no setter answers for site b"):
        resolve([ModuleNameQconfigSetter({"a": INT16})], query("b"))


class ByOperator:
    """A setter of the user's own."""

    name = "by operator"

    def __init__(self, answer: object = INT16) -> None:
        self.answer = answer

    def decide(self, query: SiteQuery) -> QConfig | None:
        return self.answer if query.op == "linear" else None  # type: ignore[return-value]

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        return [] if any(query.op == "linear" for query in queries) else ["linear"]


def test_a_setter_of_the_users_own() -> None:
    assert isinstance(ByOperator(), QConfigSetter)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid()).eval()
    gm = prepare(model, torch.randn(2, 4), ByOperator())
    assert formats(gm) == {"input.quant": qint8, "0": qint16, "2": qint16, "3": qint8}
    with pytest.raises(QuantizationError, match="the by operator setting for 'linear' has no effect"):
        prepare(nn.Sigmoid().eval(), torch.randn(2, 4), ByOperator())


def test_an_answer_that_is_no_qconfig() -> None:
    with pytest.raises(QuantizationError, match="by operator answered 'int16' for site 0") as caught:
        prepare(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4), ByOperator("int16"))
    assert "return a QConfig" in str(caught.value)


# --- without effect ------------------------------------------------------------------------------------------------


def test_a_name_that_an_earlier_setter_always_beats() -> None:
    first, second = ModuleNameQconfigSetter({"a": INT16}), ModuleNameQconfigSetter({"a.b": get_qconfig()})
    queries = [query("a.b"), query("c")]
    check_all_used((second, first), [*queries, query("a.c")])
    with pytest.raises(QuantizationError, match=r"'a\.b' has no effect") as caught:
        check_all_used((first, second), queries)
    assert "earlier setter" in str(caught.value)


def test_nobody_asks_after_a_default() -> None:
    with pytest.raises(QuantizationError, match="'conv1' has no effect"):
        prepare(Residual().eval(), image(), (QConfig(), ModuleNameQconfigSetter({"conv1": INT16})))


def test_close_names_are_suggested() -> None:
    with pytest.raises(QuantizationError) as caught:
        prepare(Residual().eval(), image(), ModuleNameQconfigSetter({"conv3": INT16}))
    assert "'conv2'" in str(caught.value)
    assert "'conv1'" in str(caught.value)


# --- reuse ---------------------------------------------------------------------------------------------------------


def test_a_setter_serves_several_models() -> None:
    """What a setter matched in one model says nothing about the next."""
    setter = ModuleNameQconfigSetter({"conv1": INT16})
    first = formats(prepare(Residual().eval(), image(), setter))
    second = formats(prepare(Residual(8).eval(), image(), setter))
    assert first == second
    assert first["conv1"] == qint16
    with pytest.raises(QuantizationError, match="'conv1' has no effect"):
        prepare(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4), setter)
    assert formats(prepare(Residual().eval(), image(), setter)) == first


@pytest.mark.parametrize(
    ("setter", "output", "observer"),
    [
        (qgraph.default_calibration_qconfig_setter, qint8, "min_max"),
        (qgraph.default_qat_qconfig_setter, qint8, "moving_average"),
        (qgraph.calibration_8bit_weight_16bit_act_qconfig_setter, qint16, "min_max"),
        (qgraph.qat_8bit_weight_16bit_act_qconfig_setter, qint16, "moving_average"),
    ],
)
def test_templates(setter: DefaultQconfigSetter, output: object, observer: str) -> None:
    gm = prepare(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).eval(), torch.randn(2, 4), setter)
    for node in gm.graph.nodes:
        plan, weight = info(node).plan, info(node).weight_plan
        if plan is not None:
            assert (plan.format, plan.observer, plan.rule) == (output, observer, setter.name)
        if weight is not None:
            assert (weight.format, weight.observer) == (qint8, "min_max")

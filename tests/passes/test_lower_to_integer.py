"""lower-to-integer: float operators become integer ones; what cannot is named and stays between stubs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from qgraph import QuantStub
from qgraph.analysis import compare_sites
from qgraph.capture import trace
from qgraph.errors import InternalError, QuantizationError, UserError
from qgraph.ir.editor import Editor
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op_table import FAKE_QUANT
from qgraph.ir.stage import Stage
from qgraph.pipeline import CheckLevel, Pipeline
from qgraph.quantization import QConfig, calibrate, prepare
from qgraph.simulator import Simulator
from tests.passes.models import printed
from tests.support.models import Attention, Forward, Residual, image


def frozen(model: nn.Module, example: Any, setter: object = None) -> fx.GraphModule:
    gm = prepare(model.eval(), example, setter)
    calibrate(gm, [example], progress=False)
    return Pipeline.parse("freeze-qparams").run(gm).gm


def lowered(gm: fx.GraphModule, options: str = "") -> fx.GraphModule:
    return Pipeline.parse(f"lower-to-integer{options}").run(gm, checks=CheckLevel.CLAIMS).gm


def operators(gm: fx.GraphModule) -> list[str]:
    return [name for node in gm.graph.nodes if (name := integer_name(node.target)) is not None]


def x() -> torch.Tensor:
    return torch.randn(2, 4)


def with_islands() -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = torch.cummax(m.a(x), -1).values
        return torch.cumprod(m.b(y), 1).sigmoid()

    return Forward(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))


def test_golden(golden: Callable[[str], None]) -> None:
    example = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    golden(printed(lowered(frozen(Residual(), example))))


@pytest.mark.parametrize(
    ("model", "example"), [(Residual(), image()), (Attention(), torch.randn(2, 5, 8))], ids=["residual", "attention"]
)
def test_agrees_with_fake_quantization_site_by_site(model: nn.Module, example: torch.Tensor) -> None:
    gm = frozen(model, example)
    integer = lowered(gm)
    sites = compare_sites(gm, integer, (torch.randn_like(example),))
    assert len(sites) == sum(info(node).plan is not None for node in gm.graph.nodes)
    tables = ("exp", "reciprocal", "rsqrt")
    for site in sites:
        if site.format != "int32" and site.op not in tables:
            assert site.largest <= 1, site
            assert site.differing <= 1 + 0.01 * site.elements, site


def test_no_float_arithmetic_is_left() -> None:
    gm = lowered(frozen(Attention(), torch.randn(2, 5, 8)))
    assert graph_info(gm).stage is Stage.INTEGER
    assert not any(info(node).op is FAKE_QUANT for node in gm.graph.nodes)
    assert not any(node.op == "call_module" for node in gm.graph.nodes if info(node).op.name != "guard")
    assert not list(gm.parameters())
    names = operators(gm)
    assert names[0] == "quantize"
    assert names[-1] == "dequantize"
    assert names.count("quantize") == names.count("dequantize") == 1


def test_sites_keep_their_names() -> None:
    gm = frozen(Residual(), image())
    before = {info(node).site for node in gm.graph.nodes if info(node).plan is not None}
    assert before <= set(Simulator(lowered(gm)).sites)


def test_a_stub_between_equal_scales_disappears() -> None:
    """Two stubs of the user with one fixed scale: nothing to compute between them."""
    model = Forward(
        lambda m, x: m.second(m.first(x).reshape(-1)).relu(), first=QuantStub(scale=0.5), second=QuantStub(scale=0.5)
    )
    gm = lowered(frozen(model, x()))
    assert operators(gm) == ["quantize", "clamp", "dequantize"]


def test_a_stub_between_codes_rescales() -> None:
    model = Forward(lambda m, x: m.second(m.first(x)).relu(), first=QuantStub(scale=0.5), second=QuantStub(scale=0.25))
    gm = lowered(frozen(model, x()))
    assert operators(gm) == ["quantize", "requantize", "clamp", "dequantize"]
    assert gm(torch.tensor([[0.6, 40.0, -3.0, 0.2]] * 2))[0].tolist() == [0.5, 31.75, 0.0, 0.0]


def test_tuples_of_codes() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.split(m.fc(x).sigmoid(), 2, dim=1)
        return a * b

    gm = lowered(frozen(Forward(forward, fc=nn.Linear(4, 4)), x()))
    items = [node for node in gm.graph.nodes if info(node).op.name == "item"]
    assert [str(info(node).value) for node in items] == ["i8[2,2]", "i8[2,2]"]
    assert all(info(node).qparams is not None for node in items)


# --- float islands -------------------------------------------------------------------------------------------------


def test_islands_stay_between_stubs() -> None:
    gm = lowered(frozen(with_islands(), x()))
    for node in gm.graph.nodes:
        if info(node).float_reason is not None:
            assert info(node).qparams is None
            assert all(info(used).qparams is None for used in node.all_input_nodes)
            assert info(node).source is not None
    assert operators(gm) == ["quantize", "linear", "dequantize"] * 2 + ["quantize", "lookup", "dequantize"]
    islands = [note for note in graph_info(gm).notes if note.startswith("float:")]
    assert [note.split(":")[1].split()[0] for note in islands] == ["_generated_cummax_0", "_generated_cumprod_0"]


def test_islands_compute_what_they_did() -> None:
    gm = lowered(frozen(with_islands(), x()))
    run = Simulator(gm).run(x(), record=True)
    assert torch.equal(run.values["_generated_cummax_0[0]"], torch.cummax(run.values["a.dequant"], -1).values)
    assert torch.equal(run.values["_generated_cumprod_0"], torch.cumprod(run.values["b.dequant"], 1))


def test_strict_names_every_island_and_changes_nothing() -> None:
    gm = frozen(with_islands(), x())
    text, record = printed(gm), graph_info(gm)
    with pytest.raises(QuantizationError, match=r"2 operator\(s\) stay in float") as caught:
        lowered(gm, "{strict=true}")
    for part in ("site _generated_cummax_0", "_generated_cumprod_0", "no integer form of torch.cumprod is known"):
        assert part in str(caught.value)
    assert str(caught.value).count("test_lower_to_integer.py:") == 2
    assert printed(gm) == text
    assert graph_info(gm) == record


def test_strict_names_all_of_many_islands() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            x = torch.cumprod(x, 1)
        return m.fc(x)

    with pytest.raises(QuantizationError, match=r"12 operator\(s\)") as caught:
        lowered(frozen(Forward(forward, fc=nn.Linear(4, 4)), x()), "{strict=true}")
    for number in range(12):
        assert f"_generated_cumprod_{number}," in str(caught.value)


def test_strict_accepts_what_is_all_integer() -> None:
    gm = frozen(Residual(), image())
    assert printed(lowered(gm, "{strict=true}")) == printed(lowered(gm))


# --- order, and errors in the middle -------------------------------------------------------------------------------


def test_needs_frozen_scales() -> None:
    gm = prepare(Residual().eval(), image())
    calibrate(gm, [image()], progress=False)
    with pytest.raises(UserError, match="lower-to-integer needs 'frozen' first"):
        lowered(gm)
    with pytest.raises(UserError, match="works on a prepared graph, but gets a captured one"):
        lowered(trace(Residual().eval(), image()))


def test_runs_once() -> None:
    with pytest.raises(UserError, match="works on a prepared graph, but gets a integer one"):
        lowered(lowered(frozen(Residual(), image())))


def test_the_frozen_graph_is_untouched() -> None:
    gm, example = frozen(Residual(), image()), image()
    text, modules, expected = printed(gm), dict(gm.named_modules()), gm(example)
    lowered(gm)
    assert printed(gm) == text
    assert dict(gm.named_modules()) == modules
    assert torch.equal(gm(example), expected)


@pytest.mark.parametrize(
    ("site", "changes", "words"),
    [
        ("conv1", {"weight_qparams": None}, "a weight has no scale"),
        ("stem", {"qparams": None}, "an integer operator reads a value without scale"),
    ],
)
def test_an_error_in_the_middle_leaves_the_given_graph_alone(site: str, changes: dict[str, Any], words: str) -> None:
    gm = frozen(Residual(), image())
    node = next(node for node in gm.graph.nodes if info(node).site == site)
    Editor(gm, "test").annotate(node, **changes)
    text = printed(gm)
    with pytest.raises(InternalError, match=words) as caught:
        lowered(gm)
    assert "models.py:" in str(caught.value)
    assert printed(gm) == text


def test_int16_activations() -> None:
    example = torch.randn(2, 5, 8)
    gm = frozen(Attention(), example, QConfig(output="int16"))
    integer = lowered(gm)
    with torch.no_grad():
        expected = gm(example)
    assert (integer(example) - expected).abs().max() <= 0.01 * expected.abs().max()

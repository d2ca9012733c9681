"""compare_sites: each site is judged alone, and graphs that do not belong together are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from qgraph.analysis import compare_sites
from qgraph.errors import StateError, UserError
from qgraph.ir.node_info import info
from qgraph.quantization import FakeQuantState, calibrate, convert, prepare, set_fake_quantize
from tests.support.models import Attention, Forward, Residual, image


def road(model: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    prepared = prepare(model.eval(), x)
    calibrate(prepared, [x], progress=False)
    return prepared, convert(prepared)


@pytest.fixture
def graphs() -> tuple[fx.GraphModule, fx.GraphModule]:
    return road(Residual(), image())


def test_every_rounded_site_once_in_order(graphs: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    prepared, integer = graphs
    sites = compare_sites(prepared, integer, (image(5),))
    planned = [info(node).site for node in prepared.graph.nodes if info(node).plan is not None]
    assert [site.site for site in sites] == planned
    assert [site.elements for site in sites] == [5 * n for n in (192, 256, 256, 256, 4, 5)]
    assert [site.format for site in sites] == ["int8"] * 5 + ["int32"]
    assert all(site.largest <= 1 for site in sites if site.format == "int8")
    assert compare_sites(prepared, integer, kwargs={"x": image()})


def test_a_difference_is_counted_where_it_arises_and_nowhere_else() -> None:
    """A layer without weights: its own results differ, those after it do not."""
    x = torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())
    prepared, integer = road(model, x)
    before = {site.site: site.differing for site in compare_sites(prepared, integer, (x,))}
    integer.get_buffer("n2_weight").zero_()
    after = {site.site: site for site in compare_sites(prepared, integer, (x,))}
    assert before["2"] == 0
    assert after["2"].differing > 20
    assert after["2"].largest > 1
    assert 0 < after["2"].agreement < 1
    for name in ("input.quant", "0", "4", "5"):
        assert after[name].largest <= 1, name


def test_attention() -> None:
    x = torch.randn(2, 5, 8)
    prepared, integer = road(Attention(), x)
    sites = compare_sites(prepared, integer, (x,))
    assert len(sites) == sum(info(node).plan is not None for node in prepared.graph.nodes)


# --- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [FakeQuantState.FLOAT, FakeQuantState.CALIBRATION, FakeQuantState.QAT], ids=str)
def test_only_in_validation(graphs: tuple[fx.GraphModule, fx.GraphModule], state: FakeQuantState) -> None:
    prepared, integer = graphs
    set_fake_quantize(prepared, state, ["conv2"])
    with pytest.raises(StateError, match=f"site conv2 is in state {state}") as caught:
        compare_sites(prepared, integer, (image(),))
    assert "FakeQuantState.VALIDATION" in str(caught.value)


def test_a_graph_calibrated_after_convert(graphs: tuple[fx.GraphModule, fx.GraphModule]) -> None:
    prepared, integer = graphs
    calibrate(prepared, [image() * 10], progress=False)
    with pytest.raises(UserError, match=r"site x\.quant has another scale or format") as caught:
        compare_sites(prepared, integer, (image(),))
    assert "calibrated or trained after convert" in str(caught.value)


def test_graphs_of_different_models() -> None:
    one, _ = road(Forward(lambda m, x: m.a(x).sigmoid(), a=nn.Linear(4, 4)), torch.randn(2, 4))

    class Other(nn.Module):
        def forward(self, other: torch.Tensor) -> torch.Tensor:
            return other.tanh()

    _, integer = road(Other(), torch.randn(2, 4))
    with pytest.raises(UserError, match="no rounded site in common") as caught:
        compare_sites(one, integer, (torch.randn(2, 4),))
    assert "Forward and Other" in str(caught.value)


@pytest.mark.parametrize(
    ("pick", "args", "words"),
    [
        (lambda p, i: (i, p), (image(),), "compare_sites needs a prepared graph, this one is integer"),
        (lambda p, i: (p, p), (image(),), "the simulator runs integer graphs"),
        (lambda p, i: (Residual(), i), (image(),), "needs a prepared model, got a Residual"),
        (lambda p, i: (p, i), image(), r"args is a Tensor"),
        (lambda p, i: (p, i), (), "input 'x' is missing"),
        (lambda p, i: (p, i), (torch.randn(2, 3, 9, 9),), "expected"),
    ],
    ids=["swapped", "two prepared", "model", "no tuple", "no inputs", "shape"],
)
def test_wrong_arguments(graphs: tuple[fx.GraphModule, fx.GraphModule], pick: Any, args: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compare_sites(*pick(*graphs), args)

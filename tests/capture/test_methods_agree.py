"""Prepare methods that succeed on a model give graphs that compute the same, with the same sites."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import fx, nn

from qgraph import CaptureError, PrepareMethod, Tracer, UserError, graph_info, info, prepare, trace
from qgraph.capture.values.variants import varied
from qgraph.capture.verification.compare import first_difference
from qgraph.capture.verification.process import reproducible
from tests.capture.architectures import ARCHITECTURES, Architecture


def _module_sites(gm: fx.GraphModule) -> list[str]:
    return [info(node).site for node in gm.graph.nodes if node.op == "call_module"]


def _sites(gm: fx.GraphModule) -> list[str]:
    return [info(node).site for node in gm.graph.nodes if node.op.startswith("call") and info(node).op.name != "size"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_methods_agree_on_architectures(architecture: Architecture) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'zoo': pip install qgraph-fx[zoo]")
    torch.manual_seed(0)
    model, example = architecture.build(transformers).eval(), architecture.example()
    graphs = {"jit": trace(model, example, "jit", waive=architecture.waive)}
    graphs["export"] = trace(model, example, "export", waive=architecture.waive)
    with contextlib.suppress(CaptureError):  # fx refuses most of these
        graphs["symbolic"] = trace(model, example, "symbolic", waive=architecture.waive)
    assert graph_info(graphs["export"]).batch_fixed is None
    tripled = {name: tensor.repeat(3, *[1] * (tensor.dim() - 1)) for name, tensor in example.items()}
    for inputs in (example, varied(example, 5), tripled):
        with reproducible():
            expected = graphs["jit"](**inputs)
            for gm in graphs.values():
                assert first_difference(expected, gm(**inputs)) is None
    for gm in graphs.values():
        assert _module_sites(gm) == _module_sites(graphs["jit"])


class _Net(nn.Module):
    """Two stages, a shared activation, functional calls and a structure in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Dropout(), nn.AdaptiveAvgPool2d(2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor, flags: dict[str, bool]) -> dict[str, torch.Tensor]:
        y = self.act(self.norm(self.conv(x))) * self.scale
        if flags["twice"]:
            y = self.act(y + y)
        z = self.down(y).flatten(2).transpose(1, 2)
        z, _ = self.attention(z, z, z)
        return {"classes": torch.softmax(self.head(z).mean(1), dim=-1), "first": y[:, 0]}


def _inputs() -> tuple[torch.Tensor, dict[str, bool]]:
    return torch.randn(2, 3, 8, 8), {"twice": True}


def test_methods_agree_on_sites() -> None:
    model = _Net().eval()
    jit, symbolic, export = (trace(model, _inputs(), method) for method in ("jit", "symbolic", PrepareMethod.EXPORT))

    def sites(gm: fx.GraphModule) -> list[str]:
        # Parts of a result are no calls, and `y[:, 0]` is a slice and a selection in aten.
        return [site for site in _sites(gm) if not any(word in site for word in ("item", "attention[", "select"))]

    assert sites(export) == sites(jit)
    assert _module_sites(symbolic) == _module_sites(jit)
    x, flags = torch.randn(5, 3, 8, 8), {"twice": True}
    with torch.no_grad():
        expected = jit(x, flags)
        assert all(first_difference(expected, gm(x, flags)) is None for gm in (symbolic, export))


def test_methods_agree_on_the_prepared_graph() -> None:
    model = _Net().eval()
    sites = []
    for method in ("jit", "export"):
        gm = prepare(model, _inputs(), method=method)
        sites.append([info(node).site for node in gm.graph.nodes if info(node).op.name in ("conv2d", "linear", "add")])
    assert sites[0] == sites[1]


def test_export_keeps_leaf_modules_whole() -> None:
    gm = trace(_Net().eval(), _inputs(), "export")
    assert _module_sites(gm) == [
        *("input_guard", "conv", "norm", "act", "act(1)"),
        *("down.0", "down.1", "down.2", "attention", "head"),
    ]


def test_export_fixes_the_batch_where_the_forward_asks_for_it() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0] // 2, 2, 4) if x.shape[0] % 2 == 0 else x.reshape(-1, 1, 4) * 2

    gm = trace(Halves().eval(), torch.randn(4, 4), "export")
    assert "% 2" in str(graph_info(gm).batch_fixed)
    with pytest.raises(UserError, match="shape"):
        gm(torch.randn(3, 4))


def test_export_refuses_dynamic_blocks() -> None:
    class Loop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with Tracer.dynamic_block(self, "step"):
                return x + 1

    with pytest.raises(CaptureError, match="export does not support dynamic blocks"):
        trace(Loop().eval(), torch.randn(2, 3), "export")


class _Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1


def test_auto_reports_every_attempt() -> None:
    with pytest.raises(CaptureError) as caught:
        trace(_Branch().eval(), torch.ones(2, 3))
    text = str(caught.value)
    assert "by jit" in text
    assert "export: torch.export cannot export _Branch" in text
    assert "symbolic: torch.fx cannot trace _Branch" in text


def test_auto_notes_why_it_left_jit() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.abs().max().item()

    gm = trace(Scaled().eval(), torch.randn(2, 3))
    assert graph_info(gm).method == "export"
    assert any("captured by export, because jit failed" in note for note in graph_info(gm).notes)


def test_unknown_methods_are_refused_with_what_is_close() -> None:
    with pytest.raises(UserError, match="unknown capture method 'jitstrip'") as caught:
        trace(nn.ReLU().eval(), torch.randn(2), "jitstrip")
    assert "jit_strip" in str(caught.value)
    with pytest.raises(UserError, match="eager is not available"):
        trace(nn.ReLU().eval(), torch.randn(2), "eager")


def test_methods_print_as_their_names() -> None:
    assert [str(method) for method in PrepareMethod] == ["auto", "jit", "jit_strip", "symbolic", "export"]

"""Models for pictures, and pictures parsed back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache

import pydot
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph.ir.copying import copy_graph
from qgraph.pipeline import Pass, PassObserver, PassReport
from qgraph.viz.style import Role
from tests.support.models import Attention, Residual, image, settle

STAGES = ("captured", "fused", "prepared", "integer")


class SharedConv(nn.Module):
    """A convolution called twice, a block of its own, and a float island."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        settle(self)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(F.relu(self.conv(x)))
        return self.head(torch.cat([x, y], 1)[:, :3]), torch.cumprod(y, 1)


class Chain(nn.Module):
    """Blocks inside one module whose sums are outside it: 4 nodes a block."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) + x
        return x


MODELS = {
    "residual": (Residual, image),
    "shared": (SharedConv, image),
    "attention": (Attention, lambda: torch.randn(2, 5, 8)),
}


class _KeepFused(PassObserver):
    graph: fx.GraphModule

    def after(self, owner: Pass, gm: fx.GraphModule, report: PassReport) -> None:
        if owner.name == "fuse-conv-bn-add-relu":
            self.graph = copy_graph(gm)


@cache
def stages(name: str) -> dict[str, fx.GraphModule]:
    """The four stages of a model; shared between tests, which do not change them."""
    torch.manual_seed(0)
    build, make_example = MODELS[name]
    model, example, keeper = build().eval(), make_example(), _KeepFused()
    prepared = qgraph.prepare(model, example, observers=[keeper])
    qgraph.calibrate(prepared, [example], progress=False)
    graphs = (qgraph.trace(model, example), keeper.graph, prepared, qgraph.convert(prepared))
    return dict(zip(STAGES, graphs, strict=True))


@dataclass
class Picture:
    """What a DOT text draws, by the names of graph nodes.

    Args:
        boxes: node to the lines in its box.
        fills: node to its colour.
        values: node to the text in the middle of the edges that leave it.
        edges: pairs of nodes, through the value between them.
        clusters: label of a cluster to the nodes directly in it.
        heading: title of the picture.
        legend: the legend's HTML.
    """

    boxes: dict[str, list[str]] = field(default_factory=dict)
    fills: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    edges: set[tuple[str, str]] = field(default_factory=set)
    clusters: dict[str, set[str]] = field(default_factory=dict)
    heading: str = ""
    legend: str = ""

    def with_role(self, role: Role) -> set[str]:
        """Nodes of one colour."""
        return {name for name, fill in self.fills.items() if fill == role.fill}


def parsed(dot: pydot.Dot) -> Picture:
    """What the DOT text of a picture draws, parsed back by pydot; takes seconds for 100 nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pydot's, of its own parser library
        (again,) = pydot.graph_from_dot_data(dot.to_string()) or []
    return read(again)


def read(dot: pydot.Dot) -> Picture:
    """What a picture draws."""
    picture = Picture(heading=unquoted(dot.get("label")))
    arrows: list[tuple[str, str]] = []
    _collect(dot, picture, arrows)
    assert len(set(arrows)) == len(arrows), "no edge is drawn twice"
    source_of = {end: start for start, end in arrows if end.endswith(" value")}
    picture.edges = {(source_of[start], end) for start, end in arrows if start.endswith(" value")}
    picture.values = {source_of[name]: text for name, text in picture.values.items()}
    return picture


def _collect(graph: pydot.Graph, picture: Picture, arrows: list[tuple[str, str]]) -> None:
    inside: set[str] = set()
    if graph.get_name().startswith("cluster_"):
        picture.clusters[unquoted(graph.get("label"))] = inside
    for node in graph.get_nodes():
        name = unquoted(node.get_name())
        if name == "legend":
            picture.legend = node.get("label")
        elif name.endswith(" value"):
            picture.values[name] = unquoted(node.get("label"))
        elif node.get("fillcolor"):
            inside.add(name)
            picture.boxes[name] = unquoted(node.get("label")).split("\n")
            picture.fills[name] = unquoted(node.get("fillcolor"))
    for edge in graph.get_edges():
        arrows.append((unquoted(edge.get_source()), unquoted(edge.get_destination())))
    for inner in graph.get_subgraphs():
        _collect(inner, picture, arrows)


def unquoted(text: str | None) -> str:
    """What graphviz shows for a quoted string."""
    if text is None or not text.startswith('"'):
        return text or ""
    shown, escaped = "", False
    for letter in text[1:-1]:
        if escaped:
            shown += "\n" if letter == "n" else letter
        elif letter != "\\":
            shown += letter
        escaped = letter == "\\" and not escaped
    return shown.replace("&amp;", "&")

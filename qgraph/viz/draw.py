"""Pictures of graphs: DOT by pydot, SVG and PNG by graphviz.

    draw(gm, "graph.svg")
    draw_diff(before, after, "diff.svg")

One box per operator, grouped by the user's modules; formats and scales stand on the edges; fused operators, float
islands and stubs have colours of their own, explained in a legend; calls that share weights say so. Fake quantizations,
weights and multipliers are drawn as labels, not as boxes. In an SVG, resting on a box shows its line of the text form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import pydot
from torch import fx

from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op import OpKind
from qgraph.viz.dot import quoted, write
from qgraph.viz.labels import box_text, hover_text, is_hidden, shared_calls, sources, value_text
from qgraph.viz.style import CLUSTER, EDGE, GRAPH, NODE, VALUE, Role, role_of

_STRAIGHT = 10
"""Weight of edges along a chain, against 1: graphviz bends others first."""


def draw(gm: fx.GraphModule, path: str | Path, *, title: str | None = None) -> Path:
    """Draws a graph to a file.

    Args:
        gm: a graph made by qgraph, of any stage.
        path: where to; the ending chooses the format: .dot, .svg or .png.
        title: a heading; model, stage and target if None.

    Returns:
        The path written.

    Raises:
        DrawError: the ending is unknown, graphviz is missing or fails, or the file cannot be written; nothing is left
            behind.
    """
    return write(to_dot(gm, title=title), path)


def to_dot(gm: fx.GraphModule, *, title: str | None = None) -> pydot.Dot:
    """The pydot graph of a picture, for further changes."""
    head = graph_info(gm)
    target = f", target {head.target.name}" if head.target else ""
    dot = empty_picture(title or f"{head.model} ({head.stage}{target})")
    roles = {node: role_of(node) for node in gm.graph.nodes if not is_hidden(node)}
    add_graph(dot, gm, roles)
    dot.add_node(legend({role: role.meaning for role in roles.values()}))
    return dot


def empty_picture(heading: str) -> pydot.Dot:
    """A picture with nothing but a heading."""
    return pydot.Dot("picture", graph_type="digraph", label=quoted(heading), labelloc="t", **GRAPH)


def add_graph(parent: pydot.Graph, gm: fx.GraphModule, roles: Mapping[fx.Node, Role], *, prefix: str = "") -> None:
    """Adds a box for every node that has a role, in clusters by module, and the values that flow between them.

    A value is a small text of its own in the middle of its edges: graphviz lets labels of edges run over other edges.
    """
    sharing = shared_calls(gm)
    composites = {path for node in roles if info(node).inner for path in _parents(_module_path(node))}
    paths = {node: _module_path(node, composites) for node in roles}
    clusters = _Clusters(parent, prefix, paths.values())
    chains = _chains(roles)
    for node, role in roles.items():
        box = pydot.Node(
            _name(node, prefix),
            label=quoted(box_text(node, sharing.get(node))),
            tooltip=quoted(hover_text(node)),
            group=f"{prefix}{chains[node]}",
            fillcolor=role.fill,
            color=role.line,
            **NODE,
        )
        clusters.holder(paths[node]).add_node(box)
    for node in roles:
        for source, operand in sources(node):
            value = _name(operand, prefix, " value")
            if not clusters.holder(paths[source]).get_node(value):
                text = quoted(value_text(operand))
                clusters.holder(paths[source]).add_node(
                    pydot.Node(value, label=text, group=f"{prefix}{chains[source]}", **VALUE)
                )
                parent.add_edge(pydot.Edge(_name(source, prefix), value, arrowhead="none", weight=_STRAIGHT, **EDGE))
            weight = _STRAIGHT if chains[source] == chains[node] else 1
            parent.add_edge(pydot.Edge(value, _name(node, prefix), weight=weight, **EDGE))


def _name(node: fx.Node, prefix: str, suffix: str = "") -> str:
    return quoted(f"{prefix}%{node.name}{suffix}")


def legend(meanings: Mapping[Role, str]) -> pydot.Node:
    """A box that explains the colours."""
    rows = "".join(
        f'<TR><TD BGCOLOR="{role.fill}" COLOR="{role.line}" BORDER="1" WIDTH="18"></TD>'
        f'<TD ALIGN="LEFT" BORDER="0">{meaning}</TD></TR>'
        for role, meaning in sorted(meanings.items(), key=lambda pair: list(Role).index(pair[0]))
    )
    table = f'<<TABLE BORDER="0" CELLSPACING="3" CELLPADDING="3">{rows}</TABLE>>'
    return pydot.Node("legend", shape="plaintext", label=table, tooltip="legend", fontname="Helvetica", fontsize="9")


class _Clusters:
    """Nested boxes for module paths; a path that holds fewer than two nodes gets none."""

    def __init__(self, root: pydot.Graph, prefix: str, paths: Iterable[str]) -> None:
        self.root = root
        self.prefix = prefix
        self.known: dict[str, pydot.Cluster] = {}
        self.counts: dict[str, int] = {}
        for path in paths:
            for inner in _parents(path):
                self.counts[inner] = self.counts.get(inner, 0) + 1

    def holder(self, path: str) -> pydot.Graph:
        """The box in which a node of module `path` belongs."""
        current = self.root
        for inner in _parents(path):
            if self.counts[inner] < 2:
                break
            if inner not in self.known:
                name = f"{self.prefix}{len(self.known)}"  # pydot cannot quote cluster names; the label is the path
                cluster = pydot.Cluster(name, label=quoted(inner), tooltip=quoted(inner), **CLUSTER)
                current.add_subgraph(cast(pydot.Subgraph, cluster))
                self.known[inner] = cluster
            current = self.known[inner]
        return current


def _parents(path: str) -> list[str]:
    """`a.b.c` to `a`, `a.b`, `a.b.c`."""
    parts = path.split(".") if path else []
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _chains(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Groups that graphviz draws as straight lines: a node continues the chain of its first operand if it is first."""
    chains: dict[fx.Node, str] = {}
    continued: set[fx.Node] = set()
    for number, node in enumerate(nodes):
        first = next((source for source, _ in sources(node)), None)
        goes_on = first in chains and first not in continued
        chains[node] = chains[first] if goes_on and first is not None else f"chain{number}"
        if first is not None:
            continued.add(first)
    return chains


def _module_path(node: fx.Node, composites: Iterable[str] = ()) -> str:
    """The module box of a node: the owner of a module call, the running module of a function, its own composite."""
    record = info(node)
    if record.op.kind is OpKind.STUB and record.created_by != "capture" and node.all_input_nodes:
        return _module_path(node.all_input_nodes[0], composites)
    base = record.site.partition("(")[0]
    if base in composites:
        return base
    return base.rpartition(".")[0] if "." in base else record.module

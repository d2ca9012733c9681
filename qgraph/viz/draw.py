"""Pictures of graphs: DOT by pydot, SVG and PNG by graphviz.

    draw(gm, "graph.svg")
    draw_diff(before, after, "diff.svg")

One box per operator, grouped by the user's modules; formats and scales stand on the edges; fused operators, float
islands, stubs and shared modules have colours of their own, explained in a legend. Fake quantizations and constants are
drawn as labels, not as boxes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import pydot
from torch import fx

from qgraph.errors import DrawError
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import CONSTANT, FAKE_QUANT, GUARD, OPAQUE
from qgraph.ir.stage import Stage
from qgraph.ir.text import called_name
from qgraph.ir.values import format_spec
from qgraph.viz.style import EDGE, GRAPH, NODE, Role, role_of, wrapped

FORMATS = (".dot", ".svg", ".png")


def draw(gm: fx.GraphModule, path: str | Path, *, title: str | None = None) -> Path:
    """Draws a graph to a file.

    Args:
        gm: a graph made by qgraph, of any stage.
        path: where to; the ending chooses the format: .dot, .svg or .png.
        title: a heading; model, stage and target if None.

    Returns:
        The path written.

    Raises:
        DrawError: the ending is unknown, or graphviz is missing or fails; nothing is left behind.
    """
    return write(to_dot(gm, title=title), path)


def draw_diff(before: fx.GraphModule, after: fx.GraphModule, path: str | Path, *, title: str | None = None) -> Path:
    """Draws two graphs side by side: removed nodes red, new ones green, changed ones yellow, the rest grey.

    Nodes are paired by site; a pair has changed if its text form differs.

    Raises:
        DrawError: as for `draw`.
    """
    old, new = _descriptions(before), _descriptions(after)
    heading = title or f"{graph_info(before).model}: {graph_info(before).stage} to {graph_info(after).stage}"
    dot = pydot.Dot("diff", graph_type="digraph", label=heading, labelloc="t", **GRAPH)
    for label, gm, ours, theirs in (("before", before, old, new), ("after", after, new, old)):
        side = pydot.Cluster(label, label=label, style="rounded", color="#888888", fontsize="12")
        roles = {
            site: (Role.REMOVED if label == "before" else Role.ADDED)
            if site not in theirs
            else (Role.CHANGED if theirs[site] != text else Role.UNCHANGED)
            for site, text in ours.items()
        }
        _add_graph(side, gm, prefix=f"{label}_", roles=roles)
        dot.add_subgraph(cast(pydot.Subgraph, side))
    dot.add_node(_legend(Role.diff_roles()))
    return write(dot, path)


def to_dot(gm: fx.GraphModule, *, title: str | None = None) -> pydot.Dot:
    """The pydot graph of a picture, for further changes."""
    head = graph_info(gm)
    target = f", target {head.target}" if head.target else ""
    heading = title or f"{head.model} ({head.stage}{target})"
    dot = pydot.Dot("graph", graph_type="digraph", label=heading, labelloc="t", **GRAPH)
    used = _add_graph(dot, gm, prefix="", roles=None)
    dot.add_node(_legend(used))
    return dot


def write(dot: pydot.Dot, path: str | Path) -> Path:
    """Writes a pydot graph as .dot, .svg or .png.

    Raises:
        DrawError: as for `draw`.
    """
    target = Path(path)
    if target.suffix not in FORMATS:
        raise DrawError(
            f"cannot draw to {target.name!r}",
            why=f"the ending {target.suffix!r} names no known format",
            fix=f"use one of {', '.join(FORMATS)}",
        )
    if target.parent != Path() and not target.parent.is_dir():
        raise DrawError(f"the folder {target.parent} does not exist", fix="create it first")
    if target.suffix == ".dot":
        target.write_text(dot.to_string(), encoding="utf-8")
        return target
    if shutil.which("dot") is None:
        raise DrawError(
            f"{target.suffix} pictures need the program 'dot' of graphviz, which is not installed",
            fix="install it (Debian: apt-get install graphviz, macOS: brew install graphviz), or draw to .dot",
        )
    try:
        data = dot.create(format=target.suffix.removeprefix("."))
    except Exception as error:
        raise DrawError(
            "graphviz could not lay the graph out", why=str(error), fix="draw to .dot and look at it"
        ) from error
    target.write_bytes(cast(bytes, data))
    return target


def _add_graph(parent: pydot.Graph, gm: fx.GraphModule, *, prefix: str, roles: Mapping[str, Role] | None) -> list[Role]:
    """Adds nodes, module clusters and edges; returns the roles that occur."""
    drawn = [node for node in gm.graph.nodes if not _hidden(node)]
    clusters = _Clusters(parent, prefix, [_module_path(node) for node in drawn])
    used: dict[Role, None] = {}
    for node in drawn:
        role = role_of(node) if roles is None else roles.get(info(node).site, Role.UNCHANGED)
        used[role] = None
        clusters.holder(_module_path(node)).add_node(
            pydot.Node(f"{prefix}{node.name}", label=_label(node), **NODE, fillcolor=role.fill, color=role.line)
        )
    for node in drawn:
        for source, label in _sources(node):
            parent.add_edge(pydot.Edge(f"{prefix}{source.name}", f"{prefix}{node.name}", label=label, **EDGE))
    return list(used)


class _Clusters:
    """Nested boxes for module paths; a path that holds fewer than two nodes gets none."""

    def __init__(self, parent: pydot.Graph, prefix: str, paths: Iterable[str]) -> None:
        self.root = parent
        self.prefix = prefix
        self.known: dict[str, pydot.Cluster] = {}
        self.counts: dict[str, int] = {}
        for path in paths:
            parts = path.split(".") if path else []
            for depth in range(1, len(parts) + 1):
                inner = ".".join(parts[:depth])
                self.counts[inner] = self.counts.get(inner, 0) + 1

    def holder(self, path: str) -> pydot.Graph:
        """The box in which a node of module `path` belongs."""
        current: pydot.Graph = self.root
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            inner = ".".join(parts[:depth])
            if self.counts[inner] < 2:
                break
            if inner not in self.known:
                cluster = pydot.Cluster(
                    f"{self.prefix}{inner}",
                    label=inner,
                    style="rounded",
                    color="#a0a8b8",
                    fontcolor="#505868",
                    fontsize="11",
                )
                current.add_subgraph(cast(pydot.Subgraph, cluster))
                self.known[inner] = cluster
            current = self.known[inner]
        return current


def _hidden(node: fx.Node) -> bool:
    record = info(node)
    return record.op in (CONSTANT, FAKE_QUANT, GUARD) and not _is_data(node)


def _is_data(node: fx.Node) -> bool:
    """A constant that is an operand in its own right, not a parameter of an operator that shows it in its label."""
    if info(node).op is not CONSTANT:
        return False
    owner = node.graph.owning_module
    if isinstance(owner, fx.GraphModule) and graph_info(owner).stage is Stage.INTEGER:
        return info(node).qparams is not None
    return True


def _module_path(node: fx.Node) -> str:
    """The module box of a node: the owner of a module call, the running module of a function."""
    record = info(node)
    base = record.site.partition("(")[0]
    return base.rpartition(".")[0] if "." in base else record.module


def _sources(node: fx.Node) -> list[tuple[fx.Node, str]]:
    """Where a node's data comes from, with the label of the edge; hidden nodes are looked through."""
    found = []
    operands = node.all_input_nodes
    for operand in operands:
        label = _edge_label(operand)
        source = operand
        while _hidden(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if not _hidden(source):
            found.append((source, label))
    return found


def _edge_label(node: fx.Node) -> str:
    record = info(node)
    shape = format_spec(record.value) if record.value is not None else ""
    if record.qparams is not None:
        return f"{record.qparams}\n{shape}"
    producer = node.all_input_nodes[0] if record.op is FAKE_QUANT else node
    plan = info(producer).plan
    if plan is None:
        return shape
    scale = _known_scale(node)
    return f"{plan.format}{scale}\n{shape}"


def _known_scale(node: fx.Node) -> str:
    owner = node.graph.owning_module
    if owner is None or node.op != "call_module":
        return ""
    scale = getattr(owner.get_submodule(str(node.target)), "scale", None)
    if scale is None or not hasattr(scale, "dim") or scale.dim() > 0:
        return ""
    return f"*{scale.item():.4g}"


def _label(node: fx.Node) -> str:
    record = info(node)
    if record.op.kind is OpKind.OUTPUT:
        return "output"
    kind = _kind(node)
    lines = [kind, wrapped(record.site)]
    if record.weight_plan is not None:
        lines.append(f"weight {record.weight_plan.format}")
    weights = [
        used for used in node.all_input_nodes if info(used).op is CONSTANT and str(used.target).endswith("_weight")
    ]
    lines += [f"weight {format_spec(info(weight).value)}" for weight in weights]
    if record.float_reason is not None:
        lines.append("float: " + wrapped(record.float_reason, width=28))
    return "\n".join(line for line in lines if line)


def _kind(node: fx.Node) -> str:
    """The operator, with what is fused into it."""
    record = info(node)
    if record.op is OPAQUE:
        return called_name(node)
    parts = [record.op.name]
    if node.op == "call_module" and node.graph.owning_module is not None:
        module = node.graph.owning_module.get_submodule(str(node.target))
        parts += ["add"] if getattr(module, "adds", False) else []
        activation = str(getattr(module, "activation", "none"))
        parts += [activation] if activation != "none" else []
    elif integer_name(node.target) in ("conv", "linear"):
        parts += ["add"] if node.args[3] is not None else []
        parts += ["relu"] if node.kwargs.get("low") == 0 else []
    return " + ".join(parts)


def _descriptions(gm: fx.GraphModule) -> dict[str, str]:
    """Site to a text that changes when the node does."""
    return {
        # An input is named by the last captured node it stands for, so that fusion above does not count as a change.
        info(node).site: f"{_kind(node)} {[info(used).stands_for[-1] for used in node.all_input_nodes]}"
        for node in gm.graph.nodes
        if not _hidden(node)
    }


def _legend(roles: Iterable[Role]) -> pydot.Node:
    rows = "".join(
        f'<TR><TD BGCOLOR="{role.fill}" COLOR="{role.line}" BORDER="1" WIDTH="18"></TD>'
        f'<TD ALIGN="LEFT" BORDER="0">{role.meaning}</TD></TR>'
        for role in sorted(roles, key=list(Role).index)
    )
    table = f'<<TABLE BORDER="0" CELLSPACING="3" CELLPADDING="3">{rows}</TABLE>>'
    return pydot.Node("legend", shape="plaintext", label=table, fontname="Helvetica", fontsize="9")

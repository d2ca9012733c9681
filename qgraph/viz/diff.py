"""Pictures of two graphs side by side, with what differs in colour."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import cast

import pydot
import torch
from torch import fx

from qgraph.ir.node_info import graph_info, info, module_of, tensor_at
from qgraph.ir.stage import Stage
from qgraph.ir.text import describe
from qgraph.ir.values import TensorSpec
from qgraph.viz.dot import quoted, write
from qgraph.viz.draw import add_graph, empty_picture, legend
from qgraph.viz.labels import is_hidden, sources, value_format, value_scale, weight_format
from qgraph.viz.style import CLUSTER, Role

_NAME = re.compile(r"%(\w+)")


def draw_diff(before: fx.GraphModule, after: fx.GraphModule, path: str | Path, *, title: str | None = None) -> Path:
    """Draws two graphs side by side: removed nodes red, new ones green, changed ones yellow, the rest grey.

    Nodes are paired by site. A pair has changed if its operator, operands, shape, format or scale differ; options and
    parameters count too, except between a float operator and the integer operator it became.

    Raises:
        DrawError: as for `draw`.
    """
    return write(diff_to_dot(before, after, title=title), path)


def diff_to_dot(before: fx.GraphModule, after: fx.GraphModule, *, title: str | None = None) -> pydot.Dot:
    """The pydot graph of `draw_diff`, for further changes."""
    lowered = (graph_info(before).stage is Stage.INTEGER) != (graph_info(after).stage is Stage.INTEGER)
    old, new = _by_site(before), _by_site(after)
    changed = {site for site in old.keys() & new.keys() if _differ(old[site], new[site], lowered=lowered)}
    counts = Counter(
        {
            Role.ADDED: len(new.keys() - old.keys()),
            Role.REMOVED: len(old.keys() - new.keys()),
            Role.CHANGED: len(changed),
            Role.UNCHANGED: len(old.keys() & new.keys()) - len(changed),
        }
    )
    heading = title or _heading(before, after)
    same = counts[Role.UNCHANGED] == counts.total()
    dot = empty_picture(f"{heading}\nno differences" if same else heading)
    for word, gm, ours, theirs, alone in (
        ("before", before, old, new, Role.REMOVED),
        ("after", after, new, old, Role.ADDED),
    ):
        roles = {
            node: alone if site not in theirs else Role.CHANGED if site in changed else Role.UNCHANGED
            for site, node in ours.items()
        }
        side = pydot.Cluster(word, label=quoted(f"{word}: {graph_info(gm).stage}"), tooltip=word, **CLUSTER)
        add_graph(side, gm, roles, prefix=word)
        dot.add_subgraph(cast(pydot.Subgraph, side))
    dot.add_node(legend({role: f"{counts[role]} {role.meaning}" for role in Role.diff_roles()}))
    return dot


def _heading(before: fx.GraphModule, after: fx.GraphModule) -> str:
    old, new = graph_info(before), graph_info(after)
    if old.model != new.model:
        return f"{old.model} ({old.stage}) to {new.model} ({new.stage})"
    return f"{old.model}: {old.stage}" + (f" to {new.stage}" if new.stage is not old.stage else "")


def _by_site(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {info(node).site: node for node in gm.graph.nodes if not is_hidden(node)}


def _differ(old: fx.Node, new: fx.Node, *, lowered: bool) -> bool:
    """Whether a pair has changed; a `lowered` pair is a float operator and the integer operator it became."""
    if _common(old) != _common(new):
        return True
    ours, theirs = value_scale(old), value_scale(new)
    if lowered:
        return ours is not None and theirs is not None and not _same(ours, theirs)
    if info(old).value != info(new).value or not _same(ours, theirs) or _with_sites(old) != _with_sites(new):
        return True
    held, holds = _parameters(old), _parameters(new)
    return len(held) != len(holds) or not all(map(_same, held, holds))


def _common(node: fx.Node) -> tuple[object, ...]:
    """What float and integer operators have in common."""
    record = info(node)
    shape = record.value.shape if isinstance(record.value, TensorSpec) else None
    operands = [info(source).stands_for[-1] for source, _ in sources(node)]
    return record.op, shape, value_format(node), weight_format(node), record.float_reason, operands


def _with_sites(node: fx.Node) -> str:
    """The text form with sites for names, which differ where nodes were inserted.

    An operand is named by the last captured node it stands for, so that fusion above does not count as a change.
    """
    names = {operand.name: info(source).stands_for[-1] for source, operand in sources(node)}
    return _NAME.sub(lambda found: names.get(found[1], "constant"), describe(node))


def _parameters(node: fx.Node) -> list[torch.Tensor]:
    if node.op == "call_module":
        return [value for value in module_of(node).state_dict().values() if isinstance(value, torch.Tensor)]
    owner = node.graph.owning_module
    constants = [node, *(used for used in node.all_input_nodes if is_hidden(used))]
    return [tensor_at(owner, str(used.target)) for used in constants if used.op == "get_attr" and owner is not None]


def _same(old: torch.Tensor | None, new: torch.Tensor | None) -> bool:
    if old is None or new is None:
        return old is new
    if (old.dtype, old.device, old.shape) != (new.dtype, new.device, new.shape):
        return False
    return torch.equal(old, new) or torch.allclose(old, new, rtol=0, atol=0, equal_nan=True)

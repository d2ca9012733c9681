"""The networkx view of a graph, and the graph questions asked of it.

The view is a snapshot: it does not follow later edits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import networkx as nx
from torch import fx

from qgraph.ir.node_info import info

if TYPE_CHECKING:
    Network: TypeAlias = nx.DiGraph[str]
else:
    Network = nx.DiGraph


def to_networkx(gm: fx.GraphModule) -> Network:
    """A directed graph: one networkx node per fx node, keyed by name, edges along the data.

    Attributes of a node: `op`, `kind`, `site`, `module` and `position` in execution order.
    """
    network: Network = nx.DiGraph(name=type(gm).__name__)
    for position, node in enumerate(gm.graph.nodes):
        record = info(node)
        network.add_node(
            node.name,
            op=record.op.name,
            kind=str(record.op.kind),
            site=record.site,
            module=record.module,
            position=position,
        )
        network.add_edges_from((used.name, node.name) for used in node.all_input_nodes)
    return network


def cone(network: Network, name: str) -> set[str]:
    """Names of the nodes whose value depends on `name`, itself included."""
    return {name, *nx.descendants(network, name)}


def sources_of(network: Network, name: str) -> set[str]:
    """Names of the nodes that `name` depends on, itself included."""
    return {name, *nx.ancestors(network, name)}


def dominators(network: Network, start: str) -> dict[str, str]:
    """Immediate dominator of every node reachable from `start`: all paths to a node pass through it."""
    immediate: dict[str, str] = dict(nx.immediate_dominators(network, start))
    return immediate

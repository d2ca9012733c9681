"""A second graph over the same tensors."""

from __future__ import annotations

from torch import fx

from qgraph.ir.node_info import graph_info, info, set_info


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own whose leaf modules and tensors are those of `gm`.

    Passes replace modules and tensors and never write to them, so the original keeps computing what it did.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    old_output = next(node for node in gm.graph.nodes if node.op == "output")
    set_info(graph.output(output), info(old_output))
    copied = fx.GraphModule(gm, graph, class_name=graph_info(gm).model)
    copied.train(gm.training)
    copied.meta.update(gm.meta)
    return copied

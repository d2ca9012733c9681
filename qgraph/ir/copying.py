"""A second graph over the same tensors, and dropping what a graph does not use."""

from __future__ import annotations

from torch import fx, nn

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
    # Leaf modules are gm's own, with flags of their own; only what the constructor made gets one.
    originals = dict(gm.named_modules())
    for path, module in copied.named_modules():
        if path not in originals or originals[path] is not module:
            module.training = originals[path].training if path in originals else gm.training
    copied.meta.update(gm.meta)
    return copied


def drop_unused_modules(gm: fx.GraphModule) -> None:
    """Removes modules and tensors that no node uses.

    fx's own `delete_all_unused_submodules` takes quadratic time.
    """
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    _drop(gm, "", called, read, _parents(called | read))


def _parents(paths: set[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        parent = path.rpartition(".")[0]
        while parent and parent not in found:
            found.add(parent)
            parent = parent.rpartition(".")[0]
    return found


def _drop(module: nn.Module, prefix: str, called: set[str], read: set[str], parents: set[str]) -> None:
    for table in (module._parameters, module._buffers):
        for name in [name for name in table if prefix + name not in read]:
            del table[name]
    for name, child in list(module._modules.items()):
        path = prefix + name
        if path in called:
            continue
        if path not in parents or child is None:
            del module._modules[name]
        else:
            _drop(child, f"{path}.", called, read, parents)

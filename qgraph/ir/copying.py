"""A second graph over the same tensors, and dropping what a graph does not use."""

from __future__ import annotations

from torch import fx, nn

from qgraph.ir.graph_module import CheckedGraphModule
from qgraph.ir.node_info import graph_info, info, set_info
from qgraph.nn import clone_module


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own whose leaf modules and tensors are those of `gm`.

    Passes replace modules and tensors and never write to them, so the original keeps computing what it did.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    old_output = next(node for node in gm.graph.nodes if node.op == "output")
    set_info(graph.output(output), info(old_output))
    copied = CheckedGraphModule(gm, graph, class_name=graph_info(gm).model)
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


def is_container(module: object) -> bool:
    """Whether a module only holds others: those belong to one graph, all others may be shared between graphs."""
    return type(module) is nn.Module or isinstance(module, fx.GraphModule)


def own_child(parent: nn.Module, name: str, *, shared: bool) -> tuple[nn.Module, bool]:
    """The child of a module that belongs to the graph, made the graph's own if it is not.

    Args:
        shared: whether `parent` was shared before.

    Returns:
        The child, and whether it was shared.
    """
    child = parent._modules[name]
    assert child is not None
    shared = shared or not is_container(child)
    if shared:
        child = clone_module(child)
        parent._modules[name] = child
    return child, shared


def _drop(
    module: nn.Module, prefix: str, called: set[str], read: set[str], parents: set[str], *, shared: bool = False
) -> None:
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
            own, was_shared = own_child(module, name, shared=shared)
            _drop(own, f"{path}.", called, read, parents, shared=was_shared)

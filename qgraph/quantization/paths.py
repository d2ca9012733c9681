"""Models with several control-flow paths: one prepared graph per path, with what they have in common shared.

Each path is captured and prepared for itself. Then parameters that are equal become one tensor, and the same site of
several paths gets one fake quantization, so that all paths calibrate and train it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qgraph.errors import UserError
from qgraph.ir.node_info import NodeInfo, graph_info, info, module_of, update_graph_info
from qgraph.ir.op_table import FAKE_QUANT
from qgraph.ir.paths import PathModel, refusal
from qgraph.nn import Fused
from qgraph.quantization.fake_quantize import FakeQuantize


@dataclass(frozen=True, init=False)
class Examples:
    """Several example inputs, one per path that the model's forward takes.

    Args:
        examples: each as `prepare` takes it: a tensor, a tuple of positional or a dict of keyword arguments.
    """

    examples: tuple[Any, ...]

    def __init__(self, *examples: Any) -> None:
        if not examples:
            raise UserError("Examples() holds no example", fix="give one example per path: Examples(first, second)")
        object.__setattr__(self, "examples", examples)


def prepare_paths(examples: Examples, prepare: Callable[[Any], fx.GraphModule]) -> PathModel:
    """One prepared graph per path; `prepare` makes one from an example."""
    graphs: list[fx.GraphModule] = []
    for example in examples.examples:
        gm = prepare(example)
        known = graph_info(gm).example
        assert known is not None
        same = next((other for other in graphs if refusal(other, known.args, known.kwargs) is None), None)
        if same is not None:
            note = "a further example takes the path of an earlier one: there is one graph for both"
            update_graph_info(same, notes=(*graph_info(same).notes, note))
            continue
        for other in graphs:
            _share_parameters(other, gm)
            _share_quantizers(other, gm)
        graphs.append(gm)
    return PathModel(graphs)


def _share_parameters(first: fx.GraphModule, gm: fx.GraphModule) -> None:
    known = dict(first.named_parameters(remove_duplicate=False))
    apart = []
    for path, module in gm.named_modules(remove_duplicate=False):
        for name, own in module._parameters.items():
            whole = f"{path}.{name}".lstrip(".")
            shared = known.get(whole)
            if own is None or shared is None or own is shared:
                continue
            if own.shape == shared.shape and torch.equal(own, shared):
                module._parameters[name] = shared
            else:
                apart.append(whole)
    if apart:
        note = f"not shared between paths, because the paths are fused differently: {', '.join(sorted(set(apart)))}"
        update_graph_info(gm, notes=(*graph_info(gm).notes, note))


def _share_quantizers(first: fx.GraphModule, gm: fx.GraphModule) -> None:
    known = _rounded_sites(first)
    for key, path in _rounded_sites(gm).items():
        if key in known:
            owner, _, name = path.rpartition(".")
            gm.get_submodule(owner)._modules[name] = first.get_submodule(known[key])
    weights = {
        (id(module.weight), _settings(module.weight_fake_quant)): module.weight_fake_quant
        for module in first.modules()
        if isinstance(module, Fused) and isinstance(module.weight_fake_quant, FakeQuantize)
    }
    for module in gm.modules():
        if isinstance(module, Fused) and isinstance(module.weight_fake_quant, FakeQuantize):
            key = (id(module.weight), _settings(module.weight_fake_quant))
            module.weight_fake_quant = weights.get(key, module.weight_fake_quant)


def _rounded_sites(gm: fx.GraphModule) -> dict[Any, str]:
    """What identifies a site in every path, to the path of its fake quantization."""
    found: dict[Any, str] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or info(node).op is not FAKE_QUANT:
            continue
        source = node.all_input_nodes[0]
        module = module_of(node)
        if isinstance(module, FakeQuantize):
            key = (_identity(info(source)), _settings(module))
            found.setdefault(key, str(node.target))
    return found


def _identity(record: NodeInfo) -> Any:
    """The place in the user's code, and what is fused there: numbers in names may shift from path to path."""
    members = tuple(site.partition("(")[0] for site in record.stands_for)
    if record.repeated is not None:
        place: Any = record.repeated.common(record.site)
        members = tuple(member.rpartition("_generated_")[0] or member for member in members)
        return record.op, place, len(members), members[0], str(record.source)
    return record.op, record.site, members, str(record.source)


def _settings(module: nn.Module | None) -> Any:
    assert isinstance(module, FakeQuantize)
    return module.qtype, str(module.observer), module.fixed_scale, module.scheme

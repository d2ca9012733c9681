"""Helpers of the capture tests: comparing a graph with its model, snapshots of a model, lines of a test file."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph.capture.values.variants import copy_inputs
from qgraph.capture.verification.compare import first_difference
from qgraph.capture.verification.process import reproducible
from qgraph.ir.node_info import info
from qgraph.ir.op_table import GUARD

_BOOKKEEPING = ("placeholder", "output", "get_attr")


def x(size: int = 2) -> torch.Tensor:
    """An input of most models here."""
    return torch.randn(size, 4, 6)


def network() -> nn.Module:
    """A model of three leaves for it."""
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


class Mixed(nn.Module):
    """Convolution, norm, attention and a matrix product, for images of three channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x))) * 0.5
        y = y.flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.head(y.mean(1) / y.shape[-1] ** 0.5).softmax(-1)


def run(module: nn.Module, args: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None) -> Any:
    """Calls a model or a graph on copies of the arguments, with the numerics of a capture."""
    with reproducible():
        return module(*copy_inputs({"args": args})["args"], **copy_inputs(dict(named or {})))


def assert_agrees(model: nn.Module, gm: fx.GraphModule, *args: Any, **named: Any) -> None:
    """The graph computes exactly what the model does."""
    found = first_difference(run(model, args, named), run(gm, args, named))
    assert found is None, found


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes that compute something, in execution order."""
    return [node for node in gm.graph.nodes if node.op not in _BOOKKEEPING and info(node).op is not GUARD]


def sites(gm: fx.GraphModule) -> list[str]:
    """Their sites."""
    return [info(node).site for node in calls(gm)]


def called_modules(gm: fx.GraphModule) -> list[str]:
    """Paths of the modules the graph calls, without the input guard."""
    return [str(node.target) for node in calls(gm) if node.op == "call_module"]


def line_of(file: str, marker: str) -> int:
    """Number of the only line of `file` that ends with the comment `marker`."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {marker}")]
    assert len(found) == 1, f"{marker!r} is on lines {found}"
    return found[0]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module: tensors by value, containers and plain values by their contents."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = _frozen(value)
    return found


def process_state() -> dict[str, Any]:
    """What a capture must put back in the process."""
    return {
        "call": nn.Module.__call__,
        "setattr": nn.Module.__setattr__,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "collector": gc.isenabled(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
        return (id(value), tuple(value.shape), value.dtype, dense.double().tolist(), tuple(sorted(value.__dict__)))
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_frozen(entry) for entry in value]
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return value
    return id(value)

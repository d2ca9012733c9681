"""A forward without values: tensors on the meta device that pretend to be where the example was.

Meta kernels of simple operators are decomposed in Python and would cost more than the real forward, so their shape rule
is applied directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qgraph.capture.values.storage import flat_tensors
from qgraph.ir.arguments import classify, writes_in_place
from qgraph.ir.node_info import submodule_at
from qgraph.ir.op import ShapeRule
from qgraph.ir.op_table import IDENTITY

if TYPE_CHECKING:
    from qgraph.capture.recording.recorder import Recorder

Outcome = tuple[Any, list[torch.Tensor]]


class MetaCalls:
    """Makes calls fit the meta device.

    Args:
        device: where the tensors pretend to be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.meta = torch.device("meta")
        self._originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._placed: dict[int, torch.Tensor] = {}

    def described(self, name: str, access: str, args: Any) -> Any:
        """What `x.device` and the like say in a run with values; None for other properties."""
        if access != "__get__" or not args[0].is_meta:
            return None
        answers = {
            "device": self.device,
            "is_meta": False,
            "is_cpu": self.device.type == "cpu",
            "is_cuda": self.device.type == "cuda",
        }
        return answers.get(name)

    def placed(self, recorder: Recorder, name: str, args: Any, named: Any) -> tuple[Any, Any]:
        """The arguments with devices and constants moved to meta."""
        movable = name in ("to", "cpu", "cuda")
        if not movable and "device" not in named and all(tensor.is_meta for tensor in flat_tensors((args, named))):
            return args, named
        recorder.depth += 1
        try:
            return tuple(self._moved(entry, movable) for entry in args), {
                key: self.meta if key == "device" and entry is not None else self._moved(entry, movable)
                for key, entry in named.items()
            }
        finally:
            recorder.depth -= 1

    def restored(self, result: Any, written: list[torch.Tensor]) -> Outcome:
        """The outcome in terms of the caller's own tensors."""
        if not self._originals:
            return result, written
        if isinstance(result, torch.Tensor) and id(result) in self._originals:
            result = self._originals[id(result)][1]
        return result, [self._originals.get(id(tensor), (tensor, tensor))[1] for tensor in written]

    def _moved(self, value: Any, movable: bool) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.is_meta else self._copy(value)
        if isinstance(value, torch.device):
            return self.meta
        if movable and isinstance(value, str):
            return self.meta
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return type(value)(self._moved(entry, movable) for entry in value)
        return value

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._placed:
            copy = self._placed[id(tensor)] = tensor.to(self.meta)
            self._originals[id(copy)] = copy, tensor
        return self._placed[id(tensor)]

    def by_shape(self, recorder: Recorder, kind: str, target: Any, args: Any, options: Any) -> Outcome | None:
        """The outcome of an op that follows a simple rule; None for others."""
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_meta:
            return None
        if kind == "call_module" and isinstance(module := submodule_at(recorder.root, target), nn.RNNBase):
            return _recurrent(module, args[0]), []
        op = classify(kind, target, recorder.root, args, options)
        rule = op.shape
        if op is IDENTITY or rule is ShapeRule.OTHER:  # whether an identity returns its operand is for torch to say
            return None
        if writes_in_place(kind, target) or options.get("inplace"):
            return args[0], [args[0]]
        recorder.depth += 1
        try:
            if rule is ShapeRule.SAME and args[0].is_floating_point():  # integers may become floats
                return torch.empty_like(args[0]), []
            if rule is ShapeRule.BROADCAST and _same_floats(args) and not options:
                shapes = [value.shape for value in args if isinstance(value, torch.Tensor)]
                return args[0].new_empty(torch.broadcast_shapes(*shapes)), []
        finally:
            recorder.depth -= 1
        return None


def _recurrent(module: nn.RNNBase, x: torch.Tensor) -> Any:
    """What a recurrent layer returns; without values torch would go through the sequence step by step."""
    directions = 2 if module.bidirectional else 1
    width = module.proj_size or module.hidden_size
    batch = x.shape[:-1][0 if module.batch_first else 1 :][:1] if x.dim() == 3 else ()
    output = x.new_empty(*x.shape[:-1], directions * width)
    state = x.new_empty(module.num_layers * directions, *batch, width)
    if not isinstance(module, nn.LSTM):
        return output, state
    return output, (state, x.new_empty(module.num_layers * directions, *batch, module.hidden_size))


def _same_floats(args: tuple[Any, ...]) -> bool:
    """Whether arguments are float tensors on meta of one dtype, and Python numbers."""
    dtype = args[0].dtype
    return bool(dtype.is_floating_point) and all(
        value.dtype is dtype and value.is_meta if isinstance(value, torch.Tensor) else isinstance(value, (int, float))
        for value in args
    )

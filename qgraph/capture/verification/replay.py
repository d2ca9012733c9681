"""The user's model, run beside its graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qgraph.capture.model.copying import copy_model, shared, with_own_memory
from qgraph.capture.model.names import state_storages
from qgraph.capture.options.request import Request
from qgraph.capture.values.storage import storage_key, written_operands
from qgraph.capture.values.structure import Inputs
from qgraph.capture.values.variants import copy_inputs
from qgraph.capture.verification.compare import compare_replay
from qgraph.errors import CaptureError


@dataclass(frozen=True)
class Outcome:
    """One run of the model: what it was given, what came out, and torch's random state before."""

    inputs: Inputs
    output: Any
    random_state: torch.Tensor


class Reference:
    """Runs copies of the model, never the model itself.

    All runs use one copy, so that a forward whose next call computes something else is noticed. The copy shares the
    model's tensors and may not write to them; only where state is waived, every run has a copy with its own memory.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._copy: nn.Module | None = None
        self._state = {} if request.writable else state_storages(request.model)

    def run(self, inputs: Inputs) -> Outcome:
        """One more call of the model.

        Raises:
            Exception: what the forward raises; the next run then starts with a new copy.
        """
        state = torch.get_rng_state()
        model = self._copy or copy_model(self.request.model, with_own_memory if self.request.writable else shared)
        self._copy = None
        with ReadOnly(self._state):
            output = self.request.call(model, copy_inputs(inputs))
        if not self.request.writable:
            self._copy = model
        return Outcome(inputs, output, state)


def replay(request: Request, gm: fx.GraphModule, what: str, outcome: Outcome, notes: tuple[str, ...]) -> None:
    """Runs the graph on what the model was run on and compares exactly.

    Raises:
        CaptureError: the outputs differ.
    """
    graph = copy.deepcopy(gm) if request.writable else gm
    torch.set_rng_state(outcome.random_state)
    actual = graph(**copy_inputs(outcome.inputs))
    compare_replay(outcome.output, actual, what=what, model=request.name, suspects=notes)


class ReadOnly(TorchDispatchMode):
    """Refuses writes to tensors of the user's."""

    def __init__(self, state: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for tensor in written_operands(func, args, kwargs or {}):
                path = self.state.get(storage_key(tensor))
                if path is not None:
                    raise CaptureError(
                        f"the forward writes to {path} with these inputs, but not with the example's",
                        why="the graph holds no such write",
                        fix="keep the state outside the model and pass it in and out",
                    )
        return func(*args, **(kwargs or {}))

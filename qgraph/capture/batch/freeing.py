"""Finding out how a recording serves other batch sizes: the forward is run again at some, and compared.

First without values, at a size so large and odd that no two functions of it look alike; where the model does not run
without values, on real ones at a small multiple.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from qgraph.capture.batch.merge import Merge, confirm, merge
from qgraph.capture.model.copying import copy_model, shared, with_own_memory, without_values
from qgraph.capture.model.names import state_storages
from qgraph.capture.options.request import Request
from qgraph.capture.recording.nodes import Again
from qgraph.capture.recording.record import Recording
from qgraph.capture.recording.recorder import Recorder
from qgraph.capture.sizes.expressions import CannotMerge
from qgraph.capture.sizes.tracked import SizeWatch
from qgraph.capture.values.structure import Inputs
from qgraph.capture.values.variants import (
    BatchChoice,
    batch_choices,
    empty_with_batch,
    tensor_places,
    with_batch,
    with_rows,
)
from qgraph.capture.verification.replay import Outcome, ReadOnly, Reference

_LARGE_FACTOR = 1009
_SMALL_FACTOR = 3
REPLAY_FACTORS = (2, 3, 4, 5, 7)


@dataclass(frozen=True)
class Batch:
    """How the graph serves other batch sizes.

    Args:
        choice: the inputs that carry the batch; None if it is fixed.
        fixed: why it is fixed.
        merged: what to change in the recording.
        outcome: a run of the model at another batch size.
        size: that size.
    """

    choice: BatchChoice | None = None
    fixed: str | None = None
    merged: Merge | None = None
    outcome: Outcome | None = None
    size: int = 0


def free_batch(request: Request, recording: Recording, reference: Reference | None) -> Batch:
    """Frees the batch size of a recording, or says why it stays fixed."""
    choices = batch_choices(request.inputs)
    if not choices:
        empty = any(tensor.dim() for _, tensor in tensor_places(request.inputs))
        return Batch(fixed="the example's batch is empty" if empty else "no input has a first dimension")
    reasons = []
    for choice in choices:
        try:
            return _freed(request, recording, reference, choice)
        except CannotMerge as error:
            reasons.append(str(error))
    return Batch(fixed=reasons[0])


def input_node(recording: Recording, choice: BatchChoice) -> fx.Node:
    """The node of the input tensor whose dimension 0 is the batch."""
    name, path = choice.places[0]
    node: fx.Node = next(node for node in recording.graph.nodes if node.op == "placeholder" and node.target == name)
    for _, key in path:
        node = next(user for user in node.users if len(user.args) == 2 and user.args[1] == key)
    return node


def _freed(request: Request, recording: Recording, reference: Reference | None, choice: BatchChoice) -> Batch:
    factor = REPLAY_FACTORS[0]
    outcome = None if reference is None else _outcome(request, choice, reference, factor)
    if recording.size_guards:
        raise CannotMerge(f"the forward depends on it: {recording.size_guards[0]}")
    if request.method in ("symbolic", "export"):
        return Batch(choice, outcome=outcome, size=choice.size * factor)  # fx keeps sizes as nodes
    merged = _merged(request, recording, choice)
    served = next((factor for factor in REPLAY_FACTORS if merged.serves(choice.size * factor)), None)
    if served is None:
        broken = next(one for one in merged.conditions if not one.holds(choice.size * factor))
        raise CannotMerge(f"control flow depends on it: {broken} only at some sizes")
    if served != factor and reference is not None:
        outcome = _outcome(request, choice, reference, served)
    return Batch(choice, merged=merged, outcome=outcome, size=choice.size * served)


def _outcome(request: Request, choice: BatchChoice, reference: Reference, factor: int) -> Outcome:
    """The model's own result at another batch size.

    Raises:
        CannotMerge: it has none.
    """
    try:
        return reference.run(with_batch(request.inputs, choice, factor, seed=2))
    except Exception as error:
        raise CannotMerge(_failure(choice.size * factor, error)) from error


def _failure(size: int, error: Exception) -> str:
    return f"the model fails at batch {size}: {type(error).__name__}: {error}"


def _merged(request: Request, recording: Recording, choice: BatchChoice) -> Merge:
    """The merge with another recording, confirmed by more where it holds guesses.

    Raises:
        CannotMerge: the batch is not free, or the model does not run at other sizes.
    """
    large, small = (Again(recording, choice.size, choice.size * factor) for factor in (_LARGE_FACTOR, _SMALL_FACTOR))
    first = _Rerun(request, choice, replace(large, on_meta=True))
    try:
        merged = first.compare()
    except Exception as error:
        if isinstance(error, CannotMerge) and first.escaped:
            raise  # nobody knows what decided there, so agreement at a small size would mean nothing
        merged = _merged_on_values(request, choice, small)
    if merged.doubtful:
        # On values: what a forward keeps in caches of its own is kept for these sizes.
        for size in sorted({1, 2, 3, 2 * choice.size + 1} - {choice.size}):
            if merged.serves(size):
                _Rerun(request, choice, replace(small, large=size, follow=False)).confirm(merged)
    return merged


def _merged_on_values(request: Request, choice: BatchChoice, again: Again) -> Merge:
    try:
        return _Rerun(request, choice, again).compare()
    except CannotMerge:
        raise
    except Exception as error:
        raise CannotMerge(_failure(again.large, error)) from error


class _Rerun:
    """A run of the model at another batch size."""

    def __init__(self, request: Request, choice: BatchChoice, again: Again) -> None:
        self.request = request
        self.choice = choice
        self.again = again
        self.escaped = False

    def compare(self) -> Merge:
        """Merges the first recording with this run.

        Raises:
            CannotMerge: they differ.
            Exception: what the model raises.
        """
        other, sizes = self._record()
        assert sizes is not None
        return merge(self.again.first, other, sizes)

    def confirm(self, merged: Merge) -> None:
        """Checks a merge against this run; where the model fails, the graph need not do better.

        Raises:
            CannotMerge: they differ.
        """
        try:
            other, _ = self._record()
        except CannotMerge:
            raise
        except Exception:  # noqa: BLE001 - see above
            return
        confirm(merged, self.again.first, other, self.again.large)

    def _record(self) -> tuple[Recording, SizeWatch | None]:
        request, size = self.request, self.again.large
        if self.again.on_meta:
            inputs = empty_with_batch(request.inputs, self.choice, size)
            with torch.device("meta"):
                return self._run(copy_model(request.model, without_values), inputs)
        inputs = with_rows(request.inputs, self.choice, size, seed=3)
        root = copy_model(request.model, with_own_memory if request.writable else shared)
        with ReadOnly({} if request.writable else state_storages(request.model)):
            return self._run(root, inputs)

    def _run(self, root: nn.Module, inputs: Inputs) -> tuple[Recording, SizeWatch | None]:
        recorder = Recorder(root, self.request.leaf, again=self.again)
        try:
            recording = recorder.run(inputs, lambda: self.request.call(root, inputs))
        finally:
            self.escaped = recorder.sizes is not None and recorder.sizes.escaped
        recording.release()
        return recording, recorder.sizes

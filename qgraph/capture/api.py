"""`trace`: from a model and example inputs to a verified graph.

    copy the model -> record -> raise flags -> record again at another batch size -> merge -> make writes pure
    -> guard the inputs -> replay against the model

The given model is never changed: recording runs on copies, and so does the replay of a model that changes itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.batch.freeing import Batch, free_batch, input_node
from qgraph.capture.batch.merge import apply_merge
from qgraph.capture.boundary.guard import InputGuard
from qgraph.capture.boundary.strip import strip
from qgraph.capture.model.copying import copy_model, own_tensors, shared, state_keeper, with_own_memory
from qgraph.capture.model.source import line_of_error
from qgraph.capture.options.flags import Unfaithful, raise_unless_waived
from qgraph.capture.options.leaves import LeafChoice
from qgraph.capture.options.request import ATTEMPTS, METHODS, ForwardFails, Request, check_request, fails_on_example
from qgraph.capture.recording.exporting import record_export
from qgraph.capture.recording.record import Recording, StateWrite
from qgraph.capture.recording.recorder import Recorder
from qgraph.capture.recording.symbolic import record_symbolically
from qgraph.capture.values.layout import copy_tensor
from qgraph.capture.values.structure import Inputs
from qgraph.capture.values.variants import copy_inputs, first_sample, varied
from qgraph.capture.verification.process import kept_random_states, reproducible
from qgraph.capture.verification.replay import Outcome, Reference, replay
from qgraph.capture.writes.inplace import InPlaceRemover
from qgraph.errors import CaptureError, QGraphError
from qgraph.ir.graph_module import CheckedGraphModule
from qgraph.ir.node_info import ExampleInputs, GraphInfo, NodeInfo, graph_info, set_info, update_graph_info
from qgraph.ir.op_table import GUARD
from qgraph.ir.stage import Stage
from qgraph.memory import paused_collection

__all__ = ["METHODS", "trace", "trace_shared"]

_GUARD_PATH = "_input_guard"


def trace(
    model: nn.Module,
    example_inputs: Any,
    method: str = "auto",
    *,
    waive: Iterable[str] | str = (),
    leaf_modules: Iterable[LeafChoice] | LeafChoice = (),
    verify: bool = True,
) -> fx.GraphModule:
    """Captures what `model` computes as a graph.

    Args:
        model: the float model in eval mode; it is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for calling the model. They
            decide the path through Python control flow, and all sizes but the batch.
        method: a `PrepareMethod` or its name. `jit` runs the real forward and records it; `jit_strip` keeps of that
            what lies between QuantStub and DeQuantStub; `symbolic` uses torch.fx, `export` torch.export; `auto` takes
            the first of jit, export and symbolic that succeeds, and notes why the others failed.
        waive: kinds of flags to accept: scalar, numpy, data-shaped, random, autocast, state, lost.
        leaf_modules: a module class or path, or several, to keep as single nodes.
        verify: whether to replay the graph on other values and another batch size and compare exactly.

    Returns:
        A `GraphModule` in stage CAPTURED that takes the model's inputs and returns its outputs. Its parameters are
        copies. The batch size is free unless `graph_info(gm).batch_fixed` says why not; a call with a batch size at
        which the forward would take another path is refused with the line that decides.

    Raises:
        CaptureError: the capture would not be faithful, or replay found a difference.
        UserError: the arguments do not fit.
    """
    gm = trace_shared(model, example_inputs, method, waive=waive, leaf_modules=leaf_modules, verify=verify)
    with torch.inference_mode(False):
        own_tensors(gm, model)
    return gm


def trace_shared(
    model: nn.Module,
    example_inputs: Any,
    method: str = "auto",
    *,
    waive: Iterable[str] | str = (),
    leaf_modules: Iterable[LeafChoice] | LeafChoice = (),
    verify: bool = True,
) -> fx.GraphModule:
    """As `trace`, but the graph shares the model's tensors: for callers that replace most of them anyway.

    Nothing may write to the result's tensors before `own_tensors(gm, model)`.
    """
    request = check_request(model, example_inputs, method, waive, leaf_modules, verify)
    with torch.inference_mode(False), reproducible(), kept_random_states(), paused_collection():
        if request.method == "auto":
            return _first_that_works(request)
        if request.method == "jit_strip":
            return strip(_capture(request.by("jit")))
        return _capture(request)


def _first_that_works(request: Request) -> fx.GraphModule:
    """Tries the methods in turn; a note tells why the earlier ones failed.

    Raises:
        CaptureError: all failed; the message lists each attempt.
    """
    failures: list[tuple[str, CaptureError]] = []
    for method in ATTEMPTS:
        try:
            gm = _capture(request.by(method))
        except CaptureError as error:
            if method == "jit" and not _may_be_the_method(error):
                raise
            failures.append((method, error))
            continue
        tried = tuple(f"captured by {method}, because {failed} failed: {_brief(error)}" for failed, error in failures)
        update_graph_info(gm, notes=(*graph_info(gm).notes, *tried))
        return gm
    first = failures[0][1]
    others = "; ".join(f"{method}: {_brief(error)}" for method, error in failures[1:])
    raise CaptureError(
        first.what, where=first.where, why=f"{first.why or 'see above'} (by jit; also tried: {others})", fix=first.fix
    ) from first


def _may_be_the_method(error: CaptureError) -> bool:
    """Whether another method may do better: a value that left torch may stay a value, a hidden state stays hidden."""
    if isinstance(error, Unfaithful):
        return error.kinds <= {"scalar", "numpy", "data-shaped", "lost"}
    return not isinstance(error, ForwardFails)


def _brief(error: CaptureError) -> str:
    place = f" at {error.where}" if error.where else ""
    return f"{error.what}{place}" + (f" ({error.why})" if error.why else "")


def _capture(request: Request) -> fx.GraphModule:
    root = copy_model(request.model, with_own_memory if request.writable else shared)
    inputs = copy_inputs(request.inputs)
    restore = state_keeper(root) if request.writable else None
    recording = _record(request, root, inputs)
    if restore is not None:
        restore()
    try:
        return _finish(request, root, recording)
    finally:
        recording.release()


def _finish(request: Request, root: nn.Module, recording: Recording) -> fx.GraphModule:
    notes = (*raise_unless_waived(recording.flags, request.waived, request.name), *recording.notes)
    reference = Reference(request) if request.verify else None
    batch = free_batch(request, recording, reference)
    if batch.merged is not None and batch.choice is not None:
        apply_merge(recording.graph, batch.merged, input_node(recording, batch.choice))
    InPlaceRemover(root, recording).run()
    gm = _build(request, root, recording, batch, notes)
    if reference is not None:
        _replay(request, gm, reference, batch, notes)
        _try_single_sample(request, gm, reference, batch, notes)
    return gm


def _record(request: Request, root: nn.Module, inputs: Inputs) -> Recording:
    try:
        if request.method == "symbolic":
            return record_symbolically(request, root, inputs)
        if request.method == "export":
            return record_export(request, root, inputs)
        recorder = Recorder(root, request.leaf, protected=not request.writable)
        return recorder.run(inputs, lambda: request.call(root, inputs))
    except StateWrite as error:
        raise_unless_waived(error.flags, request.waived, request.name)
        raise
    except QGraphError:
        raise
    except Exception as error:
        raise fails_on_example(request.name, line_of_error(error), error) from error


def _build(
    request: Request, root: nn.Module, recording: Recording, batch: Batch, notes: tuple[str, ...]
) -> fx.GraphModule:
    for path, tensor in recording.constants.items():
        owner, _, name = path.rpartition(".")
        root.get_submodule(owner).register_buffer(name, copy_tensor(tensor), persistent=True)
    graph = recording.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    example = copy_inputs({name: request.inputs[name] for name in names})
    path = _GUARD_PATH
    while hasattr(root, path):
        path += "_"  # the model is a captured graph itself
    root.add_module(path, _guard(example, recording, batch))
    with graph.inserting_after(placeholders[-1]):
        guard = graph.create_node("call_module", path, tuple(placeholders), {}, name="input_guard")
    set_info(guard, NodeInfo(GUARD, "input_guard"))
    gm = CheckedGraphModule(root, graph, class_name=request.name)
    gm.eval()
    gm.meta["qgraph"] = GraphInfo(
        Stage.CAPTURED,
        request.name,
        request.method,
        ExampleInputs((), example),
        recording.output,
        batch_fixed=batch.fixed,
        notes=notes,
        stateful=recording.changed_state,
    )
    return gm


def _guard(example: Inputs, recording: Recording, batch: Batch) -> InputGuard:
    conditions = () if batch.merged is None else batch.merged.conditions
    return InputGuard(example, batch.choice, batch.fixed, layout=recording.reads_layout, conditions=conditions)


def _replay(request: Request, gm: fx.GraphModule, reference: Reference, batch: Batch, notes: tuple[str, ...]) -> None:
    """Compares at another batch size and on other values; without the first, on the example: a second call counts."""
    if batch.choice is not None and batch.outcome is not None:
        replay(request, gm, f"a batch of {batch.size}", batch.outcome, notes)
    else:
        replay(request, gm, "the example inputs", _outcome(request, reference, request.inputs), notes)
    replay(request, gm, "other values", _outcome(request, reference, varied(request.inputs, seed=1)), notes)


def _try_single_sample(
    request: Request, gm: fx.GraphModule, reference: Reference, batch: Batch, notes: tuple[str, ...]
) -> None:
    """Lets the graph serve a batch of one if the other path that the forward takes there gives the same result.

    Models often spare themselves an `expand` when there is one sample.
    """
    if batch.merged is None or batch.choice is None or batch.merged.serves(1):
        return
    guard = gm.get_submodule(_GUARD_PATH)
    assert isinstance(guard, InputGuard)
    guard.proven.add(1)
    try:
        replay(request, gm, "one sample", reference.run(first_sample(request.inputs, batch.choice)), notes)
    except Exception:  # noqa: BLE001 - whatever goes wrong there, the graph does not serve it
        guard.proven.clear()


def _outcome(request: Request, reference: Reference, inputs: Inputs) -> Outcome:
    try:
        return reference.run(inputs)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{request.name} fails on other values, so its graph cannot be verified",
            where=line_of_error(error),
            why=f"{type(error).__name__}: {error}",
            fix="pass verify=False to accept an unverified graph, or typical example inputs",
        ) from error

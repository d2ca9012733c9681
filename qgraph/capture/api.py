"""`trace`: from a model and example inputs to a verified graph.

    copy the model -> record -> raise flags -> record again at another batch size -> merge -> make writes pure
    -> guard the inputs -> replay against the model

The given model is never changed: recording runs on copies, and so does the replay of a model that changes itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.batch import CannotMerge, Merge, apply_merge, merge
from qgraph.capture.copying import copy_model, own_tensors, shared, state_keeper, with_own_memory, without_values
from qgraph.capture.flags import check_waivers, raise_unless_waived
from qgraph.capture.guard import InputGuard
from qgraph.capture.inplace import InPlaceRemover
from qgraph.capture.inputs import (
    BatchChoice,
    Inputs,
    batch_choices,
    check_tensors,
    copy_inputs,
    empty_with_batch,
    varied,
    with_batch,
)
from qgraph.capture.leaves import LeafRule, leaf_rule
from qgraph.capture.recorder import Recorder, Recording, StateWrite
from qgraph.capture.source import is_user_file
from qgraph.capture.structure import as_example, bind_to_forward
from qgraph.capture.symbolic import record_symbolically
from qgraph.capture.verify import compare_replay, model_runner, reproducible
from qgraph.errors import CaptureError, QGraphError, UserError, did_you_mean
from qgraph.ir.node_info import ExampleInputs, GraphInfo, NodeInfo, set_info
from qgraph.ir.op_table import GUARD
from qgraph.ir.stage import Stage
from qgraph.memory import paused_collection

METHODS = ("auto", "jit", "symbolic")
_SHAPE_FACTOR = 3
_REPLAY_FACTOR = 2
_GUARD_PATH = "_input_guard"


@dataclass(frozen=True)
class _Request:
    """One call of `trace`, checked."""

    model: nn.Module
    inputs: Inputs
    positional: tuple[str, ...]
    method: str
    leaf: LeafRule
    waived: frozenset[str]
    verify: bool

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def call(self, model: nn.Module, inputs: Inputs) -> Any:
        """Calls a model with named inputs, the variadic ones by position."""
        args = [inputs[name] for name in self.positional]
        return model(*args, **{name: value for name, value in inputs.items() if name not in self.positional})


def trace(
    model: nn.Module,
    example_inputs: Any,
    method: str = "auto",
    *,
    waive: Iterable[str] = (),
    leaf_modules: Iterable[type[nn.Module] | str] = (),
    verify: bool = True,
) -> fx.GraphModule:
    """Captures what `model` computes as a graph.

    Args:
        model: the float model in eval mode; it is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for calling the model. They
            decide the path through Python control flow, and all sizes but the batch.
        method: `jit` runs the real forward and records it; `symbolic` uses torch.fx; `auto` is `jit`.
        waive: kinds of flags to accept: scalar, numpy, data-shaped, random, autocast, state, lost.
        leaf_modules: module classes or paths to keep as single nodes.
        verify: whether to replay the graph on other values and another batch size and compare exactly.

    Returns:
        A `GraphModule` in stage CAPTURED that takes the model's inputs and returns its outputs. Its parameters are
        copies. The batch size is free unless `graph_info(gm).batch_fixed` says why not.

    Raises:
        CaptureError: the capture would not be faithful, or replay found a difference.
        UserError: the arguments do not fit.
    """
    gm = trace_shared(model, example_inputs, method, waive=waive, leaf_modules=leaf_modules, verify=verify)
    own_tensors(gm, model)
    return gm


def trace_shared(
    model: nn.Module,
    example_inputs: Any,
    method: str = "auto",
    *,
    waive: Iterable[str] = (),
    leaf_modules: Iterable[type[nn.Module] | str] = (),
    verify: bool = True,
) -> fx.GraphModule:
    """As `trace`, but the graph shares the model's tensors: for callers that replace most of them anyway.

    Nothing may write to the result's tensors before `own_tensors(gm, model)`.
    """
    request = _check_request(model, example_inputs, method, waive, leaf_modules, verify)
    with reproducible(), paused_collection():
        return _capture(request)


def _check_request(
    model: nn.Module,
    example_inputs: Any,
    method: str,
    waive: Iterable[str],
    leaf_modules: Iterable[type[nn.Module] | str],
    verify: bool,
) -> _Request:
    if not isinstance(model, nn.Module):
        raise UserError(f"trace needs a torch.nn.Module, got a {type(model).__name__}")
    if method not in METHODS:
        raise UserError(f"unknown capture method {method!r}", fix=did_you_mean(method, METHODS))
    model = _unwrapped(model)
    _refuse_training(model)
    inputs = bind_to_forward(model, as_example(example_inputs))
    check_tensors(inputs)
    variadic = tuple(name for name in inputs if name not in _named_parameters(model))
    keyword = as_example(example_inputs).kwargs
    positional = tuple(inputs)[: _positional_count(inputs, keyword)] if variadic else ()
    chosen = "jit" if method == "auto" else method
    return _Request(model, inputs, positional, chosen, leaf_rule(model, leaf_modules), check_waivers(waive), verify)


def _named_parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _positional_count(inputs: Inputs, keyword: Any) -> int:
    return len(inputs) - sum(1 for name in inputs if name in keyword)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside parallel and compile wrappers, whose own forwards compute nothing."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _refuse_training(model: nn.Module) -> None:
    training = [path or type(model).__name__ for path, module in model.named_modules() if module.training]
    if training:
        shown = ", ".join(training[:5]) + (f" and {len(training) - 5} more" if len(training) > 5 else "")
        raise UserError(
            f"{type(model).__name__} is in training mode",
            where=shown,
            why="dropout and batch statistics make the forward random and change the model",
            fix="call model.eval() first; quantization-aware training starts after prepare",
        )


def _capture(request: _Request) -> fx.GraphModule:
    writable = "state" in request.waived
    root = copy_model(request.model, with_own_memory if writable else shared)
    inputs = copy_inputs(request.inputs)
    restore = state_keeper(root) if writable else None
    recording = _record(request, root, inputs)
    if restore is not None:
        restore()
    notes = raise_unless_waived(recording.flags, request.waived, request.name)
    merged, choice, fixed = _free_batch(request, recording)
    InPlaceRemover(root, recording).run()
    if merged is not None and choice is not None:
        apply_merge(recording.graph, merged, _input_node(recording, choice))
    gm = _build(request, root, recording, choice, fixed, notes)
    if request.verify:
        _replay(request, gm, choice, recording.changed_state, notes)
    return gm


def _record(request: _Request, root: nn.Module, inputs: Inputs) -> Recording:
    try:
        if request.method == "symbolic":
            return record_symbolically(root, request.leaf, inputs, protected="state" not in request.waived)
        recorder = Recorder(root, request.leaf, protected="state" not in request.waived)
        return recorder.run(inputs, lambda: request.call(root, inputs))
    except StateWrite as error:
        raise_unless_waived(error.flags, request.waived, request.name)
        raise
    except QGraphError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{request.name} fails on the example inputs",
            where=_user_line_of(error),
            why=f"{type(error).__name__}: {error}",
            fix="give example inputs with which model(*example_inputs) runs",
        ) from error


def _free_batch(request: _Request, recording: Recording) -> tuple[Merge | None, BatchChoice | None, str | None]:
    """How to serve every batch size, which inputs carry it, or why it stays fixed."""
    choices = batch_choices(request.inputs)
    if not choices:
        return None, None, "no input has a first dimension"
    reasons = []
    for choice in choices:
        failure = _fails_at_other_batch(request, choice)
        if failure is None and request.method == "symbolic":
            return None, choice, None  # fx keeps sizes as nodes
        if failure is None:
            try:
                other = _record_shapes(request, choice)
                return merge(recording, other, choice.size, choice.size * _SHAPE_FACTOR), choice, None
            except CannotMerge as error:
                failure = str(error)
        reasons.append(failure)
    return None, None, reasons[0]


def _fails_at_other_batch(request: _Request, choice: BatchChoice) -> str | None:
    """Why the model itself does not run at another batch size; None if it does, or if nothing is to be verified."""
    if not request.verify:
        return None
    inputs = with_batch(request.inputs, choice, _REPLAY_FACTOR, seed=2)
    try:
        request.call(_replica(request), copy_inputs(inputs))
    except Exception as error:  # noqa: BLE001 - any failure of the user's model is the answer
        return f"the model fails at batch {choice.size * _REPLAY_FACTOR}: {type(error).__name__}: {error}"
    return None


def _replica(request: _Request) -> nn.Module:
    """A model to run once and drop; it has tensors of its own if the forward writes to them."""
    return copy_model(request.model, with_own_memory if "state" in request.waived else shared)


def _record_shapes(request: _Request, choice: BatchChoice) -> Recording:
    """The forward at another batch size: without values where that works, else on real ones.

    Raises:
        CannotMerge: the model does not run at that size.
    """
    try:
        return _meta_run(request, choice)
    except Exception:  # noqa: BLE001 - many ops refuse to run without values; the real run decides
        pass
    root = _replica(request)
    inputs = with_batch(request.inputs, choice, _SHAPE_FACTOR, seed=3)
    try:
        return Recorder(root, request.leaf, track=False).run(inputs, lambda: request.call(root, inputs))
    except Exception as error:
        raise CannotMerge(f"the model fails at batch {choice.size * _SHAPE_FACTOR}: {error}") from error


def _meta_run(request: _Request, choice: BatchChoice) -> Recording:
    root = copy_model(request.model, without_values)
    inputs = empty_with_batch(request.inputs, choice, _SHAPE_FACTOR)
    with torch.device("meta"):
        return Recorder(root, request.leaf, track=False).run(inputs, lambda: request.call(root, inputs))


def _input_node(recording: Recording, choice: BatchChoice) -> fx.Node:
    """The node of the input tensor whose dimension 0 is the batch."""
    name, path = choice.places[0]
    node: fx.Node = next(node for node in recording.graph.nodes if node.op == "placeholder" and node.target == name)
    for _, key in path:
        node = next(user for user in node.users if len(user.args) == 2 and user.args[1] == key)
    return node


def _build(
    request: _Request,
    root: nn.Module,
    recording: Recording,
    choice: BatchChoice | None,
    fixed: str | None,
    notes: tuple[str, ...],
) -> fx.GraphModule:
    for path, tensor in recording.constants.items():
        owner, _, name = path.rpartition(".")
        root.get_submodule(owner).register_buffer(name, tensor.detach(), persistent=True)
    graph = recording.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    root.add_module(_GUARD_PATH, InputGuard({name: request.inputs[name] for name in names}, choice, fixed))
    with graph.inserting_after(placeholders[-1]):
        guard = graph.create_node("call_module", _GUARD_PATH, tuple(placeholders), {}, name="input_guard")
    set_info(guard, NodeInfo(GUARD, "input_guard"))
    gm = fx.GraphModule(root, graph, class_name=request.name)
    gm.eval()
    example = ExampleInputs((), copy_inputs({name: request.inputs[name] for name in names}))
    gm.meta["qgraph"] = GraphInfo(
        Stage.CAPTURED,
        request.name,
        request.method,
        example,
        recording.output,
        batch_fixed=fixed,
        notes=notes,
        stateful=recording.changed_state,
    )
    return gm


def _replay(
    request: _Request, gm: fx.GraphModule, choice: BatchChoice | None, changed_state: bool, notes: tuple[str, ...]
) -> None:
    reference = model_runner(request.model, request.call, keeps_state=not changed_state)
    variants = [("other values", varied(request.inputs, seed=1))]
    if choice is not None:
        batch = choice.size * _REPLAY_FACTOR
        variants.append((f"a batch of {batch}", with_batch(request.inputs, choice, _REPLAY_FACTOR, seed=2)))
    for what, inputs in variants:
        state = torch.get_rng_state()
        try:
            expected = reference(inputs)
        except Exception as error:
            raise CaptureError(
                f"{request.name} fails on {what}, so its graph cannot be verified",
                why=f"{type(error).__name__}: {error}",
                fix="pass verify=False to accept an unverified graph, or typical example inputs",
            ) from error
        torch.set_rng_state(state)
        graph = copy.deepcopy(gm) if changed_state else gm
        actual = graph(**copy_inputs({name: inputs[name] for name in inputs}))
        compare_replay(expected, actual, what=what, model=request.name, suspects=notes)


def _user_line_of(error: BaseException) -> str | None:
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if is_user_file(traceback.tb_frame.f_code.co_filename):
            line = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return line

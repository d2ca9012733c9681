"""The recorder's ears: torch functions, module calls, and kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qgraph.capture.boundary.guard import InputGuard
from qgraph.capture.model.patching import ThreadPatch
from qgraph.capture.model.source import user_line
from qgraph.capture.recording.record import StateWrite
from qgraph.capture.recording.spelling import alias, holds_array, importable, is_shallow_copy, name_of, spelled
from qgraph.capture.recording.taint import sized_by
from qgraph.capture.sizes.expressions import CannotMerge, Linear
from qgraph.capture.sizes.tracked import bare, escape, expression_of, is_tracked, number_of
from qgraph.capture.values.storage import flat_tensors, storage_key, written_operands
from qgraph.errors import CaptureError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, submodule_at
from qgraph.ir.op_table import CHUNK, SLICE, SPLIT, SQUEEZE

if TYPE_CHECKING:
    from qgraph.capture.recording.recorder import Recorder

# Reading these gives Python values that describe a tensor without looking at its data.
_SIZE_READERS = frozenset({"shape", "size", "numel", "nelement", "__len__", "stride", "nbytes", "sym_size"})
_METADATA = frozenset(
    {
        *("dtype", "device", "layout", "ndim", "dim", "is_floating_point", "is_complex", "is_cuda", "is_cpu"),
        *("is_contiguous", "storage_offset", "is_meta", "requires_grad", "requires_grad_", "retain_grad"),
        *("register_hook", "share_memory_", "__repr__", "__format__", "__hash__"),
    }
)
# Reading these takes data out of torch without a kernel that dispatch could see.
_LEAVING = {
    "numpy": "numpy",
    "__array__": "numpy",
    "__dlpack__": "numpy",
    "__reduce_ex__": "numpy",
    "untyped_storage": "numpy",
    "storage": "numpy",
    "tolist": "scalar",
}
_SILENT = frozenset({"__repr__", "__format__"})
# What these answer depends on how the inputs lie in memory, so the input guard has to look at that.
_LAYOUT_READERS = frozenset({"stride", "is_contiguous", "storage_offset"})
_FRESH = torch.ops.aten.lift_fresh.default  # what `torch.tensor` makes comes in through this
_MODULE_CALLS = ThreadPatch("__call__")
_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class FunctionMode(TorchFunctionMode):
    """Sees torch functions and methods called by the forward, outside leaf modules."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, named = self.recorder, kwargs or {}
        if recorder.depth:
            return func(*args, **named)
        name = name_of(func)
        if name in _LAYOUT_READERS:
            recorder.recording.reads_layout = True
        if name in _METADATA:
            return self._metadata(func, name, args, named)
        tensors = flat_tensors((args, named))
        if name in _SIZE_READERS:
            return self._size(func, name, tensors, args, named)
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
            return func(*args, **named)  # recorded kernel by kernel at dispatch, below the transform
        if is_shallow_copy(name):
            return alias, args[:1]
        if holds_array((args, named)):  # numpy's values are constants
            with torch.device("cpu"):
                return func(*args, **named)
        if recorder.track:
            args = self._leaving(func, name, tensors, args)
        recorder.meet(tensors)
        return self._record(func, name, args, named)

    def _metadata(self, func: Any, name: str, args: Any, named: Any) -> Any:
        if name in _SILENT:
            return _unobserved(self.recorder, func, args, named)
        meta = self.recorder.meta
        if meta is not None:
            known = meta.described(name, getattr(func, "__name__", ""), args)
            if known is not None:
                return known
        return func(*args, **named)

    def _size(self, func: Any, name: str, tensors: list[torch.Tensor], args: Any, named: Any) -> Any:
        recorder = self.recorder
        if recorder.track and any(recorder.taint.sized_by_data(tensor) for tensor in tensors):
            recorder.flag("data-shaped", f".{name}")
        if recorder.sizes is None or len(tensors) != 1 or name in ("stride", "nbytes"):
            return func(*args, **named)
        sizes = recorder.sizes_of(tensors[0])
        if name == "shape" or (name == "size" and len(args) + len(named) == 1):
            return torch.Size(sizes)
        if name in ("numel", "nelement"):
            count = 1
            for size in sizes:
                count = size * count
            return count
        if name == "__len__":
            escape()  # Python's len() makes an ordinary integer of whatever it is given
            return func(*args, **named)
        return sizes[named["dim"] if "dim" in named else args[1]]

    def _leaving(self, func: Any, name: str, tensors: list[torch.Tensor], args: Any) -> Any:
        recorder = self.recorder
        if name in _LEAVING:
            if any(map(recorder.taint.depends, tensors)):
                recorder.flag(_LEAVING[name], f".{name}()")
            elif recorder.protected and args and name != "__reduce_ex__":
                copy, _ = recorder.observed(args[0].clone, ())
                return (copy, *args[1:])  # numpy could write to the user's memory unseen
        elif name == "data" and getattr(func, "__name__", "") == "__set__":
            recorder.flag("state", "assignment to .data")
        elif func in _GRADIENTS:
            raise CaptureError(
                "the forward computes gradients with torch.autograd",
                where=str(user_line()),
                why="a graph records what the forward computes, not how autograd goes back through it",
                fix="use torch.func.grad, or compute the gradients outside the model",
            )
        return args

    def _record(self, func: Any, name: str, args: Any, named: Any) -> Any:
        recorder = self.recorder
        recorder.scalar_read = False
        if name == "__deepcopy__":
            func, name, args, named = torch.Tensor.clone, "clone", args[:1], {}
        kind, target, node_args = spelled(func, name, args)
        result, written = _called(recorder, kind, target, name, func, args, named)
        outputs = flat_tensors((result,))
        if recorder.scalar_read:
            _judge_scalar(recorder, name, args, named, [*outputs, *written])
        if written or outputs:
            node = recorder.record(kind, target, node_args, named, result, written)
            if recorder.sizes is not None:
                _check_sizes(recorder, node, args, result)
        return result


class DispatchMode(TorchDispatchMode):
    """Sees every kernel: taint, randomness, values that leave torch, and kernels nobody announced."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, named = self.recorder, kwargs or {}
        announced = recorder.depth > 0
        call = functools.partial(func, *args, **named)
        if func._schema.is_mutable and torch.is_inference_mode_enabled():
            call = functools.partial(_counted_write, recorder, func, args, named)
        if announced and not recorder.track and not recorder.protected:
            return call()
        with torch._C.DisableTorchFunction():
            if recorder.protected and func._schema.is_mutable:
                _refuse_state_write(recorder, func, args, named)
            if not announced:
                recorder.meet(flat_tensors((args, named)))
        result, written = recorder.observed(call, (args, named))
        if recorder.track:
            with torch._C.DisableTorchFunction():
                self._follow(func, args, named, result, announced)
        if not announced and (written or flat_tensors((result,))):
            recorder.record("call_function", func, args, named, result, written)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, announced: bool) -> None:
        recorder = self.recorder
        inputs, outputs = flat_tensors((args, kwargs)), flat_tensors((result,))
        recorder.note_born([] if func is _FRESH else inputs, outputs)
        name = func._schema.name.removeprefix("aten::")
        if recorder.taint.propagate(func, inputs, [*outputs, *written_operands(func, args, kwargs)]):
            if isinstance(result, (list, tuple)) and _counts_by_size(func):
                if any(map(recorder.taint.sized_by_data, inputs)):
                    recorder.flag("data-shaped", f"the number of parts of {name}")
            elif not outputs and result is not None and not func._schema.is_mutable:
                # Inside a call that the graph keeps as a whole, the value is read again whenever the graph runs.
                recorder.scalar_read = True
                if not announced:
                    recorder.flag("scalar", name)
        if torch.Tag.nondeterministic_seeded in func.tags:
            recorder.note_random(name)


@contextmanager
def listening_modules(recorder: Recorder) -> Iterator[None]:
    """Intercepts module calls: a leaf becomes a node, another module a naming scope."""
    held = {id(module): _tensor_ids(module) for module in recorder.root.modules()}

    def listener(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if recorder.depth:
                return original(module, *args, **kwargs)
            if isinstance(module, InputGuard):
                return _check_inputs(recorder, module, original, args)
            path = recorder.module_paths.get(id(module))
            if path and recorder.leaf(module, path) and _unchanged(module, held):
                return _call_leaf(recorder, module, path, original, args, kwargs)
            recorder.names.enter(recorder.names.owner if path is None else path)
            try:
                return original(module, *args, **kwargs)
            finally:
                recorder.names.leave()

        return call

    with _MODULE_CALLS.listening(listener):
        yield


def _call_leaf(
    recorder: Recorder, module: nn.Module, path: str, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    site = recorder.names.module_call(path)
    recorder.names.enter(path)
    with torch._C.DisableTorchFunction():
        recorder.meet(flat_tensors((args, kwargs)))
    recorder.scalar_read = False
    try:
        own = () if recorder.protected or not recorder.track else (*module.parameters(), *module.buffers())
        run = functools.partial(original, module)
        result, written = _called(recorder, "call_module", path, path, run, args, kwargs, own)
    finally:
        recorder.names.leave()
    if recorder.scalar_read:
        with torch._C.DisableTorchFunction():
            _judge_scalar(recorder, path, args, kwargs, [*flat_tensors((result,)), *written])
    recorder.record("call_module", importable(recorder.root, path), args, kwargs, result, written, site=site)
    return result


def _check_inputs(recorder: Recorder, guard: InputGuard, original: Callable[..., Any], inputs: Any) -> None:
    """Runs the check of a captured graph inside the model; what it demands of the batch is demanded of this one."""
    recorder.observed(lambda: original(guard, *inputs), ())
    if recorder.sizes is not None and guard.conditions:
        place = guard.batched(inputs)
        if place is not None:
            with torch._C.DisableTorchFunction():
                batch = expression_of(recorder.sizes_of(place)[0])
            if batch != Linear(1, 0):
                raise CannotMerge(f"a graph inside the model has a batch size of its own at {user_line()}")
            for condition in guard.conditions:
                recorder.sizes.decide(condition)


def _tensor_ids(module: nn.Module) -> tuple[int, ...]:
    """Which tensors a module holds itself."""
    held = [*module._parameters.values(), *module._buffers.values()]
    held += [value for value in module.__dict__.values() if isinstance(value, torch.Tensor)]
    return tuple(map(id, held))


def _unchanged(module: nn.Module, held: dict[int, tuple[int, ...]]) -> bool:
    """Whether a leaf computes with its own tensors: a functional call lends it others."""
    if not module._modules:
        return _tensor_ids(module) == held[id(module)]
    return all(_tensor_ids(part) == held.get(id(part)) for part in module.modules())


def _refuse_state_write(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> None:
    """Stops before a kernel writes to one of the user's tensors, of the model or from elsewhere.

    Raises:
        StateWrite: with all flags so far and this one.
    """
    for tensor in written_operands(func, args, kwargs):
        path = recorder.recording.state.get(storage_key(tensor))
        if path is None and recorder.is_from_outside(tensor):
            path = f"a tensor of shape {list(tensor.shape)} from outside the model"
        if path is not None:
            recorder.flag("state", f"{func._schema.name.removeprefix('aten::')} writes to {path}")
            raise StateWrite(recorder.recording.flags)


def _counted_write(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """A call that writes to tensors which, made in inference mode, count no versions."""
    result = func(*args, **kwargs)
    recorder.inference_writes.update(map(storage_key, written_operands(func, args, kwargs)))
    return result


def _judge_scalar(recorder: Recorder, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
    """A call has read a value that depends on the inputs: it becomes part of the result, which must say so."""
    if not tensors:
        recorder.flag("scalar", f".{name}()")
    sized = sized_by(name, args, kwargs)
    for tensor in tensors:
        recorder.taint.mark(tensor, size=sized and tensor.dim() > 0)


def _counts_by_size(func: Any) -> bool:
    """Whether a kernel returns as many tensors as a size says."""
    returns = func._schema.returns
    by_list = func._schema.name == "aten::split_with_sizes"
    return len(returns) == 1 and isinstance(returns[0].type, torch.ListType) and not by_list


def _check_sizes(recorder: Recorder, node: Any, args: Any, result: Any) -> None:
    """Notes under which sizes a slice is as long, and a split has as many parts, as it did here."""
    op = info(node).op
    if op is SLICE and isinstance(args[0], torch.Tensor):
        _check_bounds(recorder.sizes_of(args[0]), args[1])
    elif op in (SPLIT, CHUNK) and isinstance(result, (tuple, list)):
        bound = bind(node)
        sizes = recorder.sizes_of(args[0])
        length = sizes[bound.option("dim")]
        part = number_of(length, bound.option("chunks")) if op is CHUNK else bound.option("split_size_or_sections")
        if isinstance(part, int) and number_of(length, part) != len(result):
            raise CannotMerge(f"the number of parts depends on it at {user_line()}")
    elif op is SQUEEZE:
        sizes, dims = recorder.sizes_of(args[0]), bind(node).option("dim")
        for dim in range(len(sizes)) if dims is None else dims if isinstance(dims, (tuple, list)) else (dims,):
            _ = sizes[dim] != 1
    elif type(result) in (tuple, list):
        # Whatever else returns several tensors was told how many, as `tensor_split` is.
        for number in args:
            if is_tracked(number) and number != len(result):
                raise CannotMerge(f"the number of parts may depend on it at {user_line()}")


def _check_bounds(sizes: tuple[int, ...], index: Any) -> None:
    entries = index if isinstance(index, tuple) else (index,)
    used = sum(_axes(entry) for entry in entries)
    axis = 0
    for entry in entries:
        if isinstance(entry, slice):
            for bound in (entry.start, entry.stop):
                if isinstance(bound, int) and axis < len(sizes):
                    _ = sizes[axis] >= (bound if bare(bound) >= 0 else -bound)
        axis += len(sizes) - used if entry is Ellipsis else _axes(entry)


def _axes(entry: Any) -> int:
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    return entry.dim() if isinstance(entry, torch.Tensor) and entry.dtype is torch.bool else 1


def _called(
    recorder: Recorder, kind: str, target: Any, name: str, func: Any, args: Any, named: Any, own: Any = ()
) -> tuple[Any, list[torch.Tensor]]:
    """Result of a call and which operands it wrote to; `own` are the module's tensors, where they may be written."""
    meta = recorder.meta
    if meta is None:
        return recorder.observed(lambda: func(*args, **named), (args, named, own))
    options = submodule_at(recorder.root, target).__dict__ if kind == "call_module" else named
    with torch._C.DisableTorchFunction():  # or the tensors would say that they have values
        found = meta.by_shape(recorder, kind, target, args, options)
        given, others = (args, named) if found else meta.placed(recorder, name, args, named)
    if found is None:
        found = meta.restored(*recorder.observed(lambda: func(*given, **others), (given, others)))
    return found


def _unobserved(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Printing reads values without using them: no flag."""
    track, recorder.track = recorder.track, False
    recorder.depth += 1
    try:
        return func(*args, **kwargs)
    finally:
        recorder.depth -= 1
        recorder.track = track

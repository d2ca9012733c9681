"""Running the user's real forward and writing down what it does.

Three things listen while it runs:
- a torch function mode sees every torch function and method, and records it as a node;
- `nn.Module.__call__` is intercepted: torch's own modules become one node, others open a naming scope;
- a torch dispatch mode sees every kernel: it follows which values depend on the inputs, and records kernels that no
  function announced (scripted functions, vmap, native extensions).

A tensor carries the node that made it as an attribute. What reaches an op without one is a parameter, a buffer, or a
constant; if it depends on the inputs it was lost, which is flagged.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qgraph.capture.flags import Flag
from qgraph.capture.leaves import LeafRule
from qgraph.capture.names import SiteNames, module_paths, plain_tensors, state_storages, tensor_paths
from qgraph.capture.outputs import output_argument
from qgraph.capture.source import functional_module, user_line
from qgraph.capture.structure import leaves
from qgraph.capture.taint import Taint, flat_tensors, storage_key, written_operands
from qgraph.errors import CaptureError
from qgraph.ir.arguments import classify, writes_in_place
from qgraph.ir.editor import node_name
from qgraph.ir.functional import field as get_field
from qgraph.ir.functional import item as get_item
from qgraph.ir.node_info import NodeInfo, SourceLine, info, set_info
from qgraph.ir.op import Op, ShapeRule
from qgraph.ir.op_table import CONSTANT, FIELD, IDENTITY, INPUT, ITEM, OPAQUE, OUTPUT
from qgraph.ir.values import spec_of

_TAG = "_qgraph_tag"

# Reading these gives Python values that describe a tensor without looking at its data.
_SHAPE_READERS = frozenset({"shape", "size", "numel", "nelement", "__len__", "stride", "nbytes", "sym_size"})
_METADATA = frozenset(
    {
        *("dtype", "device", "layout", "ndim", "dim", "is_floating_point", "is_complex", "is_cuda", "is_contiguous"),
        *("requires_grad", "requires_grad_", "retain_grad", "register_hook", "share_memory_"),
        *("__repr__", "__format__", "__hash__"),
    }
)
# Reading these takes data out of torch without a kernel that dispatch could see.
_LEAVING = {
    "numpy": "numpy",
    "__array__": "numpy",
    "__dlpack__": "numpy",
    "untyped_storage": "numpy",
    "storage": "numpy",
    "tolist": "scalar",
}
_SILENT = frozenset({"__repr__", "__format__"})
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__invert__": operator.invert,
    "__neg__": operator.neg,
    "__pow__": operator.pow,
    "__mod__": operator.mod,
    "__floordiv__": operator.floordiv,
    "__matmul__": operator.matmul,
    "__abs__": operator.abs,
}


@dataclass(frozen=True)
class Write:
    """One in-place write: `node` wrote the storage `storage`, reached through `target`'s value."""

    node: fx.Node
    target: fx.Node
    storage: int


@dataclass
class Recording:
    """What one run left behind."""

    graph: fx.Graph
    flags: list[Flag] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    storages: dict[fx.Node, int] = field(default_factory=dict)
    output: Any = None
    changed_state: bool = False
    state: dict[int, str] = field(default_factory=dict)


class StateWrite(Exception):
    """The forward was about to write to one of the user's own tensors."""

    def __init__(self, flags: list[Flag]) -> None:
        super().__init__("a write to the model's state")
        self.flags = flags


class Recorder:
    """Records one forward of `root`.

    Args:
        root: the module to run; it is run as it is, so give it a copy of the user's structure.
        leaf: which modules become one node.
        track: whether to follow taint and collect flags; off for the second, shape-only run.
        protected: whether the root's tensors belong to the user, so that a write to them ends the run.
    """

    def __init__(self, root: nn.Module, leaf: LeafRule, *, track: bool = True, protected: bool = False) -> None:
        self.root = root
        self.leaf = leaf
        self.track = track
        self.protected = protected
        self.recording = Recording(fx.Graph())
        self.names = SiteNames()
        self.taint = Taint()
        self.depth = 0
        self._module_paths = module_paths(root)
        self._tensor_paths = tensor_paths(root)
        self.recording.state = state_storages(root) if track else {}
        self._attribute_nodes: dict[str, fx.Node] = {}
        self._constant_paths: dict[int, str] = {}
        self._held: list[Any] = []
        self._random: list[Flag] = []
        self._random_seen = 0

    # --- the run -------------------------------------------------------------------------------------------

    def run(self, inputs: dict[str, Any], call: Callable[[], Any]) -> Recording:
        """Records `call()`, which must run the root on exactly the tensors in `inputs`."""
        for name, value in inputs.items():
            self._add_input(name, value)

        def listened() -> Any:
            with self._intercepted_modules(), _FunctionMode(self):
                return call()

        output = self.recording.output = self.watch(inputs, listened)
        argument = output_argument(self.recording.graph, output, self.node_of)
        set_info(self.recording.graph.output(argument), NodeInfo(OUTPUT, "output"))
        self.recording.graph.lint()
        return self.recording

    def watch(self, inputs: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Runs `call()` under the dispatch mode, following taint from `inputs` and collecting flags."""
        before = _random_states() if self.track else {}
        if self.track:
            for tensor in flat_tensors(leaf for value in inputs.values() for _, leaf in leaves(value)):
                self.taint.mark(tensor)
        with _watched_attributes(self), _DispatchMode(self), torch.no_grad():
            output = call()
        if self.track:
            self._check_random(before)
        return output

    def _add_input(self, name: str, value: Any) -> None:
        node = self.recording.graph.placeholder(name)
        set_info(node, NodeInfo(INPUT, name, value=spec_of(value)))
        for path, leaf in leaves(value):
            if not isinstance(leaf, torch.Tensor):
                continue
            current = node
            for step, key in path:
                function, op = (get_item, ITEM) if step == "item" else (get_field, FIELD)
                current = self.recording.graph.call_function(function, (current, key))
                set_info(current, NodeInfo(op, current.name))
            self._tag(leaf, current)
            set_info(current, NodeInfo(info(current).op, info(current).site, value=spec_of(leaf)))

    def _check_random(self, before: dict[str, object]) -> None:
        moved = [name for name, state in _random_states().items() if state != before.get(name)]
        if "torch" in moved:
            self.recording.flags += self._random or [Flag("random", "torch's random state moved", "", None)]
        for name in moved:
            if name != "torch":
                self.flag("random", f"{name}'s random state moved")

    # --- recording -----------------------------------------------------------------------------------------

    def record(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        written: list[torch.Tensor],
        *,
        site: str | None = None,
    ) -> None:
        """Adds a node for a call that gave `result` and wrote to the tensors `written`."""
        with torch._C.DisableTorchFunction():
            self._record(kind, target, args, kwargs, result, written, site)

    def _record(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        written: list[torch.Tensor],
        site: str | None,
    ) -> None:
        source = user_line() if self.track else None
        node_args = tuple(self.argument(value) for value in args)
        node_kwargs = {key: self.argument(value) for key, value in kwargs.items()}
        op = classify(kind, target, self.root, args, kwargs)
        site = site or self._function_site(target, op)
        node = self.recording.graph.create_node(kind, target, node_args, node_kwargs, name=node_name(site))
        value = None if result is None else spec_of(result)
        record = NodeInfo(op, site, self.names.owner, source, value, in_place=bool(written), random=self.drew_random())
        set_info(node, record)
        node.meta["stack_trace"] = f'File "{source.file}", line {source.line}, in {source.function}' if source else ""
        if self.track and _autocast_on(result):
            self.flag("autocast", "an autocast region")
        returned = {id(tensor) for tensor in flat_tensors((result,))}
        for tensor in written:
            self._note_write(node, tensor, returned=id(tensor) in returned)
        self._tag_result(result, node, ())

    def _function_site(self, target: Any, op: Op) -> str:
        functional = functional_module()
        if functional is not None and id(functional[0]) in self._module_paths:
            return self.names.method_call(self._module_paths[id(functional[0])], functional[1])
        if op is not OPAQUE:
            return self.names.function_call(op.name)
        name = target if isinstance(target, str) else getattr(target, "__name__", "function")
        return self.names.function_call(str(name).split(".")[0].strip("_") or "function")

    def _note_write(self, node: fx.Node, tensor: torch.Tensor, *, returned: bool) -> None:
        target = self.node_of(tensor)
        self.recording.writes.append(Write(node, target, storage_key(tensor)))
        self.check_state(node, tensor)
        if returned:
            self._tag(tensor, node)

    def refuse_state_write(self, func: Any, args: Any, kwargs: Any) -> None:
        """Stops before a kernel writes to one of the user's tensors.

        Raises:
            StateWrite: with all flags so far and this one.
        """
        for tensor in written_operands(func, args, kwargs):
            path = self.recording.state.get(storage_key(tensor))
            if path is not None:
                self.flag("state", f"{func._schema.name.removeprefix('aten::')} writes to {path}")
                raise StateWrite(self.recording.flags)

    def check_state(self, node: fx.Node, written: torch.Tensor) -> None:
        """Flags a write to one of the model's own tensors."""
        path = self.recording.state.get(storage_key(written))
        if path is not None:
            self.recording.changed_state = True
            self.flag("state", f"{info(node).site} writes to {path}")

    def _tag_result(self, value: Any, node: fx.Node, path: tuple[Any, ...]) -> None:
        if isinstance(value, torch.Tensor):
            self._tag(value, node, path)
        elif isinstance(value, (tuple, list)):
            for position, entry in enumerate(value):
                self._tag_result(entry, node, (*path, position))
        elif isinstance(value, dict):
            for key, entry in value.items():
                self._tag_result(entry, node, (*path, key))

    def _tag(self, tensor: torch.Tensor, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        tensor.__dict__[_TAG] = (self, node, path)
        if self.track and not path:
            self.recording.storages[node] = storage_key(tensor)
            self.hold(tensor)

    def hold(self, tensor: torch.Tensor) -> None:
        """Keeps the identity (not the memory) of a tensor's storage from being used again during the run."""
        self._held.append(StorageWeakRef(tensor.untyped_storage()))

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node whose value `tensor` is; parameters, buffers and constants get one on first sight."""
        tag = tensor.__dict__.get(_TAG)
        if tag is not None and tag[0] is self:
            _, node, path = tag
            for key in path:
                node = self._item(node, key)
            if path:
                self._tag(tensor, node)
            found: fx.Node = node
            return found
        path_of_tensor = self._tensor_paths.get(id(tensor)) or self._constant(tensor)
        known = self._attribute_nodes.get(path_of_tensor)
        if known is None:
            known = self.recording.graph.create_node("get_attr", path_of_tensor, (), {}, name=node_name(path_of_tensor))
            set_info(
                known, NodeInfo(CONSTANT, path_of_tensor, path_of_tensor.rpartition(".")[0], value=spec_of(tensor))
            )
            self._attribute_nodes[path_of_tensor] = known
            if self.track:
                self.recording.storages[known] = storage_key(tensor)
        return known

    def _item(self, node: fx.Node, key: Any) -> fx.Node:
        for user in node.users:
            if user.target is operator.getitem and info(user).op is ITEM and user.args[1] == key:
                return user
        record = info(node)
        with self.recording.graph.inserting_after(node):
            child = self.recording.graph.create_node(
                "call_function", operator.getitem, (node, key), {}, name=f"{node.name}_{key}"
            )
        value = record.value[key] if isinstance(record.value, tuple) and isinstance(key, int) else None
        site = f"{record.site}[{key}]"
        set_info(child, NodeInfo(ITEM, site, record.module, record.source, value))
        return child

    def _constant(self, tensor: torch.Tensor) -> str:
        if id(tensor) in self._constant_paths:
            return self._constant_paths[id(tensor)]
        if self.track and self.taint.depends(tensor):
            self.flag("lost", f"a tensor of shape {list(tensor.shape)}")
        owner = f"{self.names.owner}." if self.names.owner else ""
        path, counter = "", 0
        while not path or path in self.recording.constants:
            path, counter = f"{owner}_constant_{counter}", counter + 1
        self.recording.constants[path] = tensor
        self._constant_paths[id(tensor)] = path
        return path

    def argument(self, value: Any) -> Any:
        """`value` as a graph argument: tensors become nodes, containers keep their kind.

        Raises:
            CaptureError: a value that no graph can hold.
        """
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, (tuple, list)):
            entries = [self.argument(entry) for entry in value]
            return entries if isinstance(value, list) else tuple(entries)
        if isinstance(value, dict):
            return {key: self.argument(entry) for key, entry in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, range):
            return list(value)
        plain = _plain(value)
        if plain is _UNKNOWN:
            raise CaptureError(
                f"an argument of type {type(value).__name__} cannot be kept in a graph",
                where=str(user_line()),
                why="graphs hold tensors, numbers, strings, dtypes, devices and containers of these",
                fix="pass its parts as tensors or numbers, or make the module that uses it a leaf (leaf_modules=)",
            )
        return plain

    # --- flags ---------------------------------------------------------------------------------------------

    def flag(self, kind: str, what: str) -> None:
        """Notes that something may make the capture unsound."""
        self.recording.flags.append(Flag(kind, what, self.names.owner, user_line()))

    def note_random(self, what: str) -> None:
        """Notes a random op; it counts only if the random state moved."""
        self._random.append(Flag("random", what, self.names.owner, user_line()))

    def drew_random(self) -> bool:
        """Whether a random op ran since this was last asked."""
        drew = len(self._random) > self._random_seen
        self._random_seen = len(self._random)
        return drew

    # --- modules -------------------------------------------------------------------------------------------

    @contextmanager
    def _intercepted_modules(self) -> Iterator[None]:
        original = nn.Module.__call__
        thread = threading.get_ident()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.depth or threading.get_ident() != thread:
                return original(module, *args, **kwargs)
            path = self._module_paths.get(id(module))
            if path and self.leaf(module, path):
                return self._call_leaf(module, path, original, args, kwargs)
            self.names.enter(self.names.owner if path is None else path)
            try:
                return original(module, *args, **kwargs)
            finally:
                self.names.leave()

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def _call_leaf(
        self, module: nn.Module, path: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        site = self.names.module_call(path)
        self.names.enter(path)
        try:
            own = () if self.protected or not self.track else (*module.parameters(), *module.buffers())
            result, written = self.shape_only("call_module", path, args, module.__dict__) or self.observed(
                lambda: original(module, *args, **kwargs), (*args, *kwargs.values(), *own)
            )
        finally:
            self.names.leave()
        self.record("call_module", path, args, kwargs, result, written, site=site)
        return result

    def shape_only(
        self, kind: str, target: Any, args: tuple[Any, ...], options: Any
    ) -> tuple[Any, list[torch.Tensor]] | None:
        """Result and written operands of an op whose shape rule is simple, in a run that only looks at shapes.

        The meta kernels of such ops are decomposed in Python and would cost more than the real forward.
        """
        if self.track or not args or not isinstance(args[0], torch.Tensor) or args[0].device.type != "meta":
            return None
        op = classify(kind, target, self.root, args, options)
        rule = op.shape
        if op is IDENTITY:  # whether it returns its operand or another tensor is for torch to say
            return None
        if rule is not ShapeRule.OTHER and (writes_in_place(kind, target) or options.get("inplace")):
            return args[0], [args[0]]
        self.depth += 1
        try:
            with torch._C.DisableTorchFunction():
                if rule is ShapeRule.SAME:
                    return torch.empty_like(args[0]), []
                if rule is ShapeRule.BROADCAST and _same_floats(args) and not options:
                    shapes = [value.shape for value in args if isinstance(value, torch.Tensor)]
                    return args[0].new_empty(torch.broadcast_shapes(*shapes)), []
        finally:
            self.depth -= 1
        return None

    def observed(self, call: Callable[[], Any], operands: tuple[Any, ...]) -> tuple[Any, list[torch.Tensor]]:
        """Runs `call` unrecorded; returns its result and the operands it wrote to."""
        tensors = flat_tensors(operands)
        before = _versions(tensors)
        self.depth += 1
        try:
            result = call()
        finally:
            self.depth -= 1
        after = _versions(tensors)
        written = {id(t): t for t, old, new in zip(tensors, before, after, strict=True) if old != new}
        return result, list(written.values())


class _FunctionMode(TorchFunctionMode):
    """Sees torch functions and methods called by the forward, outside leaf modules."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, named = self.recorder, kwargs or {}
        if recorder.depth:
            return func(*args, **named)
        name = _name(func)
        if name in _METADATA:
            return _unobserved(recorder, func, args, named) if name in _SILENT else func(*args, **named)
        tensors = flat_tensors((args, named))
        if name in _SHAPE_READERS:
            if recorder.track and any(recorder.taint.sized_by_data(tensor) for tensor in tensors):
                recorder.flag("data-shaped", f".{name}")
            return func(*args, **named)
        if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
            return func(*args, **named)  # recorded kernel by kernel at dispatch, below the transform
        if name in _LEAVING and recorder.track:
            if any(map(recorder.taint.depends, tensors)):
                recorder.flag(_LEAVING[name], f".{name}()")
            elif recorder.protected and args:
                args = (args[0].clone(), *args[1:])  # numpy could write to the user's memory unseen
        if name == "data" and getattr(func, "__name__", "") == "__set__" and recorder.track:
            recorder.flag("state", "assignment to .data")
        kind, target, node_args = _spelled(func, name, args)
        result, written = recorder.shape_only(kind, target, args, named) or recorder.observed(
            lambda: func(*args, **named), (args, named)
        )
        if written or flat_tensors((result,)):
            recorder.record(kind, target, node_args, named, result, written)
        return result


class _DispatchMode(TorchDispatchMode):
    """Sees every kernel: taint, randomness, values that leave torch, and kernels nobody announced."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, named = self.recorder, kwargs or {}
        announced = recorder.depth > 0
        if announced and not recorder.track and not recorder.protected:
            return func(*args, **named)
        if recorder.protected and func._schema.is_mutable:
            with torch._C.DisableTorchFunction():
                recorder.refuse_state_write(func, args, named)
        result, written = recorder.observed(lambda: func(*args, **named), (args, named))
        if recorder.track:
            with torch._C.DisableTorchFunction():
                self._follow(func, args, named, result)
        if not announced and (written or flat_tensors((result,))):
            recorder.record("call_function", func, args, named, result, written)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        recorder = self.recorder
        inputs, outputs = flat_tensors((args, kwargs)), flat_tensors((result,))
        depends = recorder.taint.propagate(func, inputs, [*outputs, *written_operands(func, args, kwargs)])
        if depends and not outputs and result is not None and not func._schema.is_mutable:
            recorder.flag("scalar", f"{func._schema.name.removeprefix('aten::')}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            recorder.note_random(func._schema.name.removeprefix("aten::"))


def _unobserved(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Printing reads values without using them: no flag."""
    track, recorder.track = recorder.track, False
    recorder.depth += 1
    try:
        return func(*args, **kwargs)
    finally:
        recorder.depth -= 1
        recorder.track = track


def _same_floats(args: tuple[Any, ...]) -> bool:
    """Whether arguments are float tensors of one dtype, and Python numbers."""
    dtype = args[0].dtype
    return bool(dtype.is_floating_point) and all(
        value.dtype is dtype if isinstance(value, torch.Tensor) else isinstance(value, (int, float)) for value in args
    )


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    with torch._C.DisableTorchFunction():  # reading an attribute is a torch function too
        return [tensor._version for tensor in tensors]


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "function")
    if name in ("__get__", "__set__"):
        return str(getattr(func.__self__, "__name__", name))
    return str(name)


def _spelled(func: Any, name: str, args: Any) -> tuple[str, Any, tuple[Any, ...]]:
    """How fx should write a call: node kind, target and arguments."""
    args = tuple(args)
    if getattr(func, "__name__", "") in ("__get__", "__set__"):
        return _property(name, args)
    if name in _OPERATORS and getattr(torch.Tensor, name, None) is func:
        return "call_function", _OPERATORS[name], args
    if getattr(torch.Tensor, name, None) is func and args:
        return "call_method", name, args
    return "call_function", func, args


def _property(name: str, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    tensor = args[0]
    if name == "T" and tensor.dim() <= 2:
        return "call_method", "t", args
    if name == "T":
        return "call_method", "permute", (tensor, *reversed(range(tensor.dim())))
    if name == "mT":
        return "call_method", "transpose", (tensor, -2, -1)
    if name == "data":
        return "call_method", "detach", args[:1]
    return "call_function", getattr, (tensor, name)


_UNKNOWN = object()
_PLAIN = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return _UNKNOWN
    if isinstance(value, (bool, str)) or value is None or value is Ellipsis:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (*_PLAIN, torch.layout, torch.memory_format)):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return _UNKNOWN


def _autocast_on(result: Any) -> bool:
    tensors = flat_tensors((result,))
    return bool(tensors) and torch.is_autocast_enabled(tensors[0].device.type)


def _random_states() -> dict[str, object]:
    """The state of every random generator a forward may use by default."""
    states: dict[str, object] = {"Python": random.getstate()}
    generators = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        generators += torch.cuda.get_rng_state_all()
    states["torch"] = [state.numpy().tobytes() for state in generators]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state(legacy=True)
        states["numpy"] = (kind, keys.tobytes(), *rest)
    return states


@contextmanager
def _watched_attributes(recorder: Recorder) -> Iterator[None]:
    """Notices tensors that the forward puts on modules in place of others."""
    if not recorder.track:
        yield
        return
    before = _attributes(recorder.root)
    modules = {id(module): module for module in recorder.root.modules()}
    original = nn.Module.__setattr__
    lines: dict[tuple[int, str], SourceLine | None] = {}

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            lines[(id(module), name)] = user_line()
        original(module, name, value)

    nn.Module.__setattr__ = assign  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
    for key, (path, old) in before.items():
        new = getattr(modules[key[0]], key[1], None)
        if new is old:
            continue
        recorder.recording.changed_state = True
        if isinstance(new, torch.Tensor) and recorder.taint.depends(new):
            recorder.recording.flags.append(Flag("state", f"{path} is assigned", "", lines.get(key)))


def _attributes(root: nn.Module) -> dict[tuple[int, str], tuple[str, torch.Tensor]]:
    found: dict[tuple[int, str], tuple[str, torch.Tensor]] = {}
    for path, module in root.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None:
                found[(id(module), name)] = (f"{path}.{name}".lstrip("."), tensor)
    modules = dict(root.named_modules())
    for path, name, tensor in plain_tensors(root):
        found[(id(modules[path]), name)] = (f"{path}.{name}".lstrip("."), tensor)
    return found

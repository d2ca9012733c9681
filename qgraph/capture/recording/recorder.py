"""Running the user's real forward and writing down what it does.

Three things listen while it runs (`qgraph.capture.listening`):
- a torch function mode sees every torch function and method, and records it as a node;
- `nn.Module.__call__` is intercepted: torch's own modules become one node, others open a naming scope;
- a torch dispatch mode sees every kernel: it follows which values depend on the inputs, and records kernels that no
  function announced (scripted functions, vmap, native extensions).

Tensors are followed to their nodes by tags (`qgraph.capture.nodes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.boundary.outputs import output_argument
from qgraph.capture.model.blocks import listening_blocks
from qgraph.capture.model.names import module_paths, state_storages
from qgraph.capture.model.source import functional_module, user_line
from qgraph.capture.model.state import random_states, watched_attributes
from qgraph.capture.options.flags import Flag
from qgraph.capture.options.leaves import LeafRule
from qgraph.capture.recording.listening import DispatchMode, FunctionMode, listening_modules
from qgraph.capture.recording.meta import MetaCalls
from qgraph.capture.recording.nodes import Again, RecordedNodes
from qgraph.capture.recording.record import Recording, Write
from qgraph.capture.recording.taint import Taint
from qgraph.capture.values.layout import relaid
from qgraph.capture.values.storage import flat_tensors, storage_key
from qgraph.capture.values.structure import leaves
from qgraph.ir.arguments import classify
from qgraph.ir.editor import node_name
from qgraph.ir.functional import field as get_field
from qgraph.ir.functional import item as get_item
from qgraph.ir.node_info import NodeInfo, SourceLine, info, set_info
from qgraph.ir.op import Op
from qgraph.ir.op_table import CAST, FIELD, IDENTITY, INPUT, ITEM, OPAQUE, OUTPUT
from qgraph.ir.values import spec_of


class Recorder(RecordedNodes):
    """Records one forward of `root`.

    Args:
        root: the module to run; it is run as it is, so give it a copy of the user's structure.
        leaf: which modules become one node.
        protected: whether the root's tensors belong to the user, so that a write to them ends the run.
        again: the recording that this run repeats; values are not followed and flags not collected then.
    """

    def __init__(self, root: nn.Module, leaf: LeafRule, *, protected: bool = False, again: Again | None = None) -> None:
        super().__init__(root, again)
        self.leaf = leaf
        self.track = again is None
        self.protected = protected
        self.taint = Taint()
        self.scalar_read = False
        self.inference_writes: Counter[int] = Counter()
        self.meta = MetaCalls(again.first.device) if again is not None and again.on_meta else None
        self.module_paths = module_paths(root)
        self.recording.state = state_storages(root) if self.track else {}
        self._inputs: set[int] = set()
        self._born: set[int] = set()
        self._random: list[Flag] = []
        self._random_seen = 0

    # --- the run -------------------------------------------------------------------------------------------

    def run(self, inputs: dict[str, Any], call: Callable[[], Any]) -> Recording:
        """Records `call()`, which must run the root on exactly the tensors in `inputs`.

        The tensors that live on keep their tags until `Recording.release`.
        """
        try:
            return self._run(inputs, call)
        except BaseException:
            self.recording.release()
            raise

    def _run(self, inputs: dict[str, Any], call: Callable[[], Any]) -> Recording:
        recording = self.recording
        for name, value in inputs.items():
            self._add_input(name, value)

        def listened() -> Any:
            blocks = listening_blocks(self.names, self.module_paths, lambda: self.names.owner)
            with blocks, listening_modules(self), FunctionMode(self):
                return call()

        output = recording.output = self.watch(inputs, listened)
        argument = output_argument(recording.graph, output, self.node_of)
        set_info(recording.graph.output(argument), NodeInfo(OUTPUT, "output"))
        self._note_the_rest()
        recording.notes = self.names.notes()
        recording.graph.lint()
        return recording

    def watch(self, inputs: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Runs `call()` under the dispatch mode, following taint from `inputs` and collecting flags."""
        if not self.track:
            following = self.sizes.watching() if self.sizes is not None else nullcontext()
            with following, DispatchMode(self), torch.no_grad():
                return call()
        before = random_states()
        for tensor in flat_tensors(leaf for value in inputs.values() for _, leaf in leaves(value)):
            self.recording.device = tensor.device
            self._inputs.add(storage_key(tensor))
            self.taint.mark(tensor)
        with watched_attributes(self.root, self._note_assignment), DispatchMode(self), torch.no_grad():
            output = call()
        self._check_random(before)
        return output

    def _add_input(self, name: str, value: Any) -> None:
        node = self.create("placeholder", name, (), {}, name)
        set_info(node, NodeInfo(INPUT, name, value=spec_of(value)))
        for path, leaf in leaves(value):
            if not isinstance(leaf, torch.Tensor):
                continue
            current = node
            for step, key in path:
                function, op = (get_item, ITEM) if step == "item" else (get_field, FIELD)
                current = self.create("call_function", function, (current, key), {})
                set_info(current, NodeInfo(op, current.name))
            self.tag(leaf, current)
            set_info(current, NodeInfo(info(current).op, info(current).site, value=spec_of(leaf)))

    def _note_the_rest(self) -> None:
        """The builders of the output and the output itself are the last nodes created."""
        known = set(self.recording.created)
        for node in self.recording.graph.nodes:
            if node not in known:
                self._note_created(node)

    def _check_random(self, before: dict[str, object]) -> None:
        moved = [name for name, state in random_states().items() if state != before.get(name)]
        if "torch" in moved:
            self.recording.flags += self._random  # if no kernel here drew, another thread did
        for name in moved:
            if name != "torch":
                self.recording.flags.append(Flag("random", f"{name}'s random state moved", "", None))

    # --- nodes ---------------------------------------------------------------------------------------------

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
    ) -> fx.Node:
        """Adds a node for a call that gave `result` and wrote to the tensors `written`."""
        with torch._C.DisableTorchFunction():
            return self._record(kind, target, args, kwargs, result, written, site)

    def _record(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        written: list[torch.Tensor],
        site: str | None,
    ) -> fx.Node:
        node_args = tuple(self.argument(value) for value in args)
        node_kwargs = {key: self.argument(value) for key, value in kwargs.items()}
        op = classify(kind, target, self.root, args, kwargs)
        if self.track:
            site = site or self._function_site(target, op)
            node = self.create(kind, target, node_args, node_kwargs, node_name(site))
            self._annotate(node, op, site, result, written)
            if op in (IDENTITY, CAST) and relaid(args, result):
                set_info(node, replace(info(node), relaid=True))
        else:
            node = self.create(kind, target, node_args, node_kwargs)
            set_info(node, NodeInfo(op, node.name))
        returned = {id(tensor) for tensor in flat_tensors((result,))}
        for tensor in written:
            self._note_write(node, tensor, returned=id(tensor) in returned)
        self._tag_result(result, node, ())
        return node

    def _annotate(self, node: fx.Node, op: Op, site: str, result: Any, written: list[torch.Tensor]) -> None:
        source = user_line()
        value = None if result is None else spec_of(result)
        record = NodeInfo(op, site, self.names.owner, source, value, in_place=bool(written), random=self.drew_random())
        record = replace(record, repeated=self.names.repeats.get(site))
        set_info(node, record)
        node.meta["stack_trace"] = f'File "{source.file}", line {source.line}, in {source.function}' if source else ""
        tensors = flat_tensors((result,))
        if tensors and torch.is_autocast_enabled(tensors[0].device.type):
            self.flag("autocast", "an autocast region")

    def _function_site(self, target: Any, op: Op) -> str:
        functional = functional_module()
        if functional is not None and id(functional[0]) in self.module_paths:
            return self.names.method_call(self.module_paths[id(functional[0])], functional[1])
        if op is not OPAQUE:
            return self.names.function_call(op.name)
        name = target if isinstance(target, str) else getattr(target, "__name__", "function")
        return self.names.function_call(str(name).split(".")[0].strip("_") or "function")

    def _note_write(self, node: fx.Node, tensor: torch.Tensor, *, returned: bool) -> None:
        target = self.node_of(tensor)
        self.recording.writes.append(Write(node, target, storage_key(tensor)))
        self.check_state(node, tensor)
        if returned:
            self.tag(tensor, node)

    # --- tensors -------------------------------------------------------------------------------------------

    def _tag_result(self, value: Any, node: fx.Node, path: tuple[Any, ...]) -> None:
        if isinstance(value, torch.Tensor):
            self.tag(value, node, path)
        elif isinstance(value, (tuple, list)):
            for position, entry in enumerate(value):
                self._tag_result(entry, node, (*path, position))
        elif isinstance(value, dict):
            for key, entry in value.items():
                self._tag_result(entry, node, (*path, key))

    def note_born(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Notes memory that a kernel made."""
        given = set(map(storage_key, inputs))
        self._born.update(key for key in map(storage_key, outputs) if key not in given)

    def is_from_outside(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor existed before the forward; numpy's memory cannot be told, and counts as new."""
        key = storage_key(tensor)
        if not key or key in self._born or key in self._inputs:
            return False
        return tensor.untyped_storage().resizable()

    # --- flags ---------------------------------------------------------------------------------------------

    def note_constant(self, tensor: torch.Tensor) -> None:
        """A constant that depends on the inputs was lost on its way."""
        if self.track and self.taint.depends(tensor):
            self.flag("lost", f"a tensor of shape {list(tensor.shape)}")

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

    def check_state(self, node: fx.Node, written: torch.Tensor) -> None:
        """Flags a write to one of the model's own tensors."""
        path = self.recording.state.get(storage_key(written))
        if path is not None:
            self.recording.changed_state = True
            self.flag("state", f"{info(node).site} writes to {path}")

    def _note_assignment(self, path: str, new: torch.Tensor | None, line: SourceLine | None) -> None:
        self.recording.changed_state = True
        if new is not None and self.taint.depends(new):
            self.recording.flags.append(Flag("state", f"{path} is assigned", "", line))

    # --- calls ---------------------------------------------------------------------------------------------

    def observed(self, call: Callable[[], Any], operands: tuple[Any, ...]) -> tuple[Any, list[torch.Tensor]]:
        """Runs `call` unrecorded; returns its result and the operands it wrote to."""
        tensors = flat_tensors(operands)
        before = self._versions(tensors)
        self.depth += 1
        try:
            result = call()
        finally:
            self.depth -= 1
        after = self._versions(tensors)
        written = {id(t): t for t, old, new in zip(tensors, before, after, strict=True) if old != new}
        return result, list(written.values())

    def _versions(self, tensors: list[torch.Tensor]) -> list[int]:
        with torch._C.DisableTorchFunction():  # reading an attribute is a torch function too
            return [
                self.inference_writes[storage_key(tensor)] if tensor.is_inference() else tensor._version
                for tensor in tensors
            ]

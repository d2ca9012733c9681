"""The one record qgraph keeps per node, and the one per graph.

`node.meta["qgraph"]` holds a frozen `NodeInfo`, `gm.meta["qgraph"]` a frozen `GraphInfo`. Both are read through
`info` and `graph_info`, which raise with the node's name where a record is missing, and changed only by
`Editor` (nodes) and `update_graph_info` (graphs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from qgraph.errors import InternalError, UserError
from qgraph.ir.op import Op
from qgraph.ir.stage import Stage
from qgraph.ir.values import ValueSpec
from qgraph.numerics import Format, QParams, Scheme

KEY = "qgraph"


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of the user's code."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What was decided for one site, and by which rule.

    Args:
        format: number format of the rounded values.
        observer: name of the observer that finds the range.
        per_channel: whether there is one scale per output channel.
        rule: the rule that decided.
        overrode: earlier decisions this one replaced, oldest first.
        fixed_scale: a scale given by the user or the target, never updated.
        scheme: how a range becomes scale and zero point.
        fixed_zero: the zero point that goes with `fixed_scale`; None for that of a scale given by the user.
        same_scale: whether the site has the scale and zero point of the first operand instead of its own.
        frozen: whether training leaves the scale as calibration found it.
        fake_quant: kind of fake quantization.
    """

    format: Format
    observer: str
    per_channel: bool
    rule: str
    overrode: tuple[str, ...] = ()
    fixed_scale: float | None = None
    scheme: Scheme = Scheme.SYMMETRIC
    fixed_zero: int | None = None
    same_scale: bool = False
    frozen: bool = False
    fake_quant: str = "fake_quant"


@dataclass(frozen=True, slots=True)
class Repeated:
    """What a call in a dynamic block shares with the same call in other iterations.

    Args:
        block: the block's path.
        identity: the same for every iteration.
        site: the call's own site.
    """

    block: str
    identity: str
    site: str

    def common(self, site: str) -> str:
        """`site`, the call's own or one derived from it, as it is called in every iteration."""
        return site.replace(self.site, self.identity, 1)


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Everything qgraph knows of a node.

    Args:
        op: canonical operator.
        site: stable name: a module path, `path(1)` for its second call, or `owner._generated_add_0`.
        module: path of the innermost enclosing module.
        source: the user's line.
        value: shape and dtype on the example run; None where no run has seen the node yet.
        origins: sites of the captured nodes this one stands for; itself if empty.
        created_by: the pass that made the node, or `capture`.
        in_place: the node writes to one of its operands or to state: it must not be removed, moved or matched.
        relaid: the node copies its operand into another memory layout; kernels behind it may add in another order.
        random: the node draws random numbers: without it, later draws would differ.
        unstable: the node's storage is written by an `in_place` node: it must not be moved or matched.
        inner: the node is a step of a composite that was taken apart; the composite's site is another node's.
        plan: decision for the result's site.
        weight_plan: decision for the site of the module's weight.
        qparams: scale and zero point of the result, once frozen.
        weight_qparams: scale and zero point of the module's weight, once frozen.
        float_reason: why the node stays in float arithmetic, if it does.
        repeated: what the call shares with other iterations, if it is in a dynamic block.
    """

    op: Op
    site: str
    module: str = ""
    source: SourceLine | None = None
    value: ValueSpec | None = None
    origins: tuple[str, ...] = ()
    created_by: str = "capture"
    in_place: bool = False
    relaid: bool = False
    random: bool = False
    unstable: bool = False
    inner: bool = False
    plan: SitePlan | None = None
    weight_plan: SitePlan | None = None
    qparams: QParams | None = None
    weight_qparams: QParams | None = None
    float_reason: str | None = None
    repeated: Repeated | None = None

    @property
    def stands_for(self) -> tuple[str, ...]:
        """Sites of the captured nodes this one represents."""
        return self.origins or (self.site,)


@dataclass(frozen=True)
class Refusal:
    """Why a rule did not fire at a place where its pattern matched."""

    rule: str
    reason: str
    site: str
    source: SourceLine | None
    members: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f" ({self.source})" if self.source else ""
        return f"{self.rule} not applied at {self.site}{place}: {self.reason}"


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Named(Protocol):
    """A target, as far as graphs know it."""

    @property
    def name(self) -> str:
        """Its name."""


@dataclass(frozen=True)
class GraphInfo:
    """Everything qgraph knows of a graph as a whole.

    Args:
        stage: the stage whose rules the graph keeps.
        model: class name of the user's model.
        method: how it was captured.
        example: the example inputs, copies owned by the graph; None if it was not captured by qgraph.
        expected: the graph's outputs on the example inputs, where a run has seen them.
        batch_fixed: why the batch size cannot change; None if it is free.
        stateful: whether a run changes buffers that the next run reads (a waived flag).
        target: the target it was prepared for.
        properties: what passes have established, such as `batch-norm-folded`.
        history: names of the passes that ran, in order.
        refusals: rules that matched and did not fire, with reasons.
        notes: remarks for the user, such as float islands and waived capture flags.
    """

    stage: Stage
    model: str = "Model"
    method: str = "fx"
    example: ExampleInputs | None = None
    expected: Any = None
    batch_fixed: str | None = None
    stateful: bool = False
    target: Named | None = None
    properties: frozenset[str] = frozenset()
    history: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


def info(node: fx.Node) -> NodeInfo:
    """The node's record.

    Raises:
        InternalError: the node has none; it was created past the `Editor`.
    """
    record = node.meta.get(KEY)
    if not isinstance(record, NodeInfo):
        raise InternalError(
            f"node {node.name!r} carries no qgraph record",
            where=str(node.format_node()),
            why="it was created or replaced by something other than qgraph's Editor",
            fix="create nodes through Editor, which carries the record over",
        )
    return record


def has_info(node: fx.Node) -> bool:
    """Whether the node carries a record."""
    return isinstance(node.meta.get(KEY), NodeInfo)


def set_info(node: fx.Node, record: NodeInfo) -> None:
    """Writes the node's record; passes use `Editor.annotate` instead, which counts and notifies."""
    node.meta[KEY] = record


def graph_info(gm: fx.GraphModule) -> GraphInfo:
    """The graph's record.

    Raises:
        UserError: the module was not made by qgraph.
    """
    meta = getattr(gm, "meta", None)
    record = meta.get(KEY) if isinstance(meta, dict) else None
    if not isinstance(record, GraphInfo):
        raise UserError(
            f"this {type(gm).__name__} carries no qgraph record",
            why="it was not captured by qgraph, or it was pickled, which drops the records",
            fix="capture the model with qgraph.trace(model, example_inputs); to keep weights, save its state_dict",
        )
    return record


def update_graph_info(gm: fx.GraphModule, **changes: object) -> GraphInfo:
    """Replaces fields of the graph's record and returns the new one."""
    record = replace(graph_info(gm), **changes)  # type: ignore[arg-type]
    gm.meta[KEY] = record
    return record


def where(node: fx.Node) -> str:
    """Node, site and source line, for the `where` of a message."""
    if not has_info(node):
        return f"node {node.name}"
    record = info(node)
    parts = [f"node {node.name}"]
    if record.site and record.site != node.name:
        parts.append(f"site {record.site}")
    if record.source is not None:
        parts.append(str(record.source))
    return ", ".join(parts)


def module_of(node: fx.Node) -> torch.nn.Module:
    """The module a `call_module` node calls.

    Raises:
        InternalError: the node calls no module, or the module is missing.
    """
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        raise InternalError(f"{node.name} calls no module", where=where(node))
    try:
        return submodule_at(owner, str(node.target))
    except KeyError as error:
        raise InternalError(f"module {node.target!r} is missing", where=where(node)) from error


def submodule_at(root: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at a dotted `path`; as `root.get_submodule`, which takes ten times as long.

    Raises:
        KeyError: there is no module there.
    """
    module: torch.nn.Module | None = root
    for part in path.split(".") if path else ():
        children = {} if module is None else module.__dict__.get("_modules", {})
        module = children[part] if part in children else getattr(module, part, None)
    if not isinstance(module, torch.nn.Module):
        raise KeyError(path)
    return module


def tensor_at(gm: torch.nn.Module, path: str) -> torch.Tensor:
    """The parameter, buffer or plain tensor attribute at a dotted `path`.

    Raises:
        InternalError: there is no tensor there.
    """
    parent, _, name = path.rpartition(".")
    try:
        value = getattr(submodule_at(gm, parent), name, None)
    except KeyError:
        value = None
    if not isinstance(value, torch.Tensor):
        raise InternalError(f"no tensor at {path!r}")
    return value

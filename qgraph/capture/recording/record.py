"""What one recorded run leaves behind."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qgraph.capture.options.flags import Flag

TAG = "_qgraph_tag"


@dataclass(frozen=True)
class Write:
    """One in-place write: `node` wrote the storage `storage`, reached through `target`'s value."""

    node: fx.Node
    target: fx.Node
    storage: int


@dataclass(frozen=True)
class Layout:
    """Which elements of its storage a tensor shows, and as what."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def layout_of(tensor: torch.Tensor) -> Layout:
    """The layout of a tensor that has a storage."""
    return Layout(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class Tag:
    """Says on a tensor which node's value it is: `path` leads to it in a value of several parts."""

    __slots__ = ("node", "owner", "path")

    def __init__(self, owner: Recording | None, node: fx.Node | None, path: tuple[Any, ...]) -> None:
        self.owner = owner
        self.node = node
        self.path = path

    def __deepcopy__(self, memo: dict[int, object]) -> Tag:
        return Tag(None, None, ())

    def __reduce__(self) -> tuple[type[Tag], tuple[None, None, tuple[()]]]:
        return Tag, (None, None, ())


@dataclass
class Recording:
    """What one run left behind.

    Args:
        graph: the nodes.
        created: the nodes in the order they came, which inserted parts of tuples do not keep in the graph.
        flags: what may make the capture unsound.
        constants: path to value of tensors that neither the inputs nor the model hold.
        writes: in-place writes, in order.
        storages: storage of every node whose value is a tensor.
        layouts: the part of the storage that it shows.
        output: what the forward returned.
        changed_state: whether the run changed the model.
        reads_layout: whether the forward looked at strides.
        state: storages of the model's own tensors, with their paths.
        device: where the inputs were.
        tagged: tensors that carry tags.
        notes: remarks for the user.
        size_guards: what the forward asked about the batch size, where the batch may not change because of it.
    """

    graph: fx.Graph
    created: list[fx.Node] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    storages: dict[fx.Node, int] = field(default_factory=dict)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    output: Any = None
    changed_state: bool = False
    reads_layout: bool = False
    state: dict[int, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tagged: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    size_guards: tuple[str, ...] = ()

    def tag(self, tensor: torch.Tensor, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        """Marks a tensor as the value of `node`, or as a part of it."""
        if TAG not in tensor.__dict__:
            self.tagged.append(weakref.ref(tensor))
        tensor.__dict__[TAG] = Tag(self, node, path)

    def release(self) -> None:
        """Takes the tags off again: tensors in the user's caches and in the output live on."""
        for reference in self.tagged:
            tensor = reference()
            if tensor is not None:
                tensor.__dict__.pop(TAG, None)
        self.tagged.clear()


class StateWrite(Exception):
    """The forward was about to write to one of the user's own tensors."""

    def __init__(self, flags: list[Flag]) -> None:
        super().__init__("a write to the model's state")
        self.flags = flags

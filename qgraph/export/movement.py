"""What moves or selects elements: the same ONNX operator on reals and on codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgraph.export.call import Call, Value, translates
from qgraph.ir.node_info import module_of
from qgraph.lowering.base import bounds

_LAST = (1 << 63) - 1


@translates("identity", moves=True)
def identity(call: Call) -> str:
    """Identity."""
    return call.emit("Identity", call.read("input"))


@translates("reshape", "flatten", "unflatten", moves=True)
def reshape(call: Call) -> str:
    """Reshape to the sizes of the result, of which one may depend on the batch."""
    dims = call.dims()
    if sum(size is None for size in dims) <= 1:
        shape = call.integers("shape", [-1 if size is None else size for size in dims])
    elif call.bound.op.name == "reshape":
        shape = call.integers("shape", call.bound.option("shape"))
    else:
        raise call.unsupported("two sizes of its result depend on the batch")
    return call.emit("Reshape", call.read("input"), shape)


@translates("permute", moves=True)
def permute(call: Call) -> str:
    """Transpose."""
    return call.emit("Transpose", call.read("input"), perm=[int(d) % call.rank() for d in call.option("dims")])


@translates("transpose", moves=True)
def transpose(call: Call) -> str:
    """Transpose that swaps two dimensions."""
    order = list(range(call.rank()))
    one, two = call.axis("dim0"), call.axis("dim1")
    order[one], order[two] = order[two], order[one]
    return call.emit("Transpose", call.read("input"), perm=order)


@translates("squeeze", moves=True)
def squeeze(call: Call) -> str:
    """Squeeze of dimensions that are 1."""
    dim, dims = call.option("dim"), call.dims("input")
    chosen = range(len(dims)) if dim is None else dim if isinstance(dim, (tuple, list)) else [dim]
    axes = [int(axis) % len(dims) for axis in chosen]
    axes = [axis for axis in axes if dims[axis] == 1]
    if not axes:
        return identity(call)
    return call.emit("Squeeze", call.read("input"), call.integers("axes", axes))


@translates("unsqueeze", moves=True)
def unsqueeze(call: Call) -> str:
    """Unsqueeze."""
    return call.emit("Unsqueeze", call.read("input"), call.integers("axes", [call.axis(extra=1)]))


@translates("expand", moves=True)
def expand(call: Call) -> str:
    """Expand; ONNX keeps a size where 1 is asked for."""
    wanted, dims = list(call.bound.option("size")), call.dims()
    sizes = [
        size if isinstance(size, fx.Node) else 1 if size == -1 or dims[axis] is None else size
        for axis, size in enumerate(wanted)
    ]
    return call.emit("Expand", call.read("input"), call.integers("sizes", sizes))


@translates("repeat", moves=True)
def repeat(call: Call) -> str:
    """Tile."""
    x, counts = call.read("input"), list(call.bound.option("dims"))
    missing = len(counts) - call.rank()
    if missing > 0:
        x = call.emit("Unsqueeze", x, call.integers("axes", range(missing)))
    counts = [1] * -missing + counts
    return call.emit("Tile", x, call.integers("repeats", counts))


@translates("slice", moves=True)
def index(call: Call) -> str:
    """Slice, Gather and Unsqueeze for `x[...]` with slices, integers, None and an ellipsis."""
    index = call.bound.option("index")
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(not (entry is None or entry is Ellipsis or isinstance(entry, (slice, int))) for entry in entries):
        raise call.unsupported("it indexes with tensors")
    read = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [slice(None)] * (call.rank() - read)
    name, axis = call.read("input"), 0
    sliced: list[tuple[int, slice]] = []
    picked: list[tuple[int, int]] = []
    added: list[int] = []
    for entry in entries:
        if entry is None:
            added.append(axis - len(picked) + len(added))
            continue
        if isinstance(entry, slice) and entry != slice(None):
            sliced.append((axis, entry))
        elif not isinstance(entry, slice):
            picked.append((axis, int(entry)))
        axis += 1
    name = _sliced(call, name, sliced) if sliced else name
    for position, number in reversed(picked):
        chosen = call.constant(f"index{position}", torch.tensor(number))
        name = call.emit("Gather", name, chosen, axis=position)
    if added:
        name = call.emit("Unsqueeze", name, call.integers("new_axes", added))
    return name if sliced or picked or added else identity(call)


def _sliced(call: Call, name: str, slices: list[tuple[int, slice]]) -> str:
    starts = [0 if part.start is None else part.start for _, part in slices]
    ends = [_LAST if part.stop is None else part.stop for _, part in slices]
    steps = [1 if part.step is None else part.step for _, part in slices]
    axes = call.integers("axes", [axis for axis, _ in slices])
    return call.emit(
        "Slice", name, call.integers("starts", starts), call.integers("ends", ends), axes, call.integers("steps", steps)
    )


@translates("narrow", moves=True)
def narrow(call: Call) -> str:
    """Slice of a given length."""
    start, length = call.option("start"), call.option("length")
    return _sliced(call, call.read("input"), [(call.axis(), slice(start, start + length, 1))])


@translates("select", moves=True)
def select(call: Call) -> str:
    """Gather of one position."""
    index = call.constant("index", torch.tensor(call.option("index")))
    return call.emit("Gather", call.read("input"), index, axis=call.axis())


@translates("split", "chunk", moves=True)
def split(call: Call) -> list[str]:
    """Split into the sizes of the results."""
    axis = call.axis()
    sizes = [dims[axis] for dims in call.walk.dims[call.node]]
    if any(size is None for size in sizes):
        raise call.unsupported("the sizes of its parts depend on the batch")
    return call.emit_many("Split", call.read("input"), call.integers("split", sizes), results=len(sizes), axis=axis)


@translates("unbind", moves=True)
def unbind(call: Call) -> list[str]:
    """Gather of every position."""
    axis, x = call.axis(), call.read("input")
    count = len(call.walk.dims[call.node])
    return [call.emit("Gather", x, call.constant(f"index{i}", torch.tensor(i)), axis=axis) for i in range(count)]


@translates("index_select", moves=True)
def index_select(call: Call) -> str:
    """Gather along one dimension."""
    return call.emit("Gather", call.read("input"), call.walk.real(_plain(call, "index")), axis=call.axis())


@translates("gather", moves=True)
def gather(call: Call) -> str:
    """GatherElements."""
    if call.dims("index") != tuple(
        size if axis == call.axis() else call.dims("input")[axis] for axis, size in enumerate(call.dims("index"))
    ):
        raise call.unsupported("its index is smaller than its input in other dimensions")
    return call.emit("GatherElements", call.read("input"), call.walk.real(_plain(call, "index")), axis=call.axis())


@translates("embedding")
def embedding(call: Call) -> str:
    """Gather of rows of a float weight."""
    module: Any = module_of(call.node) if call.node.op == "call_module" else None
    weight = call.read("weight") if module is None else call.constant("weight", module.weight)
    return call.emit("Gather", weight, call.walk.real(call.value("input")), axis=0)


def _plain(call: Call, name: str) -> Value:
    operand = call.bound.values[name]
    return call.value_of(operand)


@translates("flip", moves=True)
def flip(call: Call) -> str:
    """Slice with negative steps."""
    dims = call.option("dims")
    axes = [int(d) % call.rank() for d in (dims if isinstance(dims, (tuple, list)) else [dims])]
    return _sliced(call, call.read("input"), [(axis, slice(-1, -_LAST, -1)) for axis in axes])


@translates("roll", moves=True)
def roll(call: Call) -> str:
    """Two slices joined the other way round, for each dimension."""
    shifts, dims = call.option("shifts"), call.option("dims")
    if dims is None or dims in ((), []):
        raise call.unsupported("it rolls the flattened tensor")
    shifts = shifts if isinstance(shifts, (tuple, list)) else [shifts]
    dims = dims if isinstance(dims, (tuple, list)) else [dims]
    name = call.read("input")
    for position, (shift, dim) in enumerate(zip(shifts, dims, strict=True)):
        axis = int(dim) % call.rank()
        size = call.dims("input")[axis]
        if not isinstance(size, int):
            raise call.unsupported("it rolls along the batch")
        cut = call.integers(f"cut{position}", [-shift % size])
        zero, last = call.integers("first", [0]), call.integers("last", [_LAST])
        along = call.integers(f"axis{position}", [axis])
        parts = call.emit("Slice", name, cut, last, along), call.emit("Slice", name, zero, cut, along)
        name = call.emit("Concat", *parts, axis=axis)
    return name


@translates("cat")
def cat(call: Call) -> str:
    """Concat."""
    parts = call.bound.operand("tensors")
    names = [call.read_of(part, f"tensor{position}") for position, part in enumerate(parts)]
    return call.emit("Concat", *names, axis=int(call.option("dim")) % len(call.dims()))


@translates("stack")
def stack(call: Call) -> str:
    """Concat of operands with one dimension more."""
    axis = int(call.option("dim")) % len(call.dims())
    along = call.integers("axes", [axis])
    names = [call.emit("Unsqueeze", call.read_of(part, "tensor"), along) for part in call.bound.operand("tensors")]
    return call.emit("Concat", *names, axis=axis)


@translates("pad", moves=True)
def pad(call: Call) -> str:
    """Pad; on codes, with the code of zero."""
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    mode = modes[call.option("mode")]
    if mode == "wrap" and call.opset < 19:
        raise call.unsupported("circular padding needs opset 19")
    amounts, rank = call.option("pad"), call.rank()
    before, after = [0] * rank, [0] * rank
    for place in range(len(amounts) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = amounts[2 * place], amounts[2 * place + 1]
    inputs = [call.read("input"), call.integers("pads", [*before, *after])]
    if mode == "constant":
        inputs.append(call.constant("value", _filling(call)))
    return call.emit("Pad", *inputs, mode=mode)


def _filling(call: Call) -> torch.Tensor:
    value, source = call.option("value") or 0, call.value("input")
    if not call.on_codes:
        return torch.tensor(value, dtype=source.dtype)
    assert source.qparams is not None
    return torch.tensor(bounds(source.qparams, low=0.0)["low"], dtype=source.qparams.qtype.storage)

"""Indices, running sums, shuffles and attention on real numbers."""

from __future__ import annotations

import math

import torch

from qgraph.export.call import Call, translates


@translates("argmax", "argmin")
def arg_extreme(call: Call) -> str:
    """ArgMax and ArgMin along one dimension; the first of equal values, as in torch."""
    if call.option("dim") is None:
        raise call.unsupported("it looks at the flattened tensor")
    kind = "ArgMax" if call.bound.op.name == "argmax" else "ArgMin"
    return call.emit(kind, call.read("input"), axis=call.axis(), keepdims=int(bool(call.option("keepdim"))))


@translates("cumsum")
def cumsum(call: Call) -> str:
    """CumSum."""
    if call.option("dtype") not in (None, torch.float32):
        raise call.unsupported(f"it computes in {call.option('dtype')}")
    return call.emit("CumSum", call.read("input"), call.constant("axis", torch.tensor(call.axis())))


@translates("movedim", moves=True)
def movedim(call: Call) -> str:
    """Transpose."""
    rank = call.rank()
    pairs = [call.option(name) for name in ("source", "destination")]
    source, destination = (
        [int(d) % rank for d in (dims if isinstance(dims, (tuple, list)) else [dims])] for dims in pairs
    )
    rest = iter(axis for axis in range(rank) if axis not in source)
    placed = dict(zip(destination, source, strict=True))
    order = [placed[axis] if axis in placed else next(rest) for axis in range(rank)]
    return call.emit("Transpose", call.read("input"), perm=order)


@translates("pixel_shuffle", moves=True)
def pixel_shuffle(call: Call) -> str:
    """DepthToSpace with torch's order of channels."""
    if call.rank() != 4:
        raise call.unsupported("its input has no four dimensions")
    size = int(call.option("upscale_factor"))
    return call.emit("DepthToSpace", call.read("input"), blocksize=size, mode="CRD")


@translates("scaled_dot_product_attention")
def attention(call: Call) -> str:
    """MatMul, Softmax, MatMul."""
    if call.option("is_causal") or call.option("dropout_p") or call.option("enable_gqa"):
        raise call.unsupported("it is causal, drops values, or shares heads")
    size, mask = call.dims("query")[-1], call.bound.values.get("attn_mask")
    if not isinstance(size, int):
        raise call.unsupported("its features depend on the batch")
    scale = call.option("scale")
    factor = torch.tensor(1.0 / math.sqrt(size) if scale is None else scale, dtype=torch.float32)
    order = list(range(call.rank("key")))
    order[-2:] = order[:-3:-1]
    keys = call.emit("Transpose", call.read("key"), perm=order)
    scores = call.emit("MatMul", call.emit("Mul", call.read("query"), call.constant("scale", factor)), keys)
    if mask is not None:
        if call.value_of(mask).dtype is not torch.float32:
            raise call.unsupported("its mask is not added")
        scores = call.emit("Add", scores, call.walk.real(call.value_of(mask)))
    return call.emit("MatMul", call.emit("Softmax", scores, axis=-1), call.read("value"))

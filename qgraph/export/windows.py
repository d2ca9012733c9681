"""Pooling, reductions and resizing."""

from __future__ import annotations

from typing import Any

import torch

from qgraph.export.call import Call, translates
from qgraph.ir.node_info import info
from qgraph.lowering.options import spatial

_AXES_OF_SUM, _AXES_OF_OTHERS = 13, 18  # opsets from which axes are an input


@translates("max_pool1d", "max_pool2d", "max_pool3d", moves=True)
def max_pool(call: Call) -> str:
    """MaxPool."""
    if call.option("return_indices"):
        raise call.unsupported("it also returns indices")
    rank = _rank(call)
    dilation = spatial(call.option("dilation"), rank)
    return call.emit("MaxPool", call.read("input"), dilations=dilation, **_window(call, rank))


@translates("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(call: Call) -> str:
    """AveragePool, or GlobalAveragePool where the window is everything."""
    if averages_channels(call):
        return call.emit("GlobalAveragePool", call.read("input"))
    if call.bound.values.get("divisor_override"):
        raise call.unsupported("it divides by a number of its own")
    if call.option("ceil_mode") and call.opset < 19:
        raise call.unsupported("windows beyond the edge (ceil_mode) are counted differently before opset 19")
    count = int(bool(call.option("count_include_pad")))
    return call.emit("AveragePool", call.read("input"), count_include_pad=count, **_window(call, _rank(call)))


@translates("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(call: Call) -> str:
    """GlobalAveragePool, or AveragePool with equal windows."""
    if averages_channels(call):
        return call.emit("GlobalAveragePool", call.read("input"))
    rank = _rank(call)
    sizes = [(size, out) for size, out in zip(call.dims("input")[-rank:], call.dims()[-rank:], strict=True)]
    if any(not isinstance(size, int) or not isinstance(out, int) or size % out for size, out in sizes):
        raise call.unsupported("its windows have different sizes")
    kernel = [int(size) // int(out) for size, out in sizes]  # type: ignore[arg-type]
    return call.emit("AveragePool", call.read("input"), kernel_shape=kernel, strides=kernel)


@translates("mean")
def mean(call: Call) -> str:
    """GlobalAveragePool, for which integer kernels exist, or ReduceMean."""
    if averages_channels(call):
        squeeze_all(call)
        return call.emit("GlobalAveragePool", call.read("input"))
    return _reduced(call, "ReduceMean", _AXES_OF_OTHERS)


@translates("sum")
def total(call: Call) -> str:
    """ReduceSum."""
    return _reduced(call, "ReduceSum", _AXES_OF_SUM)


@translates("amax", moves=True)
def amax(call: Call) -> str:
    """ReduceMax."""
    return _reduced(call, "ReduceMax", _AXES_OF_OTHERS)


@translates("amin", moves=True)
def amin(call: Call) -> str:
    """ReduceMin."""
    return _reduced(call, "ReduceMin", _AXES_OF_OTHERS)


def averages_channels(call: Call) -> bool:
    """Whether the call averages over all positions of every channel, which GlobalAveragePool does."""
    name, dims = info(call.node).op.name, call.dims("input")
    if name == "mean":
        return len(dims) > 2 and _axes(call) == list(range(2, len(dims)))
    rank = _rank(call)
    if len(dims) != rank + 2:
        return False
    if name.startswith("adaptive"):
        return set(call.dims()[-rank:]) == {1}
    padded = any(spatial(call.option("padding"), rank)) or call.bound.values.get("divisor_override")
    return list(dims[-rank:]) == spatial(call.option("kernel_size"), rank) and not padded


def squeeze_all(call: Call) -> None:
    """Lets a mean drop the dimensions it reduced, behind the rounding."""
    if info(call.node).op.name == "mean" and not call.option("keepdim"):
        call.then = lambda name: call.emit("Squeeze", name, call.integers("reduced", _axes(call)))


@translates("interpolate", moves=True)
def interpolate(call: Call) -> str:
    """Resize."""
    mode = call.option("mode")
    if mode not in ("nearest", "bilinear", "linear"):
        raise call.unsupported(f"mode {mode!r} has no exact ONNX form here")
    if call.option("antialias"):
        raise call.unsupported("it smooths before it shrinks (antialias)")
    given, wanted = call.dims("input")[2:], call.dims()[2:]
    if any(not isinstance(size, int) for size in (*given, *wanted)):
        raise call.unsupported("its sizes depend on the batch")
    attributes: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if call.option("align_corners"):
        attributes["coordinate_transformation_mode"] = "align_corners"
    if mode == "nearest":
        attributes = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    ratios = [int(out) / int(size) for size, out in zip(given, wanted, strict=True)]  # type: ignore[arg-type]
    factor = call.option("scale_factor")
    if factor is not None and not call.option("recompute_scale_factor"):
        ratios = [float(f) for f in (factor if isinstance(factor, (list, tuple)) else [factor] * len(given))]
    scales = call.constant("scales", torch.tensor([1.0, 1.0, *ratios], dtype=torch.float32))
    return call.emit("Resize", call.read("input"), "", scales, **attributes)


def _rank(call: Call) -> int:
    return int(info(call.node).op.name[-2])


def _window(call: Call, rank: int) -> dict[str, Any]:
    kernel = spatial(call.option("kernel_size"), rank)
    stride = call.option("stride")
    strides = kernel if stride is None else spatial(stride, rank)
    padding = spatial(call.option("padding"), rank)
    ends, ceil_mode = padding, 0
    if call.option("ceil_mode"):
        ends, ceil_mode = _beyond_the_edge(call, rank, kernel, strides, padding)
    return {"kernel_shape": kernel, "strides": strides, "pads": [*padding, *ends], "ceil_mode": ceil_mode}


def _beyond_the_edge(
    call: Call, rank: int, kernel: list[int], strides: list[int], padding: list[int]
) -> tuple[list[int], int]:
    """Padding behind, and `ceil_mode`, with which ONNX has as many windows as torch.

    torch drops a last window that starts behind the input and the padding before it; ONNX does not everywhere. Where
    they differ, the windows are written with padding alone.
    """
    sizes, results = call.dims("input")[-rank:], call.dims()[-rank:]
    if any(not isinstance(size, int) for size in (*sizes, *results)):
        raise call.unsupported("its windows reach beyond the edge (ceil_mode) of an image of unknown size")
    dilation = spatial(call.bound.values.get("dilation") or 1, rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    geometry = list(zip(sizes, results, reach, strides, padding, strict=True))
    spare = [(int(size) + 2 * p - r, int(out) - 1, s) for size, out, r, s, p in geometry]  # type: ignore[arg-type]
    if all(room // s == last for room, last, s in spare):
        return padding, 0
    if all(-(-room // s) == last for room, last, s in spare):
        return padding, 1
    ends = [max(last * s - room, 0) + p for (room, last, s), p in zip(spare, padding, strict=True)]
    counts = info(call.node).op.name.startswith("avg") and call.option("count_include_pad")
    if counts or any(end >= k for end, k in zip(ends, kernel, strict=True)):
        raise call.unsupported("its windows beyond the edge (ceil_mode) are counted differently in ONNX")
    return ends, 0


def _axes(call: Call) -> list[int]:
    dim, rank = call.option("dim"), call.rank()
    chosen = range(rank) if dim is None or dim in ((), []) else dim if isinstance(dim, (list, tuple)) else [dim]
    return sorted({int(axis) % rank for axis in chosen})


def _reduced(call: Call, kind: str, axes_input: int) -> str:
    if call.bound.values.get("dtype") not in (None, torch.float32):
        raise call.unsupported(f"it computes in {call.option('dtype')}")
    keep = bool(call.option("keepdim"))
    return call.reduced(kind, call.read("input"), _axes(call), keep=keep, axes_input=axes_input)

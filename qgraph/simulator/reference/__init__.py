"""Reference kernels in plain int64: obviously right, the measure of every faster set."""

from collections.abc import Callable

import torch

from qgraph.simulator.reference.elementwise import add, dequantize, lookup, mul, quantize, requantize, softmax
from qgraph.simulator.reference.functions import compare, lookup_segments, lookup_steps, lookup_two, prelu
from qgraph.simulator.reference.ordering import arg_extreme, cumsum, fold, order, unfold
from qgraph.simulator.reference.pairs import conv_pairs
from qgraph.simulator.reference.products import conv, linear, matmul
from qgraph.simulator.reference.sampling import resize, sample_bilinear, sample_nearest
from qgraph.simulator.reference.windows import (
    adaptive_avg_pool,
    avg_pool,
    clamp_codes,
    max_pool,
    reduce_sum,
    resize_bilinear,
)

KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "adaptive_avg_pool": adaptive_avg_pool,
    "add": add,
    "avg_pool": avg_pool,
    "clamp": clamp_codes,
    "compare": compare,
    "conv": conv,
    "conv_pairs": conv_pairs,
    "dequantize": dequantize,
    "linear": linear,
    "lookup": lookup,
    "lookup_segments": lookup_segments,
    "lookup_steps": lookup_steps,
    "lookup_two": lookup_two,
    "matmul": matmul,
    "max_pool": max_pool,
    "mul": mul,
    "prelu": prelu,
    "quantize": quantize,
    "reduce_sum": reduce_sum,
    "requantize": requantize,
    "resize_bilinear": resize_bilinear,
    "arg_extreme": arg_extreme,
    "cumsum": cumsum,
    "fold": fold,
    "order": order,
    "resize": resize,
    "sample_bilinear": sample_bilinear,
    "sample_nearest": sample_nearest,
    "unfold": unfold,
    "softmax": softmax,
}

__all__ = ["KERNELS"]

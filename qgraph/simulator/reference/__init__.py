"""Reference kernels in plain int64: obviously right, the measure of every faster set."""

from collections.abc import Callable

import torch

from qgraph.simulator.reference.elementwise import add, dequantize, lookup, mul, quantize, requantize
from qgraph.simulator.reference.pairs import conv_pairs
from qgraph.simulator.reference.products import conv, linear, matmul
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
    "conv": conv,
    "conv_pairs": conv_pairs,
    "dequantize": dequantize,
    "linear": linear,
    "lookup": lookup,
    "matmul": matmul,
    "max_pool": max_pool,
    "mul": mul,
    "quantize": quantize,
    "reduce_sum": reduce_sum,
    "requantize": requantize,
    "resize_bilinear": resize_bilinear,
}

__all__ = ["KERNELS"]

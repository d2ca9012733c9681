"""Deliberately wrong kernels, to see whether generated cases find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from qgraph.numerics import qint32
from qgraph.simulator import KERNEL_SETS, register_kernel
from qgraph.simulator.reference import KERNELS

Kernel = Callable[..., torch.Tensor]


def respelled(old: str, new: str) -> Callable[[Kernel], Kernel]:
    """A kernel that reads another word of arithmetic than it is given."""

    def fault(kernel: Kernel) -> Kernel:
        def wrong(*args: Any, arithmetic: str, **options: Any) -> torch.Tensor:
            return kernel(*args, arithmetic=arithmetic.replace(old, new), **options)

        return wrong

    return fault


def zero_before_rounding(kernel: Kernel) -> Kernel:
    """A float rescaling of a product that adds the zero point before it rounds."""

    def wrong(*args: Any, low: int, high: int, format: str, zero: int = 0, **options: Any) -> torch.Tensor:
        x, weight, bias, _, multiplier, *_ = args
        options.pop("trace", None)
        sums = kernel(
            x, weight, bias, None, None, None, None, low=qint32.qmin, high=qint32.qmax, format="int32", **options
        )
        shape = [1, -1, *[1] * (sums.dim() - 2)] if "stride" in options else [-1]
        factor = multiplier.reshape(shape) if multiplier.numel() > 1 else multiplier
        codes = torch.round(sums.to(torch.float32) * factor + float(zero)).clamp(low, high)
        return codes.to(getattr(torch, format))

    return wrong


def padding_with_code_zero(kernel: Kernel) -> Kernel:
    """A convolution that pads with code 0 instead of the zero point."""

    def wrong(x: torch.Tensor, *args: Any, padding: list[int], transposed: bool, **options: Any) -> torch.Tensor:
        if not transposed:
            x = F.pad(x, [size for size in reversed(padding) for _ in range(2)])
            padding = [0] * len(padding)
        return kernel(x, *args, padding=padding, transposed=transposed, **options)

    return wrong


def low_bound_ignored(kernel: Kernel) -> Kernel:
    """A rescaling that forgets the lower bound of a fused relu."""

    def wrong(*args: Any, low: int, format: str, **options: Any) -> torch.Tensor:
        info = torch.iinfo(getattr(torch, format))
        return kernel(*args, low=int(info.min), format=format, **options)

    return wrong


def last_tap_lost(kernel: Kernel) -> Kernel:
    """A product that leaves out the last element of sums longer than 1024."""

    def wrong(x: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if weight.shape[-1] > 1024:
            weight = weight.clone()
            weight[..., -1] = 0
        return kernel(x, weight, *args, **options)

    return wrong


PRODUCTS = ("conv", "linear")
FAULTS: dict[str, tuple[str, tuple[str, ...], Callable[[Kernel], Kernel]]] = {
    "ties upwards": ("bpu", PRODUCTS, respelled("half_even", "half_up")),
    "ties upwards in sums": ("bpu", ("add",), respelled("half_even", "half_up")),
    "ties upwards in pools": ("bpu", ("avg_pool", "reduce_sum"), respelled("half_even", "half_up")),
    "a saturating accumulator": ("bpu", PRODUCTS, respelled("wrap", "saturate")),
    "a bound ignored": ("bpu", PRODUCTS, low_bound_ignored),
    "the end of a long sum lost": ("bpu", ("linear",), last_tap_lost),
    "a zero point added before rounding": ("onnxruntime", PRODUCTS, zero_before_rounding),
    "padding with 0": ("onnxruntime", ("conv",), padding_with_code_zero),
}
"""By name: the target, the operators it spoils, and the fault."""


@contextmanager
def wrong_kernels(operators: tuple[str, ...], fault: Callable[[Kernel], Kernel]) -> Iterator[str]:
    """A kernel set with a fault in some operators, under the name it has until the end."""
    kernels: Mapping[str, Kernel] = {
        name: fault(kernel) if name in operators else kernel for name, kernel in KERNELS.items()
    }
    try:
        for name, kernel in kernels.items():
            register_kernel("wrong", name, "*", kernel)
        yield "wrong"
    finally:
        KERNEL_SETS.pop("wrong", None)

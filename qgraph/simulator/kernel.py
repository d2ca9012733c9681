"""What stands in a kernel set: plain functions, and kernels that are prepared for one call of a graph.

    kernel(*args, **options, trace=None)                    a plain function; every argument at every run
    PreparedKernel(prepare)                                 prepare(KernelCall) -> run(*computed operands, trace=None)

Preparation sees the constants, the options and what is known of the computed operands. It packs weights, chooses among
ways to compute and proves the chosen one exact for every input there can be, or raises `NoFastForm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

_CPU = torch.device("cpu")
Kernel: TypeAlias = Callable[..., torch.Tensor]


class NoFastForm(Exception):
    """A prepared kernel has no form for this call; the message says why."""


@dataclass(frozen=True)
class Operand:
    """A computed operand, as far as it is known before the run.

    Args:
        dtype: its dtype.
        shape: its shape on the example; other batches have other sizes.
        low, high: bounds of its codes.
        device: where it will be.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    low: int
    high: int
    device: torch.device = _CPU


@dataclass(frozen=True)
class KernelCall:
    """One call of an integer operator: constants are tensors, computed values are `Operand`s."""

    operator: str
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class PreparedKernel:
    """An entry of a kernel set that is prepared once per call of the graph."""

    prepare: Callable[[KernelCall], Kernel]

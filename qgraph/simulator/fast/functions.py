"""Fast forms of torch's own functions on codes: those that torch computes slowly in 8 and 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qgraph.simulator.fast.loops import loops

_CODES = (torch.int8, torch.uint8, torch.int16)


def amax(x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    """`torch.amax`; along the last dimension of codes by a compiled loop."""
    last = dim in (-1, x.dim() - 1, [-1], (-1,), [x.dim() - 1], (x.dim() - 1,))
    compiles = x.dtype in _CODES and x.device.type == "cpu" and x.numel() > 0 and x.dim() > 0
    if not (last and compiles) or loops() is None:
        return torch.amax(x, dim, keepdim)
    out = torch.empty((*x.shape[:-1], 1) if keepdim else x.shape[:-1], dtype=x.dtype)
    loops("compiled_rows").row_maxima(x.contiguous().numpy().reshape(-1, x.shape[-1]), out.numpy().reshape(-1))
    return out


FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.amax: amax}

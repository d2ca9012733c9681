"""Functions of one value as torch's quantized kernels compute them: one table for the vector loop, one for the tail.

    body    rhe(fl(f(fma(s, q, fl(s * -z))) * r)) + zy          f in float32
    tail    rhe(fl(fl(f(fl(s * (q - z))) * r) + zy))            f in float32, partly in float64
`r` is the reciprocal of the result's scale. They differ at ties, where the zero point is odd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qgraph.numerics.float_steps import fma32, whole32
from qgraph.numerics.qparams import QParams


@dataclass(frozen=True)
class TwoTables:
    """The form of torch's function tables: two full ones."""

    def __str__(self) -> str:
        return "aten"


_Pair = tuple[torch.Tensor, torch.Tensor]


def has_two_tables(name: str, options: Mapping[str, Any]) -> bool:
    """Whether torch has a quantized kernel of the operator, with these options."""
    return name in _FUNCTIONS and options.get("approximate", "none") == "none"


def two_tables(name: str, options: Mapping[str, Any], source: QParams, result: QParams) -> torch.Tensor:
    """Codes of the result for every code of the source: `[2, 2**bits]`, body and tail, in its storage dtype."""
    qtype, scale = source.qtype, source.scale
    codes = torch.arange(qtype.qmin, qtype.qmax + 1, device=scale.device)
    zero = source.zero_points().to(torch.float32)
    body = fma32(scale, codes.to(torch.float32), scale * -zero)
    tail = scale * (codes - source.zero).to(torch.float32)
    values = _FUNCTIONS[name](body, tail, options)
    reciprocal = 1.0 / result.scale
    steps = whole32(values[0] * reciprocal) + result.zero, whole32(values[1] * reciprocal + float(result.zero))
    return result.qtype.saturate(torch.stack(steps)).to(result.qtype.storage)


def _both(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor, Mapping[str, Any]], _Pair]:
    return lambda body, tail, options: (function(body, options), function(tail, options))


def _sigmoid(body: torch.Tensor, tail: torch.Tensor, options: Mapping[str, Any]) -> _Pair:
    """Both loops start from the tail's reals; the tail divides in float64."""
    power = torch.exp(-tail)
    return 1 / (1 + power), (1.0 / (1.0 + power.double())).float()


def _gelu(body: torch.Tensor, tail: torch.Tensor, options: Mapping[str, Any]) -> _Pair:
    half = math.sqrt(0.5)
    wide = tail.double()
    first = body * 0.5 * (1 + torch.erf(body * torch.tensor(half, dtype=torch.float32, device=body.device)))
    return first, (wide * 0.5 * (1 + torch.erf(wide * half))).float()


_FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, Mapping[str, Any]], _Pair]] = {
    "sigmoid": _sigmoid,
    "tanh": _both(lambda x, options: torch.tanh(x)),
    "hardswish": _both(lambda x, options: (x * (x + 3).clamp(0, 6)) / 6),
    "hardsigmoid": _both(lambda x, options: (x + 3).clamp(0, 6) / 6),
    "leaky_relu": _both(lambda x, options: torch.where(x > 0, x, x * x.new_tensor(options["negative_slope"]))),
    "gelu": _gelu,
}

"""Reference kernels: rescaling, sums, products and tables, element by element."""

from __future__ import annotations

import torch

from qgraph.numerics import QParams, parse_arithmetic, parse_qtype
from qgraph.numerics import dequantize as dequantize_codes
from qgraph.numerics import lookup as look_up
from qgraph.numerics import quantize as quantize_values
from qgraph.simulator.reference.common import finished, requantized, wide
from qgraph.simulator.trace import KernelTrace


def quantize(x: torch.Tensor, scale: torch.Tensor, *, format: str, trace: KernelTrace | None = None) -> torch.Tensor:
    """Codes of real numbers `x` (any shape): `saturate(round_half_even(x * (1 / scale)))` in float32."""
    qtype = parse_qtype(format)
    if trace is not None:
        unbounded = torch.round(x.to(torch.float32) * (1.0 / scale))
        trace.saturated += int((~qtype.contains(unbounded.double())).sum())
    return quantize_values(x, QParams(scale, qtype))


def dequantize(x: torch.Tensor, scale: torch.Tensor, *, axis: int, trace: KernelTrace | None = None) -> torch.Tensor:
    """Real numbers of codes `x` (any shape): `x * scale` in float32; `axis` -1 for one scale per tensor."""
    # The format only bounds codes, and these exist already.
    return dequantize_codes(x, QParams(scale, parse_qtype("int32"), axis=None if scale.dim() == 0 else axis))


def requantize(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    offset: torch.Tensor | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`saturate(round(x * M + offset, shift))`; parameters broadcast against `x`."""
    if offset is None:
        return requantized(wide(x), multiplier, shift, arithmetic, low, high, format, trace)
    rule = parse_arithmetic(arithmetic).rule
    return finished(rule.apply_sum([wide(x)], [multiplier], shift, offset), low, high, format, trace)


def add(
    x: torch.Tensor,
    y: torch.Tensor,
    multiplier_x: torch.Tensor,
    multiplier_y: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`saturate(round(x * Mx + y * My, shift))`, operands broadcast."""
    rule = parse_arithmetic(arithmetic).rule
    scaled = rule.apply_sum([wide(x), wide(y)], [multiplier_x, multiplier_y], shift)
    return finished(scaled, low, high, format, trace)


def mul(
    x: torch.Tensor,
    y: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`saturate(rescale(x * y))`, operands broadcast."""
    return requantized(wide(x) * wide(y), multiplier, shift, arithmetic, low, high, format, trace)


def lookup(x: torch.Tensor, table: torch.Tensor, *, source: str, trace: KernelTrace | None = None) -> torch.Tensor:
    """The table's entry for every code of `x`, interpolated where the table has fewer entries than codes."""
    return look_up(x, table, parse_qtype(source)).to(table.dtype)

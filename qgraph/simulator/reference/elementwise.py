"""Reference kernels: rescaling, sums, products and tables, element by element."""

from __future__ import annotations

import torch

from qgraph.errors import UserError
from qgraph.numerics import (
    RECIPROCAL,
    AddFactors,
    EngineSoftmax,
    EngineSum,
    Factor,
    QParams,
    Zeros,
    parse_arithmetic,
    parse_qtype,
    parse_quantize_rule,
    qint32,
)
from qgraph.numerics import dequantize as dequantize_codes
from qgraph.numerics import lookup as look_up
from qgraph.numerics import quantize as quantize_values
from qgraph.simulator.reference.common import finished, general, requantized, wide
from qgraph.simulator.trace import KernelTrace


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    format: str,
    zero: int = 0,
    rounding: str = str(RECIPROCAL),
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Codes of real numbers `x` (any shape): `saturate(round(x / scale) + zero)`; `rounding` says how in float32."""
    qtype, rule = parse_qtype(format), parse_quantize_rule(rounding)
    if trace is not None:
        unbounded = rule.codes(x.to(torch.float32), scale, torch.full_like(scale, zero))
        trace.saturated += int((~qtype.contains(unbounded.double()) | x.isnan()).sum())
    return quantize_values(x, QParams(scale, qtype, torch.full_like(scale, zero, dtype=torch.int64)), rule)


def dequantize(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int, x_zero: int = 0, trace: KernelTrace | None = None
) -> torch.Tensor:
    """Real numbers of codes `x` (any shape): `(x - x_zero) * scale` in float32; `axis` -1 for one scale per tensor."""
    # The format only bounds codes, and these exist already.
    return dequantize_codes(wide(x, x_zero), QParams(scale, qint32, axis=None if scale.dim() == 0 else axis))


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
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`saturate(round(x * M + offset, shift))`; parameters broadcast against `x`."""
    if offset is None:
        return requantized(wide(x, x_zero), multiplier, shift, arithmetic, low, high, format, zero, trace)
    rule = general(parse_arithmetic(arithmetic).rule)
    scaled = rule.apply_sum([wide(x, x_zero)], [multiplier], shift, offset) + zero
    return finished(scaled, low, high, format, trace)


def add(
    x: torch.Tensor,
    y: torch.Tensor,
    multiplier_x: torch.Tensor,
    multiplier_y: torch.Tensor,
    shift: torch.Tensor | None,
    multiplier: torch.Tensor | None = None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    y_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`saturate(round(x * Mx + y * My, shift))`, operands broadcast; `multiplier` is for engines that scale the sum."""
    rule = parse_arithmetic(arithmetic).rule
    if isinstance(rule, EngineSum):
        factors = AddFactors(multiplier_x, multiplier_y, shift, multiplier)
        return finished(rule.add(x, y, factors, Zeros(x_zero, y_zero, zero)), low, high, format, trace)
    scaled = general(rule).apply_sum([wide(x, x_zero), wide(y, y_zero)], [multiplier_x, multiplier_y], shift) + zero
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
    x_zero: int = 0,
    y_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`saturate(rescale(x * y))`, operands broadcast."""
    product = wide(x, x_zero) * wide(y, y_zero)
    return requantized(product, multiplier, shift, arithmetic, low, high, format, zero, trace)


def softmax(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    dim: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Softmax of codes over `dim`, as one engine computes it."""
    rule = parse_arithmetic(arithmetic).rule
    if not isinstance(rule, EngineSoftmax):
        raise UserError(f"{rule} is no softmax", fix="use a word such as int32:wrap/tflite_softmax")
    steps = rule.apply(wide(x).transpose(dim, -1), Factor(multiplier, shift)).transpose(dim, -1)
    return finished(steps + zero, low, high, format, trace)


def lookup(x: torch.Tensor, table: torch.Tensor, *, source: str, trace: KernelTrace | None = None) -> torch.Tensor:
    """The table's entry for every code of `x`, interpolated where the table has fewer entries than codes."""
    return look_up(x, table, parse_qtype(source)).to(table.dtype)

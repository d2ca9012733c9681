"""The end of every integer operator: accumulate, rescale, saturate."""

from __future__ import annotations

import torch

from qgraph.numerics import Arithmetic, Factor, parse_arithmetic, parse_qtype
from qgraph.simulator.trace import KernelTrace


def wide(codes: torch.Tensor, zero: int = 0) -> torch.Tensor:
    """Codes as int64, counted from their zero point."""
    return codes.to(torch.int64) - zero if zero else codes.to(torch.int64)


def accumulated(sums: torch.Tensor, arithmetic: Arithmetic, trace: KernelTrace | None) -> torch.Tensor:
    """Exact sums (int64) as the accumulator holds them, int64."""
    held = arithmetic.accumulate(sums)
    if trace is not None:
        trace.overflowed += int((held != sums).sum())
    return held


def finished(scaled: torch.Tensor, low: int, high: int, format: str, trace: KernelTrace | None) -> torch.Tensor:
    """Rescaled values (int64, zero point included) between the bounds, in the format's storage dtype."""
    qtype = parse_qtype(format)
    if trace is not None:
        # An activation's bound clips on purpose; only leaving the format counts as saturation.
        below = (scaled < qtype.qmin) if low == qtype.qmin else torch.zeros_like(scaled, dtype=torch.bool)
        above = (scaled > qtype.qmax) if high == qtype.qmax else torch.zeros_like(below)
        trace.saturated += int((below | above).sum())
    return scaled.clamp(low, high).to(qtype.storage)


def requantized(
    sums: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int,
    trace: KernelTrace | None,
) -> torch.Tensor:
    """Exact sums (int64) accumulated, rescaled by one factor, moved to the zero point, bounded."""
    word = parse_arithmetic(arithmetic)
    held = accumulated(sums, word, trace)
    return finished(word.rule.apply(held, Factor(multiplier, shift), zero), low, high, format, trace)


def along_channels(values: torch.Tensor | None, spatial: int) -> torch.Tensor | None:
    """Per-channel values `[C]` (or `[]`) viewed so that `spatial` dimensions follow the channels."""
    if values is None or values.dim() == 0:
        return values
    return values.reshape(-1, *[1] * spatial)

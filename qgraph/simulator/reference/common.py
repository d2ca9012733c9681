"""The end of every integer operator: accumulate, rescale, saturate."""

from __future__ import annotations

import torch

from qgraph.errors import UserError
from qgraph.numerics import (
    Arithmetic,
    EngineSoftmax,
    EngineSum,
    Factor,
    RequantizeRule,
    Rule,
    parse_arithmetic,
    parse_qtype,
)
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
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact sums (int64) accumulated, rescaled by one factor, moved to the zero point, bounded.

    `bias` is a float32 bias of engines that have one.
    """
    word = parse_arithmetic(arithmetic)
    if isinstance(word.rule, (EngineSum, EngineSoftmax)):
        raise UserError(f"{word.rule} does not rescale single values", fix="give this operator another word")
    held = accumulated(sums, word, trace)
    scaled = word.rule.apply(held, Factor(multiplier, shift), zero, bias)
    return finished(scaled, low, high, format, trace)


def general(rule: Rule) -> RequantizeRule:
    """A rule that defines sums of any terms.

    Raises:
        UserError: it is the word of an engine, which defines one operator.
    """
    if not isinstance(rule, RequantizeRule):
        raise UserError(f"{rule} defines no sum of several terms", fix="give this operator another word")
    return rule


def along_channels(values: torch.Tensor | None, spatial: int) -> torch.Tensor | None:
    """Per-channel values `[..., C]` (or `[]`) viewed so that `spatial` dimensions follow the channels."""
    if values is None or values.dim() == 0:
        return values
    return values.reshape(*values.shape, *[1] * spatial)

"""When floating point computes the same integers: bounds checked once, when a kernel is prepared.

float32   whole numbers of 24 bits; a sum is exact in any order if the sum of its magnitudes stays within 2**24
float64   53 bits
"""

from __future__ import annotations

import math

import torch

SINGLE, DOUBLE = 1 << 24, 1 << 53
_BYTES = (torch.int8, torch.uint8)


def largest(values: torch.Tensor | None) -> int:
    """Largest magnitude of an integer tensor, as an unbounded number."""
    if values is None or values.numel() == 0:
        return 0
    return max(abs(int(values.max())), abs(int(values.min())))


def product_bound(weight: torch.Tensor, low: int, high: int, bias: torch.Tensor | None = None) -> int:
    """Bound of every partial sum of `sum(x * w) + bias`, in any order, for `x` between `low` and `high` or 0.

    With P the sum of a row's positive weights and Q that of its negative ones' magnitudes, the positive products add up
    to at most `high * P - low * Q`, the negative ones to `high * Q - low * P`.

    Args:
        weight: integers `[out, ...]`.
        bias: integers `[out]`.
    """
    terms = math.prod(weight.shape[1:])
    single = weight.dtype in _BYTES and terms << 8 <= SINGLE  # sums of magnitudes are exact either way
    values = weight.to(torch.float32 if single else torch.float64)
    dims = tuple(range(1, values.dim()))
    total, size = values.sum(dims).double(), values.abs_().sum(dims).double()
    positive, negative = (size + total) / 2, (size - total) / 2
    down, up = min(low, 0), max(high, 0)
    bound = torch.maximum(up * positive - down * negative, up * negative - down * positive)
    if bias is not None:
        bound = bound + bias.to(torch.float64).abs()
    return int(bound.max()) if bound.numel() else 0


def exact_in_double(bound: int, multiplier: torch.Tensor, shift: torch.Tensor, bits: int) -> bool:
    """Whether `rint(v * 2**-shift)`, `v = x * multiplier` in float64, is right for all integers `abs(x) <= bound`.

    It is if `v` has 53 bits. A 54th bit is lost only by odd `v`, which then moves by 1: that matters only where it
    moves onto a tie, so that `v = 2**(shift - 1) +- 1` modulo `2**shift`; for one odd multiplier at most two `x` below
    the modulus are such, and they are computed.

    Args:
        bits: bits of the result's format; what lies beyond saturates either way.
    """
    top = bound * largest(multiplier)
    if top < DOUBLE:
        return True
    if top >= 2 * DOUBLE or multiplier.numel() != 1 or shift.numel() != 1:
        return False
    factor, places = int(multiplier), int(shift)
    if factor % 2 == 0 or places <= 52 - bits:
        return True
    modulus = 1 << places
    if modulus <= 2 * bound:
        return False
    inverse = pow(factor, -1, modulus)
    for step in (1, -1):
        residue = ((modulus >> 1) + step) * inverse % modulus
        if any(abs(x) <= bound and abs(x * factor) >= DOUBLE for x in (residue, residue - modulus)):
            return False
    return True

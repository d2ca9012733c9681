"""The whole integer arithmetic of one step, as one word.

    int32:wrap/fixed_point:24:half_even

reads: accumulate in 32 bits, wrap on overflow, rescale by a 24-bit multiplier and a shift, round half to even. The
result then saturates to its format. Integer graphs carry this word with every operator, so that an artefact says by
itself how it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from qgraph.errors import UserError, did_you_mean
from qgraph.numerics.formats import QType
from qgraph.numerics.requantize import Rule, parse_rule
from qgraph.numerics.rounding import Overflow


@dataclass(frozen=True)
class Arithmetic:
    """How one operator accumulates and rescales.

    Args:
        accumulator: format of the sum of products.
        overflow: what happens to a sum outside it.
        rule: how the sum is rescaled to the result.

    Raises:
        UserError: the accumulator is unsigned, or too wide for its product with a multiplier to fit a 64-bit register.
    """

    accumulator: QType
    overflow: Overflow
    rule: Rule

    def __post_init__(self) -> None:
        if not self.accumulator.signed:
            raise UserError(f"an accumulator is signed, not {self.accumulator}")
        widest = self.rule.accumulator_bits
        if self.accumulator.bits > widest:
            raise UserError(
                f"an accumulator of {self.accumulator.bits} bits cannot be rescaled by {self.rule}",
                why="their product may not fit a 64-bit register",
                fix=f"use at most {widest} bits, or fewer bits for the multiplier",
            )

    def accumulate(self, sums: torch.Tensor) -> torch.Tensor:
        """Exact int64 `sums` (any shape) as the accumulator holds them."""
        return self.overflow.apply(sums, self.accumulator)

    def __str__(self) -> str:
        return f"int{self.accumulator.bits}:{self.overflow}/{self.rule}"


@lru_cache(maxsize=256)
def parse_arithmetic(text: str) -> Arithmetic:
    """The arithmetic that prints as `text`.

    Raises:
        UserError: the text names none.
    """
    accumulator, slash, rule = text.partition("/")
    bits, colon, overflow = accumulator.partition(":")
    modes = {str(mode): mode for mode in Overflow}
    if not slash or not colon or not bits.startswith("int") or not _is_number(bits[3:]):
        raise UserError(
            f"{text!r} is not an arithmetic",
            fix="write it like int32:wrap/fixed_point:24:half_even",
        )
    if overflow not in modes:
        raise UserError(f"unknown overflow {overflow!r} in {text!r}", fix=did_you_mean(overflow, modes))
    return Arithmetic(QType(int(bits[3:])), modes[overflow], parse_rule(rule))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()

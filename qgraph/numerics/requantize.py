"""From an accumulator to the codes of the next format: the step where devices differ.

A `RequantizeRule` names the arithmetic; `encode` turns real multipliers into what the device stores, `apply`
computes with it. The rule is part of the integer graph, so that an artefact says by itself how it rounds.

    float            round(float32(acc) * m)                              m in float32
    fixed_point      round(acc * M / 2**s)                                one rounding
    fixed_point_two  round2(round1(acc * M / 2**min(s, 31)) / 2**max(s - 31, 0))    two roundings (gemmlowp)
    power_of_two     round(acc * M / 2**s)                                M or 2**s is 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TypeAlias

import torch

from qgraph.errors import QuantizationError, UserError, did_you_mean
from qgraph.numerics.aten import ATEN_RULES
from qgraph.numerics.engine_softmax import ENGINE_SOFTMAXES, EngineSoftmax
from qgraph.numerics.engine_sums import ENGINE_SUMS, EngineSum
from qgraph.numerics.engines import ENGINE_RULES, EngineRule
from qgraph.numerics.factor import Factor
from qgraph.numerics.rounding import Rounding, round_float, rounding_shift_right

LARGEST_SHIFT = 62
_HIGH_BITS = 31
_REGISTER_BITS = 63  # besides the sign


class ScaleForm(str, Enum):
    """How a device stores the real factor between two scales."""

    FLOAT = "float"
    FIXED_POINT = "fixed_point"
    FIXED_POINT_TWO = "fixed_point_two"
    POWER_OF_TWO = "power_of_two"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class RequantizeRule:
    """The arithmetic of one rescaling step.

    Args:
        form: how the factor is stored.
        rounding: rounding of the only step, or of the last of two.
        bits: bits of a fixed-point multiplier M; 31 for the other forms, which do not name it.
        first_rounding: rounding of the first of two steps; only for `fixed_point_two`.
    """

    form: ScaleForm
    rounding: Rounding
    bits: int = 31
    first_rounding: Rounding | None = None

    def __post_init__(self) -> None:
        if (self.first_rounding is None) == (self.form is ScaleForm.FIXED_POINT_TWO):
            raise UserError(f"{self.form} {'needs' if self.first_rounding is None else 'has no'} first_rounding")
        if not 2 <= self.bits <= 31:
            raise UserError(f"a multiplier of {self.bits} bits is not supported", fix="use 2 to 31 bits")
        if self.form is not ScaleForm.FIXED_POINT and self.bits != _HIGH_BITS:
            raise UserError(f"{self.form} has no multiplier of {self.bits} bits", fix="leave bits at 31")

    @property
    def accumulator_bits(self) -> int:
        """Bits of the widest accumulator whose product with a multiplier fits a 64-bit register."""
        return 64 if self.form is ScaleForm.FLOAT else _REGISTER_BITS - self.bits

    @property
    def largest(self) -> float:
        """The largest factor the device can store."""
        if self.form is ScaleForm.POWER_OF_TWO:
            return float(1 << self.bits)
        if self.form is ScaleForm.FLOAT:
            return float(1 << self.bits) * (1 - torch.finfo(torch.float32).eps)
        return float((1 << self.bits) - 1)

    def encode(self, factor: torch.Tensor) -> Factor:
        """What the device stores for the real `factor` (float64, any shape, finite).

        Raises:
            QuantizationError: a factor is not finite, or too large for the form.
        """
        factor = factor.to(torch.float64)
        if not bool(torch.isfinite(factor).all()):
            raise QuantizationError("a rescaling factor is not finite")
        if self.form is ScaleForm.FLOAT:
            if bool((factor.abs() >= float(1 << self.bits)).any()):
                raise _too_large(self.bits)
            return Factor(factor.to(torch.float32), None)
        if self.form is ScaleForm.POWER_OF_TWO:
            return _encode_power_of_two(factor)
        return encode_fixed_point(factor, self.bits)

    def encode_sum(self, factors: torch.Tensor) -> Factor:
        """What the device stores for the real factors of one sum (float64, `[terms, ...]`): one shift for all terms.

        Raises:
            QuantizationError: as for `encode`.
            UserError: the form defines no sum.
        """
        if self.form is ScaleForm.FIXED_POINT_TWO:
            raise _no_sum()
        if self.form is not ScaleForm.FIXED_POINT:
            encoded = self.encode(factors)  # refuses what the form cannot hold
            if self.form is ScaleForm.FLOAT:
                return encoded
        return encode_common_shift(factors, self.bits)

    def apply(
        self, accumulator: torch.Tensor, factor: Factor, zero: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rescaled accumulator at a zero point, unsaturated.

        Args:
            accumulator: int64, any shape, such that its product with the multiplier has at most 63 bits.
            factor: as encoded by this rule, broadcastable to the accumulator.
            zero: zero point of the result, added after rounding.
            bias: float32, in steps of the accumulator; for the float form only.

        Returns:
            int64 tensor of the accumulator's shape.
        """
        if self.form is ScaleForm.FLOAT:
            held = accumulator.to(torch.float32)
            held = held if bias is None else held + bias
            return _rounded(held * factor.multiplier, self.rounding) + zero
        if bias is not None:
            raise UserError(f"{self} adds no float bias", fix="give the bias in steps of the accumulator, int32")
        shift = factor.shifts()
        if self.first_rounding is None:
            return rounding_shift_right(accumulator * factor.multiplier, shift, self.rounding) + zero
        # gemmlowp multiplies the accumulator up where s < 31, to divide by 2**31 always: the same number.
        first = shift.clamp(max=_HIGH_BITS)
        high = rounding_shift_right(accumulator * factor.multiplier, first, self.first_rounding)
        return rounding_shift_right(high, (shift - _HIGH_BITS).clamp(min=0), self.rounding) + zero

    def apply_sum(
        self,
        terms: Sequence[torch.Tensor],
        multipliers: Sequence[torch.Tensor],
        shift: torch.Tensor | None,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A sum of rescaled terms, rounded once, unsaturated.

        Args:
            terms: int64, broadcastable to each other, such that the sum of their products has at most 63 bits.
            multipliers: one per term, as `encode_common_shift` makes them (float32 for the float form).
            shift: int64, the common shift; None for the float form.
            offset: int64 at the scale of the shifted sum (float32 for the float form).

        Returns:
            int64 tensor of the broadcast shape. The float form rounds each product and each partial sum to float32, in
            the order given.

        Raises:
            UserError: the form defines no sum.
        """
        if self.form is ScaleForm.FIXED_POINT_TWO:
            raise _no_sum()
        wide = torch.float32 if self.form is ScaleForm.FLOAT else torch.int64
        total = terms[0].to(wide) * multipliers[0]
        for term, multiplier in zip(terms[1:], multipliers[1:], strict=True):
            total = total + term.to(wide) * multiplier
        if offset is not None:
            total = total + offset
        if shift is None:
            return _rounded(total, self.rounding)
        return rounding_shift_right(total, shift, self.rounding)

    def __str__(self) -> str:
        """One word, readable by `parse_rule`, such as `fixed_point:24:half_even`."""
        if self.form in (ScaleForm.FLOAT, ScaleForm.POWER_OF_TWO):
            return f"{self.form}:{self.rounding}"
        first = "" if self.first_rounding is None else f"{self.first_rounding}:"
        return f"{self.form}:{self.bits}:{first}{self.rounding}"


Rule: TypeAlias = RequantizeRule | EngineRule | EngineSum | EngineSoftmax


@lru_cache(maxsize=256)
def parse_rule(text: str) -> Rule:
    """The rule that prints as `text`: a general form with its fields, or the word of an engine.

    Raises:
        UserError: the text names no rule.
    """
    engines: dict[str, Rule] = {**ENGINE_RULES, **ATEN_RULES, **ENGINE_SUMS, **ENGINE_SOFTMAXES}
    if text in engines:
        return engines[text]
    form_name, *rest = text.split(":")
    forms = {str(form): form for form in ScaleForm}
    if form_name not in forms:
        known = [*forms, *engines]
        raise UserError(f"unknown scale form {form_name!r} in {text!r}", fix=did_you_mean(form_name, known))
    form = forms[form_name]
    wanted = {ScaleForm.FIXED_POINT: 2, ScaleForm.FIXED_POINT_TWO: 3}.get(form, 1)
    if len(rest) != wanted:
        raise UserError(f"{text!r} should have {wanted} fields after {form_name!r}")
    bits = 31
    if wanted > 1:
        if not (rest[0].isascii() and rest[0].isdigit()):
            raise UserError(f"{rest[0]!r} in {text!r} is not a number of bits")
        bits = int(rest[0])
    modes = [_parse_rounding(name, text) for name in rest[1 if wanted > 1 else 0 :]]
    return RequantizeRule(form, modes[-1], bits, modes[0] if wanted == 3 else None)


def encode_fixed_point(factor: torch.Tensor, bits: int) -> Factor:
    """`factor` as `M / 2**s` with `2**(bits-1) <= |M| < 2**bits` where the shift allows it.

    Factors below `2**(bits - 63)` keep fewer bits, down to M = 0, because shifts stop at 62.

    Args:
        factor: float64, any shape, finite; M has its sign.
        bits: bits of `|M|`.

    Raises:
        QuantizationError: a factor is `2**bits` or more, or rounds to it.
    """
    mantissa, exponent = torch.frexp(factor)
    shift = (bits - exponent.to(torch.int64)).clamp(max=LARGEST_SHIFT)
    rounded = torch.round(torch.ldexp(factor, shift.to(torch.float64)))
    # A mantissa that rounds up to 2**bits is half of it with one shift less.
    full = rounded.abs() >= float(1 << bits)
    shift = torch.where(full, shift - 1, shift)
    multiplier = torch.where(full, rounded / 2, rounded).to(torch.int64)
    shift = torch.where(mantissa == 0, torch.zeros_like(shift), shift)
    _refuse_left_shift(shift, bits)
    return Factor(multiplier, shift)


def encode_common_shift(factors: torch.Tensor, bits: int) -> Factor:
    """Factors of the terms of one sum, stored with one shift so that the sum is rounded once.

    Args:
        factors: float64, `[terms, ...]`, finite, any sign.
        bits: bits of the largest `|M|`.

    Returns:
        Multipliers of `factors`' shape and shifts of shape `[...]`: the largest shift at which every `|M|` of
        the sum fits `bits` bits (62 at the most, 0 where all factors are zero).

    Raises:
        QuantizationError: a factor is not finite, or `2**bits` or more.
    """
    if not bool(torch.isfinite(factors).all()):
        raise QuantizationError("a rescaling factor is not finite")
    shift = encode_fixed_point(factors.abs().amax(dim=0), bits).shifts()
    multiplier = torch.round(torch.ldexp(factors, shift.to(torch.float64))).to(torch.int64)
    return Factor(multiplier, shift)


def _encode_power_of_two(factor: torch.Tensor) -> Factor:
    positive = torch.where(factor == 0, torch.ones_like(factor), factor.abs())
    exponent = torch.round(torch.log2(positive)).to(torch.int64)
    if not torch.equal(torch.ldexp(torch.ones_like(factor), exponent.to(torch.float64)), factor):
        raise QuantizationError(
            "a rescaling factor is not a power of two",
            why=f"factors: {factor.flatten()[:8].tolist()}",
            fix="calibrate with power-of-two scales for this target",
        )
    if bool((exponent.abs() > _HIGH_BITS).any()):
        raise QuantizationError("a power-of-two rescaling factor is beyond 2**31 or 2**-31")
    return Factor(torch.ones_like(exponent) << exponent.clamp(min=0), (-exponent).clamp(min=0))


def _refuse_left_shift(shift: torch.Tensor, bits: int) -> None:
    if bool((shift < 0).any()):
        raise _too_large(bits)


def _no_sum() -> UserError:
    return UserError("two-step fixed-point rescaling defines no sum of terms", fix="give sums another word")


def _too_large(bits: int) -> QuantizationError:
    return QuantizationError(
        f"a rescaling factor is 2**{bits} or more",
        why="the scale of the result is far smaller than the scale of what it is computed from",
        fix="look at the calibrated ranges around this op",
    )


def _rounded(values: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Float32 values as int64; beyond what int64 holds they stay outside every format."""
    largest = float(1 << LARGEST_SHIFT)
    return round_float(values.clamp(-largest, largest), rounding).to(torch.int64)


def _parse_rounding(name: str, text: str) -> Rounding:
    modes = {str(mode): mode for mode in Rounding}
    if name not in modes:
        raise UserError(f"unknown rounding {name!r} in {text!r}", fix=did_you_mean(name, modes))
    return modes[name]

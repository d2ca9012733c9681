"""Softmax as existing engines compute it on codes.

    tflite_softmax      LiteRT SOFTMAX of 8-bit codes; d = x - max(x), everything in gemmlowp's fixed point
        e = exp(srdhm(d << s, M)) in Q0.31, 0 where d < -floor(31 * 2**26 / 2**s)
        t = sum(rdbp(e, 12)), h = leading zeros of t, i = 1 / (1 + ((t << h) - 2**31))
        rdbp(srdhm(i, e), 35 - h) in steps of 1/256
    tflite_softmax16    LiteRT SOFTMAX of 16-bit codes; both functions are interpolated tables
        e = exp table[clamp(g(d) + 32767)], t = sum(e), h = leading zeros of t
        i = inverse table[clamp(((t << (h - 1)) + 2**13 >> 14) - 98304)]
        (e * i + 2**(30 - h)) >> (31 - h) in steps of 1/32768, at most 32767
`M` and `s` encode the scale of `x`; g is the word gemmlowp.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch

from qgraph.errors import QuantizationError
from qgraph.numerics.engines import Gemmlowp, quantize_multiplier, rounding_divide
from qgraph.numerics.factor import Factor
from qgraph.numerics.float_steps import wrap32
from qgraph.numerics.formats import qint16
from qgraph.numerics.gemmlowp import doubling_high_product, exp_of_negative, leading_zeros, one_over_one_plus
from qgraph.numerics.tflite_tables import interpolated, sampled_table

_INTEGER_BITS = 5  # of the exponential's argument
_TOTAL_BITS = 12  # integer bits of the sum of exponentials
_SPAN = 10.0  # the 16-bit exponential's table covers [-10, 0]


class EngineSoftmax(ABC):
    """One engine's softmax.

    Attributes:
        name: the word.
        step: value of one step of the result.
    """

    name: ClassVar[str]
    step: ClassVar[float]
    accumulator_bits: ClassVar[int] = 32

    @abstractmethod
    def encode(self, scale: torch.Tensor) -> Factor:
        """What is stored for the scale (float32, 0-d) of the input.

        Raises:
            QuantizationError: the engine refuses the scale.
        """

    @abstractmethod
    def apply(self, codes: torch.Tensor, factor: Factor) -> torch.Tensor:
        """Softmax over the last dimension of `codes` (int64), in steps of `step`, int64, not saturated."""

    def __str__(self) -> str:
        return self.name


class TfliteSoftmax(EngineSoftmax):
    """LiteRT, 8 bits."""

    name = "tflite_softmax"
    step = 1 / 256

    def encode(self, scale: torch.Tensor) -> Factor:
        real = (scale.double() * 2.0 ** (31 - _INTEGER_BITS)).clamp(max=2.0**31 - 1.0)
        if not bool(real > 1.0):
            raise QuantizationError(
                f"a softmax of values with scale {scale.item():g} is not possible",
                why="its codes stand for less than the engine's fixed point resolves",
                fix="look at the calibrated range of the softmax's input",
            )
        return quantize_multiplier(real)

    def apply(self, codes: torch.Tensor, factor: Factor) -> torch.Tensor:
        left = int(factor.shifts())
        below = codes - codes.amax(-1, keepdim=True)
        near = below >= -math.floor(((1 << _INTEGER_BITS) - 1) * 2.0 ** (31 - _INTEGER_BITS - left))
        lifted = wrap32(torch.where(near, below, 0) << left)
        powers = exp_of_negative(doubling_high_product(lifted, factor.multiplier), _INTEGER_BITS)
        powers = torch.where(near, powers, 0)
        total = rounding_divide(powers, _TOTAL_BITS).sum(-1, keepdim=True)
        zeros = leading_zeros(total)
        inverse = one_over_one_plus(wrap32((total << zeros) - (1 << 31)))
        result = rounding_divide(doubling_high_product(inverse, powers), _TOTAL_BITS - zeros + 23)
        return torch.where(near, result, 0)


class TfliteSoftmax16(EngineSoftmax):
    """LiteRT, 16 bits."""

    name = "tflite_softmax16"
    step = 1 / 32768

    def encode(self, scale: torch.Tensor) -> Factor:
        return quantize_multiplier(scale.double() / (_SPAN / 65535.0))

    def apply(self, codes: torch.Tensor, factor: Factor) -> torch.Tensor:
        below = codes - codes.amax(-1, keepdim=True)
        place = Gemmlowp().apply(below, factor) + qint16.qmax
        powers = interpolated(qint16.saturate(place), _exp_table().to(codes.device))
        total = powers.sum(-1, keepdim=True)
        zeros = leading_zeros(total)
        shifted = ((total << (zeros - 1)) + (1 << 13)) >> 14
        inverse = interpolated(qint16.saturate(shifted - (1 << 15) - (1 << 16)), _inverse_table().to(codes.device))
        right = 31 - zeros
        half = torch.ones_like(right) << (right - 1)
        return ((powers * inverse + half) >> right).clamp(0, qint16.qmax)


@cache
def _exp_table() -> torch.Tensor:
    return _table16(torch.exp, _SPAN / 65535, qint16.qmax)


@cache
def _inverse_table() -> torch.Tensor:
    return _table16(lambda values: 1.0 / (1.0 + values), 1.0 / 65535, qint16.qmin)


def _table16(function: Callable[[torch.Tensor], torch.Tensor], scale: float, zero: int) -> torch.Tensor:
    return sampled_table(function, scale, zero, 2.0 / 65535, 0, torch.float64)


ENGINE_SOFTMAXES: dict[str, EngineSoftmax] = {rule.name: rule for rule in (TfliteSoftmax(), TfliteSoftmax16())}

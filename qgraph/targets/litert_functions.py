"""Nonlinear functions as LiteRT's reference kernels compute them: one result per code.

Kernels either hold tables of 8-bit functions (float32), interpolate tables of 16-bit functions, or compute in fixed
point; all of them depend on one code only, so that each becomes a full table here. float32 functions of the C library
are float64 ones rounded once, which gives the same codes for all functions below.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from qgraph.errors import QuantizationError
from qgraph.numerics import QParams, QType, qint8, qint16, qint32
from qgraph.numerics.engines import Gemmlowp, quantize_multiplier, rounding_divide
from qgraph.numerics.float_steps import round_half_away, wrap32
from qgraph.numerics.gemmlowp import doubling_high_product
from qgraph.numerics.tflite_tables import interpolated, sampled_table

_Function = Callable[[torch.Tensor], torch.Tensor]

_ENTRIES = 1 << 8  # of the kernels' sigmoid table
# Entries that lie one above the rounded value.
_ABOVE = (4, 8, 12, 14, 15, 16, 17, 19, 20, 21, 22, 25, 27, 28, 29, 30, 31, 33, 34, 35, 37, 39, 40, 41, 43, 44, 45, 46)
_ABOVE_LATE = (49, 50, 54, 62, 63, 64, 66, 82, 86, 93, 100, 103, 112, 116, 135, _ENTRIES - 1)
_LARGEST_LEFT_SHIFT = 31  # of a 32-bit number, by one less
_FINE_BITS = 7  # by which HARD_SWISH refines 8-bit codes


# --- tables of 8 bits, interpolated tables of 16 bits ---------------------------------------------------------------


def exp(source: QParams, result: QParams) -> torch.Tensor:
    """EXP."""
    return _tabulated(_rounded_once(torch.exp), source, result)


def log(source: QParams, result: QParams) -> torch.Tensor:
    """LOG of 8 bits: the lowest code where there is no logarithm."""
    log32, lowest = _rounded_once(torch.log), (result.qtype.qmin - result.zero) * result.scale
    return _tabulated(lambda x: torch.where(x > 0, log32(x.clamp(min=1e-45)), lowest), source, result)


def gelu(source: QParams, result: QParams, approximate: str = "none") -> torch.Tensor:
    """GELU of 8 bits."""
    tanh32, erfc32 = _rounded_once(torch.tanh), _rounded_once(torch.special.erfc)
    slope, root = _float32(math.sqrt(2 / math.pi)), _float32(-math.sqrt(0.5))

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + tanh32(slope * (x + _float32(0.044715) * x * x * x)))

    return _tabulated(lambda x: 0.5 * x * erfc32(x * root) if approximate == "none" else smooth(x), source, result)


def sigmoid(source: QParams, result: QParams) -> torch.Tensor:
    """LOGISTIC."""
    if source.qtype == qint16:
        return _sigmoid16(source, result)
    exp32 = _rounded_once(torch.exp)
    return _tabulated(lambda x: 1.0 / (1.0 + exp32(-x)), source, result)


def tanh(source: QParams, result: QParams) -> torch.Tensor:
    """TANH."""
    if source.qtype == qint16:
        return _tanh16(source, result)
    return _tabulated(_rounded_once(torch.tanh), source, result)


def _tabulated(function: _Function, source: QParams, result: QParams) -> torch.Tensor:
    if source.qtype == qint16:
        scales = source.scale.item(), source.zero, result.scale.item(), result.zero
        table = sampled_table(function, *scales, dtype=torch.float32)
        return interpolated(_codes(qint16), table).to(qint16.storage)
    real = source.scale * (_codes(source.qtype) - source.zero).to(torch.float32)
    steps = round_half_away(function(real) * (1.0 / result.scale)) + float(result.zero)
    return result.qtype.saturate(steps).to(result.qtype.storage)


# --- fixed point ----------------------------------------------------------------------------------------------------


def leaky_relu(source: QParams, result: QParams, negative_slope: float = 0.01) -> torch.Tensor:
    """LEAKY_RELU: two factors in float32; a negative slope's sign is applied after rounding."""
    values = _codes(source.qtype) - source.zero
    slope = _float32(negative_slope)
    above = _rescaled(values, source.scale / result.scale)
    below = _rescaled(values, (source.scale * slope / result.scale).abs())
    return _saturated(torch.where(values >= 0, above, below if slope >= 0 else -below), result)


def hardswish(source: QParams, result: QParams) -> torch.Tensor:
    """HARD_SWISH of 8 bits, in 16-bit fixed point."""
    fine = _float32(2.0**-_FINE_BITS) * source.scale
    out_factor, gate_factor = (
        quantize_multiplier((fine / scale).double()) for scale in (result.scale, _float32(3 * 2.0**-15))
    )
    out_shift, gate_shift = int(out_factor.shifts()), int(gate_factor.shifts())
    if out_shift > 0 or gate_shift > _LARGEST_LEFT_SHIFT:
        why = "the engine refuses results so much finer than their operand"
        raise QuantizationError(
            f"a hardswish from scale {source.scale.item():g} to {result.scale.item():g} is not possible",
            why=why if out_shift > 0 else "the engine shifts its operand further than 32 bits allow",
            fix="look at the calibrated ranges around this op",
        )
    values = qint16.wrap((_codes(qint8) - source.zero) << _FINE_BITS)
    out = doubling_high_product(values, _sixteen_bits(out_factor.multiplier), 16)
    gate = _gate(values, _sixteen_bits(gate_factor.multiplier), gate_shift)
    product = torch.div(gate * out, 1 << 15, rounding_mode="trunc")
    return _saturated(_rounding_divide16(product, -out_shift), result)


def _gate(values: torch.Tensor, multiplier: torch.Tensor, shift: int) -> torch.Tensor:
    """`(relu6(x + 3)) / 6` in units of 2**-15."""
    if shift > 0:
        values = qint16.saturate(values << (shift - 1))
    values = doubling_high_product(values, multiplier, 16)
    if shift > 0:
        values = qint16.saturate(values << 1)
    if shift < 0:
        values = _rounding_divide16(values, -shift)
    return (values + (1 << 15)) >> 1


def _rounding_divide16(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """Gemmlowp's RoundingDivideByPOT of int16 values: from `2**16` on its mask is -1, and 0 becomes 1."""
    if exponent < qint16.bits:
        return rounding_divide(values, exponent)
    return torch.where(values >= 0, 1, -1)


def _sixteen_bits(multiplier: torch.Tensor) -> torch.Tensor:
    rounded = (multiplier + (1 << 15)) >> 16
    return torch.where(multiplier >= (1 << 31) - 1 - (1 << 15), qint16.qmax, rounded)


def _sigmoid16(source: QParams, result: QParams) -> torch.Tensor:
    """LOGISTIC of 16 bits: 256 entries of sigmoid(i / 24) in units of 2**-16, interpolated."""
    values = _units(source, (0,))
    index, part = values.abs() >> 9, values.abs() & ((1 << 9) - 1)
    upper = _between(index, part, 9, (1 << 15) - 1 << 10)
    return _saturated(torch.where(values >= 0, upper + (1 << 9), (1 << 25) - upper + (1 << 9) - 1) >> 10, result)


def _tanh16(source: QParams, result: QParams) -> torch.Tensor:
    """TANH of 16 bits, from the same table."""
    values = _units(source, (0, 1))
    index, part = values.abs() >> 8, values.abs() & ((1 << 8) - 1)
    upper = _between(index, part, 8, (1 << 16) - 1 << 8) - (1 << 23)
    return _saturated(torch.where(values >= 0, upper + (1 << 7), -upper + (1 << 7) - 1) >> 8, result)


def _between(index: torch.Tensor, part: torch.Tensor, bits: int, last: int) -> torch.Tensor:
    table = torch.floor(65536 / (1 + torch.exp(-torch.arange(_ENTRIES, dtype=torch.float64) / 24)) + 0.5).to(
        torch.int64
    )
    table[[*_ABOVE, *_ABOVE_LATE]] += 1
    inside = index.clamp(max=_ENTRIES - 2)
    value = (table[inside] << bits) + part * (table[inside + 1] - table[inside])
    return torch.where(index >= _ENTRIES - 1, last, value)


def _units(source: QParams, powers: tuple[int, ...]) -> torch.Tensor:
    """All 16-bit codes in units of 1 / (3 * 4096), as int64; `powers`: shifts for which a power of two is exact."""
    log = torch.log(source.scale) * (1.0 / torch.log(torch.tensor(2.0)))
    whole = round_half_away(log)
    shift = 12 + int(whole)
    if float((log - whole).abs()) < _float32(1e-3) and shift in powers:
        return _codes(qint16) * (3 << shift)
    real, shift = source.scale.item() * 4096.0 * 3.0, 0
    while real <= qint16.qmax / 2.0 and shift <= 30:
        real, shift = real * 2.0, shift + 1
    if real > qint32.qmax:
        raise QuantizationError(
            f"scale {source.scale.item():g} is too large for this function",
            why="the engine's factor for its operand leaves 32 bits",
            fix="look at the calibrated range of the operand",
        )
    if not int(real):  # which the kernels take for a power of two
        return wrap32(_codes(qint16) * (3 << shift))
    return wrap32(_codes(qint16) * int(real) + ((1 << shift) >> 1)) >> shift


# --- helpers --------------------------------------------------------------------------------------------------------


def _codes(qtype: QType) -> torch.Tensor:
    return torch.arange(qtype.qmin, qtype.qmax + 1)


def _saturated(steps: torch.Tensor, result: QParams) -> torch.Tensor:
    return result.qtype.saturate(wrap32(steps + result.zero)).to(result.qtype.storage)


def _rescaled(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return Gemmlowp().apply(values, Gemmlowp().encode(real.double()))


def _float32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _rounded_once(function: _Function) -> _Function:
    """A function of float32 values: evaluated in float64, rounded to float32."""
    return lambda values: function(values.double()).to(torch.float32)


TABLES: dict[str, Callable[..., torch.Tensor]] = {
    function.__name__: function for function in (exp, gelu, hardswish, leaky_relu, log, sigmoid, tanh)
}

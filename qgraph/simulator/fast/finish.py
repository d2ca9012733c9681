"""From exact sums to codes: the end of every fast kernel.

A `Finish` knows the rule, the factors and bounds of its terms, and chooses once how to compute:

    f32   the float rule, as it is defined
    f64   multipliers times `2**-shift` in float64, where products and sums have at most 53 bits; a single product whose
          factors have 24 bits is rounded once by a fused float32 operation instead
    int   64-bit integers
    engine  an engine's own rule, as it is defined, where no general one is the same

Each way exists compiled (numba, arrays of rows) and as torch operators (any shapes and devices).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from qgraph.numerics import (
    Arithmetic,
    AtenCat,
    AtenPool,
    EngineSoftmax,
    EngineSum,
    Factor,
    QType,
    RequantizeRule,
    Rounding,
    Rule,
    ScaleForm,
    parse_arithmetic,
    parse_qtype,
)
from qgraph.numerics.engines import EngineRule
from qgraph.numerics.rounding import round_float
from qgraph.simulator.fast.columns import Loop, bound_loop, rescaling
from qgraph.simulator.fast.exact import DOUBLE, SINGLE, exact_in_double, largest
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.fast.probe import TO_WHOLE, addcmul_fuses
from qgraph.simulator.fast.steps import Rescaling
from qgraph.simulator.fast.term import Term
from qgraph.simulator.kernel import NoFastForm
from qgraph.simulator.trace import KernelTrace

_HIGH_BITS = 31
_INT32 = 1 << 31
_TWO = RequantizeRule(ScaleForm.FIXED_POINT_TWO, Rounding.HALF_AWAY, _HIGH_BITS, Rounding.HALF_UP)
_UP = RequantizeRule(ScaleForm.FIXED_POINT, Rounding.HALF_UP, 16)
_FLOAT = RequantizeRule(ScaleForm.FLOAT, Rounding.HALF_EVEN)
_CHUNK = 1 << 17  # elements of wide temporaries that stay in a core's cache
_COLUMNS = 1024
_NARROW = (torch.int8, torch.uint8, torch.int16)


class Finish:
    """Rescales, rounds, moves to the zero point and bounds the sum of one or two terms, or the product of two.

    Args:
        options: `arithmetic`, `low`, `high`, `format` and `zero` of the operator.
        terms: one or two terms; the second is the residual.
        shift, offset: as the operator stores them.
        factors: for a product, its two operands (their multipliers are not used).
        real_bias: a float32 bias, of engines that have one.
        accumulates: whether the first term passes through the accumulator.

    Raises:
        NoFastForm: a sum may leave the accumulator, or the result is wider than 16 bits.
    """

    def __init__(
        self,
        options: dict[str, Any],
        terms: list[Term],
        shift: torch.Tensor | None,
        offset: torch.Tensor | None = None,
        factors: tuple[Term, Term] | None = None,
        real_bias: torch.Tensor | None = None,
        *,
        accumulates: bool = True,
    ) -> None:
        word: Arithmetic = parse_arithmetic(options["arithmetic"])
        self.qtype: QType = parse_qtype(options["format"])
        self.low, self.high, self.zero = int(options["low"]), int(options["high"]), int(options.get("zero", 0))
        self.storage = self.qtype.storage
        self.terms, self.offset, self.factors, self.real_bias = terms, offset, factors, real_bias
        self.is_sum = len(terms) > 1 or offset is not None
        self.rule, self.shift, self.engine = self._rule(word.rule, shift)
        if self.qtype.storage not in _NARROW:
            raise NoFastForm(f"the result is {self.qtype}")
        if accumulates and terms[0].bound > word.accumulator.qmax:
            raise NoFastForm(f"sums may leave the accumulator of {word.accumulator.bits} bits")
        if self.is_sum and (self.engine is not None or self.rule.form is ScaleForm.FIXED_POINT_TWO):
            raise NoFastForm(f"{word.rule} defines no sums")
        if real_bias is not None and self.engine is None:
            raise NoFastForm(f"{word.rule} adds no float bias")
        self.float_factors: dict[torch.device, list[torch.Tensor]] = {}
        self.way = self._way()
        even = self.rule.rounding is Rounding.HALF_EVEN
        on_cpu = terms[0].multiplier.device.type == "cpu"
        general = self.engine is None and (even or self.rule.form is not ScaleForm.FLOAT)
        self.compiles = on_cpu and general and loops() is not None
        self.loops: dict[tuple[int, bool], Loop] = {}
        constants = (*(value for term in terms for value in (term.multiplier, term.start)), shift, offset)
        self.uniform = all(value is None or value.numel() == 1 for value in constants)
        self.found: dict[int, Rescaling | None] = {}
        # float32 holds every number that arises in a product, which torch's addcmul then rounds once.
        one = self.way == "f64" and even and not self.is_sum and factors is None and terms[0].is_single()
        single = one and largest(terms[0].multiplier) <= SINGLE
        self.fuses = single and on_cpu and not self.compiles and addcmul_fuses()

    def _rule(
        self, rule: Rule, shift: torch.Tensor | None
    ) -> tuple[RequantizeRule, torch.Tensor | None, EngineRule | None]:
        """The rule in a general form, with its shift, or the engine's own, to be applied as it is defined."""
        if isinstance(rule, RequantizeRule):
            return rule, shift, None
        if isinstance(rule, (EngineSum, EngineSoftmax)):
            raise NoFastForm(f"{rule} rescales no single products")
        if isinstance(rule, (AtenCat, AtenPool)):
            raise NoFastForm(f"{rule} rescales channels of images differently")
        same = None
        if not self.is_sum and self.real_bias is None:
            same = general_form(rule, self.terms[0], shift, self.zero)
        return (_FLOAT, shift, rule) if same is None else (*same, None)

    def _way(self) -> str:
        if self.engine is not None:
            return "engine"
        if self.rule.form is ScaleForm.FLOAT:
            return "f32"
        assert self.shift is not None
        if self.rule.form is ScaleForm.FIXED_POINT_TWO:
            return "int"
        if not self.is_sum:
            exact = exact_in_double(self.terms[0].bound, self.terms[0].multiplier, self.shift, self.qtype.bits)
            return "f64" if exact else "int"
        total = largest(self.constant()) + sum(term.bound * largest(term.multiplier) for term in self.terms)
        total += sum(abs(term.zero) * largest(term.multiplier) for term in self.terms)
        return "f64" if total < DOUBLE else "int"

    def constant(self) -> torch.Tensor | None:
        """The offset of a fixed-point sum, with what the zero points of its terms contribute."""
        constant = None if self.offset is None else self.offset.to(torch.int64)
        for term in self.terms:
            for added in (-term.zero if term.zero else None, term.start):
                if added is not None:
                    moved = added * term.multiplier.to(torch.int64)
                    constant = moved if constant is None else constant + moved
        return constant

    # --- rows -------------------------------------------------------------------------------------------------------

    def rows(self, a: torch.Tensor, b: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        """Codes of contiguous `a` `[rows, columns]`; factors lie along the columns; `b` may have one row or column."""
        if not self.compiles:
            return self._bounded(self._rows, a, b, trace)
        out = torch.empty(a.shape, dtype=self.storage)
        self.write(a.numpy(), None if b is None else b.numpy(), out.numpy(), trace)
        return out

    def fill(
        self, a: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor, trace: KernelTrace | None = None
    ) -> None:
        """As `rows`, into `out`; for the parts of a larger result."""
        if self.compiles:
            self.write(a.numpy(), None if b is None else b.numpy(), out.numpy(), trace)
        elif trace is None:
            self._in_blocks(a, b, False, out)
        else:
            out.copy_(self._bounded(self._any, a, b, trace))

    def write(self, a: Any, b: Any, out: Any, trace: KernelTrace | None = None) -> None:
        """As `fill`, numpy arrays; only where it compiles."""
        if trace is None:
            self.loop(a.shape[1], False)(a, b, out)
            return
        fused = None if b is not None else self.fused(a.shape[1])
        if fused is not None:
            trace.saturated += fused.count(a, out)
            return
        wide = np.empty(a.shape, np.int16 if self.qtype.bits <= 8 else np.int32)
        self.loop(a.shape[1], True)(a, b, wide)
        trace.saturated += loops().bound(wide.reshape(-1), self.low, self.high, out.reshape(-1))

    def write_flat(self, a: Any, b: Any, out: Any, trace: KernelTrace | None = None) -> None:
        """As `write` for arrays `[n]` with one factor for all: blocks of columns, and a rest if there must be."""
        size = a.size
        width = _width(size)
        head = size - size % width
        for part, columns in ((slice(0, head), width), (slice(head, size), size - head)):
            if columns:
                shape = (-1, columns)
                self.write(
                    a[part].reshape(shape),
                    None if b is None else b[part].reshape(shape),
                    out[part].reshape(shape),
                    trace,
                )

    def flat(self, a: torch.Tensor, b: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        """Codes of contiguous `a` `[n]` (and `b` `[n]`) with one factor for all."""
        if not self.compiles:
            return self.rows(a.reshape(1, -1), None if b is None else b.reshape(1, -1), trace).reshape(-1)
        out = torch.empty(a.shape, dtype=self.storage)
        self.write_flat(a.numpy(), None if b is None else b.numpy(), out.numpy(), trace)
        return out

    def any(self, a: torch.Tensor, b: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        """Codes of `a` and `b` of any shapes that broadcast with the factors."""
        return self._bounded(self._any, a, b, trace)

    def _bounded(
        self, compute: Any, a: torch.Tensor, b: torch.Tensor | None, trace: KernelTrace | None
    ) -> torch.Tensor:
        if trace is None:
            result: torch.Tensor = compute(a, b, False)
            return result
        wide: torch.Tensor = compute(a, b, True)
        bounded = wide.clamp(self.low, self.high)
        trace.saturated += int(torch.count_nonzero(wide != bounded))
        return bounded.to(self.qtype.storage)

    def limits(self, wide: bool) -> tuple[int, int, torch.dtype]:
        """Bounds of rounded values before the zero point is added, and the dtype that holds them after.

        Args:
            wide: with one code more on the sides that no activation bounds, to see what did not fit.
        """
        low, high = self.low - self.zero, self.high - self.zero
        if not wide:
            return low, high, self.qtype.storage
        below, above = int(self.low == self.qtype.qmin), int(self.high == self.qtype.qmax)
        return low - below, high + above, torch.int16 if self.qtype.bits <= 8 else torch.int32

    def loop(self, columns: int, wide: bool) -> Loop:
        """The compiled loop for so many columns, with its constants."""
        found = self.loops.get((columns, wide))
        if found is None:
            fused = None if wide else self.fused(columns)
            found = bound_loop(self, columns, wide) if fused is None else fused.fill
            self.loops[columns, wide] = found
        return found

    def fused(self, columns: int) -> Rescaling | None:
        """The fused form for so many columns, if there is one."""
        if columns not in self.found:
            if self.uniform and columns != 1:
                one = self.fused(1)
                self.found[columns] = None if one is None else one.spread(columns)
            else:
                self.found[columns] = rescaling(self, columns) if self.compiles else None
        return self.found[columns]

    def _rows(self, a: torch.Tensor, b: torch.Tensor | None, wide: bool) -> torch.Tensor:
        if a.numel() <= _CHUNK // 2 or a.shape[0] == 1:
            return self._any(a, b, wide)
        out = torch.empty(a.shape, dtype=self.limits(wide)[2], device=a.device)
        self._in_blocks(a, b, wide, out)
        return out

    def _in_blocks(self, a: torch.Tensor, b: torch.Tensor | None, wide: bool, out: torch.Tensor) -> None:
        chunk = _CHUNK if self.fuses or self.way == "f32" else _CHUNK // 2
        height = max(chunk // a.shape[1], 1)
        for first in range(0, a.shape[0], height):
            part = slice(first, first + height)
            other = b if b is None or b.shape[0] == 1 else b[part]
            out[part] = self._any(a[part], other, wide)

    # --- torch operators --------------------------------------------------------------------------------------------

    def _any(self, a: torch.Tensor, b: torch.Tensor | None, wide: bool) -> torch.Tensor:
        if self.factors is not None:
            assert b is not None
            return self._finished(self._product(a, b), *self.limits(wide))
        return self._finished([a] if b is None else [a, b], *self.limits(wide))

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        assert self.factors is not None
        x, y = self.factors
        # float64 holds products of 17 bits each; where more is needed the way is `int`.
        wide = torch.float64 if self.way == "f64" else torch.int64
        left = a.to(wide) - x.zero if x.zero else a.to(wide)
        right = b.to(wide) - y.zero if y.zero else b.to(wide)
        return [left * right]

    def _finished(self, values: list[torch.Tensor], low: int, high: int, storage: torch.dtype) -> torch.Tensor:
        if self.way == "int":
            return self._in_integers(values, low, high, storage)
        if self.engine is not None:
            term = self.terms[0]
            started = _started(values[0].to(torch.int64), term)
            scaled = self.engine.apply(started, Factor(term.multiplier, self.shift), self.zero, self.real_bias)
            return _stored(scaled - self.zero, low, high, self.zero, storage)
        factors = self._float_factors(values[0].device)
        if self.fuses:
            total = torch.addcmul(factors[1], _held(values[0], self.terms[0], torch.float32), factors[0])
            total.clamp_(low + TO_WHOLE, high + TO_WHOLE)
            return total.sub_(TO_WHOLE - self.zero).to(storage)
        kind = torch.float32 if self.way == "f32" else torch.float64
        held = [_held(value, term, kind) for value, term in zip(values, self.terms, strict=False)]
        parts = [_times(value, factor) for value, factor in zip(held, factors, strict=False)]
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if self.offset is not None:
            total = total + factors[-1]
        rounded = (
            torch.round_(total) if self.rule.rounding is Rounding.HALF_EVEN else round_float(total, self.rule.rounding)
        )
        return _stored(rounded, low, high, self.zero, storage)

    def _float_factors(self, device: torch.device) -> list[torch.Tensor]:
        """Multipliers and offset as floats; exact, because the shift only moves the exponent."""
        found = self.float_factors.get(device)
        if found is None:
            found = self.float_factors[device] = self._as_floats(device)
        return found

    def _as_floats(self, device: torch.device) -> list[torch.Tensor]:
        if self.rule.form is ScaleForm.FLOAT:
            factors = [term.multiplier.to(torch.float32) for term in self.terms]
            return factors if self.offset is None else [*factors, self.offset.to(torch.float32)]
        assert self.shift is not None
        power = torch.ldexp(torch.ones((), dtype=torch.float64, device=device), -self.shift.to(torch.float64))
        factors = [term.multiplier.to(torch.float64) * power for term in self.terms]
        if self.fuses:
            return [factors[0].to(torch.float32), torch.tensor(TO_WHOLE)]
        return factors if self.offset is None else [*factors, self.offset.to(torch.float64) * power]

    def _in_integers(self, values: list[torch.Tensor], low: int, high: int, storage: torch.dtype) -> torch.Tensor:
        wide = [_started(v.to(torch.int64), term) for v, term in zip(values, self.terms, strict=False)]
        if self.is_sum:
            scaled = self.rule.apply_sum(wide, [term.multiplier for term in self.terms], self.shift, self.offset)
        else:
            scaled = self.rule.apply(wide[0], Factor(self.terms[0].multiplier, self.shift))
        return _stored(scaled, low, high, self.zero, storage)


@lru_cache(maxsize=256)
def _width(size: int) -> int:
    """Columns into which a flat array is cut: a divisor, so that there is no rest, or `_COLUMNS` where none is good."""
    if size <= 2 * _COLUMNS:
        return max(size, 1)
    return next((width for width in range(2 * _COLUMNS, _COLUMNS // 8, -1) if size % width == 0), _COLUMNS)


def general_form(
    rule: EngineRule, term: Term, shift: torch.Tensor | None, zero: int
) -> tuple[RequantizeRule, torch.Tensor | None] | None:
    """A general rule and its shift that compute what an engine's word does for every sum within the bound."""
    if shift is None:
        plain = rule.name == "fbgemm" or (rule.name == "mlas_mul" and zero == 0)
        # Within 32 bits their conversion to integers is exact.
        small = plain and term.bound * float(term.multiplier.abs().max()) < _INT32
        return (_FLOAT, None) if small else None
    if rule.name in ("gemmlowp", "tflite_mean") and bool((shift <= 0).all()):
        # 2**31 is divided out with ties upwards, 2**-shift with ties away from zero.
        return _TWO, _HIGH_BITS - shift
    if rule.name == "tflite_int64" and bool((shift <= 15).all()) and bool((shift >= -47).all()):
        reach = term.bound * term.multiplier.abs().double() * torch.ldexp(torch.ones(()).double(), shift - 15.0)
        if float(reach.max()) < _INT32 - 1:  # and so nothing wraps
            return _UP, 15 - shift
    return None


def _held(values: torch.Tensor, term: Term, kind: torch.dtype) -> torch.Tensor:
    """`values - zero + start` in a float dtype: by way of float64, unless float32 holds it all."""
    if not term.zero and term.start is None:
        return values.to(kind)
    if kind is torch.float64 or not term.is_single():
        return _started(values.to(torch.float64), term).to(kind)
    held = values.to(kind) if term.start is None else values.to(kind) + term.start.to(kind)
    return held - term.zero if term.zero else held


def _times(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Their product, in the memory of `values`, which are copies or sums of our own, where it has their shape."""
    fits = factor.dim() == 0 or (factor.dim() == 1 and values.shape[-1:] == factor.shape)
    return values.mul_(factor) if fits else values * factor


def _started(values: torch.Tensor, term: Term) -> torch.Tensor:
    values = values - term.zero if term.zero else values
    return values if term.start is None else values + term.start


def _stored(values: torch.Tensor, low: int, high: int, zero: int, storage: torch.dtype) -> torch.Tensor:
    bounded = values.clamp_(low, high)
    return (bounded.add_(zero) if zero else bounded).to(storage)

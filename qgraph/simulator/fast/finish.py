"""From exact sums to codes: the end of every fast kernel.

A `Finish` knows the rule, the factors and bounds of its terms, and chooses once how to compute:

    f32   the float rule, as it is defined
    f64   multipliers times `2**-shift` in float64, where products and sums have at most 53 bits
    int   64-bit integers, for all the rest

Each way exists compiled (numba, arrays of rows) and as torch operators (any shapes and devices).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qgraph.numerics import (
    Arithmetic,
    Factor,
    QType,
    RequantizeRule,
    Rounding,
    ScaleForm,
    parse_arithmetic,
    parse_qtype,
)
from qgraph.numerics.rounding import round_float
from qgraph.simulator.fast.exact import DOUBLE, SINGLE, exact_in_double, largest
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.kernel import NoFastForm
from qgraph.simulator.trace import KernelTrace

_HIGH_BITS = 31
_CHUNK = 1 << 17  # elements of wide temporaries that stay in a core's cache
_COLUMNS = 1024
_NARROW = (torch.int8, torch.uint8, torch.int16)


@dataclass(frozen=True)
class Term:
    """One term of a sum.

    Args:
        multiplier: its factor, broadcastable to the result.
        bound: bound of the magnitude of `value - zero + start`.
        zero: zero point of its codes.
        start: int32, what is added to its values before all else, as a bias; `[]` or broadcastable.
    """

    multiplier: torch.Tensor
    bound: int
    zero: int = 0
    start: torch.Tensor | None = None


class Finish:
    """Rescales, rounds, moves to the zero point and bounds the sum of one or two terms, or the product of two.

    Args:
        options: `arithmetic`, `low`, `high`, `format` and `zero` of the operator.
        terms: one or two terms; the second is the residual.
        shift, offset: as the operator stores them.
        factors: for a product, its two operands (their multipliers are not used).
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
        *,
        accumulates: bool = True,
    ) -> None:
        word: Arithmetic = parse_arithmetic(options["arithmetic"])
        self.rule: RequantizeRule = word.rule
        self.qtype: QType = parse_qtype(options["format"])
        self.low, self.high, self.zero = int(options["low"]), int(options["high"]), int(options.get("zero", 0))
        self.terms, self.shift, self.offset, self.factors = terms, shift, offset, factors
        self.is_sum = len(terms) > 1 or offset is not None
        if self.qtype.storage not in _NARROW:
            raise NoFastForm(f"the result is {self.qtype}")
        if accumulates and terms[0].bound > word.accumulator.qmax:
            raise NoFastForm(f"sums may leave the accumulator of {word.accumulator.bits} bits")
        if self.is_sum and self.rule.form is ScaleForm.FIXED_POINT_TWO:
            raise NoFastForm("two-step rescaling defines no sums")
        self.way = self._way()
        self.columns: dict[int, _Columns] = {}
        self.float_factors: dict[torch.device, list[torch.Tensor]] = {}

    def _way(self) -> str:
        if self.rule.form is ScaleForm.FLOAT:
            return "f32"
        assert self.shift is not None
        if self.rule.form is ScaleForm.FIXED_POINT_TWO:
            return "int"
        if not self.is_sum:
            exact = exact_in_double(self.terms[0].bound, self.terms[0].multiplier, self.shift, self.qtype.bits)
            return "f64" if exact else "int"
        total = largest(self._constant()) + sum(term.bound * largest(term.multiplier) for term in self.terms)
        total += sum(abs(term.zero) * largest(term.multiplier) for term in self.terms)
        return "f64" if total < DOUBLE else "int"

    def _constant(self) -> torch.Tensor | None:
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
        return self._bounded(self._rows, a, b, trace)

    def fill(self, a: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor) -> None:
        """As `rows`, into `out`; for the parts of a larger result."""
        low, high = self.low - self.zero, self.high - self.zero
        if self._compiles(a):
            other = None if b is None else b.numpy()
            self._columns(a.shape[1]).run(self, a.numpy(), other, low, high, out.numpy())
        else:
            out.copy_(self._any(a, b, low, high, self.qtype.storage))

    def flat(self, a: torch.Tensor, b: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        """Codes of contiguous `a` `[n]` (and `b` `[n]`) with one factor for all."""
        size = a.numel()
        if not self._compiles(a) or size <= _COLUMNS:
            return self.rows(a.reshape(1, -1), None if b is None else b.reshape(1, -1), trace).reshape(-1)
        return self._bounded(self._flat, a, b, trace)

    def any(self, a: torch.Tensor, b: torch.Tensor | None = None, trace: KernelTrace | None = None) -> torch.Tensor:
        """Codes of `a` and `b` of any shapes that broadcast with the factors."""
        return self._bounded(self._any, a, b, trace)

    def _bounded(
        self, compute: Any, a: torch.Tensor, b: torch.Tensor | None, trace: KernelTrace | None
    ) -> torch.Tensor:
        low, high = self.low - self.zero, self.high - self.zero
        if trace is None:
            result: torch.Tensor = compute(a, b, low, high, self.qtype.storage)
            return result
        # One code more on the sides that no activation bounds tells what did not fit.
        below, above = int(self.low == self.qtype.qmin), int(self.high == self.qtype.qmax)
        wide: torch.Tensor = compute(
            a, b, low - below, high + above, torch.int16 if self.qtype.bits <= 8 else torch.int32
        )
        bounded = wide.clamp(self.low, self.high)
        trace.saturated += int(torch.count_nonzero(wide != bounded))
        return bounded.to(self.qtype.storage)

    def _compiles(self, a: torch.Tensor) -> bool:
        rounds_even = self.rule.rounding is Rounding.HALF_EVEN
        return loops() is not None and a.device.type == "cpu" and (rounds_even or self.rule.form is not ScaleForm.FLOAT)

    def _rows(self, a: torch.Tensor, b: torch.Tensor | None, low: int, high: int, storage: torch.dtype) -> torch.Tensor:
        if self._compiles(a):
            out = torch.empty(a.shape, dtype=storage)
            self._columns(a.shape[1]).run(self, a.numpy(), None if b is None else b.numpy(), low, high, out.numpy())
            return out
        if a.numel() <= _CHUNK or a.shape[0] == 1:
            return self._any(a, b, low, high, storage)
        out, height = torch.empty(a.shape, dtype=storage, device=a.device), max(_CHUNK // a.shape[1], 1)
        for first in range(0, a.shape[0], height):
            part = slice(first, first + height)
            other = b if b is None or b.shape[0] == 1 else b[part]
            out[part] = self._any(a[part], other, low, high, storage)
        return out

    def _flat(self, a: torch.Tensor, b: torch.Tensor | None, low: int, high: int, storage: torch.dtype) -> torch.Tensor:
        """Blocks of columns, and a rest."""
        size, out = a.numel(), torch.empty(a.shape, dtype=storage)
        head = size - size % _COLUMNS
        for part, width in ((slice(0, head), _COLUMNS), (slice(head, size), size - head)):
            if width:
                first, second = (None if t is None else t[part].view(-1, width).numpy() for t in (a, b))
                self._columns(width).run(self, first, second, low, high, out[part].view(-1, width).numpy())
        return out

    def _columns(self, count: int) -> _Columns:
        found = self.columns.get(count)
        if found is None:
            found = self.columns[count] = _Columns(self, count)
        return found

    # --- torch operators --------------------------------------------------------------------------------------------

    def _any(self, a: torch.Tensor, b: torch.Tensor | None, low: int, high: int, storage: torch.dtype) -> torch.Tensor:
        if self.factors is not None:
            assert b is not None
            return self._finished(self._product(a, b), low, high, storage)
        values = [a] if b is None else [a, b]
        return self._finished(values, low, high, storage)

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
        kind = torch.float32 if self.way == "f32" else torch.float64
        factors = self._float_factors(values[0].device)
        total: torch.Tensor | None = None
        for value, term, factor in zip(values, self.terms, factors, strict=False):
            if term.zero or term.start is not None:
                # Exact in float64: codes and sums have 32 bits at most.
                value = _started(value.to(torch.float64), term).to(kind)
            # Float values are sums of our own and may be overwritten.
            scaled = value.mul_(factor) if value.dtype is kind else value.to(kind) * factor
            total = scaled if total is None else total + scaled
        assert total is not None
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
        return factors if self.offset is None else [*factors, self.offset.to(torch.float64) * power]

    def _in_integers(self, values: list[torch.Tensor], low: int, high: int, storage: torch.dtype) -> torch.Tensor:
        wide = [_started(v.to(torch.int64), term) for v, term in zip(values, self.terms, strict=False)]
        if self.is_sum:
            scaled = self.rule.apply_sum(wide, [term.multiplier for term in self.terms], self.shift, self.offset)
        else:
            scaled = self.rule.apply(wide[0], Factor(self.terms[0].multiplier, self.shift))
        return _stored(scaled, low, high, self.zero, storage)


def _started(values: torch.Tensor, term: Term) -> torch.Tensor:
    values = values - term.zero if term.zero else values
    return values if term.start is None else values + term.start


def _stored(values: torch.Tensor, low: int, high: int, zero: int, storage: torch.dtype) -> torch.Tensor:
    bounded = values.clamp_(low, high)
    return (bounded.add_(zero) if zero else bounded).to(storage)


class _Columns:
    """A `Finish`'s constants as arrays with one entry per column."""

    def __init__(self, finish: Finish, count: int) -> None:
        rule, terms = finish.rule, finish.terms

        def spread(values: torch.Tensor | None) -> Any:
            if values is None:
                return np.zeros(count, np.int64)
            return np.ascontiguousarray(values.reshape(-1).expand(count).numpy())

        self.multipliers = [spread(term.multiplier) for term in terms]
        self.zeros = [term.zero for term in (finish.factors or terms)] + [0]
        whole = spread(terms[0].start).astype(np.int64) - (0 if finish.factors else terms[0].zero)
        self.starts = {kind: whole.astype(kind) for kind in (np.int32, np.float32, np.float64)} | {np.int64: whole}
        if finish.way == "f32":
            self.offset = spread(finish.offset if finish.offset is not None else torch.tensor(0.0)).astype(np.float32)
            return
        self.first, self.second = self._roundings(rule, spread(finish.shift).astype(np.int64))
        constant = finish._constant() if finish.is_sum else None
        self.offset = spread(constant)
        self.single = None
        if self._fits_single(finish):
            self.single = spread(terms[0].multiplier).astype(np.float32) * np.ldexp(1.0, -self.first[0]).astype(
                np.float32
            )
        if finish.way == "f64":
            power = np.ldexp(1.0, -self.first[0])
            self.multipliers = [m.astype(np.float64) * power for m in self.multipliers]
            self.offset = self.offset.astype(np.float64) * power
        else:
            self.multipliers = [m.astype(np.int64) for m in self.multipliers]

    @staticmethod
    def _fits_single(finish: Finish) -> bool:
        """Whether sums and multipliers are float32 numbers and the codes far below 2**22, as `scale_fused` wants."""
        term, even = finish.terms[0], finish.rule.rounding is Rounding.HALF_EVEN
        return (
            finish.way == "f64"
            and even
            and finish.factors is None
            and not finish.is_sum
            and finish.qtype.bits <= 16
            and term.bound + largest(term.start) <= SINGLE  # the sum without what is added to it, too
            and largest(term.multiplier) <= SINGLE
        )

    def _roundings(self, rule: RequantizeRule, shift: Any) -> tuple[Any, Any]:
        if rule.first_rounding is None:
            return _rounding(shift, rule.rounding), _rounding(shift * 0, rule.rounding)
        first = np.minimum(shift, _HIGH_BITS)
        return _rounding(first, rule.first_rounding), _rounding(shift - first, rule.rounding)

    def run(self, finish: Finish, a: Any, b: Any, low: int, high: int, out: Any) -> None:
        """Fills `out`."""
        if finish.factors is not None:
            self._product(finish, a, b, low, high, out)
        elif b is not None or finish.is_sum:
            self._sum(finish, a, b, low, high, out)
        else:
            self._scale(finish, a, low, high, out)

    def _scale(self, finish: Finish, a: Any, low: int, high: int, out: Any) -> None:
        (m,), zero = self.multipliers, np.int32(finish.zero)
        f32 = np.float32
        if finish.way == "f32":
            loops().scale_f32(a, self._start(a), m, f32(low), f32(high), zero, out)
        elif self.single is not None:
            loops().scale_fused(a, self.starts[np.float32], self.single, f32(low), f32(high), zero, out)
        elif finish.way == "f64" and finish.rule.rounding is Rounding.HALF_EVEN:
            loops().scale_f64(a, self.starts[np.float64], m, float(low), float(high), zero, out)
        elif finish.rule.first_rounding is None:
            loops().scale_int(a, self.starts[np.int64], self._whole(finish, 0), self.first, low, high, finish.zero, out)
        else:
            loops().scale_two(a, self.starts[np.int64], m, self.first, self.second, low, high, finish.zero, out)

    def _sum(self, finish: Finish, a: Any, b: Any, low: int, high: int, out: Any) -> None:
        zero, f32 = np.int32(finish.zero), np.float32
        if b is None:  # one term and an offset: a second term of zeros
            b, mb, zb = np.zeros((1, 1), np.int8), self.multipliers[0] * 0, 0
        else:
            mb, zb = self.multipliers[1], self.zeros[1]
        if finish.way == "f32":
            ma = self.multipliers[0]
            loops().sum_f32(a, self._start(a), ma, b, f32(zb), mb, self.offset, f32(low), f32(high), zero, out)
        elif finish.way == "f64" and finish.rule.rounding is Rounding.HALF_EVEN:
            loops().sum_f64(a, self.multipliers[0], b, mb, self.offset, float(low), float(high), zero, out)
        else:
            whole = [self._whole(finish, i) for i in range(len(self.multipliers))] + [np.zeros(len(mb), np.int64)]
            offset = self._whole_offset(finish)
            loops().sum_int(a, whole[0], b, whole[1], offset, self.first, low, high, finish.zero, out)

    def _product(self, finish: Finish, a: Any, b: Any, low: int, high: int, out: Any) -> None:
        (m,), (za, zb, *_), zero = self.multipliers, self.zeros, np.int32(finish.zero)
        f32 = np.float32
        if finish.way == "f32":
            loops().mul_f32(a, float(za), b, float(zb), m, f32(low), f32(high), zero, out)
        elif finish.way == "f64" and finish.rule.rounding is Rounding.HALF_EVEN:
            loops().mul_f64(a, float(za), b, float(zb), m, float(low), float(high), zero, out)
        else:
            loops().mul_int(a, za, b, zb, self._whole(finish, 0), self.first, self.second, low, high, finish.zero, out)

    def _start(self, a: Any) -> Any:
        """What is added to `a` before it is rounded to float32; nothing where `a` is float32 already."""
        return self.starts[np.float32] if a.dtype == np.float32 else self.starts[np.int32]

    def _whole(self, finish: Finish, term: int) -> Any:
        """Integer multipliers, also where the way is f64 but the rounding is not to even."""
        values = finish.terms[term].multiplier.to(torch.int64).reshape(-1)
        return np.ascontiguousarray(values.expand(len(self.multipliers[0])).numpy())

    def _whole_offset(self, finish: Finish) -> Any:
        constant = finish._constant()
        constant = torch.zeros((), dtype=torch.int64) if constant is None else constant
        return np.ascontiguousarray(constant.reshape(-1).expand(len(self.multipliers[0])).numpy())


def _rounding(shift: Any, rounding: Rounding) -> Any:
    """`[shift, add, even, away]` as the compiled loops take them."""
    some = (shift > 0).astype(np.int64)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    none = np.zeros_like(some)
    add = {Rounding.HALF_EVEN: half - some, Rounding.FLOOR: none}.get(rounding, half)
    even = some if rounding is Rounding.HALF_EVEN else none
    away = -some if rounding is Rounding.HALF_AWAY else none
    return np.stack([shift, add, even, away])

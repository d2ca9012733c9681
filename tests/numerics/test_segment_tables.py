"""Segment tables: equal to the oracle's, as accurate as promised, refused where they make no sense."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from qgraph.errors import UserError
from qgraph.numerics import (
    QParams,
    QType,
    SegmentForm,
    build_segments,
    build_steps,
    build_table,
    choose_qparams,
    dequantize,
    lookup,
    lookup_segments,
    qint8,
    qint16,
    qparams_from_scale,
    quantize,
    quint8,
)
from qgraph.numerics.tables import evaluated
from tests.numerics.exact import long, single
from tests.oracle.arithmetic import Format
from tests.oracle.functions import segment_table

BPU = SegmentForm(64, 64, True, 8)
Function = Callable[[torch.Tensor], torch.Tensor]


def codes_of(qtype: QType) -> torch.Tensor:
    return torch.arange(qtype.qmin, qtype.qmax + 1)


def looked_up(function: Function, source: QParams, result: QParams, form: SegmentForm) -> torch.Tensor:
    made = build_segments(function, source, result, form)
    return lookup_segments(
        codes_of(source.qtype), made.entries, made.starts, made.shifts, source.qtype, form.fraction_bits
    )


def exact_codes(function: Function, source: QParams, result: QParams) -> torch.Tensor:
    reals = codes_of(source.qtype).double()
    return quantize(evaluated(function, reals, source, result), result).long()


# --- building ------------------------------------------------------------------------------------------------------

PLAIN: dict[str, tuple[Callable[[float], float], Function]] = {
    "square": (lambda x: x * x, torch.square),
    "reciprocal": (lambda x: math.copysign(math.inf, x) if x == 0 else 1 / x, torch.reciprocal),
    "root": (lambda x: math.sqrt(x) if x >= 0 else math.nan, torch.sqrt),
    "line": (lambda x: x * 0.37, lambda x: x * 0.37),
    "jump": (lambda x: 1.0 if x > 3 else -1.0, lambda x: torch.where(x > 3, 1.0, -1.0).double()),
    "nothing": (lambda x: 0.0, torch.zeros_like),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("segments", "entries"), [(1, 1), (5, 4), (16, 8), (64, 16)])
@pytest.mark.parametrize("fraction_bits", [0, 3, 8])
def test_tables_equal_the_oracle(name: str, segments: int, entries: int, fraction_bits: int) -> None:
    plain, vectorized = PLAIN[name]
    bits, source_scale, target_scale = 9, 1 / 3, 0.0571
    source = qparams_from_scale(source_scale, QType(bits))
    result = qparams_from_scale(target_scale, qint16)
    made = build_segments(vectorized, source, result, SegmentForm(segments, entries, True, fraction_bits))
    scales = [float(single(scale).item()) for scale in (source_scale, target_scale)]
    expected = segment_table(plain, Format(bits), scales[0], Format(16), scales[1], segments, entries, fraction_bits)
    assert (made.entries.tolist(), made.starts.tolist(), made.shifts.tolist()) == expected


@pytest.mark.parametrize("function", [torch.tanh, torch.exp, torch.rsqrt], ids=lambda f: f.__name__)
def test_even_segments_are_even_intervals(function: Function) -> None:
    source, result = qparams_from_scale(1e-4, qint16), qparams_from_scale(1e-3, qint16)
    table = build_table(function, source, result, entries=4096)
    assert torch.equal(
        looked_up(function, source, result, SegmentForm(64, 64, False)), lookup(codes_of(qint16), table, qint16)
    )


def test_segments_follow_one_another() -> None:
    made = build_segments(torch.tanh, qparams_from_scale(2e-4, qint16), qparams_from_scale(2.0**-15, qint16), BPU)
    starts, shifts = made.starts.tolist(), made.shifts.tolist()
    ends = [start + (64 << shift) for start, shift in zip(starts, shifts, strict=True)]
    assert (starts[0], [*starts[1:], 65536]) == (0, ends)
    assert len(starts) == 64
    assert made.entries.numel() == 64 * 64 + 1


def test_no_more_segments_than_needed() -> None:
    one = qparams_from_scale(1e-3, qint16)
    made = build_segments(torch.zeros_like, one, one, BPU)
    assert made.starts.tolist() == [0]
    assert torch.equal(looked_up(lambda x: x, one, one, BPU)[:-1], codes_of(qint16)[:-1])


def test_zero_points_enter_the_entries() -> None:
    source, result = QParams(single(0.05), quint8, long(100)), QParams(single(0.01), quint8, long(7))
    form = SegmentForm(16, 16, True)  # without fraction bits every code is an entry here
    assert torch.equal(looked_up(torch.tanh, source, result, form), exact_codes(torch.tanh, source, result))


# --- accuracy ------------------------------------------------------------------------------------------------------

# Function, reach of the input, where its data begins (its scale is that of the results from there on).
SMOOTH: list[tuple[str, Function, float, float]] = [
    ("sigmoid", torch.sigmoid, 8.0, -8.0),
    ("tanh", torch.tanh, 4.0, -4.0),
    ("silu", F.silu, 8.0, -8.0),
    ("gelu", F.gelu, 8.0, -8.0),
    ("mish", F.mish, 8.0, -8.0),
    ("elu", F.elu, 8.0, -8.0),
    ("softplus", F.softplus, 8.0, -8.0),
    ("erf", torch.erf, 4.0, -4.0),
    ("exp", torch.exp, 10.0, -10.0),
    ("hardswish", F.hardswish, 8.0, -8.0),
    ("sin", torch.sin, 3.2, -3.2),
    ("square", torch.square, 8.0, -8.0),
    ("log", torch.log, 8.0, 0.01),
    ("sqrt", torch.sqrt, 8.0, 0.0),
    ("rsqrt", torch.rsqrt, 4.0, 0.01),
    ("reciprocal", torch.reciprocal, 8.0, 0.16),
]


@pytest.mark.parametrize(("name", "function", "reach", "start"), SMOOTH, ids=[row[0] for row in SMOOTH])
def test_bpu_tables_are_the_function(name: str, function: Function, reach: float, start: float) -> None:
    """At most one step off anywhere, poles and ends of the domain included, and equal at 99.5 % of the codes."""
    source = qparams_from_scale(reach / 2**15, qint16)
    reals = codes_of(qint16).double() * source.scale.double()
    values = function(reals[reals >= start])
    result = choose_qparams(values.min(), values.max(), qint16)
    gap = (looked_up(function, source, result, BPU) - exact_codes(function, source, result)).abs()
    assert gap.max() <= 1
    assert (gap == 0).double().mean() > 0.995


@pytest.mark.parametrize("at", [-20000, -1, 0, 1, 63, 12345])
def test_a_jump_is_met_exactly(at: int) -> None:
    source, result = qparams_from_scale(1.0, qint16), qparams_from_scale(2.0**-14, qint16)

    def jump(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= at, 1.0, -1.0).double()

    assert torch.equal(looked_up(jump, source, result, BPU), exact_codes(jump, source, result))


# --- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sign", "floor", "ceil", "trunc", "round"])
@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.7, 2.0, 0.0123])
@pytest.mark.parametrize("qtype", [qint8, qint16], ids=str)
def test_steps_jump_where_float32_does(name: str, scale: float, qtype: QType) -> None:
    function = getattr(torch, name)
    source = qparams_from_scale(scale, qtype)
    reals = dequantize(codes_of(qtype), source)
    result = choose_qparams(function(reals).min(), function(reals).max(), qint8)
    thresholds, values = build_steps(function, source, result)
    assert (thresholds.dtype, values.dtype) == (torch.int32, torch.int8)
    assert bool((thresholds.diff() > 0).all())
    found = values[torch.searchsorted(thresholds, codes_of(qtype).int(), right=True)]
    assert torch.equal(found, quantize(function(reals), result))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 64, True), "0 segments"),
        ((3, 64, False), "3 segments"),
        ((64, 60, True), "60 entries"),
        ((64, 64, True, 9), "9 fraction bits"),
        ((64, 64, True, -1), "-1 fraction bits"),
    ],
)
def test_forms_that_make_no_sense(arguments: tuple[int, int, bool], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SegmentForm(*arguments)


def test_forms_with_more_intervals_than_codes() -> None:
    SegmentForm(4, 64, False).check(qint8)
    SegmentForm(64, 64, True).check(qint8)
    with pytest.raises(UserError, match="4096 intervals"):
        SegmentForm(64, 64, False).check(qint8)
    with pytest.raises(UserError, match="512 intervals"):
        build_segments(
            torch.tanh, qparams_from_scale(0.1, qint8), qparams_from_scale(0.1, qint8), SegmentForm(2, 512, True)
        )


def test_entries_that_do_not_go_with_the_segments() -> None:
    with pytest.raises(UserError, match="6 entries do not make 2 segments"):
        lookup_segments(long([0]), torch.zeros(6), long([0, 128]), long([6, 6]), qint8, 0)

"""The arithmetic word, and what its accumulator does to sums."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgraph.errors import UserError
from qgraph.numerics import Arithmetic, Overflow, QType, Rounding, parse_arithmetic, parse_rule, qint32
from tests.numerics.exact import exact, int64s, long, saturate_exact, wrap_exact

RULE_WORDS = [
    "float:half_even",
    "power_of_two:floor",
    "fixed_point:24:half_even",
    "fixed_point_two:31:half_up:half_away",
]
BPU_WORDS = [
    "int32:wrap/fixed_point:24:half_even",
    "int32:wrap/fixed_point:31:half_even",
    "int39:wrap/fixed_point:24:half_even",
]
REFERENCES = {Overflow.SATURATE: saturate_exact, Overflow.WRAP: wrap_exact}


@pytest.mark.parametrize("rule", RULE_WORDS)
@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("bits", [2, 16, 20, 32])
def test_every_part_reads_back(bits: int, overflow: Overflow, rule: str) -> None:
    arithmetic = Arithmetic(QType(bits), overflow, parse_rule(rule))
    word = f"int{bits}:{overflow}/{rule}"
    assert str(arithmetic) == word
    assert parse_arithmetic(word) == arithmetic


@pytest.mark.parametrize("word", BPU_WORDS)
def test_words_of_the_default_target(word: str) -> None:
    arithmetic = parse_arithmetic(word)
    assert str(arithmetic) == word
    assert arithmetic.overflow is Overflow.WRAP
    assert arithmetic.rule.rounding is Rounding.HALF_EVEN
    assert parse_arithmetic(word) == parse_arithmetic(str(arithmetic))


def test_an_unsigned_accumulator_is_refused_or_named() -> None:
    with pytest.raises(UserError, match="signed"):
        Arithmetic(QType(32, signed=False), Overflow.WRAP, parse_rule("float:floor"))


@pytest.mark.parametrize("rule", RULE_WORDS)
def test_products_fit_a_64_bit_register(rule: str) -> None:
    widest = {"float": 64, "fixed_point": 39}.get(rule.split(":")[0], 32)
    assert Arithmetic(QType(widest), Overflow.WRAP, parse_rule(rule)).accumulator.bits == widest
    if widest < 64:
        with pytest.raises(UserError, match="cannot be rescaled") as caught:
            Arithmetic(QType(widest + 1), Overflow.WRAP, parse_rule(rule))
        assert f"at most {widest} bits" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "'' is not an arithmetic"),
        ("int32:wrap", "'int32:wrap' is not an arithmetic"),
        ("int32/float:floor", "is not an arithmetic"),
        ("32:wrap/float:floor", "is not an arithmetic"),
        ("uint32:wrap/float:floor", "is not an arithmetic"),
        ("float32:wrap/float:floor", "is not an arithmetic"),
        ("int:wrap/float:floor", "is not an arithmetic"),
        ("int-8:wrap/float:floor", "is not an arithmetic"),
        ("int32:clip/float:floor", "unknown overflow 'clip'"),
        ("int32:/float:floor", "unknown overflow ''"),
        ("int1:wrap/float:floor", "integer format of 1 bits"),
        ("int65:wrap/float:floor", "integer format of 65 bits"),
        ("int32:wrap/", "unknown scale form ''"),
        ("int32:wrap/fixed_point:24:half_evn", "unknown rounding 'half_evn'"),
        ("int32:wrap/float:floor/float:floor", "should have 1 fields"),
        ("int²:wrap/float:floor", "is not an arithmetic"),
    ],
)
def test_words_that_name_no_arithmetic(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arithmetic(word)
    assert message in caught.value.what


def test_errors_help() -> None:
    with pytest.raises(UserError) as caught:
        parse_arithmetic("int32:saturated/float:floor")
    assert caught.value.fix == "did you mean 'saturate'?"
    with pytest.raises(UserError) as caught:
        parse_arithmetic("nonsense")
    assert caught.value.fix is not None
    example = caught.value.fix.removeprefix("write it like ")
    assert str(parse_arithmetic(example)) == example


@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("bits", [16, 20, 32, 48, 64])
@given(sums=st.lists(int64s(), min_size=1, max_size=8))
@exact(50)
def test_accumulators_hold_sums_as_named(overflow: Overflow, bits: int, sums: list[int]) -> None:
    arithmetic = Arithmetic(QType(bits), overflow, parse_rule("float:floor"))
    result = arithmetic.accumulate(long(sums))
    assert result.dtype is torch.int64
    assert result.tolist() == [REFERENCES[overflow](value, QType(bits)) for value in sums]


def test_one_past_the_end() -> None:
    past = long([qint32.qmax + 1, qint32.qmin - 1]).reshape(1, 2)
    wrapped, saturated = (
        parse_arithmetic(f"int32:{mode}/float:floor").accumulate(past) for mode in ("wrap", "saturate")
    )
    assert wrapped.tolist() == [[qint32.qmin, qint32.qmax]]
    assert saturated.tolist() == [[qint32.qmax, qint32.qmin]]


def test_words_are_as_distinct_as_arithmetics() -> None:
    every = {
        Arithmetic(QType(bits), overflow, parse_rule(rule))
        for bits, overflow, rule in product((24, 32), Overflow, RULE_WORDS)
    }
    assert len({str(arithmetic) for arithmetic in every}) == len(every) == 16

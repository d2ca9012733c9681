"""Words of torch's engines at the ends of their ranges, and what they refuse; bits are checked against torch itself."""

from __future__ import annotations

import pytest
import torch

from qgraph.errors import QuantizationError, UserError
from qgraph.numerics import (
    Factor,
    QuantizeRule,
    Rounding,
    dispatches_pairs,
    pair_sums,
    pairs_may_saturate,
    parse_arithmetic,
    parse_quantize_rule,
    qint16,
    quint8,
)
from qgraph.numerics.quantize import ZeroPoint

WORDS = ("aten_requantize", "aten_cat", "aten_avg_pool", "aten_adaptive_avg_pool")


@pytest.mark.parametrize("name", WORDS)
def test_words_are_read_and_printed(name: str) -> None:
    word = parse_arithmetic(f"int32:wrap/{name}")
    assert str(word) == f"int32:wrap/{name}"
    factor = Factor(torch.ones(3), None)
    with pytest.raises(QuantizationError, match="adds no float bias"):
        word.rule.apply(torch.zeros(1, 1, 1, 1, dtype=torch.int64), factor, bias=torch.ones(1))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", WORDS[1:])
def test_channels_are_those_of_images(name: str) -> None:
    rule = parse_arithmetic(f"int32:wrap/{name}").rule
    with pytest.raises(QuantizationError, match="channels_last"):
        rule.apply(torch.zeros(3, 4, dtype=torch.int64), Factor(torch.ones(3 if name == "aten_cat" else 2), None))  # type: ignore[union-attr]


def test_engines_differ_beyond_32_bits() -> None:
    """oneDNN saturates before it converts; fbgemm's conversion makes the lowest number of everything."""
    acc = torch.tensor([2**30, -(2**30)])
    onednn = parse_arithmetic("int32:wrap/onednn").rule
    stages = torch.tensor([[4.0], [1.0], [1.0]])
    assert (onednn.apply(acc, Factor(stages, None), 3) > 255).tolist() == [True, False]  # type: ignore[union-attr]
    fbgemm = parse_arithmetic("int32:wrap/fbgemm").rule
    assert fbgemm.apply(acc, Factor(torch.tensor(4.0), None), 3).tolist() == [3 - 2**31] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("word", "codes"),
    [
        ("reciprocal:half_even", [0 + 7, 2 + 7, 2 + 7]),
        ("reciprocal:before:half_even", [8, 8, 10]),
        ("reciprocal:fused:half_even", [8, 8, 10]),
        ("divide:before:floor", [7, 8, 9]),
    ],
)
def test_a_zero_point_before_rounding_moves_ties(word: str, codes: list[int]) -> None:
    rule = parse_quantize_rule(word)
    assert str(rule) == word
    found = rule.codes(torch.tensor([0.25, 0.75, 1.25]), torch.tensor(0.5), torch.tensor(7))
    assert found.tolist() == codes


def test_nan_is_the_zero_point() -> None:
    for word in ("reciprocal:half_even", "reciprocal:before:half_even", "reciprocal:fused:half_even"):
        codes = parse_quantize_rule(word).codes(torch.tensor([float("nan")]), torch.tensor(0.5), torch.tensor(7))
        assert codes.tolist() == [7]


def test_a_fused_addition_rounds_once() -> None:
    """The product is -2.5 + 2**-24, which alone rounds to -2.5: a tie, once 3 is added."""
    scale = torch.tensor(1 + 2.0**-23)
    assert (1.0 / scale).item() == 1 - 2.0**-23
    x, zero = torch.tensor([-2.5 - 2.0**-22]), torch.tensor(3)
    assert parse_quantize_rule("reciprocal:fused:half_even").codes(x, scale, zero).tolist() == [1.0]
    assert parse_quantize_rule("reciprocal:before:half_even").codes(x, scale, zero).tolist() == [0.0]


def test_divisions_are_not_fused() -> None:
    with pytest.raises(UserError, match="cannot be fused"):
        QuantizeRule(True, Rounding.HALF_EVEN, ZeroPoint.FUSED)
    with pytest.raises(UserError, match="no way to quantize"):
        parse_quantize_rule("divide:fused:half_even")


def test_pairs_saturate_at_16_bits() -> None:
    largest = quint8.qmax * 127
    assert pair_sums(torch.tensor([largest, largest, largest])).item() == qint16.qmax + largest
    assert pair_sums(torch.tensor([[-largest, -largest], [largest, -largest]])).tolist() == [qint16.qmin, 0]


@pytest.mark.parametrize(
    ("first", "second", "may"), [(64, 64, False), (65, 64, True), (-64, -64, False), (-65, -64, True)]
)
def test_weights_up_to_64_never_saturate(first: int, second: int, may: bool) -> None:
    weight = torch.tensor([first, second, 1, 1]).reshape(1, 1, 2, 2)
    assert pairs_may_saturate(weight, quint8) is may


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"weight": (32, 1, 3, 3)}, True),
        ({"weight": (48, 1, 3, 3)}, False),
        ({"weight": (16, 2, 3, 3)}, False),
        ({"weight": (16, 1, 3, 5)}, False),
        ({"weight": (16, 1, 3)}, False),
        ({"weight": (12, 1, 3, 3), "groups": 12}, False),
        ({"stride": (2, 1)}, True),
        ({"stride": (3, 1)}, False),
        ({"padding": (0, 1)}, False),
        ({"dilation": (2, 2)}, False),
    ],
)
def test_which_convolutions_add_in_pairs(change: dict[str, object], taken: bool) -> None:
    usual = {"weight": (16, 1, 3, 3), "groups": 16, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    assert dispatches_pairs(**{**usual, **change}) is taken  # type: ignore[arg-type]

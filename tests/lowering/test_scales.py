"""Scales at the edge of what a device can store."""

from __future__ import annotations

import pytest
import torch

from qgraph import Simulator, calibrate, convert, prepare
from qgraph.errors import QuantizationError
from qgraph.lowering.base import encode_saturating
from qgraph.numerics import parse_arithmetic, qint8, qint16
from tests.support.models import Forward


@pytest.mark.parametrize("word", ["fixed_point:24:half_even", "fixed_point:31:floor", "float:half_up"])
@pytest.mark.parametrize("factor", [2.0**24, -(2.0**31), 1e30])
def test_a_factor_too_large_to_store_saturates_all_the_same(word: str, factor: float) -> None:
    rule = parse_arithmetic(f"int32:wrap/{word}").rule
    stored = encode_saturating(rule, torch.tensor(factor, dtype=torch.float64), qint16)
    codes = torch.tensor([-(2**31), -3, -1, 0, 1, 3, 2**31 - 1])
    expected = (codes.double() * factor).clamp(qint16.qmin, qint16.qmax)
    assert torch.equal(rule.apply(codes, stored).clamp(qint16.qmin, qint16.qmax).double(), expected)


def test_a_factor_that_would_not_saturate_is_refused() -> None:
    rule = parse_arithmetic("int32:wrap/fixed_point:8:half_even").rule
    with pytest.raises(QuantizationError, match=r"2\*\*8 or more"):
        encode_saturating(rule, torch.tensor(300.0, dtype=torch.float64), qint8)


def test_a_result_far_smaller_than_its_operands() -> None:
    model = Forward(lambda m, x: (x - x.mean(-1, keepdim=True)).mean(-1)).eval()
    samples = torch.randn(8, 4, 50)
    prepared = prepare(model, samples[:2])
    calibrate(prepared, [samples], progress=False)
    simulated = Simulator(convert(prepared))(samples)
    assert simulated.abs().max() < 1e-3

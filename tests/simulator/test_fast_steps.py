"""Rescalings in float32: exact products rounded once, and fused forms proven at their steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qgraph.numerics import qint8
from qgraph.simulator.fast.functions import amax
from qgraph.simulator.fast.loops import loops
from tests.simulator.fast import compare

pytestmark = pytest.mark.skipif(loops() is None, reason="compiled loops need numba")
RULES = ("fixed_point:24:half_even", "fixed_point:24:half_up", "fixed_point_two:31:half_up:half_away")


def _options(rule: str, low: int = qint8.qmin, high: int = qint8.qmax) -> dict[str, Any]:
    return {"arithmetic": f"int32:wrap/{rule}", "low": low, "high": high, "format": "int8"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("low", [qint8.qmin, 0])
def test_every_code_with_ties_and_saturation(rule: str, low: int) -> None:
    """A power of two makes every second product a tie; the others leave the format at both ends."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(64, 1024)
    bits = 30 if "two" in rule else 23
    for multiplier, shift in ((1 << bits, bits + 1), (1 << bits, bits + 9), ((1 << bits) + 12345, bits + 7)):
        args = (x, torch.tensor(multiplier, dtype=torch.int32), torch.tensor(shift, dtype=torch.int32), None)
        assert compare("requantize", args, _options(rule, low)) is None


@pytest.mark.parametrize("rule", RULES)
def test_one_factor_per_column(rule: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(-(1 << 15), 1 << 15, (70, 33)).to(torch.int16)
    bits = 30 if "two" in rule else 23
    multiplier = torch.randint(1 << bits, 1 << (bits + 1), (33,)).to(torch.int32)
    shift = torch.randint(bits + 5, bits + 9, (33,)).to(torch.int32)
    assert compare("requantize", (x, multiplier, shift, None), _options(rule)) is None


def test_a_sum_with_a_constant() -> None:
    from qgraph.simulator.fast import KERNELS
    from qgraph.simulator.kernel import KernelCall, Operand
    from qgraph.simulator.reference import KERNELS as REFERENCE

    torch.manual_seed(0)
    x, y = (torch.randint(-128, 128, (2, 5, 7)).to(torch.int8) for _ in range(2))
    factors = torch.tensor(5, dtype=torch.int32), torch.tensor(3, dtype=torch.int32)
    options = _options(RULES[0])
    for constant in (y, y[:1]):
        rest = (constant, *factors, torch.tensor(2, dtype=torch.int32))
        known = Operand(x.dtype, tuple(x.shape), qint8.qmin, qint8.qmax)
        run = KERNELS["add"].prepare(KernelCall("add", (known, *rest), options))
        assert torch.equal(run(x), REFERENCE["add"](x, *rest, **options))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.float32])
def test_maxima_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 37).mul(40).to(dtype)
    for value in (x, x.transpose(1, 2)):
        for dim in (-1, 2, [2], 1, (0, 2)):
            for keepdim in (True, False):
                assert torch.equal(amax(value, dim, keepdim), torch.amax(value, dim, keepdim))

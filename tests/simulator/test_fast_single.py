"""Rescaling in float32: products rounded once, beside ties that float32 cannot tell from them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qgraph.simulator.fast.finish import Finish
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.fast.probe import addcmul_fuses
from qgraph.simulator.fast.term import Term
from qgraph.simulator.reference import KERNELS as REFERENCE
from qgraph.simulator.trace import KernelTrace

SHIFT = 26
WORD = f"int32:wrap/fixed_point:{SHIFT}:half_even"
BOUND = 1 << 15


@pytest.fixture(params=["1", "0"])
def numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("QGRAPH_NUMBA", request.param)
    loops.cache_clear()
    yield request.param
    loops.cache_clear()


def beside_ties() -> tuple[torch.Tensor, torch.Tensor]:
    """Integers `x` and multipliers `m` with `x * m = 2**(SHIFT - 1) + d` modulo `2**SHIFT`, `d` in -1, 0, 1."""
    pairs = []
    for x in range(BOUND // 2 + 1, BOUND, 32):
        for beside in (-1, 0, 1):
            m = ((1 << SHIFT - 1) + beside) * pow(x, -1, 1 << SHIFT) % (1 << SHIFT)
            pairs += [(x, m), (-x, m)] if m < 1 << 24 else []
    x, m = torch.tensor(pairs).t().contiguous()
    return x, m


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize(("format", "zero"), [("int8", 0), ("quint8", 121), ("int16", 0), ("int16", -7)])
def test_products_beside_ties(format: str, zero: int, dtype: torch.dtype, numba: str) -> None:
    x, m = beside_ties()
    assert len(x) > 400
    limits = {"int8": (-128, 127), "quint8": (0, 255), "int16": (-(1 << 15), (1 << 15) - 1)}[format]
    options = {"arithmetic": WORD, "format": format, "low": limits[0], "high": limits[1], "zero": zero}
    shift, counts, trace = torch.tensor(SHIFT), KernelTrace(), KernelTrace()
    rows = torch.stack([x, x // 64, torch.full_like(x, BOUND), x * 0])
    expected = REFERENCE["requantize"](rows, m, shift, None, **options, trace=counts)
    finish = Finish(options, [Term(m, BOUND)], shift)
    if numba == "0" and addcmul_fuses():
        assert finish.fuses
    assert torch.equal(finish.rows(rows.to(dtype)), expected)
    assert torch.equal(finish.rows(rows.to(dtype), None, trace), expected)
    assert trace.saturated == counts.saturated
    start = torch.arange(len(x), dtype=torch.int32)
    moved = Finish(options, [Term(m, BOUND, 0, start)], shift)
    assert torch.equal(moved.rows((rows - start).to(dtype)), expected)


def test_bounds_beyond_float32_are_not_computed_in_it(numba: str) -> None:
    options = {"arithmetic": WORD, "format": "int8", "low": -128, "high": 127}
    finish = Finish(options, [Term(torch.tensor([3]), 1 << 25)], torch.tensor(SHIFT))
    assert not finish.fuses
    x = torch.tensor([[(1 << 24) + 1], [1 - (1 << 25)]], dtype=torch.int32)
    expected = REFERENCE["requantize"](x, torch.tensor([3]), torch.tensor(SHIFT), None, **options)
    assert torch.equal(finish.rows(x), expected)

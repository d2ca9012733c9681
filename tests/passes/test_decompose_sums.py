"""Sums with a product inside, taken apart and run in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qgraph.analysis import compare_sites
from qgraph.ir.node_info import graph_info, info
from qgraph.quantization import calibrate, convert, prepare
from tests.support.models import Forward
from tests.support.passes import count_ops, run_passes

CASES: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "addcmul": (lambda m, x, y: torch.addcmul(x, y, x.relu(), value=0.3713), {"mul": 1, "add": 1}),
    "addcmul in place": (lambda m, x, y: (x * 1.1713).addcmul_(y, x), {"mul": 2, "add": 1}),
    "addcdiv": (lambda m, x, y: x.addcdiv(y, y.abs() + 1.7), {"reciprocal": 1, "mul": 1, "add": 2}),
    "lerp": (lambda m, x, y: torch.lerp(x, y, 0.2713), {"sub": 1, "add": 1}),
    "lerp by a value": (lambda m, x, y: x.lerp(y, x.sigmoid()), {"sub": 1, "mul": 1, "add": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_of_products(name: str) -> None:
    forward, steps = CASES[name]
    inputs = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    model = Forward(forward).eval()
    found = count_ops(run_passes(model, inputs, "canonicalize,decompose-composites").gm)
    assert {op: found[op] for op in steps} == steps
    prepared = prepare(model, inputs)
    calibrate(prepared, [inputs], progress=False)
    integer = convert(prepared)
    assert not [note for note in graph_info(integer).notes if note.startswith("float:")]
    assert all(info(node).float_reason is None for node in integer.graph.nodes)
    assert all(site.largest <= 1 for site in compare_sites(prepared, integer, inputs))


def test_a_factor_computed_in_the_forward_is_left_whole() -> None:
    gm = run_passes(
        Forward(lambda m, x, y: torch.addcmul(x, y, y, value=float("inf"))).eval(),
        (torch.randn(2, 3), torch.randn(2, 3)),
        "canonicalize,decompose-composites",
    ).gm
    assert count_ops(gm)["addcmul"] == 1

"""Fast kernels beside reference kernels: one call, prepared and run, compared bit by bit and count by count."""

from __future__ import annotations

from typing import Any

import torch

from qgraph.simulator.fast import KERNELS as FAST
from qgraph.simulator.kernel import KernelCall, NoFastForm, Operand
from qgraph.simulator.reference import KERNELS as REFERENCE
from qgraph.simulator.trace import KernelTrace

# Positions of the arguments that are computed in a graph; the others are constants.
COMPUTED = {"conv": (0, 3), "linear": (0, 3), "matmul": (0, 1), "add": (0, 1), "mul": (0, 1)}


def operand(x: torch.Tensor, *, whole: bool) -> Operand:
    """What is known of `x`: the bounds of its dtype, or those of its codes."""
    if x.is_floating_point():
        return Operand(x.dtype, tuple(x.shape), 0, 0)
    limits = torch.iinfo(x.dtype)
    low, high = (limits.min, limits.max) if whole or not x.numel() else (int(x.min()), int(x.max()))
    return Operand(x.dtype, tuple(x.shape), low, high)


def compare(operator: str, args: tuple[Any, ...], options: dict[str, Any], *, whole: bool = True) -> str | None:
    """Asserts equal bits and counts; the reason if there is no fast form."""
    places = [i for i in COMPUTED.get(operator, (0,)) if args[i] is not None]
    known = tuple(operand(a, whole=whole) if i in places else a for i, a in enumerate(args))
    try:
        run = FAST[operator].prepare(KernelCall(operator, known, options))
    except NoFastForm as reason:
        return str(reason)
    trace, counts = KernelTrace(), KernelTrace()
    expected = REFERENCE[operator](*args, **options, trace=counts)
    before = [args[i].clone() for i in places]
    found = run(*[args[i] for i in places])
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), (found.shape, expected.shape, found.dtype)
    differing = int((found != expected).sum())
    assert differing == 0, f"{differing} of {found.numel()} differ: {operator}, {options}"
    again = run(*[args[i] for i in places], trace=trace)
    assert torch.equal(again, expected)
    assert (trace.saturated, trace.overflowed) == (counts.saturated, counts.overflowed), options
    assert all(torch.equal(args[i], kept) for i, kept in zip(places, before, strict=True)), "operands are left alone"
    return None

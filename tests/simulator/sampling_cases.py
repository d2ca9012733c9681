"""Cases for the operators that sample, order, and lay windows out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.simulator.cases import STORAGE, Case, Draw

MOVES = ("arg_extreme", "order", "sample_nearest", "unfold")
"""Operators that do not compute with codes: no zero points."""


def outside(draw: Draw, x: torch.Tensor) -> dict[str, int]:
    """The code that stands for what lies beyond the borders: mostly left out, else any."""
    name = next(name for name, dtype in STORAGE.items() if dtype is x.dtype)
    return {"outside": draw.code(name, draw.one_of("ends", "small", "uniform"))} if draw.chance(0.5) else {}


def rescaled(draw: Draw, extra_shift: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Multiplier and shift; arithmetic and bounds."""
    text = draw.word()
    factors = draw.factors(text, extra_shift=extra_shift)
    return (*factors.multipliers, factors.shift), {"arithmetic": text, **draw.output()}


def arg_extreme_case(draw: Draw) -> Case:
    x = draw.operand(draw.shape(draw.integer(1, 4), 4), "int8", "int16", "int32")
    dim = draw.one_of(None, draw.integer(-x.dim(), x.dim() - 1))
    return Case("arg_extreme", (x,), {"dim": dim, "keepdim": draw.chance(0.5), "largest": draw.chance(0.5)})


def order_case(draw: Draw) -> Case:
    x = draw.operand(draw.shape(draw.integer(1, 3), 6), "int8", "int16", "int32")
    dim = draw.integer(-x.dim(), x.dim() - 1)
    count = draw.one_of(None, draw.integer(1, x.shape[dim]))
    return Case("order", (x,), {"dim": dim, "descending": draw.chance(0.5), "count": count})


def cumsum_case(draw: Draw) -> Case:
    x = draw.operand(draw.shape(draw.integer(1, 3), 5))
    factors, options = rescaled(draw)
    return Case("cumsum", (x, *factors), {"dim": draw.integer(-x.dim(), x.dim() - 1), **options})


def window(draw: Draw) -> tuple[dict[str, list[int]], list[int]]:
    """Geometry of windows, and a size that has room for at least one."""
    kernel, dilation, padding, stride = (draw.integers(2, first, 3 if first else 2) for first in (1, 1, 0, 1))
    spans = [dilation[a] * (kernel[a] - 1) + 1 for a in range(2)]
    size = [max(1, spans[a] - 2 * padding[a]) + draw.integer(0, 3) for a in range(2)]
    return {"kernel_size": kernel, "dilation": dilation, "padding": padding, "stride": stride}, size


def unfold_case(draw: Draw) -> Case:
    geometry, size = window(draw)
    x = draw.operand([*draw.shape(2, 2), *size])
    return Case("unfold", (x,), {**geometry, **outside(draw, x)})


def fold_case(draw: Draw) -> Case:
    geometry, size = window(draw)
    kernel = geometry["kernel_size"]
    # Asked of torch itself.
    count = torch.nn.functional.unfold(torch.zeros(1, 1, *size), **geometry).shape[-1]
    outer, channels = draw.shape(2, 2)
    x = draw.operand([outer, channels * kernel[0] * kernel[1], count])
    factors, options = rescaled(draw)
    return Case("fold", (x, *factors), {"output_size": size, **geometry, **options})


def resize_case(draw: Draw) -> Case:
    rank, bits = draw.integer(1, 3), draw.one_of(11, 8, 1)
    size = draw.integers(rank, 1, 4)
    x = draw.operand([*draw.shape(2, 2), *size])
    taps = draw.integer(1, 4 if rank < 3 else 2)
    tables = [neighbours(draw, length, taps, bits) for length in size]
    factors, options = rescaled(draw, extra_shift=rank * bits)
    return Case("resize", (x, *[None] * (3 - rank), *tables, *factors), options)


def neighbours(draw: Draw, size: int, taps: int, bits: int) -> torch.Tensor:
    """Which elements, and their weights: some negative, some none."""
    count, one = draw.integer(1, 3), 1 << bits
    indices = [draw.integers(count, 0, size - 1) for _ in range(taps)]
    weights = [
        [draw.one_of(0, one, one // 2, -one // 8, draw.integer(0, one)) for _ in range(count)] for _ in range(taps)
    ]
    return torch.tensor([indices, weights], dtype=draw.one_of(torch.int32, torch.int64))


def place(draw: Draw, shape: list[int], size: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Positions: on pixels, between them, at halves, just beyond the borders and far away."""
    bits = draw.one_of(11, 8, 1)
    one = 1 << bits
    values = []
    for _ in range(int(torch.Size(shape).numel())):
        for length in reversed(size):
            values.append(
                draw.one_of(
                    draw.integer(-2, length + 1) * one + draw.one_of(0, one // 2, 1, -1),
                    draw.integer(-one, length * one),
                    draw.integer(-9 * length * one, 9 * length * one),
                    draw.one_of(-(2**31), 2**31 - 1),
                )
            )
    positions = torch.tensor(values, dtype=torch.int32).reshape(*shape, 2)
    padding = draw.one_of("zeros", "border", "reflection")
    return positions, {"position_bits": bits, "padding": padding, "align_corners": draw.chance(0.5)}


def sample_case(draw: Draw, operator: str) -> Case:
    size = draw.integers(2, 1, 4)
    x = draw.operand([*draw.shape(2, 2), *size])
    positions, options = place(draw, [x.shape[0], *draw.shape(draw.integer(1, 2), 3)], size)
    if operator == "sample_nearest":
        return Case(operator, (x, positions), {**options, **outside(draw, x)})
    factors, rest = rescaled(draw, extra_shift=2 * options["position_bits"])
    return Case(operator, (x, positions, *factors), {**options, **rest})


SAMPLING_CASES: dict[str, Callable[[Draw], Case]] = {
    "arg_extreme": arg_extreme_case,
    "cumsum": cumsum_case,
    "fold": fold_case,
    "order": order_case,
    "resize": resize_case,
    "sample_bilinear": lambda draw: sample_case(draw, "sample_bilinear"),
    "sample_nearest": lambda draw: sample_case(draw, "sample_nearest"),
    "unfold": unfold_case,
}

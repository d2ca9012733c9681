"""Cases for functions of one value and for comparisons."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.oracle.arithmetic import parse_format
from tests.simulator.cases import STORAGE, Case, Draw, broadcasting_shapes

LOOKUPS = ("lookup_segments", "lookup_steps", "lookup_two")
"""Operators that do not compute with codes: no zero points."""


def prelu_case(draw: Draw) -> Case:
    text = draw.word()
    n, c, h = draw.shape(3)
    parameters = draw.one_of([], [c, 1])
    positive, negative = draw.factors(text), draw.factors(text, parameters)
    x = draw.operand([n, c, h], "int8", "int16", "int32")
    factors = (*positive.multipliers, positive.shift, *negative.multipliers, negative.shift)
    return Case("prelu", (x, *factors), {"arithmetic": text, **draw.output()})


def compare_case(draw: Draw) -> Case:
    left, right = broadcasting_shapes(draw)
    x, y = draw.operand(left), draw.operand(right, "int8", "int16", "int32")
    largest = (1 << 31) - 1
    multipliers = draw.one_of((1, 1), (3, 2), (largest, largest - 1), (1 << 30, largest), (largest, 0), (5, 5))
    factors = [torch.tensor(m, dtype=torch.int64) for m in multipliers]
    return Case("compare", (x, y, *factors), {"relation": draw.one_of("gt", "ge", "lt", "le", "eq", "ne")})


def segments_case(draw: Draw) -> Case:
    """Segments of any widths, in any order, with entries at the ends of the format."""
    source, target = draw.one_of("int8", "int16"), draw.one_of("int8", "int16")
    bits, fraction_bits = parse_format(source).bits, draw.one_of(0, 0, 4, 8)
    intervals = 1 << draw.integer(0, 4)
    pieces = [(0, bits - intervals.bit_length() + 1)]
    for _ in range(draw.integer(0, 12)):
        start, shift = pieces[draw.integer(0, len(pieces) - 1)]
        if shift:
            pieces.remove((start, shift))
            pieces += [(start, shift - 1), (start + (intervals << (shift - 1)), shift - 1)]
    pieces.sort()
    kind = draw.one_of("uniform", "ends", "small")
    entries = [draw.code(target, kind) << fraction_bits for _ in range(len(pieces) * intervals)]
    entries = [entry + draw.integer(0, (1 << fraction_bits) - 1) for entry in entries] + [0]
    entries = [min(entry, parse_format(target).high << fraction_bits) for entry in entries]
    starts, shifts = (torch.tensor(column, dtype=torch.int32) for column in zip(*pieces, strict=True))
    x = torch.cat([draw.codes(source, [20]), draw.codes(source, [20])]).reshape(2, 4, 5)
    options = {"source": source, "fraction_bits": fraction_bits, "format": target}
    return Case("lookup_segments", (x, torch.tensor(entries, dtype=torch.int32), starts, shifts), options)


def steps_case(draw: Draw) -> Case:
    source, target = draw.one_of("int8", "int16"), draw.one_of("int8", "int16", "int32")
    x = draw.codes(source, draw.shape(draw.integer(0, 3)))
    near = [*x.flatten().tolist(), *(code + 1 for code in x.flatten().tolist())]
    thresholds = sorted({*near[: draw.integer(0, len(near))], *draw.integers(draw.integer(0, 3), -200, 200)})
    values = [draw.code(target, draw.one_of("uniform", "ends")) for _ in range(len(thresholds) + 1)]
    return Case(
        "lookup_steps",
        (x, torch.tensor(thresholds, dtype=torch.int32), torch.tensor(values, dtype=STORAGE[target])),
        {},
    )


def two_tables_case(draw: Draw) -> Case:
    source, target = draw.one_of("int8", "uint8"), draw.one_of("int8", "int16", "uint8")
    shape = draw.one_of([2, 7, 3, 3], [1, 9, 4, 2], [66], [5, 30], [63], [2, 32])
    entries = [draw.code(target, "uniform") for _ in range(512)]
    tables = torch.tensor(entries, dtype=STORAGE[target]).reshape(2, 256)
    return Case("lookup_two", (draw.codes(source, shape), tables), {"source": source})


FUNCTION_CASES: dict[str, Callable[[Draw], Case]] = {
    "compare": compare_case,
    "lookup_segments": segments_case,
    "lookup_steps": steps_case,
    "lookup_two": two_tables_case,
    "prelu": prelu_case,
}

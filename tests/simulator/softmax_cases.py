"""Cases for softmax: all formats, dimensions of every length, scales from much too fine to much too coarse."""

from __future__ import annotations

import math

import torch

from tests.simulator.cases import Case, Draw


def softmax_case(draw: Draw) -> Case:
    wide = draw.chance(0.5)
    shape = [*draw.shape(draw.integer(0, 2)), draw.integer(1, 9)]
    x = draw.operand(shape, "int16" if wide else "int8")
    real = 2.0 ** -draw.integer(1, 14 if wide else 11) * draw.one_of(1.0, 0.75, 1.0 - 2.0**-20, 1.37)
    mantissa, shift = math.frexp(real * (6553.5 if wide else 2.0**26))
    multiplier = min(math.floor(mantissa * 2.0**31 + 0.5), 2**31 - 1)
    dim = draw.integer(-len(shape), len(shape) - 1)
    options = {"dim": dim, "arithmetic": f"int32:wrap/tflite_softmax{16 if wide else ''}", **draw.output()}
    return Case("softmax", (x, torch.tensor(multiplier), torch.tensor(shift)), options)

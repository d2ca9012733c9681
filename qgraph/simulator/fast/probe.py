"""What this machine computes exactly in 8 bits, found out by computing extremes.

CPUs without 8-bit dot products (VNNI and its kin) add pairs of products in 16 bits, which saturate: oneDNN and
`_int_mm` then return wrong sums without a word. One call per kind of kernel with the largest codes shows it. What fails
is carried in floats instead, which is exact under the bounds that every kernel checks.

`QGRAPH_INT8=0` in the environment says that nothing passes, `QGRAPH_NUMBA=0` that numba is not there.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import torch.nn.functional as F

from qgraph.numerics import qint8, quint8

# Kind of convolution: channels in, channels out, kernel size, groups.
_CONVOLUTIONS = {
    "dense": (64, 32, 3, 1),
    "pointwise": (96, 32, 1, 1),
    "depthwise": (32, 32, 3, 32),
    "grouped": (64, 64, 3, 4),
}


@lru_cache(maxsize=1)
def exact_kinds() -> frozenset[str]:
    """Kinds of 8-bit kernels that are exact here: those of `_CONVOLUTIONS` and `matrix`."""
    if os.environ.get("QGRAPH_INT8") == "0":
        return frozenset()
    found = {kind for kind in _CONVOLUTIONS if _convolution_is_exact(kind)}
    return frozenset(found | ({"matrix"} if _matrix_is_exact() else set()))


def kind_of(channels_in: int, channels_out: int, kernel: tuple[int, int], groups: int) -> str:
    """The kind of a convolution."""
    if groups == 1:
        return "pointwise" if kernel == (1, 1) else "dense"
    return "depthwise" if groups == channels_in else "grouped"


def _convolution_is_exact(kind: str) -> bool:
    channels, out, size, groups = _CONVOLUTIONS[kind]
    try:
        for code, zero in ((quint8.qmax, 0), (0, quint8.qmax), (quint8.qmax, 1 << 7)):
            for value in (qint8.qmax, qint8.qmin):
                x = torch.full((1, channels, 5, 5), code, dtype=torch.uint8).contiguous(
                    memory_format=torch.channels_last
                )
                weight = torch.full((out, channels // groups, size, size), value, dtype=torch.int8)
                found = Convolution(weight, None, [1, 1], [size // 2] * 2, [1, 1], groups, zero)(x)
                expected = F.conv2d(x.double() - zero, weight.double(), None, 1, size // 2, 1, groups)
                if not torch.equal(found.double(), expected):
                    return False
    except (AttributeError, RuntimeError, NotImplementedError):  # this torch has no such operator, or not here
        return False
    return True


def _matrix_is_exact() -> bool:
    try:
        for dtype, code in ((torch.int8, qint8.qmin), (torch.int8, qint8.qmax), (torch.uint8, quint8.qmax)):
            for value in (qint8.qmax, qint8.qmin):
                x, y = torch.full((32, 256), code, dtype=dtype), torch.full((48, 256), value, dtype=torch.int8)
                for rows in (1, 32):
                    found = torch._int_mm(x[:rows], y.t())
                    if not torch.equal(found, torch.full((rows, 48), 256 * code * value, dtype=torch.int32)):
                        return False
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


@lru_cache(maxsize=1)
def addcmul_fuses() -> bool:
    """Whether `torch.addcmul` rounds `a + x * m` once on this CPU, in every loop it may take.

    The products lie beside a tie by less than a float32 product can tell.
    """
    shift, places, pairs = 26, torch.finfo(torch.float32).bits - 8, []
    for x in range((1 << 14) + 1, 1 << 15, 64):
        for beside in (1, -1):
            m = ((1 << shift - 1) + beside) * pow(x, -1, 1 << shift) % (1 << shift)
            if m < 1 << places:
                pairs.append((x, m))
    x, m = torch.tensor(pairs, dtype=torch.float64).t().contiguous()
    m = m * 2.0**-shift
    expected, whole = torch.round(x * m), torch.tensor(TO_WHOLE)
    single_x, single_m = x.float(), m.float()
    for count in (1, 7, 16, len(pairs)):
        rows = single_x[:count].expand(3, count).contiguous()
        if not torch.equal((torch.addcmul(whole, rows, single_m[:count]) - whole)[1].double(), expected[:count]):
            return False
    ones = torch.ones(19)
    found = [torch.addcmul(whole, ones * a, b)[::18] - whole for a, b in zip(single_x, single_m, strict=True)]
    return torch.equal(torch.stack(found, 1).double(), expected.expand(2, -1))


TO_WHOLE = float(
    3 << 22
)  # added to a float32 within 2**22, it leaves no bits for fractions: the sum is rounded to even


class Convolution:
    """oneDNN's 8-bit convolution of uint8 codes, sums as float32: exact while they stay within 2**24.

    Args:
        weight: int8 `[out, in / groups, kh, kw]`.
        bias: float32 `[out]`, whole numbers.
        zero: code that counts as zero, of the padding too.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        zero: int,
    ) -> None:
        self.weight, self.bias, self.zero = weight, bias, zero
        self.geometry = (stride, padding, dilation, groups)
        self.ones = torch.ones(weight.shape[0])
        self.zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
        self.packed: dict[tuple[int, ...], torch.Tensor] = {}

    def at(self, zero: int) -> None:
        """Changes the zero point; the packed weights hold a sum that depends on it."""
        if zero != self.zero:
            self.zero = zero
            self.packed.clear()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Sums, float32 `[N, out, *]`, channels_last as `x` should be."""
        shape = tuple(x.shape)
        packed = self.packed.get(shape)
        if packed is None:
            if len(self.packed) > 1:  # oneDNN chooses a layout for a shape; a batch and its rest are two
                self.packed.clear()
            # Layouts are remembered by shape, not by zero point, and a layout without room for what a zero point takes
            # away is repacked at every call. One more row gives the same layout under another name.
            n, c, h, w = shape
            size = [n, c, h + (self.zero != 0), w]
            packed = torch.ops.onednn.qconv_prepack(self.weight, self.ones, 1.0, self.zero, *self.geometry, size)
            self.packed[shape] = packed
        sums: torch.Tensor = torch.ops.onednn.qconv_pointwise(
            x,
            1.0,
            self.zero,
            packed,
            self.ones,
            self.zeros,
            self.bias,
            *self.geometry,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return sums

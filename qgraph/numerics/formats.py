"""Number formats as values.

Invariants:
- `QType` alone knows the bounds of an integer format; no other module writes 127 or -128.
- A format has one name (`str(qtype)`), and `parse_format` reads that name back.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

import torch

from qgraph.errors import UserError, did_you_mean

# Narrowest first: (bits of a signed format it holds, bits of an unsigned one, dtype).
_STORAGE = (
    (0, 8, torch.uint8),
    (8, 7, torch.int8),
    (16, 15, torch.int16),
    (32, 31, torch.int32),
    (64, 63, torch.int64),
)


@dataclass(frozen=True, order=True)
class QType:
    """A two's complement or unsigned integer format of `bits` bits.

    Raises:
        UserError: `bits` is not between 2 and 64.
    """

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 64:
            raise UserError(
                f"an integer format of {self.bits} bits is not supported",
                why="formats have 2 to 64 bits",
                fix="use for example QType(8) or QType(16)",
            )

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def storage(self) -> torch.dtype:
        """Smallest torch dtype that holds every code."""
        for signed_bits, unsigned_bits, dtype in _STORAGE:
            if self.bits <= (signed_bits if self.signed else unsigned_bits):
                return dtype
        raise UserError(f"no torch dtype stores {self}", fix="use a signed format of at most 64 bits")

    def saturate(self, codes: torch.Tensor) -> torch.Tensor:
        """`codes` (any shape, integer or float dtype) clamped to the bounds, dtype unchanged."""
        return codes.clamp(*self._bounds(codes.dtype))

    def wrap(self, codes: torch.Tensor) -> torch.Tensor:
        """`codes` (any shape, int64) reduced modulo 2**bits into the bounds (two's complement)."""
        if self.signed:  # the shift back copies the sign bit
            return (codes << (64 - self.bits)) >> (64 - self.bits)
        return codes & ((1 << self.bits) - 1)

    def contains(self, codes: torch.Tensor) -> torch.Tensor:
        """Boolean tensor of `codes`' shape: which codes lie within the bounds."""
        low, high = self._bounds(codes.dtype)
        return (codes >= low) & (codes <= high)

    def _bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """The bounds as far as `dtype` reaches: its own limits, or the nearest floats inside."""
        if not dtype.is_floating_point:
            limits = torch.iinfo(dtype)
            return max(self.qmin, limits.min), min(self.qmax, limits.max)
        precision = 1 - int(math.log2(torch.finfo(dtype).eps))
        excess = max(self.qmax.bit_length() - precision, 0)
        # qmax is all ones: its leading ones are the largest float below it; qmin is a power of two or zero.
        return float(self.qmin), float(self.qmax >> excess << excess)

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


@dataclass(frozen=True, order=True)
class FloatFormat:
    """A floating-point format; `bits` is 16 (IEEE half) or 32 (IEEE single)."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (16, 32):
            raise UserError(f"a float format of {self.bits} bits is not supported", fix="use 16 or 32")

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of this format."""
        return torch.float16 if self.bits == 16 else torch.float32

    def __str__(self) -> str:
        return f"float{self.bits}"


Format: TypeAlias = QType | FloatFormat

qint4 = QType(4)
qint8 = QType(8)
qint16 = QType(16)
qint32 = QType(32)
quint8 = QType(8, signed=False)
float16 = FloatFormat(16)
float32 = FloatFormat(32)

_NAMED: dict[str, Format] = {str(entry): entry for entry in (qint4, qint8, qint16, qint32, quint8, float16, float32)}


def parse_format(name: str) -> Format:
    """The format called `name`, such as `int8`, `qint8`, `uint8` or `float16`.

    Raises:
        UserError: no format has that name.
    """
    plain = name.removeprefix("q")
    if plain in _NAMED:
        return _NAMED[plain]
    integer = re.fullmatch(r"(u?)int([0-9]{1,2})", plain)
    if integer is None:
        raise UserError(f"unknown number format {name!r}", fix=did_you_mean(plain, _NAMED))
    return QType(int(integer[2]), signed=not integer[1])


def parse_qtype(name: str) -> QType:
    """The integer format called `name`.

    Raises:
        UserError: no integer format has that name.
    """
    parsed = parse_format(name)
    if not isinstance(parsed, QType):
        raise UserError(f"{name!r} is not an integer format", fix="use for example int8 or int16")
    return parsed


def as_format(value: Format | torch.dtype | str) -> Format:
    """`value` as a format; torch dtypes and names are understood.

    Raises:
        UserError: there is no such format.
    """
    if isinstance(value, (QType, FloatFormat)):
        return value
    return parse_format(str(value).removeprefix("torch."))

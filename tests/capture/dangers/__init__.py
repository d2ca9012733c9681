"""Forwards as people really write them, each with something that a capture may get wrong."""

from __future__ import annotations

from tests.capture.dangers import basics, language, numerics, values, writes
from tests.capture.dangers.basics import BufferUpdate, PlainAttributeAccumulates
from tests.capture.dangers.common import EXACT, FREE, REFUSED, Danger

DANGERS = [*basics.DANGERS, *language.DANGERS, *writes.DANGERS, *values.DANGERS, *numerics.DANGERS]

__all__ = [
    "DANGERS",
    "EXACT",
    "FREE",
    "REFUSED",
    "BufferUpdate",
    "Danger",
    "PlainAttributeAccumulates",
]

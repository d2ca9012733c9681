"""Converting a calibrated ResNet-18: CPU seconds, with the default checks and without."""

from __future__ import annotations

from qgraph import CheckLevel, calibrate, convert, prepare
from tools.bench.measure import interleaved, middle, table
from tools.bench.models import build, example

ALLOWED_SECONDS = 0.35


def run(*, rounds: int = 7) -> str:
    """The table; `ok` where converting takes less than it may."""
    prepared = prepare(build("resnet18"), example())
    calibrate(prepared, [example()], progress=False)
    times = interleaved(
        {
            "default checks": lambda: convert(prepared),
            "no checks": lambda: convert(prepared, checks=CheckLevel.NONE),
        },
        rounds=rounds,
    )
    rows: list[tuple[object, ...]] = []
    for name in times:
        seconds = middle(times, name)
        rows.append((name, f"{seconds:.2f}", ALLOWED_SECONDS, "ok" if seconds <= ALLOWED_SECONDS else "MISSED"))
    return table(("ResNet-18, one thread", "convert, s", "allowed", ""), rows)

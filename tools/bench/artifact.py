"""Saving and loading a ResNet-50: seconds, file size."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from qgraph import calibrate, convert, load, prepare, save
from tools.bench.measure import table
from tools.bench.models import build, example

ALLOWED_SECONDS = 1.0


def run(*, rounds: int = 5) -> str:
    """The table; `ok` where loading takes less than it may."""
    x = example()
    prepared = prepare(build("resnet50"), (x,))
    calibrate(prepared, [(x,)], progress=False)
    integer = convert(prepared)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.qgraph"
        saving, loading = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            save(integer, path)
            written = time.perf_counter()
            load(path)
            loading.append(time.perf_counter() - written)
            saving.append(written - start)
        size = path.stat().st_size
    seconds = statistics.median(loading)
    verdict = "ok" if seconds <= ALLOWED_SECONDS else "MISSED"
    row = (
        "resnet50",
        f"{size / 2**20:.1f}",
        f"{statistics.median(saving):.2f}",
        f"{seconds:.2f}",
        f"{ALLOWED_SECONDS}",
    )
    return table(("model", "MiB", "save, s", "load, s", "allowed", ""), [(*row, verdict)])

"""Timing for ratios: one thread, CPU seconds of the process, candidates interleaved, medians.

Machines are shared and noisy: absolute times move by a factor of two within minutes, ratios of one round do not.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Work = Callable[[], object]


def interleaved(candidates: Mapping[str, Work], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """CPU seconds of every candidate in every round; each round runs all of them, in order."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, work in candidates.items():
            gc.collect()
            started = time.process_time()
            kept = work()
            elapsed = time.process_time() - started
            del kept
            if number >= warmup:
                times[name].append(elapsed)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of `name / base`."""
    return median(a / b for a, b in zip(times[name], times[base], strict=True))


def middle(times: Mapping[str, list[float]], name: str) -> float:
    """Median seconds."""
    return median(times[name])


def table(headers: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)

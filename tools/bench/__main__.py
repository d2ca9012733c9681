"""Runs benchmarks and prints their tables.

`python -m tools.bench [prepare growth calibration fidelity artifact convert simulate accuracy]`
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tools.bench import accuracy, artifact, calibration, convert, fidelity, growth, prepare, simulate

BENCHMARKS: dict[str, Callable[[], str]] = {
    "prepare": prepare.run,
    "growth": growth.run,
    "calibration": calibration.run,
    "fidelity": fidelity.run,
    "artifact": artifact.run,
    "convert": convert.run,
    "simulate": simulate.run,
    "accuracy": accuracy.run,
}


def main(names: list[str]) -> int:
    """Runs the named benchmarks, all if none is named; returns 1 if a figure to reach was missed."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    missed = False
    for name in names or BENCHMARKS:
        text = BENCHMARKS[name]()
        missed |= "MISSED" in text
        print(f"## {name}\n\n{text}\n", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

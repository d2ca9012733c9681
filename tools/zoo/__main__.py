"""The zoo's table: `python -m tools.zoo [NAME ...] [--target bpu] [--write]`.

Each entry runs in a process of its own, so that one that hangs or dies does not take the others along.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from tools.zoo.entry import Entry

PAGE = Path(__file__).parents[2] / "docs/zoo.md"
LIMIT_S = 300

HEAD = """# Zoo

Architectures of the field with random weights, taken along the whole road for target `{target}`:
`python -m tools.zoo --write`. Definitions of `transformers` are small configurations of the real classes; the
others are in `tools/zoo/`.

*exact*: the captured graph equals the model bit for bit on two further inputs and two further batch sizes.
*simulated*: there is an integer graph, it runs, and fast and reference kernels agree. *float MACs*: share of the
multiply-accumulates in float islands. Random models say nothing about accuracy.

"""


def entries() -> dict[str, Entry]:
    """All entries by name."""
    from tools.zoo import own_entries, transformers_entries

    return {entry.name: entry for entry in (*own_entries.ENTRIES, *transformers_entries.ENTRIES)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes architectures along the whole road.")
    parser.add_argument("names", nargs="*", help="entries; all if none")
    parser.add_argument("--target", default="bpu")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_one(given.one, given.target)))
        return
    known = entries()
    unknown = [name for name in given.names if name not in known]
    if unknown:
        parser.error(f"no entry is named {unknown[0]!r}; there are {', '.join(known)}")
    rows = []
    for name in given.names or known:
        rows.append(_in_process(known[name], given.target))
        print(_line(rows[-1]), flush=True)
    print(summary(rows))
    if given.write:
        PAGE.write_text(page(rows, given.target), encoding="utf-8")


def _one(name: str, target: str) -> dict[str, Any]:
    import torch

    from tools.zoo.road import travel

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcome = travel(entries()[name], target)
    return {**outcome.as_dict(), "runs": outcome.runs}


def _in_process(entry: Entry, target: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.zoo", "--one", entry.name, "--target", target]
    failed = {"name": entry.name, "family": entry.family, "reached": "none", "runs": False, "operators": 0}
    failed.update({"islands": [], "float_macs": 0.0, "seconds": 0.0})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {**failed, "reason": f"it took longer than {LIMIT_S} s", "seconds": float(LIMIT_S)}
    if done.returncode:
        last = done.stderr.strip().splitlines()
        return {**failed, "reason": f"the process ended with {done.returncode}: {last[-1] if last else ''}"}
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def _line(row: dict[str, Any]) -> str:
    return f"{row['name']:22} {row['reached']:10} {row['float_macs']:6.1%} {row['seconds']:6.1f} s  {row['reason']}"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many reached what."""
    captured = sum(row["reached"] not in ("none", "captured") for row in rows)
    running = sum(row["runs"] for row in rows)
    return f"{len(rows)} architectures: {captured} captured and exact, {running} to a running integer graph."


def page(rows: list[dict[str, Any]], target: str) -> str:
    """The text of the page."""
    table = [
        (r["name"], r["family"], r["reached"], r["operators"], len(r["islands"]), f"{r['float_macs']:.1%}", r["reason"])
        for r in rows
    ]
    headers = ("architecture", "family", "reached", "operators", "in float", "float MACs", "reason it went no further")
    reasons = Counter(island.partition(": ")[2] for row in rows for island in row["islands"])
    shown = [(count, reason.replace("|", "\\|")) for reason, count in reasons.most_common(20)]
    why = tabulate(shown, ("operators", "why they stay in float"), tablefmt="github")
    return f"{HEAD.format(target=target)}{summary(rows)}\n\n{tabulate(table, headers, tablefmt='github')}\n\n{why}\n"


if __name__ == "__main__":
    main()

"""How often integers differ from fake quantization, per site and given the same integer inputs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from qgraph.analysis import SiteConsistency, compare_sites
from qgraph.demo import run_demo
from qgraph.quantization import calibrate, convert, prepare
from tools.bench.measure import table
from tools.bench.models import MODELS, build, example

_TABLES = ("exp", "reciprocal", "rsqrt", "sigmoid", "gelu", "silu", "tanh")


def run() -> str:
    """The demo's figures, then one row per benchmark model."""
    with tempfile.TemporaryDirectory() as folder:
        demo = run_demo(Path(folder), say=lambda line: None, progress=False)
    rows = [_row("demo, 500 test images", demo.sites)]
    for name in MODELS:
        prepared = prepare(build(name), example())
        calibrate(prepared, [example(4), example(4)], progress=False)
        sites = compare_sites(prepared, convert(prepared), (torch.randn(2, 3, 224, 224),))
        rows.append(_row(f"{name}, random weights", tuple(sites)))
    drop = (demo.float_accuracy - demo.integer_accuracy) * 100
    verdict = "ok" if drop <= 0.5 else "MISSED"
    headers = (
        "model",
        "elements",
        "differing",
        "next to a tie",
        "lowest agreement of a site",
        "largest",
        "unexplained",
        "lowest, int16 tables",
        "largest, int16 tables",
    )
    accuracy = (
        f"float {demo.float_accuracy:.2%}, integer {demo.integer_accuracy:.2%}: {drop:.2f} points lower ({verdict})"
    )
    return f"Demo: {accuracy}, SQNR {demo.sqnr:.1f} dB.\n\n" + table(headers, rows)


def _row(name: str, sites: tuple[SiteConsistency, ...]) -> tuple[object, ...]:
    interpolated = [site for site in sites if site.op in _TABLES and site.format == "int16"]
    others = [site for site in sites if site not in interpolated]
    elements, differing = sum(s.elements for s in sites), sum(s.differing for s in sites)
    near = sum(s.near_tie for s in sites)
    unexplained = sum(s.unexplained for s in others)
    return (name, elements, differing, near, *_worst(others), unexplained, *_worst(interpolated))


def _worst(sites: list[SiteConsistency]) -> tuple[str, str]:
    if not sites:
        return "-", "-"
    return f"{min(site.agreement for site in sites):.5%}", str(max(site.largest for site in sites))


if __name__ == "__main__":
    print(run())

"""The demo: the whole road on real input, and a report of it.

train -> trace -> fuse -> prepare -> calibrate -> convert -> simulate the test set in integers
"""

from __future__ import annotations

import html
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tabulate import tabulate
from torch import fx

from qgraph.analysis import SiteConsistency, compare_sites
from qgraph.capture import trace
from qgraph.demo.model import DigitsNet
from qgraph.demo.training import EPOCHS, Digits, accuracy, calibration_batches, load_digits, train
from qgraph.errors import DrawError, UserError
from qgraph.ir.copying import copy_graph
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op import OpKind
from qgraph.ir.text import print_graph
from qgraph.ir.values import TensorSpec
from qgraph.pipeline import Pass, PassObserver, PassReport
from qgraph.quantization import calibrate, convert, prepare
from qgraph.simulator import Simulator
from qgraph.viz import draw

_STAGES = ("captured", "fused", "prepared", "integer")
_FUSED_AFTER = "fuse-conv-bn-add-relu"

Say = Callable[[str], None]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Args:
        float_accuracy, fake_accuracy, integer_accuracy: shares of correct test images.
        sqnr: signal to quantization noise of the integer logits against float, in dB.
        sites: agreement of integers and fake quantization per site, each on the same integer inputs.
        float_bytes, integer_bytes: bytes of weights and biases before and after.
        ops: (operator, format) to number of operators in the integer graph.
        islands: operators that stay in float, with the reason.
        folder: where the report is.
    """

    float_accuracy: float
    fake_accuracy: float
    integer_accuracy: float
    sqnr: float
    sites: tuple[SiteConsistency, ...]
    float_bytes: int
    integer_bytes: int
    ops: dict[tuple[str, str], int]
    islands: tuple[str, ...]
    folder: Path

    def rows(self) -> list[tuple[str, str]]:
        """The table the demo prints."""
        elements = sum(site.elements for site in self.sites)
        differing = sum(site.differing for site in self.sites)
        formats = Counter[str]()
        for (_, name), count in self.ops.items():
            formats[name] += count
        return [
            ("float accuracy", f"{self.float_accuracy:.2%}"),
            ("fake-quant accuracy", f"{self.fake_accuracy:.2%}"),
            ("integer accuracy", f"{self.integer_accuracy:.2%}"),
            ("SQNR of the logits, integer against float", f"{self.sqnr:.1f} dB"),
            (
                "integers that differ from fake-quant, all sites",
                f"{differing} of {elements}",
            ),
            ("largest difference", f"{max(site.largest for site in self.sites)} step(s)"),
            ("lowest agreement of a site", _worst(self.sites)),
            ("bytes of weights", f"{self.float_bytes} float, {self.integer_bytes} integer"),
            ("operators per format", ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))),
            ("float islands", "; ".join(self.islands) or "none"),
        ]

    def table(self) -> str:
        """`rows` as text."""
        return tabulate(self.rows(), tablefmt="simple_outline")


def run_demo(folder: Path, *, say: Say, progress: bool = True, epochs: int = EPOCHS) -> DemoResult:
    """Runs the demo and writes its report.

    Args:
        folder: where pictures, texts and tables go; created if missing.
        say: receives lines for the user.
        progress: whether to show progress bars.
        epochs: how long to train.

    Returns:
        The figures of the table.

    Raises:
        UserError: nothing can be written to `folder`, or scikit-learn is not installed.
    """
    _make_folder(folder)
    digits = load_digits()
    model = _timed(
        "train a small residual network on handwritten digits",
        say,
        lambda: train(digits, epochs=epochs, progress=progress),
    )
    example = digits.train_images[:1]
    captured = _timed("capture it as a graph, replayed and compared exactly", say, lambda: trace(model, example))
    keeper = _KeepFused()
    prepared = _timed(
        "run the passes, each checked numerically", say, lambda: prepare(model, example, observers=[keeper])
    )
    batches = calibration_batches(digits)
    _timed("calibrate on 128 images", say, lambda: calibrate(prepared, batches, progress=progress))
    integer = _timed("lower to integer operators", say, lambda: convert(prepared))
    result = _timed(
        "simulate the whole test set in integers", say, lambda: _measure(model, prepared, integer, digits, folder)
    )
    stages = dict(zip(_STAGES, (captured, keeper.graph or captured, prepared, integer), strict=True))
    _write_report(folder, stages, result, say)
    return result


def _make_folder(folder: Path) -> None:
    """Makes the folder and tries to write to it, before a minute is spent on what goes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder}",
            why=f"{type(error).__name__}: {error}",
            fix="choose a folder you may write to",
        ) from error


class _KeepFused(PassObserver):
    """Keeps the graph as it was right after fusion, to be drawn."""

    graph: fx.GraphModule | None = None

    def after(self, owner: Pass, gm: fx.GraphModule, report: PassReport) -> None:
        if owner.name == _FUSED_AFTER:
            self.graph = copy_graph(gm)


def _timed(what: str, say: Say, work: Callable[[], _Result]) -> _Result:
    started = time.perf_counter()
    result = work()
    say(f"{what} ({time.perf_counter() - started:.1f} s)")
    return result


def _measure(
    model: DigitsNet, prepared: fx.GraphModule, integer: fx.GraphModule, digits: Digits, folder: Path
) -> DemoResult:
    simulator = Simulator(integer)
    images = digits.test_images
    with torch.no_grad():
        exact, simulated = model(images), simulator(images)
    noise = (exact - simulated).double().pow(2).sum()
    sqnr = 10 * torch.log10(exact.double().pow(2).sum() / noise).item()
    return DemoResult(
        float_accuracy=accuracy(model, digits),
        fake_accuracy=accuracy(prepared, digits),
        integer_accuracy=accuracy(simulator, digits),
        sqnr=sqnr,
        sites=tuple(compare_sites(prepared, integer, (images,))),
        float_bytes=_bytes(list(prepared.parameters())),
        integer_bytes=_bytes([t for name, t in integer.named_buffers() if name.endswith(("_weight", "_bias"))]),
        ops=_ops(integer),
        islands=tuple(note.removeprefix("float: ") for note in graph_info(integer).notes if note.startswith("float: ")),
        folder=folder,
    )


def _ops(integer: fx.GraphModule) -> dict[tuple[str, str], int]:
    counts: Counter[tuple[str, str]] = Counter()
    for node in integer.graph.nodes:
        record = info(node)
        if record.op.kind in (OpKind.INPUT, OpKind.OUTPUT, OpKind.CONSTANT, OpKind.STRUCTURE):
            continue
        name = "float32" if record.qparams is None else str(record.qparams.qtype)
        if isinstance(record.value, TensorSpec):
            counts[(record.op.name, name)] += 1
    return dict(counts)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _worst(sites: tuple[SiteConsistency, ...]) -> str:
    worst = min(sites, key=lambda site: site.agreement)
    return f"{worst.agreement:.4%} at {worst.site} ({worst.op})"


def _write_report(folder: Path, stages: dict[str, fx.GraphModule], result: DemoResult, say: Say) -> None:
    drawn = {}
    problem: DrawError | None = None
    for number, (name, gm) in enumerate(stages.items()):
        stem = f"{number}_{name}"
        (folder / f"{stem}.txt").write_text(print_graph(gm), encoding="utf-8")
        try:
            drawn[name] = draw(gm, folder / f"{stem}.svg")
        except DrawError as error:
            drawn[name] = draw(gm, folder / f"{stem}.dot")
            problem = error
    if problem is not None:
        say(f"the report has .dot files in place of pictures: {problem.what}\n  what to do: {problem.fix}")
    sites = tabulate(
        [(s.site, s.op, s.format, s.elements, s.differing, s.largest) for s in result.sites],
        headers=("site", "op", "format", "elements", "differing", "largest"),
    )
    ops = tabulate(
        [(op, name, count) for (op, name), count in sorted(result.ops.items())], headers=("op", "format", "count")
    )
    (folder / "report.txt").write_text(f"{result.table()}\n\n{sites}\n\n{ops}\n", encoding="utf-8")
    (folder / "report.html").write_text(_page(result, sites, ops, drawn), encoding="utf-8")


def _page(result: DemoResult, sites: str, ops: str, drawn: dict[str, Path]) -> str:
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in result.rows())
    stages = "".join(_figure(name, path) for name, path in drawn.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>qgraph demo</title><style>
body {{ font-family: sans-serif; margin: 2em; max-width: 100%; }}
table {{ border-collapse: collapse; }} td {{ border: 1px solid #ccc; padding: 0.3em 0.8em; }}
main {{ display: flex; gap: 2em; align-items: flex-start; overflow-x: auto; }}
figure {{ margin: 0; }} figcaption {{ font-weight: bold; padding: 0.5em 0; }} img {{ border: 1px solid #ddd; }}
</style></head><body><h1>From float to integers</h1><table>{rows}</table>
<h2>The four stages</h2><main>{stages}</main>
<h2>Agreement of integers and fake quantization, site by site</h2><pre>{html.escape(sites)}</pre>
<h2>Operators</h2><pre>{html.escape(ops)}</pre></body></html>
"""


def _figure(name: str, path: Path) -> str:
    picture = f'<img src="{path.name}" alt="the {name} graph">' if path.suffix == ".svg" else ""
    return (
        f'<figure><figcaption><a href="{path.name}">{name}</a> (<a href="{path.stem}.txt">text</a>)</figcaption>'
        f"{picture}</figure>"
    )

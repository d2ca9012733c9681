"""One entry along the whole road: capture, prepare, calibrate, convert, simulate; what holds at each step."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

import qgraph
from qgraph.capture.values.variants import varied
from qgraph.capture.verification.compare import first_difference
from qgraph.capture.verification.process import reproducible
from qgraph.errors import QGraphError
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op import OpKind
from qgraph.simulator.cost import macs_of
from tools.zoo.entry import Entry

BATCH, BATCHES, SEEDS = 2, (1, 5), (11, 12)
MOST_IN_FLOAT = 0.05  # of the multiply-accumulates


@dataclass
class Outcome:
    """What happened to one entry.

    Args:
        reached: the last step that succeeded: `none`, `captured`, `exact`, `prepared`, `integer` or `simulated`.
        reason: why it went no further.
        operators: nodes of the integer graph that compute.
        islands: those that compute in float, and why.
        float_macs: their share of the multiply-accumulates.
        seconds: of the whole road.
    """

    name: str
    family: str
    reached: str = "none"
    reason: str = ""
    operators: int = 0
    islands: list[str] = field(default_factory=list)
    float_macs: float = 0.0
    seconds: float = 0.0

    @property
    def runs(self) -> bool:
        """Whether a running integer graph came out, with few multiply-accumulates in float."""
        return self.reached == "simulated" and self.float_macs <= MOST_IN_FLOAT

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def travel(entry: Entry, target: str = "bpu") -> Outcome:
    """Takes one entry as far as it goes."""
    outcome = Outcome(entry.name, entry.family)
    start = time.perf_counter()
    try:
        _travel(entry, target, outcome)
    except QGraphError as error:
        outcome.reason = f"{type(error).__name__}: {error.what}" + (f" ({error.where})" if error.where else "")
    except Exception as error:  # noqa: BLE001 - anything else is a defect, and shown as one
        outcome.reason = f"defect: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    outcome.seconds = time.perf_counter() - start
    return outcome


def _travel(entry: Entry, target: str, outcome: Outcome) -> None:
    torch.manual_seed(0)
    model, example = _settled(entry)
    captured = qgraph.trace(model, example, waive=entry.waive)
    outcome.reached = "captured"
    difference = _first_difference(entry, model, captured, example)
    if difference is not None:
        outcome.reason = f"the graph differs from the model on other inputs: {difference}"
        return
    outcome.reached = "exact"
    prepared = qgraph.prepare(model, example, target=target, waive=entry.waive, verify=False)
    outcome.reached = "prepared"
    qgraph.calibrate(prepared, [example, *(varied(example, seed) for seed in SEEDS)], progress=False)
    integer = qgraph.convert(prepared)
    outcome.reached = "integer"
    _count(integer, outcome)
    with torch.no_grad():
        fast = qgraph.Simulator(integer)(**example)
        reference = qgraph.Simulator(integer, kernels="reference")(**example)
    difference = first_difference(reference, fast)
    if difference is not None:
        outcome.reason = f"fast and reference kernels differ: {difference}"
        return
    outcome.reached = "simulated"


def _settled(entry: Entry) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, after two batches in training mode have given its batch norms statistics."""
    model = entry.build()
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        model.train()
        with torch.no_grad():
            for _ in range(2):
                model(**entry.example(4))
    return model.eval(), entry.example(BATCH)


def _first_difference(entry: Entry, model: nn.Module, gm: fx.GraphModule, example: dict[str, Any]) -> str | None:
    """On two further inputs and two further batch sizes; None where everything is equal."""
    fixed = graph_info(gm).batch_fixed
    others = [] if fixed is not None else [entry.example(batch) for batch in BATCHES]
    with torch.no_grad(), reproducible():
        for inputs in (*(varied(example, seed) for seed in SEEDS), *others):
            found = first_difference(model(**inputs), gm(**inputs))
            if found is not None:
                return str(found)
    return None if fixed is None else f"the batch size is fixed: {fixed}"


def _count(integer: fx.GraphModule, outcome: Outcome) -> None:
    total = in_float = 0
    for node in integer.graph.nodes:
        record = info(node)
        if not node.op.startswith("call") or record.op.kind in (OpKind.STRUCTURE, OpKind.INPUT):
            continue
        outcome.operators += 1
        macs = macs_of(node, integer)
        total += macs
        if integer_name(node.target) is None and record.float_reason:
            in_float += macs
            outcome.islands.append(f"{record.site} ({record.op}): {record.float_reason}")
    outcome.float_macs = in_float / total if total else 0.0

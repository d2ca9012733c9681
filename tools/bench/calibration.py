"""Calibration with min-max observers, 16 batches of 8, against the float eager forward of the same batches."""

from __future__ import annotations

import copy
import warnings

import torch

from qgraph.quantization import calibrate, prepare
from tools.bench.measure import interleaved, ratio, table
from tools.bench.models import build, example

BATCHES, BATCH = 16, 8
ALLOWED = 0.9


def run(*, rounds: int = 5, models: tuple[str, ...] = ("resnet18", "mobilenetv2", "vit_tiny")) -> str:
    """The table; only ResNet-18 has a figure to reach."""
    rows = []
    for name in models:
        model = build(name)
        data = [torch.randn(BATCH, 3, 224, 224) for _ in range(BATCHES)]
        prepared, peer = prepare(model, example()), _torch_ao(model) if name == "resnet18" else None
        candidates = {
            "float": lambda model=model, data=data: _loop(model, data),
            "qgraph": lambda prepared=prepared, data=data: calibrate(prepared, data, progress=False),
        }
        if peer is not None:
            candidates["torch.ao"] = lambda peer=peer, data=data: _loop(peer, data)
        times = interleaved(candidates, rounds=rounds if name == "resnet18" else 2)
        ours = ratio(times, "qgraph", "float")
        theirs = f"{ratio(times, 'torch.ao', 'float'):.3f}" if peer is not None else "-"
        verdict = ("ok" if ours <= ALLOWED else "MISSED") if name == "resnet18" else ""
        rows.append((name, f"{ours:.3f}", theirs, verdict))
    return table(("model", "qgraph calibrate / float forward", "torch.ao FX, min-max", ""), rows)


def _loop(model: torch.nn.Module, data: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for batch in data:
            model(batch)


def _torch_ao(model: torch.nn.Module) -> torch.nn.Module:
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    weight = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    qconfig = QConfig(activation=MinMaxObserver.with_args(dtype=torch.quint8), weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_fx(copy.deepcopy(model), QConfigMapping().set_global(qconfig), example())


if __name__ == "__main__":
    print(run())

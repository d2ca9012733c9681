"""Calibration with min-max observers and exact histograms, 16 batches of 8.

Both against the float eager forward of the same batches, and beside torch.ao's observers of the same kind.
"""

from __future__ import annotations

import copy
import warnings

import torch

from qgraph.quantization import QConfig, calibrate, prepare
from tools.bench.measure import interleaved, ratio, table
from tools.bench.models import build, example

BATCHES, BATCH = 16, 8
ALLOWED = {"min_max": 0.82, "histogram": 0.97}


def run(*, rounds: int = 5, models: tuple[str, ...] = ("resnet18", "mobilenetv2", "vit_tiny")) -> str:
    """The table; only ResNet-18 has figures to reach."""
    rows: list[tuple[object, ...]] = []
    for name in models:
        model = build(name)
        data = [torch.randn(BATCH, 3, 224, 224) for _ in range(BATCHES)]
        judged = name == "resnet18"
        candidates = {"float": lambda model=model, data=data: _loop(model, data)}
        for observer in ALLOWED:
            ours = prepare(model, example(), QConfig(activation_observer=observer))
            candidates[observer] = lambda ours=ours, data=data: calibrate(ours, data, progress=False)
            if judged:
                peer = _torch_ao(model, observer)
                candidates[f"torch.ao {observer}"] = lambda peer=peer, data=data: _loop(peer, data)
        times = interleaved(candidates, rounds=rounds if judged else 2)
        for observer, allowed in ALLOWED.items():
            found = ratio(times, observer, "float")
            theirs = f"{ratio(times, f'torch.ao {observer}', 'float'):.3f}" if judged else "-"
            verdict = ("ok" if found <= allowed else "MISSED") if judged else ""
            rows.append((name, observer, f"{found:.3f}", theirs, verdict))
    return table(("model", "observer", "qgraph calibrate / float forward", "torch.ao FX", ""), rows)


def _loop(model: torch.nn.Module, data: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for batch in data:
            model(batch)


def _torch_ao(model: torch.nn.Module, observer: str) -> torch.nn.Module:
    from torch.ao.quantization import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver, QConfigMapping
    from torch.ao.quantization import QConfig as PeerQConfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    weight = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    kind = MinMaxObserver if observer == "min_max" else HistogramObserver
    qconfig = PeerQConfig(activation=kind.with_args(dtype=torch.quint8), weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_fx(copy.deepcopy(model), QConfigMapping().set_global(qconfig), example())


if __name__ == "__main__":
    print(run())

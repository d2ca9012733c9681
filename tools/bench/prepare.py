"""Trace and passes, against torch.ao FX `prepare_fx` on the same model in the same rounds, in float forwards."""

from __future__ import annotations

import copy
import sys
import warnings

import torch

from qgraph.pipeline import CheckLevel
from qgraph.quantization import prepare
from tools.bench.measure import interleaved, ratio, table
from tools.bench.models import MODELS, build, example

CHECKED_EXTRA = 12


def run(*, rounds: int = 5) -> str:
    """The table; `ok` where the figure to reach is reached."""
    rows = []
    for name in MODELS:
        model, image = build(name), example()
        times = interleaved(
            {
                "float": lambda model=model, image=image: _forward(model, image),
                "torch.ao": lambda model=model, image=image: _torch_ao(model, image),
                "plain": lambda model=model, image=image: prepare(model, image, verify=False, checks=CheckLevel.NONE),
                "checked": lambda model=model, image=image: prepare(model, image),
            },
            rounds=rounds,
        )
        peer, plain, checked = (ratio(times, key, "float") for key in ("torch.ao", "plain", "checked"))
        allowed = peer + CHECKED_EXTRA
        verdict = "ok" if plain <= peer and checked <= allowed else "MISSED"
        rows.append((name, f"{peer:.2f}", f"{plain:.2f}", f"{checked:.2f}", f"{allowed:.2f}", verdict))
    return table(
        ("model", "torch.ao prepare_fx", "qgraph, checks off", "qgraph, all checks", "allowed with checks", ""), rows
    )


def _forward(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(image)


def _torch_ao(model: torch.nn.Module, image: torch.Tensor) -> object:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    sys.setrecursionlimit(100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), image)


if __name__ == "__main__":
    print(run())

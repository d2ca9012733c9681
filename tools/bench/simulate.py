"""The fast simulator against the float eager forward, and beside torch.ao FX (x86) and onnxruntime, both int8.

Memory is what torch allocates: weights, what the simulator packs, and the peak of a run.
One process per setting of threads and numba, because both are fixed when a process starts.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qgraph.quantization import calibrate, convert, get_qconfig, prepare
from qgraph.simulator import Simulator
from tools.bench.measure import table
from tools.bench.models import build, example

TWO_STEPS = 'product = "int32:wrap/fixed_point_two:31:half_up:half_away"'
# Row: model, batch, variant, figure to reach with numba and without it.
ROWS: tuple[tuple[str, int, str, float, float], ...] = (
    ("resnet18", 1, "bpu", 4.0, 3.5),
    ("resnet18", 8, "bpu", 4.0, 3.5),
    ("resnet50", 1, "bpu", 4.0, 3.5),
    ("resnet50", 8, "bpu", 4.0, 3.5),
    ("resnet18", 1, "onnxruntime", 4.0, 3.5),
    ("resnet50", 1, "onnxruntime", 4.0, 3.5),
    ("mobilenetv2", 1, "bpu", 2.5, 0.0),
    ("vit_tiny", 1, "bpu", 1.5, 0.0),
    ("resnet18", 1, "litert rounding", 2.5, 0.0),
    ("resnet18", 1, "int16 activations", 1.0, 0.0),
)
RECORDED, FX, MEMORY = 1.5, 1.15, 1.2  # at most: recorded / fast, fast / FX x86, memory of fast / float
SETTINGS = ((1, "1"), (2, "1"), (1, "0"))


def run(*, rounds: int = 7, rows: tuple[str, ...] = ()) -> str:
    """One table per setting of threads and numba; `rows` picks models."""
    parts = []
    for threads, numba in SETTINGS:
        command = [sys.executable, "-W", "ignore", "-m", "tools.bench.simulate", str(threads), str(rounds), *rows]
        done = subprocess.run(command, env={**os.environ, "QGRAPH_NUMBA": numba}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        measured = json.loads(done.stdout.splitlines()[-1])
        title = f"{threads} thread{'s' * (threads > 1)}, {'with' if numba == '1' else 'without'} numba"
        parts.append(f"{title}:\n\n{_table(measured, numba == '1')}")
    return "\n\n".join(parts)


def _table(measured: list[dict[str, Any]], numba: bool) -> str:
    headers = (
        "model",
        "batch",
        "variant",
        "float / fast",
        "at least",
        "recorded / fast",
        "fast / FX x86",
        "fast / ort",
        "memory / float",
        "verdict",
    )
    rows: list[tuple[object, ...]] = []
    for row in measured:
        reach = row["with"] if numba else row["without"]
        missed = [f"speed {reach}"] * (row["fast"] < reach) + [f"recorded {RECORDED}"] * (row["recorded"] > RECORDED)
        fx = row["fx"] / row["fast"] if "fx" in row else None
        missed += [f"FX {FX}"] * (numba and fx is not None and fx > FX) + [f"memory {MEMORY}"] * (
            row["memory"] > MEMORY
        )
        peers = [f"{row[peer] / row['fast']:.2f}" if peer in row else "-" for peer in ("fx", "ort")]
        ours = (f"{row['fast']:.2f}", reach or "-", f"{row['recorded']:.2f}", *peers, f"{row['memory']:.2f}")
        verdict = "MISSED: " + ", ".join(missed) if missed else "reached"
        rows.append((row["model"], row["batch"], row["variant"], *ours, verdict))
    return table(headers, rows)


def measure_all(threads: int, rounds: int, picked: tuple[str, ...]) -> list[dict[str, Any]]:
    """Ratios of every row, in this process."""
    torch.set_num_threads(threads)
    found = []
    for name, batch, variant, with_numba, without in ROWS:
        if picked and name not in picked:
            continue
        model, x = build(name), example(batch)
        integer = _integer(model, variant)
        simulator, held = _allocated(lambda integer=integer, x=x: _ran(Simulator(integer), x))
        candidates: dict[str, Callable[[], object]] = {
            "float": lambda model=model, x=x: model(x),
            "fast": lambda simulator=simulator, x=x: simulator(x),
            "recorded": lambda simulator=simulator, x=x: simulator.run(x, record=True),
        }
        if name.startswith("resnet") and variant == "bpu":
            candidates |= {"fx": _torch_ao(model, x), "ort": _onnxruntime(model, x, threads)}
        times = _interleaved(candidates, rounds, threads)
        ratios = {peer: median(a / b for a, b in zip(times["float"], times[peer], strict=True)) for peer in times}
        ratios["recorded"] = median(a / b for a, b in zip(times["recorded"], times["fast"], strict=True))
        row = {"model": name, "batch": batch, "variant": variant, "with": with_numba, "without": without}
        memory = (held[1] + _bytes(integer) + _peak(simulator, x)) / (_bytes(model) + _peak(model, x))
        found.append({**row, **ratios, "memory": memory})
    return found


def _ran(simulator: Simulator, x: torch.Tensor) -> Simulator:
    simulator(x)
    return simulator


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _peak(work: Callable[[torch.Tensor], object], x: torch.Tensor) -> int:
    work(x)
    return _allocated(lambda: work(x))[1][0]


def _allocated(work: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
    """What `work` returns; the most bytes torch held meanwhile, and those it holds after."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    events = profiled.profiler.kineto_results.events()
    held = peak = 0
    for _, count in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += count
        peak = max(peak, held)
    return kept, (peak, held)


def _interleaved(candidates: dict[str, Callable[[], object]], rounds: int, threads: int) -> dict[str, list[float]]:
    """CPU seconds on one thread, wall seconds of several; the best of three runs per round."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, work in candidates.items():
                best = float("inf")
                for _ in range(3):
                    started = clock()
                    work()
                    best = min(best, clock() - started)
                if number:
                    times[name].append(best)
    return times


def _integer(model: torch.nn.Module, variant: str) -> torch.fx.GraphModule:
    target, qconfig = "bpu", None
    with tempfile.TemporaryDirectory() as folder:
        if variant == "onnxruntime":
            target = variant
        if variant == "int16 activations":
            qconfig = get_qconfig(out_dtype="int16")
        if variant == "litert rounding":
            text = (Path(__file__).parents[2] / "qgraph" / "targets" / "bpu.toml").read_text(encoding="utf-8")
            changed = text.replace('product = "int32:wrap/fixed_point:24:half_even"', TWO_STEPS)
            assert changed != text
            (Path(folder) / "two_steps.toml").write_text(changed.replace('name = "bpu"', 'name = "two_steps"'))
            target = str(Path(folder) / "two_steps.toml")
        prepared = prepare(model, example(), qconfig, target=target)
        calibrate(prepared, [example(2)], progress=False)
        return convert(prepared)


def _torch_ao(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "x86"
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        converted = convert_fx(prepared)
    return lambda: converted(x)


def _onnxruntime(model: torch.nn.Module, x: torch.Tensor, threads: int) -> Callable[[], object]:
    import numpy as np
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Data(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": x.numpy()}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        source, result = str(Path(folder) / "float.onnx"), str(Path(folder) / "int8.onnx")
        torch.onnx.export(model, (x,), source, input_names=["x"], dynamo=False)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(source, result, Data(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(result, options, providers=["CPUExecutionProvider"])
    values = {"x": x.numpy()}
    return lambda: session.run(None, values)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].isdigit():
        print(json.dumps(measure_all(int(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]))))
    else:
        print(run(rows=tuple(sys.argv[1:])))

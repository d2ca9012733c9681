"""Time per block of a conv-bn-relu-add chain as it grows, and against torch.ao FX at 1000 blocks."""

from __future__ import annotations

import threading

import torch

from qgraph.pipeline import CheckLevel
from qgraph.quantization import prepare
from tools.bench.measure import interleaved, middle, table
from tools.bench.models import chain
from tools.bench.prepare import _torch_ao

LENGTHS = (250, 1000, 4000)
_STACK = 512 * 1024 * 1024


def run(*, rounds: int = 3) -> str:
    """The table and the comparison."""
    image = torch.randn(1, 4, 8, 8)
    models = {blocks: chain(blocks).eval() for blocks in LENGTHS}
    candidates = {
        f"{kind} {blocks}": lambda model=model, off=kind == "plain": prepare(
            model, image, verify=not off, checks=CheckLevel.NONE if off else CheckLevel.NUMERICS
        )
        for blocks, model in models.items()
        for kind in ("plain", "checked")
    }
    times = interleaved(candidates, rounds=rounds)
    rows = [
        (kind, *(f"{middle(times, f'{kind} {blocks}') / blocks * 1e3:.2f}" for blocks in LENGTHS), _spread(times, kind))
        for kind in ("plain", "checked")
    ]
    pair = {"ours": candidates["plain 1000"], "peer": lambda: _torch_ao(models[1000], image)}
    side_by_side = _in_deep_stack(lambda: interleaved(pair, rounds=2, warmup=0))
    ours, theirs = middle(side_by_side, "ours"), middle(side_by_side, "peer")
    verdict = "ok" if theirs >= 8 * ours else "MISSED"
    headers = ("checks", *(f"{blocks} blocks, ms per block" for blocks in LENGTHS), "largest / smallest")
    comparison = f"{ours:.2f} s, torch.ao prepare_fx {theirs:.1f} s: {theirs / ours:.1f} times as long ({verdict})"
    return f"{table(headers, rows)}\n\n1000 blocks: {comparison}"


def _spread(times: dict[str, list[float]], kind: str) -> str:
    per_block = [middle(times, f"{kind} {blocks}") / blocks for blocks in LENGTHS]
    spread = max(per_block) / min(per_block)
    return f"{spread:.2f}" + (" ok" if spread <= 1.3 else " MISSED")


def _in_deep_stack(work):
    """Runs `work` in a thread with a large stack: torch.ao recurses once per node."""
    result = []
    threading.stack_size(_STACK)
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    threading.stack_size(0)
    return result[0]


if __name__ == "__main__":
    print(run())

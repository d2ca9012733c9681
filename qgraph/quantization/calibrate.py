"""`calibrate`: shows a prepared model data, so that every site learns its range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from qgraph.errors import UserError
from qgraph.quantization.sites import require_prepared, set_fake_quantize
from qgraph.quantization.states import FakeQuantState


def calibrate(
    model: fx.GraphModule,
    loader: Iterable[Any],
    num_steps: int | None = None,
    *,
    progress: bool = True,
) -> None:
    """Runs `model` on batches in state CALIBRATION, computes all scales, and leaves it in state VALIDATION.

    Args:
        model: what `prepare` returned; it is changed. Ranges of an earlier calibration are extended.
        loader: batches: a tensor, a tuple or list whose first elements are the model's inputs (labels may follow), or
            a mapping with the model's input names.
        num_steps: stop after this many batches; None for all.
        progress: whether to show a progress bar.

    Raises:
        UserError: the loader is empty or its batches do not fit the model.
        QuantizationError: the data holds NaN or infinite values; the message names the first site that saw them.
    """
    gm = require_prepared(model, "calibrate")
    if num_steps is not None and num_steps < 1:
        raise UserError(f"calibration over {num_steps} steps observes nothing", fix="give num_steps >= 1 or None")
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    set_fake_quantize(gm, FakeQuantState.CALIBRATION)
    total = _length(loader, num_steps)
    count = 0
    try:
        with torch.no_grad():
            for batch in tqdm(
                islice(loader, num_steps), total=total, desc="calibrate", disable=not progress, leave=False
            ):
                args, kwargs = batch_inputs(batch, names)
                gm(*args, **kwargs)
                count += 1
    except BaseException:
        set_fake_quantize(gm, FakeQuantState.FLOAT)
        raise
    if count == 0:
        set_fake_quantize(gm, FakeQuantState.FLOAT)
        raise UserError(
            "the calibration loader is empty",
            why="no batch means no range for any site",
            fix="give a loader with at least one batch; an iterator that was used up before is empty too",
        )
    try:
        set_fake_quantize(gm, FakeQuantState.VALIDATION)
    except BaseException:
        set_fake_quantize(gm, FakeQuantState.FLOAT)
        raise


def batch_inputs(batch: Any, names: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call, from a loader's batch.

    Args:
        batch: a tensor, tuple, list or mapping.
        names: the model's inputs.

    Raises:
        UserError: the batch does not hold the model's inputs.
    """
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            raise UserError(
                f"a batch has no {missing}",
                why=f"the model takes {names}, the batch holds {sorted(map(str, batch))}",
                fix="give a loader whose batches hold the model's inputs by name",
            )
        return (), {name: batch[name] for name in names}
    if isinstance(batch, (tuple, list)):
        if len(batch) < len(names):
            raise UserError(f"a batch holds {len(batch)} elements, the model takes {len(names)} inputs: {names}")
        return tuple(batch[: len(names)]), {}
    raise UserError(
        f"a batch is a {type(batch).__name__}", fix="give tensors, tuples, lists or mappings of the model's inputs"
    )


def _length(loader: Iterable[Any], num_steps: int | None) -> int | None:
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return num_steps
    return length if num_steps is None else min(length, num_steps)

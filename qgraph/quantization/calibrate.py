"""`calibrate`: shows a prepared model data, so that every site learns its range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from qgraph.errors import QGraphError, UserError
from qgraph.ir.paths import PathModel, refusal
from qgraph.quantization.input_ranges import InputSamples, fit_input_scales
from qgraph.quantization.sites import require_float32, require_prepared, set_fake_quantize, snapshot
from qgraph.quantization.states import FakeQuantState


def calibrate(
    model: fx.GraphModule | PathModel,
    loader: Iterable[Any],
    num_steps: int | None = None,
    *,
    progress: bool = True,
    fit_inputs: bool = True,
) -> None:
    """Runs `model` on batches in state CALIBRATION, computes all scales, and leaves it in state VALIDATION.

    The graph runs in eval mode and without gradients. After an error the model is as it was before.

    Args:
        model: what `prepare` returned; it is changed. Ranges of an earlier calibration are extended. Of a model with
            several paths, every path must see data.
        loader: batches: a tensor, a tuple or list whose first elements are the model's inputs (labels may follow), or
            a mapping with the model's input names.
        num_steps: stop after this many batches; None for all.
        progress: whether to show a progress bar.
        fit_inputs: whether ranges of inputs may be widened where their values then fall on codes, as images do.

    Raises:
        UserError: the loader is empty or its batches do not fit the model.
        QuantizationError: the data holds NaN or infinite values; the message names the first site that saw them.
    """
    graphs = model.graphs if isinstance(model, PathModel) else (require_prepared(model, "calibrate"),)
    for gm in graphs:
        require_float32(require_prepared(gm, "calibrate"))
    _check_arguments(loader, num_steps)
    restores = [snapshot(gm) for gm in graphs]
    samples = [InputSamples(gm) for gm in graphs]
    try:
        set_fake_quantize(model, FakeQuantState.CALIBRATION)
        with evaluating(model), torch.no_grad(), ExitStack() as watching:
            for sample in samples if fit_inputs else ():
                watching.enter_context(sample.watching())
            count = _observe(model, loader, num_steps, progress)
        if count == 0:
            raise UserError(
                "the calibration loader is empty",
                why="no batch means no range for any site",
                fix="give a loader with at least one batch; an iterator that was used up before is empty too",
            )
        set_fake_quantize(model, FakeQuantState.VALIDATION)
        if fit_inputs:
            for gm, sample in zip(graphs, samples, strict=True):
                fit_input_scales(gm, sample)
            set_fake_quantize(model, FakeQuantState.VALIDATION)  # the steps of biases follow from the inputs' scales
    except BaseException:
        for restore in restores:
            restore()
        raise


def _check_arguments(loader: Any, num_steps: Any) -> None:
    if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1):
        raise UserError(f"calibration cannot take {num_steps!r} steps", fix="give a whole number >= 1, or None for all")
    require_batches(loader, "the calibration loader", "calibrate(model, [batch])")


def require_batches(data: Any, what: str, example: str) -> None:
    """Refuses data that yields no batches; a single batch is the usual mistake.

    Raises:
        UserError: it is a tensor, a mapping, a text, or nothing that can be iterated.
    """
    if isinstance(data, (torch.Tensor, Mapping, str)) or not _is_iterable(data):
        single = isinstance(data, (torch.Tensor, Mapping))
        raise UserError(
            f"{what} is a {type(data).__name__}",
            why="it must yield batches",
            fix=f"put a single batch into a list: {example}" if single else "give a list or DataLoader",
        )


def _is_iterable(loader: Any) -> bool:
    return hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode, as for inference; each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _observe(model: fx.GraphModule | PathModel, loader: Iterable[Any], num_steps: int | None, progress: bool) -> int:
    """Runs the batches; returns how many there were."""
    total = _length(loader, num_steps)
    count = 0
    for batch in tqdm(islice(loader, num_steps), total=total, desc="calibrate", disable=not progress, leave=False):
        try:
            _run_batch(model, batch)
        except QGraphError as error:
            error.attach(f"in batch {count} of the calibration loader")
            raise
        count += 1
    return count


def _run_batch(model: fx.GraphModule | PathModel, batch: Any) -> None:
    """Runs one batch; of several paths, the one that takes the most of it, because labels may follow the inputs."""
    if not isinstance(model, PathModel):
        args, kwargs = batch_inputs(batch, _input_names(model))
        model(*args, **kwargs)
        return
    for gm in sorted(model.graphs, key=lambda gm: -len(_input_names(gm))):
        try:
            args, kwargs = batch_inputs(batch, _input_names(gm))
        except UserError:  # it takes more than there is
            continue
        if refusal(gm, args, kwargs) is None:
            gm(*args, **kwargs)
            return
    args, kwargs = batch_inputs(batch, _input_names(model.graphs[0]))
    model(*args, **kwargs)  # says why no path takes it


def _input_names(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]


def batch_inputs(batch: Any, names: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call, from a loader's batch.

    Args:
        batch: a tensor, tuple, list or mapping.
        names: the model's inputs.

    Raises:
        UserError: the batch does not hold the model's inputs.
    """
    if isinstance(batch, torch.Tensor):
        batch = (batch,)
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
            raise UserError(
                f"a batch holds {len(batch)} elements, the model takes {len(names)} inputs: {names}",
                fix="give batches that hold the model's inputs in this order; more may follow",
            )
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

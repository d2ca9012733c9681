"""Every known way for a capture to go wrong is exact on other values and batch sizes, or refused: never silence."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import fx

from qgraph.capture import trace
from qgraph.capture.values.structure import as_example, tensors_in
from qgraph.capture.values.variants import varied
from qgraph.errors import CaptureError
from qgraph.ir.node_info import graph_info
from tests.capture.checks import assert_agrees, process_state, snapshot
from tests.capture.dangers import DANGERS, EXACT, FREE, REFUSED, Danger

CAPTURED = [danger for danger in DANGERS if danger.expect in (EXACT, FREE)]
FREED = [danger for danger in DANGERS if danger.expect == FREE]
REFUSALS = [danger for danger in DANGERS if danger.expect not in (EXACT, FREE)]
FLAGGED = [danger for danger in REFUSALS if danger.expect != REFUSED]


def name_of(danger: Danger) -> str:
    return danger.name


def capture(danger: Danger, **options: Any) -> tuple[torch.nn.Module, fx.GraphModule, tuple[Any, ...]]:
    torch.manual_seed(0)
    model, example = danger.build().eval(), danger.example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, trace(model, example, **options), example


def check(danger: Danger, model: torch.nn.Module, gm: fx.GraphModule, example: tuple[Any, ...]) -> None:
    for seed in range(3):
        assert_agrees(model, gm, *varied({"args": example}, seed + 10)["args"])
        assert_agrees(model, gm, *danger.example())
    for others in danger.others():
        assert_agrees(model, gm, *others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("danger", CAPTURED, ids=name_of)
def test_exact_on_other_values(danger: Danger) -> None:
    check(danger, *capture(danger))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("danger", CAPTURED, ids=name_of)
def test_exact_without_the_safety_net_of_replay(danger: Danger) -> None:
    check(danger, *capture(danger, verify=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("danger", FREED, ids=name_of)
def test_free_batch(danger: Danger) -> None:
    model, gm, _ = capture(danger)
    assert graph_info(gm).batch_fixed is None
    for size in (1, 2, 5, 7):
        assert_agrees(model, gm, *danger.example(size))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("danger", REFUSALS, ids=name_of)
def test_refused_with_the_users_line(danger: Danger) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(danger, method="jit")
    message = str(raised.value)
    assert "what to do:" in message
    if danger.expect != REFUSED:
        assert f"{danger.expect}:" in message
        line = "an unknown line" if danger.name == "python_random" else "/tests/capture/dangers/"
        assert line in message, "the user's line is named"
        assert f"waive=({danger.expect!r}" in message, "and how to accept it"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("danger", REFUSALS, ids=name_of)
def test_what_auto_captures_in_another_way_is_exact(danger: Danger) -> None:
    try:
        found = capture(danger)
    except CaptureError:
        return
    assert graph_info(found[1]).method in ("export", "symbolic")
    check(danger, *found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("danger", FLAGGED, ids=name_of)
def test_waived_flags_become_notes(danger: Danger) -> None:
    _, gm, _ = capture(danger, waive=[danger.expect], verify=False)
    assert any(note.startswith(f"waived {danger.expect}:") for note in graph_info(gm).notes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("danger", DANGERS, ids=name_of)
def test_nothing_is_left_behind(danger: Danger) -> None:
    torch.manual_seed(0)
    model, example = danger.build().eval(), danger.example()
    before, process = snapshot(model), process_state()
    inputs = [tensor.clone() for tensor in tensors_in(example)]
    with warnings.catch_warnings(), contextlib.suppress(CaptureError):  # other tests look at the error
        warnings.simplefilter("ignore")
        trace(model, example)
    assert process_state() == process
    assert snapshot(model) == before
    assert as_example(example).args == example
    assert all(torch.equal(one, two) for one, two in zip(inputs, tensors_in(example), strict=True))

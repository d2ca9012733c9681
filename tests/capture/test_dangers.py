"""Every known way for a capture to go wrong is either exact or refused, never silently wrong."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from qgraph.capture import trace
from qgraph.capture.inputs import copy_inputs, varied
from qgraph.capture.structure import as_example, tensors_in
from qgraph.capture.verify import first_difference, reproducible
from qgraph.errors import CaptureError
from tests.capture.dangers import CASES, Case

EXACT = [case for case in CASES if case.flag is None]
FLAGGED = [case for case in CASES if case.flag is not None]


def other_inputs(example, seed):
    return varied({"args": example}, seed)["args"]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_exact_on_other_values(case: Case) -> None:
    torch.manual_seed(0)
    model, example = case.build().eval(), case.example()
    gm = trace(model, example)
    with reproducible():
        for seed in range(3):
            inputs = other_inputs(example, seed + 10)
            expected = model(*copy_inputs({"args": inputs})["args"])
            actual = gm(*copy_inputs({"args": inputs})["args"])
            assert first_difference(expected, actual) is None


@pytest.mark.parametrize("case", FLAGGED, ids=lambda case: case.name)
def test_refused_with_the_users_line(case: Case) -> None:
    torch.manual_seed(0)
    model, example = case.build().eval(), case.example()
    with pytest.raises(CaptureError) as raised:
        trace(model, example)
    message = str(raised.value)
    assert f"{case.flag}:" in message
    assert "dangers.py" in message, "the user's line is named"
    assert "waive" in message, "and how to accept it"


@pytest.mark.parametrize("case", FLAGGED, ids=lambda case: case.name)
def test_waived_flags_become_notes(case: Case) -> None:
    torch.manual_seed(0)
    model, example = case.build().eval(), case.example()
    gm = trace(model, example, waive=[case.flag], verify=False)
    assert any(case.flag in note for note in gm.meta["qgraph"].notes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_model_and_inputs_are_not_changed(case: Case) -> None:
    torch.manual_seed(0)
    model, example = case.build().eval(), case.example()
    before = copy.deepcopy(dict(model.named_parameters()) | dict(model.named_buffers()))
    attributes = {name: id(value) for name, value in vars(model).items()}
    inputs = [tensor.clone() for tensor in tensors_in(example)]
    with contextlib.suppress(CaptureError):
        trace(model, example)
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        assert torch.equal(tensor, before[name])
    assert {name: id(value) for name, value in vars(model).items()} == attributes
    assert all(torch.equal(a, b) for a, b in zip(inputs, tensors_in(example), strict=True))
    assert as_example(example).args == example

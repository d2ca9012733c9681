"""The replay of a graph against its model, and how outputs are compared."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from qgraph.capture import trace
from qgraph.capture.verification.compare import first_difference
from qgraph.errors import CaptureError
from tests.capture.checks import assert_agrees, x
from tests.support.models import Forward


def test_verify_false_runs_the_model_less_often() -> None:
    counts = []
    for verify in (True, False):
        calls: list[int] = []
        trace(Forward(lambda m, x, calls=calls: calls.append(1) or x * 2).eval(), x(), verify=verify)
        counts.append(len(calls))
    assert counts[1] < counts[0]


def test_flags_are_raised_without_verification_too() -> None:
    with pytest.raises(CaptureError, match="scalar"):
        trace(Forward(lambda m, x: x * float(x.max())).eval(), x(), verify=False)


def test_replay_catches_a_counter_outside_the_model() -> None:
    calls = []

    def forward(m, x):
        calls.append(1)
        return x * len(calls)

    with pytest.raises(CaptureError, match="does not reproduce"):
        trace(Forward(forward).eval(), x())


def test_replay_catches_a_counter_outside_the_model_with_a_fixed_batch() -> None:
    calls = []

    def forward(m, x):
        calls.append(1)
        return x.reshape(2, 24) * len(calls)

    with pytest.raises(CaptureError, match="does not reproduce"):
        trace(Forward(forward).eval(), x())


def test_replay_catches_the_clock() -> None:
    with pytest.raises(CaptureError, match="does not reproduce"):
        trace(Forward(lambda m, x: x * time.perf_counter()).eval(), x())


def test_replay_says_where_the_outputs_differ() -> None:
    calls = []

    def forward(m, x):
        calls.append(1)
        return {"same": x, "other": [x, x[:, 0] * len(calls)]}

    with pytest.raises(CaptureError) as raised:
        trace(Forward(forward).eval(), x())
    message = str(raised.value)
    assert "output['other'][1]" in message
    assert "elements, by up to" in message


def test_a_model_that_fails_on_varied_values_says_so() -> None:
    """Only positive definite matrices have a Cholesky factor; a permuted one is none."""
    model = Forward(lambda m, x: torch.linalg.cholesky(x)).eval()
    example = torch.eye(4)[None].repeat(2, 1, 1) + 0.1
    with pytest.raises(CaptureError) as raised:
        trace(model, example)
    assert "cannot be verified" in str(raised.value)
    assert "verify=False" in str(raised.value)
    assert_agrees(model, trace(model, example, verify=False), example)


@pytest.mark.parametrize(
    ("one", "two", "equal"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor([1.0, float("nan")]), torch.tensor([float("nan"), 1.0]), False),
        (torch.tensor([float("inf")]), torch.tensor([float("-inf")]), False),
        (torch.tensor([float("nan")]), torch.tensor([0.0]), False),
        (torch.tensor([float("inf")]), torch.tensor([torch.finfo(torch.float32).max]), False),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.tensor([2**53 + 1]), torch.tensor([2**53]), False),
        (torch.tensor([1j]), torch.tensor([2j]), False),
        (torch.complex(torch.tensor([float("nan")]), torch.tensor([1.0])), torch.tensor([complex("nan")]), False),
        ([torch.ones(1)], (torch.ones(1),), False),
        ([[torch.ones(1)]], [(torch.ones(1),)], False),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, False),
        ([], [torch.ones(1)], False),
        ([[], torch.ones(1)], [torch.ones(1)], False),
        ({"a": []}, {}, False),
        (1, True, False),
        (1, 1.0, False),
        (float("nan"), float("nan"), True),
        (None, torch.ones(1), False),
        (torch.ones(0), torch.ones(0), True),
    ],
)
def test_first_difference(one: Any, two: Any, equal: bool) -> None:
    found = first_difference(one, two)
    assert (found is None) == equal, found


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.tensor([float("inf"), 0.0]), torch.tensor([float("-inf"), 0.0])),
        (torch.tensor([float("nan"), 0.0]), torch.tensor([1.0, 0.0])),
        (torch.tensor([2**53 + 1]), torch.tensor([2**53])),
    ],
)
def test_first_difference_counts_what_differs(one: torch.Tensor, two: torch.Tensor) -> None:
    assert "1 of" in str(first_difference(one, two))

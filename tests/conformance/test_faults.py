"""A wrong kernel does not get past some hundreds of cases, and its failure shrinks to a few lines."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest

from tests.conformance.faults import FAULTS, wrong_kernels
from tests.conformance.session import Session
from tests.conformance.shrink import Failure, reproducer, shrink

CASES = 400


QUICK = ("ties upwards in sums",)
SLOW = ("the end of a long sum lost", "ties upwards in sums")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_wrong_kernel_is_found_and_shrunk(name: str) -> None:
    target, operators, fault = FAULTS[name]
    with wrong_kernels(operators, fault) as kernels:
        session = Session(target, kernels=[kernels], seed=1)
        summary = session.run(CASES)
        assert summary.failures, f"{summary.cases} cases did not find {name}"
        case, mismatch = summary.failures[0]
        assert (mismatch.who, mismatch.against) == ("wrong", "reference")
        smallest = shrink(case, session.compare, tries=250)
        check_small(smallest, "long sum" in name)
        check_runs(reproducer(smallest))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAULTS]
)
def test_a_wrong_kernel_is_found(name: str) -> None:
    target, operators, fault = FAULTS[name]
    with wrong_kernels(operators, fault) as kernels:
        assert Session(target, kernels=[kernels], seed=2).run(CASES).failures


def check_small(failure: Failure, long: bool) -> None:
    assert len(failure.case.program.steps) <= 2
    assert failure.mismatch.got.numel() <= 16
    elements = sum(tensor.numel() for tensor in failure.built.inputs)
    assert elements <= (8192 if long else 64)


def check_runs(text: str) -> None:
    """The printed reproducer computes what it says came out, which is not what it says was expected."""
    scope: dict[str, object] = {}
    with redirect_stdout(io.StringIO()):
        exec(text, scope)
    got, expected = scope["got"], scope["expected"]
    computed = scope["run"].values[scope["site"]]  # type: ignore[attr-defined]
    assert computed.tolist() == got.tolist()  # type: ignore[attr-defined]
    assert computed.tolist() != expected.tolist()  # type: ignore[attr-defined]


def test_right_kernels_pass() -> None:
    with wrong_kernels((), lambda kernel: kernel) as kernels:
        summary = Session("bpu", kernels=[kernels]).run(20)
    assert summary.cases == 20
    assert not summary.failures
    assert summary.elements > 1000

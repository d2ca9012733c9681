"""No element differs: every kernel set and every engine, on generated cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgraph.errors import TargetError
from qgraph.targets import get_target
from tests.conformance.compare import ENGINES, engine_of, kernel_sets
from tests.conformance.session import Session, Summary
from tests.conformance.shrink import reproducer, shrink
from tools.conformance import main

pytestmark = pytest.mark.filterwarnings("ignore:.*are deprecated and will be removed")

QUICK = 60
MANY = 2500
LARGE = 8


def targets() -> list[str]:
    """Targets that exist and whose engine has an adapter."""
    found = []
    for target in ENGINES:
        try:
            get_target(target)
            engine_of(target)
        except (TargetError, ModuleNotFoundError):
            continue
        found.append(target)
    return found


def check(session: Session, cases: int) -> Summary:
    """Runs the cases; a failure is shrunk and becomes the message."""
    summary = session.run(cases)
    if summary.failures:
        case, mismatch = summary.failures[0]
        smallest = shrink(case, session.compare, tries=300)
        pytest.fail(f"{mismatch}\n{summary}\n\n{reproducer(smallest)}", pytrace=False)
    assert summary.cases == cases
    assert summary.elements > 50 * cases
    assert sum(summary.refused.values()) * 2 < cases, summary
    return summary


def engine_session(target: str, seed: int) -> Session:
    engine = engine_of(target)
    if engine.available() is not None:
        pytest.skip(engine.available())
    return Session(target, engine, seed=seed)


@pytest.mark.parametrize("target", targets())
def test_cases(target: str) -> None:
    summary = check(engine_session(target, seed=0), QUICK)
    assert {"conv2d", "linear", "add"} <= set(summary.operators)


@pytest.mark.slow
@pytest.mark.parametrize("target", targets())
def test_many_cases(target: str) -> None:
    summary = check(engine_session(target, seed=1), MANY)
    assert {"conv2d", "linear", "add", "relu", "cat", "sigmoid"} <= set(summary.operators)
    assert set(summary.formats) == set(get_target(target).activations)


@pytest.mark.parametrize("target", [target for target in targets() if kernel_sets()])
def test_large_cases_agree_among_kernels(target: str) -> None:
    session = Session(target, seed=2, large=True)
    check(session, LARGE)


def test_every_target_has_an_adapter() -> None:
    assert "bpu" in targets()


def test_sessions_repeat() -> None:
    """The same seed gives the same cases."""
    first, second = (Session("bpu", engine_of("bpu"), seed=5).run(6) for _ in range(2))
    assert (first.elements, first.operators) == (second.elements, second.operators)
    assert Session("bpu", engine_of("bpu"), seed=6).run(6).elements != first.elements


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("own.toml", ["there is no engine to compare", "give --no-engine", "onnxruntime"]),
        ("bup", ["did you mean 'bpu'"]),
    ],
)
def test_what_cannot_be_compared(
    target: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.toml").write_text('name = "own"\nbase = "bpu"\n', encoding="utf-8")
    given = str(tmp_path / target) if target.endswith(".toml") else target
    assert main([given, "--cases", "1"]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message

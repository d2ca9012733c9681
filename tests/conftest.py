"""Fixtures for all tests: golden texts, one thread, fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"

# The same examples in every run, and no deadline: a first call imports and compiles, and the machine may be busy.
settings.register_profile("qgraph", derandomize=True, deadline=None)
settings.load_profile("qgraph")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with `tests/golden/<test module>/<test name>.txt`."""
    module = Path(str(request.path)).relative_to(Path(__file__).parent).with_suffix("")
    name = request.node.name.translate(str.maketrans("[]/ ", "__--")).strip("_")
    path = GOLDEN / module / f"{name}.txt"

    def check(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden file {path}; make it with: pytest {request.node.nodeid} --update-golden")
        assert text == path.read_text(encoding="utf-8"), f"differs from {path} (--update-golden accepts it)"

    return check

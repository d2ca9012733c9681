"""Names of passes: listing, loading, third parties, name clashes, and a `passes` package in the way."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import qgraph.pipeline.registry as registry_module
from qgraph.errors import PassError, UserError
from qgraph.passes import Canonicalize
from qgraph.pipeline import Pass, Pipeline
from qgraph.pipeline.registry import _BUILT_IN, REGISTRY, PassRegistry

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(_BUILT_IN))
def test_every_built_in_name_loads_a_pass_of_that_name(name: str) -> None:
    cls = REGISTRY.get(name)
    assert issubclass(cls, Pass)
    assert cls.name == name
    assert cls.__doc__
    assert cls.__module__ == "passes." + name.replace("-", "_"), "one file per pass, named after it"
    assert str(Pipeline((cls(),))) == name, "all options have defaults"


def test_every_file_of_passes_is_registered_and_in_the_facade() -> None:
    import qgraph.passes as facade

    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert files == {target.partition(":")[0].removeprefix("passes.") for target in _BUILT_IN.values()}
    assert {target.partition(":")[2] for target in _BUILT_IN.values()} <= set(facade.__all__)


def test_unknown_names_suggest_close_ones() -> None:
    with pytest.raises(UserError, match="'fold-constants'"):
        REGISTRY.get("fold-constant")


def test_a_name_taken_twice_names_both_owners() -> None:
    registry = PassRegistry({"canonicalize": "passes.canonicalize:Canonicalize"})
    with pytest.raises(UserError, match="exists already") as raised:
        registry.register("canonicalize", "mine:Canonicalize", owner="my-package")
    assert "qgraph" in str(raised.value)
    assert "my-package" in str(raised.value)


def entry_points(*points: EntryPoint):
    return lambda group: [point for point in points if point.group == group]


def test_other_packages_join_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("my-canonicalize", "passes.canonicalize:Canonicalize", "qgraph.passes")
    monkeypatch.setattr(registry_module, "entry_points", entry_points(point))
    registry = PassRegistry({})
    assert registry.names() == ["my-canonicalize"]
    with pytest.raises(PassError, match="calls itself 'canonicalize'"):
        registry.get("my-canonicalize")


def test_an_entry_point_that_takes_a_built_in_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("canonicalize", "mine:Canonicalize", "qgraph.passes")
    monkeypatch.setattr(registry_module, "entry_points", entry_points(point))
    with pytest.raises(UserError, match="exists already"):
        PassRegistry(dict(_BUILT_IN)).names()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no.such.module:Pass", "cannot be imported"),
        ("passes.canonicalize:Missing", "cannot be imported"),
        ("json:loads", "is not a Pass class"),
    ],
)
def test_targets_that_are_wrong(target: str, words: str) -> None:
    registry = PassRegistry({})
    registry._extended = True
    registry.register("broken", target, owner="my-package")
    with pytest.raises(UserError, match=words) as raised:
        registry.get("broken")
    assert "my-package" in str(raised.value)


def test_classes_can_be_registered_directly() -> None:
    registry = PassRegistry({})
    registry._extended = True
    registry.register("canonicalize", Canonicalize, owner="a test")
    assert registry.get("canonicalize") is Canonicalize


@pytest.mark.parametrize("statement", ["import qgraph.passes", "import qgraph; qgraph.Pipeline.parse('canonicalize')"])
def test_a_passes_package_of_the_users_own_is_named(tmp_path: Path, statement: str) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes/__init__.py").write_text("MINE = True\n", encoding="utf-8")
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(tmp_path)!r}]
        sys.path.append({str(ROOT)!r})
        {statement}
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a package of your own named 'passes' hides the one that belongs to qgraph" in done.stderr
    assert str(tmp_path / "passes") in done.stderr
    assert "rename your package" in done.stderr

"""Targets by name: built in, and from other packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qgraph.errors import TargetError
from qgraph.targets import get_target, list_targets, parse_target
from qgraph.targets.inherit import BUILT_IN
from tests.targets.test_parse import SMALL


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, points: dict[str, str], module: str, name: str = "dist"
) -> None:
    """Puts a distribution with entry points, and a module, on sys.path."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("[qgraph.targets]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{name}_target.py").write_text(module, encoding="utf-8")
    if str(folder) not in sys.path:
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, f"{name}_target", raising=False)


MODULE = f"""
from pathlib import Path
from qgraph.targets import parse_target
from qgraph.targets.inherit import BUILT_IN
TEXT = '''{SMALL}'''
READY = parse_target(TEXT, origin="dist")
def made():
    return READY
def path():
    file = Path(__file__).with_name("chip.toml")
    file.write_text(TEXT)
    return file
def name():
    return "again"
def broken():
    raise ZeroDivisionError("no chip")
NUMBER = 3
"""


@pytest.mark.parametrize("provider", ["READY", "made", "path"])
def test_a_package_provides_a_target(provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"chip": f"dist_target:{provider}"}, MODULE)
    assert list_targets() == [*BUILT_IN, "chip"]
    assert get_target("chip").name == "small"


@pytest.mark.parametrize(
    ("provider", "words"),
    [
        ("dist_target:NUMBER", ["is a int, not a target", "registered as 'chip' by dist", "provide a Target"]),
        ("dist_target:broken", ["cannot be loaded", "registered by dist", "ZeroDivisionError: no chip"]),
        ("dist_target:missing", ["cannot be loaded", "AttributeError"]),
        ("no_such_module:READY", ["cannot be loaded", "ModuleNotFoundError"]),
        ("dist_target:name", ["the target file again cannot be read"]),
    ],
)
def test_packages_with_faults(provider: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"chip": provider}, MODULE)
    with pytest.raises(TargetError) as raised:
        get_target("chip")
    for word in words:
        assert word in str(raised.value)


def test_a_built_in_name_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"bpu": "dist_target:READY"}, MODULE)
    with pytest.raises(TargetError, match="a target named 'bpu' exists already") as raised:
        list_targets()
    assert "registered by qgraph and again by dist" in str(raised.value)


def test_two_packages_with_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, {"chip": "dist_target:READY"}, MODULE)
    install(tmp_path, monkeypatch, {"chip": "other_target:READY"}, MODULE, name="other")
    with pytest.raises(TargetError, match="a target named 'chip' exists already") as raised:
        get_target("chip")
    assert "dist" in str(raised.value)
    assert "other" in str(raised.value)


@pytest.mark.parametrize("name", ["bpuu", "BPU", "bp"])
def test_close_names_are_suggested(name: str) -> None:
    with pytest.raises(TargetError, match=f"no target is named '{name}'") as raised:
        get_target(name)
    assert "'bpu'" in str(raised.value) or "known names: bpu" in str(raised.value)


def test_names_that_are_none() -> None:
    with pytest.raises(TargetError, match="no target is named ''"):
        get_target("")
    with pytest.raises(TargetError, match="a target cannot be of type int") as raised:
        get_target(3)  # type: ignore[arg-type]
    assert "give a name, a TOML file or a Target" in str(raised.value)


def test_a_target_is_itself() -> None:
    target = get_target("bpu")
    assert get_target(target) is target
    assert get_target("bpu") is target, "read once"


def test_a_path_with_another_ending_says_so() -> None:
    with pytest.raises(TargetError, match=r"the path of a target's file ends in \.toml"):
        get_target("chips/mychip.tml")


def test_misspelled_keys_of_formats_are_told_from_formats() -> None:
    text = 'name = "x"\nbase = "bpu"\n[weights]\nper_chanel = true\n'
    with pytest.raises(TargetError, match="did you mean 'per_channel'"):
        parse_target(text, origin="x.toml")
    with pytest.raises(TargetError, match="did you mean 'base'"):
        parse_target('name = "x"\nbse = "bpu"\n', origin="x.toml")

"""Files of pictures: every way they can fail leaves a message and no half-written file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import qgraph
from qgraph.errors import DrawError
from tests.viz.pictures import stages

KINDS = [".dot", ".svg", ".png"]
as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def gm():
    return stages("residual")["captured"]


def no_graphviz(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "empty").mkdir()
    monkeypatch.setenv("PATH", str(folder / "empty"))


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a `dot` in the way that runs `script`."""
    path = folder / "bin" / "dot"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{path.parent}:/bin:/usr/bin")


def test_without_graphviz_dot_works(gm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_graphviz(monkeypatch, tmp_path)
    assert qgraph.draw(gm, tmp_path / "g.dot").read_text(encoding="utf-8").startswith("digraph")


@pytest.mark.parametrize("kind", [".svg", ".png"])
def test_without_graphviz_the_rest_names_the_package(
    gm, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_graphviz(monkeypatch, tmp_path)
    for write in (lambda path: qgraph.draw(gm, path), lambda path: qgraph.draw_diff(gm, gm, path)):
        with pytest.raises(DrawError, match=r"graphviz, which is not installed") as raised:
            write(tmp_path / f"g{kind}")
        assert "apt-get install graphviz" in str(raised.value)
        assert "draw to .dot" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("script", ["echo nonsense >&2; exit 1", "exit 0", "kill -9 $$"])
def test_graphviz_that_fails_leaves_the_old_file(
    gm, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.svg"
    path.write_text("old", encoding="utf-8")
    program(tmp_path, script, monkeypatch)
    with pytest.raises(DrawError, match="could not lay the graph out") as raised:
        qgraph.draw(gm, path)
    assert ("nonsense" in str(raised.value)) == ("nonsense" in script)
    assert path.read_text(encoding="utf-8") == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"g.svg", "bin"}
    assert capfd.readouterr() == ("", "")


def test_a_bitmap_scaled_down_is_not_silent(gm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "echo 'dot: graph is too large for cairo-renderer bitmaps. Scaling' >&2; echo x", monkeypatch)
    with pytest.warns(UserWarning, match="scaled down: draw to .svg") as caught:
        qgraph.draw(gm, tmp_path / "g.png")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["graph.pdf", "graph.svgz", "graph.dot.gz", "graph", ".svg", "", "graph."])
def test_unknown_endings(gm, name: str, tmp_path: Path) -> None:
    with pytest.raises(DrawError, match="cannot draw to") as raised:
        qgraph.draw(gm, tmp_path / name)
    assert "use one of .dot, .svg, .png" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [kind.upper() for kind in KINDS])
def test_endings_in_capitals(gm, kind: str, tmp_path: Path) -> None:
    assert qgraph.draw(gm, tmp_path / f"g{kind}").stat().st_size > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_folder(gm, kind: str, tmp_path: Path) -> None:
    with pytest.raises(DrawError, match="does not exist") as raised:
        qgraph.draw(gm, tmp_path / "none" / f"g{kind}")
    assert "create it first" in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_where_the_folder_should_be(gm, kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DrawError, match="does not exist"):
        qgraph.draw(gm, tmp_path / "file" / f"g{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_where_the_file_should_be(gm, kind: str, tmp_path: Path) -> None:
    (tmp_path / f"g{kind}").mkdir()
    with pytest.raises(DrawError, match="cannot write") as raised:
        qgraph.draw(gm, tmp_path / f"g{kind}")
    assert "is a folder" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [f"g{kind}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_written(gm, kind: str) -> None:
    with pytest.raises(DrawError, match="cannot write") as raised:
        qgraph.draw(gm, f"/proc/g{kind}")
    assert "choose a file you may write" in str(raised.value)


@as_root
def test_a_folder_without_permission(gm, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DrawError, match="cannot write"):
        qgraph.draw(gm, tmp_path / "g.dot")


def test_a_full_disk_leaves_nothing(gm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DrawError, match="cannot write") as raised:
        qgraph.draw(gm, tmp_path / "g.dot")
    assert "No space left on device" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_is_replaced_and_has_usual_permissions(gm, tmp_path: Path) -> None:
    path = tmp_path / "g.dot"
    path.write_text("old", encoding="utf-8")
    plain = tmp_path / "plain"
    plain.touch()
    qgraph.draw(gm, path)
    assert path.read_text(encoding="utf-8").startswith("digraph")
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_current_folder_needs_no_name(gm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert qgraph.draw(gm, "g.svg") == Path("g.svg")
    assert (tmp_path / "g.svg").exists()

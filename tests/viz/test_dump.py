"""Dumps of a pipeline: numbered texts and pictures of every step, and what changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qgraph
from qgraph.pipeline import Pipeline
from tests.support.models import Residual, image

PASSES = "canonicalize,fold-constants,fuse-conv-bn-add-relu"
STEPS = ["000_start", "001_canonicalize", "002_fold-constants", "003_fuse-conv-bn-add-relu"]


@pytest.fixture
def gm():
    return qgraph.trace(Residual().eval(), image())


def test_every_step_is_written_as_text_and_dot(gm, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "dump"
    result = Pipeline.parse(PASSES).run(gm, observers=[qgraph.DumpObserver(folder)])
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{step}.{kind}" for step in STEPS for kind in ("txt", "dot")] + ["index.json"]
    )
    assert (folder / "000_start.txt").read_text(encoding="utf-8") == qgraph.print_graph(gm)
    assert (folder / f"{STEPS[-1]}.txt").read_text(encoding="utf-8") == qgraph.print_graph(result.gm)


def test_the_index_says_what_changed(gm, tmp_path: Path) -> None:
    Pipeline.parse(PASSES).run(gm, observers=[qgraph.DumpObserver(tmp_path)])
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in index] == STEPS
    fused = index[-1]
    assert fused["changed"]
    assert fused["gone"] == ["_generated_add_0", "bn1", "bn2", "relu", "relu(1)"]
    assert fused["new"] == []
    assert fused["seconds"] > 0
    assert not index[0]["changed"]
    assert not index[2]["changed"]


def test_refusals_are_in_the_index(tmp_path: Path) -> None:
    model = Residual().eval()
    model.conv2 = model.conv1
    gm = qgraph.trace(model, image())
    Pipeline.parse(PASSES).run(gm, observers=[qgraph.DumpObserver(tmp_path)])
    refusals = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))[-1]["refusals"]
    assert refusals
    assert all("not applied at" in refusal for refusal in refusals)


def test_a_second_pipeline_counts_on_and_keeps_the_index(gm, tmp_path: Path) -> None:
    first = Pipeline.parse("canonicalize").run(gm, observers=[qgraph.DumpObserver(tmp_path)])
    Pipeline.parse("fuse-conv-bn-add-relu").run(first.gm, observers=[qgraph.DumpObserver(tmp_path)])
    texts = sorted(path.stem for path in tmp_path.glob("*.txt"))
    assert texts == ["000_start", "001_canonicalize", "002_start", "003_fuse-conv-bn-add-relu"]
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in index] == texts


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(qgraph.DrawError, match="cannot be written") as raised:
        qgraph.DumpObserver(tmp_path / "file")
    assert "choose a new folder" in str(raised.value)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{not json", encoding="utf-8")
    with pytest.raises(qgraph.DrawError, match="cannot be written"):
        qgraph.DumpObserver(tmp_path)

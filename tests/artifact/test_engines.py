"""Graphs of targets that compute with functions of an engine are saved and loaded like all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from qgraph.artifact import load, save
from qgraph.errors import ArtifactError
from qgraph.ir.node_info import graph_info
from qgraph.simulator import Simulator
from qgraph.targets import get_target, parse
from qgraph.targets.inherit import BUILT_IN
from tests.artifact.graphs import integer_of

ROOT = Path(__file__).parents[2]
OWN = """
name = "own"
base = "onnxruntime"

[functions]
module = "own_functions"
"""
MODULE = """
import torch

def sigmoid(values):
    return torch.sigmoid(values)

FUNCTIONS = {"sigmoid": sigmoid}
"""


def graph(target: str) -> tuple[fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 3))
    return integer_of(model, x, target=target), x


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_targets(name: str, tmp_path: Path) -> None:
    gm, x = graph(name)
    save(gm, tmp_path / "model.qgraph")
    loaded = load(tmp_path / "model.qgraph")
    assert graph_info(loaded).target == get_target(name)
    assert torch.equal(Simulator(loaded)(x), Simulator(gm)(x))


def test_a_process_that_has_read_no_target(tmp_path: Path) -> None:
    save(graph("onnxruntime")[0], tmp_path / "model.qgraph")
    code = "import sys, qgraph; print(len(qgraph.graph_info(qgraph.load(sys.argv[1])).target.functions.own))"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.qgraph"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert int(run.stdout) == len(get_target("onnxruntime").functions.own)


def test_a_target_of_another_package_is_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_functions.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "own.toml").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(parse, "ENGINE_FUNCTIONS", set(parse.ENGINE_FUNCTIONS))
    monkeypatch.setattr("qgraph.artifact.known.ENGINE_FUNCTIONS", parse.ENGINE_FUNCTIONS)
    gm, x = graph(str(tmp_path / "own.toml"))
    save(gm, tmp_path / "model.qgraph")
    assert torch.equal(Simulator(load(tmp_path / "model.qgraph"))(x), Simulator(gm)(x))
    own = sys.modules.pop("own_functions")
    parse.ENGINE_FUNCTIONS.discard(own.sigmoid)
    with pytest.raises(ArtifactError, match=r"own_functions\.sigmoid.*not known here") as raised:
        load(tmp_path / "model.qgraph")
    assert "read the target that names it" in str(raised.value)
    assert "own_functions" not in sys.modules, "a file imports nothing"

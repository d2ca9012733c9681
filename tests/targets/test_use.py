"""A target given as a file or an object is the one that is computed with, all the way to the simulator."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.errors import QuantizationError
from qgraph.targets import Target, target_of
from tests.support.models import Residual, image

BPU = resources.files("qgraph.targets").joinpath("bpu.toml").read_text(encoding="utf-8")
ROUGH = "int32:saturate/fixed_point:16:half_up"


def rough_text(name: str) -> str:
    text = BPU.replace('name = "bpu"', f'name = "{name}"')
    line = next(line for line in text.splitlines() if line.startswith("product"))
    return text.replace(line, f'product = "{ROUGH}"')


def integer_graph(target: object) -> fx.GraphModule:
    prepared = qgraph.prepare(Residual().eval(), image(), target=target)
    qgraph.calibrate(prepared, [image()], progress=False)
    return qgraph.convert(prepared)


@pytest.mark.parametrize("name", ["rough", "bpu"], ids=["a name of its own", "the name of a built-in target"])
def test_a_file_is_followed_to_the_simulator(tmp_path: Path, name: str) -> None:
    path = tmp_path / "chip.toml"
    path.write_text(rough_text(name), encoding="utf-8")
    integer = integer_graph(str(path))
    words = {node.kwargs["arithmetic"] for node in integer.graph.nodes if node.name in ("stem", "conv1")}
    assert words == {ROUGH}
    assert qgraph.Simulator(integer).target.origin == str(path)
    assert f"target {name})" in qgraph.print_graph(integer)


def test_an_object_is_followed_to_the_simulator() -> None:
    mine = replace(qgraph.get_target("bpu"), name="mine", clock_hz=1.0)
    integer = integer_graph(mine)
    assert isinstance(target_of(integer), Target)
    assert qgraph.Simulator(integer).target == mine


def test_a_weight_format_the_target_never_has_is_refused() -> None:
    with pytest.raises(QuantizationError, match="int8, int4 -> int8 is illegal for linear on bpu"):
        qgraph.prepare(
            nn.Linear(4, 4).eval(), torch.randn(2, 4), qconfig_setter=qgraph.get_qconfig(weight_dtype="int4")
        )

"""An integer operator of another package: registered, lowered to, simulated."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qgraph.errors import UserError
from qgraph.simulator import register_operator

PAGE = Path(__file__).parents[2] / "docs" / "adding_an_operator.md"


SCRIPT = """
from dataclasses import replace
from torch import nn
import qgraph
from qgraph.analysis import compare_sites
from qgraph.numerics import qint8, qint16
from qgraph.targets import LegalFormats, OpRule

class Larger(nn.Module):
    def forward(self, x, y):
        return torch.fmax(x * 2, y)

bpu = qgraph.get_target("bpu")
legal = LegalFormats(((qint8, qint16),), (qint8, qint16))
target = replace(bpu, name="with fmax", ops={**bpu.ops, "fmax": OpRule("vector", (legal,))})
example = (torch.randn(2, 5), torch.randn(2, 5))
prepared = qgraph.prepare(Larger().eval(), example, target=target)
qgraph.calibrate(prepared, [example], progress=False)
integer = qgraph.convert(prepared, strict=True)
assert "fmax" in {qgraph.info(node).op.name for node in integer.graph.nodes}
assert all(site.unexplained == 0 for site in compare_sites(prepared, integer, example))
assert torch.equal(qgraph.Simulator(integer)(*example), integer(*example))
"""


def test_the_example_of_the_page_runs_end_to_end(tmp_path: Path) -> None:
    """In a process of its own: operators are named once in a process."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "register_operator" in block]
    script = tmp_path / "script.py"
    script.write_text(code + SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_are_taken_once() -> None:
    with pytest.raises(UserError, match="named 'conv' exists already"):
        register_operator("conv", "(Tensor x) -> Tensor", lambda x, trace=None: x, torch.clone)


def test_a_kernel_must_take_the_trace() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x

    assert "trace" not in inspect.signature(kernel).parameters
    with pytest.raises(UserError, match="takes no trace"):
        register_operator("traceless", "(Tensor x) -> Tensor", kernel, torch.clone)
    assert not hasattr(torch.ops.qgraph, "traceless")

"""An integer operator of another package: registered, lowered to, simulated."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    (code,) = [block for block in blocks if 'register_operator("fmax"' in block]
    _run(tmp_path, code + SCRIPT)


NETWORK = """
from torch.overrides import has_torch_function
from dataclasses import replace
from qgraph.numerics import qint8, quint8
from qgraph.targets import LegalFormats, OpRule

def squared(x, y):
    if has_torch_function((x, y)):
        return handle_torch_function(squared, (x, y), x, y)
    return (x - y) ** 2

register_lowering("squared_difference", SquaredDifferenceLowering())
OPS.define(
    Op(
        name="squared_difference",
        kind=OpKind.ARITHMETIC,
        signature=inspect.signature(lambda input, other: None),
        operands=("input", "other"),
        target=squared,
        quant=QuantRule.OWN,
        lowering="squared_difference",
        shape=ShapeRule.BROADCAST,
    )
)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 5), QuickGelu()

    def forward(self, x):
        x = self.first(x)
        return self.act(squared(x, x * 0.3))  # the second is within the range of the first

torch.manual_seed(0)
for name, qtype in (("bpu", qint8), ("onnxruntime", quint8)):
    base = qgraph.get_target(name)
    rule = OpRule("vector", (LegalFormats(((qtype,),), (qtype,)),))
    rules = {"quick_gelu": rule, "squared_difference": rule}
    target = replace(base, name="chip", ops={**base.ops, **rules})
    model, x = Net().eval(), torch.randn(64, 6)
    prepared = qgraph.prepare(model, x, target=target, leaf_modules=[QuickGelu])
    qgraph.calibrate(prepared, [x], progress=False)
    integer = qgraph.convert(prepared, strict=True)
    computed = qgraph.Simulator(integer)(x)
    assert torch.equal(computed, qgraph.Simulator(integer, kernels="reference")(x))
    assert (computed - model(x)).abs().max() < 0.1 * model(x).abs().max(), name
    (site,) = [s for s in qgraph.check_consistency(prepared, integer, [x]).sites if s.op == "squared_difference"]
    assert "double rounding" in {str(cause) for cause in site.causes}, "the second operand is rounded first"
    assert "precision of the factor" not in {str(cause) for cause in site.causes}
"""


def test_own_functions_modules_and_kernels_of_the_page_run_end_to_end(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    _run(tmp_path, "".join(blocks) + NETWORK)


def _run(folder: Path, code: str) -> None:
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
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


@pytest.mark.parametrize(
    ("schema", "kernel", "fake", "words"),
    [
        ("(Tensor x, *, int low) -> Tensor", lambda x, trace=None: x, lambda x, low: x, "kernel of 'new_one' does not"),
        (
            "(Tensor x, Tensor y) -> Tensor",
            lambda x, y, trace=None: x,
            lambda x: x,
            "fake kernel of 'new_one' does not",
        ),
        ("(Tensr x) -> Tensor", lambda x, trace=None: x, lambda x: x, "schema of 'new_one' is malformed"),
    ],
)
def test_functions_take_what_the_schema_says(schema: str, kernel: Any, fake: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        register_operator("new_one", schema, kernel, fake)
    assert not hasattr(torch.ops.qgraph, "new_one")

"""Whole networks: the fast simulator against the reference, site by site, and on machines without 8-bit kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info
from qgraph.quantization import calibrate, convert, get_qconfig, prepare
from qgraph.simulator import KERNEL_SETS, Simulator
from qgraph.simulator.kernel import NoFastForm, PreparedKernel
from tests.properties.generated import SHAPE, Generated
from tests.properties.test_whole_road import _computes, networks, quiet
from tests.support.models import Attention, Residual, image

ROOT = Path(__file__).parents[2]


def integer_of(model: torch.nn.Module, x: torch.Tensor, target: str = "bpu") -> fx.GraphModule:
    prepared = prepare(model.eval(), x, target=target)
    calibrate(prepared, [x], progress=False)
    return convert(prepared)


def check_alike(integer: fx.GraphModule, x: torch.Tensor) -> None:
    fast, plain = Simulator(integer), Simulator(integer, "reference")
    mine, theirs = fast.run(x, record=True), plain.run(x, record=True)
    for site, value in theirs.values.items():
        assert torch.equal(mine.values[site], value) or value.isnan().any(), site
    counts = [[(op.site, op.saturated, op.overflowed) for op in run.ops] for run in (mine, theirs)]
    assert counts[0] == counts[1]
    for one, two in zip(_tuple(fast(x)), _tuple(theirs.output), strict=True):
        assert torch.equal(one, two)


def _tuple(value: object) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


@settings(max_examples=30, derandomize=True, **quiet)
@given(networks)
def test_every_network_is_alike_at_every_site(model: Generated) -> None:
    x = torch.randn(2, *SHAPE)
    if not _computes(model, x):
        return
    integer = integer_of(model, x)
    for batch in (1, 5):
        check_alike(integer, torch.randn(batch, *SHAPE) * 2)


@pytest.mark.parametrize("target", ["bpu", "onnxruntime"])
def test_a_residual_network_runs_fast_everywhere(target: str) -> None:
    torch.manual_seed(0)
    integer = integer_of(Residual(), image(4), target)
    check_alike(integer, image(3) * 3)
    assert Simulator(integer).fallbacks == {}


def test_attention() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    integer = integer_of(Attention(), x)
    check_alike(integer, x * 2)
    assert Simulator(integer).fallbacks == {}


def test_activations_of_16_bits() -> None:
    torch.manual_seed(0)
    x = image(2)
    prepared = prepare(Residual().eval(), x, get_qconfig(out_dtype="int16"))
    calibrate(prepared, [x], progress=False)
    check_alike(convert(prepared), x)


def test_injected_codes_beyond_what_a_site_computes() -> None:
    """After a relu the fast kernels read codes as unsigned; negative ones send the run to the reference."""
    torch.manual_seed(0)
    integer = integer_of(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)), image(2)
    )
    fast, plain = Simulator(integer), Simulator(integer, "reference")
    site = next(site for site, node in fast.sites.items() if node.kwargs.get("low") == 0)
    codes = torch.randint(-128, 0, (2, 4, 6, 6)).to(torch.int8)
    for injected in (codes, -1 - codes):
        runs = [simulator.run(image(2), inject={site: injected}).output for simulator in (fast, plain)]
        assert torch.equal(runs[0], runs[1])


def test_fallbacks_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def never(call: object) -> None:
        raise NoFastForm("not today")

    monkeypatch.setitem(KERNEL_SETS["fast"], ("conv", "*"), PreparedKernel(never))  # type: ignore[arg-type]
    integer, x = integer_of(Residual(), image(4)), image(2)
    simulator = Simulator(integer)
    assert simulator.fallbacks == {"stem": "not today", "conv1": "not today", "conv2": "not today"}
    assert torch.equal(simulator(x), Simulator(integer, "reference")(x))


SCRIPT = """
import torch
from qgraph.simulator import Simulator
from qgraph.simulator.fast.probe import exact_kinds
from tests.simulator.test_fast_networks import check_alike, integer_of
from tests.support.models import Residual, image
print(sorted(exact_kinds()))
torch.manual_seed(0)
check_alike(integer_of(Residual(), image(4)), image(2) * 3)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_cpu_whose_8_bit_sums_saturate() -> None:
    """oneDNN without 8-bit dot products: the probe notices, floats carry the sums."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT), "QGRAPH_NUMBA": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dense" not in done.stdout
    assert "matrix" not in done.stdout


class Clamped(torch.nn.Module):
    """A relu behind a sum that nobody else reads, and one behind a sum that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x) + x)
        z = self.second(y) + y
        return torch.relu(z) * z


def test_a_clamp_joins_the_sum_before_it() -> None:
    torch.manual_seed(0)
    integer = integer_of(Clamped(), image(4), "onnxruntime")
    program = Simulator(integer)._program
    joined = {step.site for step in program.steps} - {step.site for step in program.joined}
    sums = [node for node in integer.graph.nodes if integer_name(node.target) == "add"]
    clamps = [node for node in integer.graph.nodes if integer_name(node.target) == "clamp"]
    assert (len(sums), len(clamps)) == (2, 2)
    assert joined == {info(sums[0]).site}, "the second sum is read twice"
    check_alike(integer, image(3) * 3)

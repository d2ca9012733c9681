"""From float to integers, for generated networks: what must hold for every network holds for these."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qgraph import FakeQuantState, QConfig, Simulator, calibrate, convert, prepare, set_fake_quantize, trace
from qgraph.analysis.consistency import SiteConsistency, compare_sites
from qgraph.errors import UserError
from qgraph.ir.node_info import ExampleInputs, graph_info, info
from qgraph.ir.stage import Stage
from qgraph.numerics import QType, qint8, qint16
from qgraph.pipeline import EXACT, CheckLevel, Pipeline, close
from qgraph.pipeline.checks import promise_broken
from tests.properties.generated import SHAPE, Generated, Step, steps
from tests.support.passes import assert_idempotent

FLOAT_PASSES = (
    "fold-constants,canonicalize,eliminate-dead-code,split-shared-modules,fuse-conv-bn-add-relu,use-channels-last,"
    "decompose-composites"
)
TABLES = ("exp", "reciprocal", "rsqrt", "sigmoid", "tanh", "silu", "gelu", "hardswish", "leaky_relu")
networks = st.builds(Generated, steps, outputs=st.integers(1, 2))
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


def check_float_passes(model: Generated) -> None:
    before = copy.deepcopy(model.state_dict())
    x, other = torch.randn(2, *SHAPE), torch.randn(5, *SHAPE)
    captured = trace(model, x)
    rewritten = Pipeline.parse(FLOAT_PASSES).run(captured, checks=CheckLevel.CLAIMS).gm
    for gm, numerics in ((captured, EXACT), (rewritten, close(2e-5))):
        broken = promise_broken(gm, ExampleInputs((other,)), _results(model, other), _results(gm, other), numerics)
        assert broken is None, broken
    assert_idempotent(rewritten, FLOAT_PASSES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def check_integers(model: Generated, output: QType) -> None:
    x, other = torch.randn(2, *SHAPE), torch.randn(5, *SHAPE)
    if not _computes(model, x):
        with pytest.raises(UserError, match="nothing in this model can be quantized"):
            prepare(model, x)
        return
    prepared = prepare(model, x, QConfig(output=output))
    calibrate(prepared, [torch.randn(8, *SHAPE) for _ in range(2)], progress=False)
    set_fake_quantize(prepared, FakeQuantState.FLOAT)
    results = _results(model, other), _results(prepared, other)
    assert promise_broken(prepared, ExampleInputs((other,)), *results, close(1e-4)) is None
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    integer = convert(prepared)
    assert graph_info(integer).stage is Stage.INTEGER
    assert not [note for note in graph_info(integer).notes if note.startswith("float:")]
    simulator = Simulator(integer)
    together = _results(simulator, other)
    for direct, simulated in zip(_results(integer, other), together, strict=True):
        assert torch.equal(direct, simulated), "the simulator and the torch operators are one arithmetic"
    for row in range(len(other)):
        for alone, all_rows in zip(_results(simulator, other[row : row + 1]), together, strict=True):
            assert torch.equal(alone, all_rows[row : row + 1]), "a sample is computed alike in every batch"
    for site in compare_sites(prepared, integer, (other,)):
        check_site(site)


def _computes(model: Generated, x: torch.Tensor) -> bool:
    """Whether anything is left of the network."""
    nodes = Pipeline.parse(FLOAT_PASSES).run(trace(model, x)).gm.graph.nodes
    return any(info(node).op.lowering is not None for node in nodes)


def check_site(site: SiteConsistency) -> None:
    """Section 11 of docs/arithmetic.md, for a site given the same integers."""
    if site.op in (*TABLES, "interpolate") and site.format == "int16":
        return  # declared roundings: the shape of the function says how far; tests/lowering states it
    if site.op == "interpolate":
        assert site.largest <= 1, site  # its weights are rounded to 11 bits
        return
    if site.format == "int32":
        assert site.largest <= 2**9, site  # float32 holds 24 of the accumulator's 32 bits
        return
    assert site.unexplained == 0, site


def _results(module: object, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        found = module(x)  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


@settings(max_examples=40, derandomize=True, **quiet)
@given(networks)
def test_float_passes_keep_every_network(model: Generated) -> None:
    check_float_passes(model)


@settings(max_examples=40, derandomize=True, **quiet)
@given(networks, st.sampled_from([qint8, qint16]))
def test_integers_agree_with_fake_quantization_for_every_network(model: Generated, output: QType) -> None:
    check_integers(model, output)


@pytest.mark.slow
@settings(max_examples=500, **quiet)
@given(networks)
def test_float_passes_keep_many_networks(model: Generated) -> None:
    check_float_passes(model)


@pytest.mark.slow
@settings(max_examples=500, **quiet)
@given(networks, st.sampled_from([qint8, qint16]))
def test_integers_agree_with_fake_quantization_for_many_networks(model: Generated, output: QType) -> None:
    check_integers(model, output)


def test_a_network_can_be_written_down() -> None:
    model = Generated([Step("conv_norm", 0, 0, 0), Step("add", 0, 1, 0), Step("pool", 0, 0, 3)], outputs=2)
    assert [tuple(value.shape) for value in model(torch.zeros(3, *SHAPE))] == [(3, 4, 6, 6), (3, 4, 1, 1)]

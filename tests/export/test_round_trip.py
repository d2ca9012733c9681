"""onnxruntime computes from the exported file what the simulator computes: no element differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph import export_onnx, info
from qgraph.numerics import dequantize
from qgraph.quantization import freeze
from tests.conformance import engine_onnxruntime as engine
from tests.export.nets import Mixed, Sequence, on_ties, prepared, real_inputs, seek_ties
from tools.bench.models import build

pytestmark = pytest.mark.skipif(engine.available() is not None, reason=str(engine.available()))

TARGET = qgraph.get_target("onnxruntime")
TARGETS = {"uint8": TARGET, "int8": replace(TARGET, eight_bits=qgraph.qint8)}
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixed": (Mixed, (2, 3, 12, 10)),
    "sequence": (Sequence, (2, 6, 12)),
    "resnet18": (lambda: build("resnet18"), (1, 3, 64, 64)),
    "mobilenetv2": (lambda: build("mobilenetv2"), (1, 3, 64, 64)),
}


CASES = [*((net, "uint8") for net in NETS), ("mixed", "int8"), ("sequence", "int8"), ("mobilenetv2", "int8")]


@pytest.fixture(params=CASES, ids="-".join)
def net(request: pytest.FixtureRequest) -> tuple[fx.GraphModule, tuple[int, ...]]:
    name, signed = request.param
    make, shape = NETS[name]
    return prepared(make(), torch.randn(shape), target=TARGETS[signed]), shape


def test_whole_networks(net: tuple[fx.GraphModule, tuple[int, ...]], tmp_path: Path) -> None:
    gm, shape = net
    files = {form: export_onnx(gm, tmp_path / f"{form}.onnx", form=form) for form in ("qdq", "qoperator")}
    simulator = qgraph.Simulator(qgraph.convert(gm))
    for batch in (1, 2, 3):
        x = torch.randn(batch, *shape[1:]) * 1.2
        ours = simulator(x)
        for form, optimized in (("qdq", True), ("qoperator", True), ("qoperator", False)):
            (theirs,) = engine.outputs(str(files[form]), (x,), optimized=optimized)
            assert torch.equal(ours, theirs), (form, optimized, batch, int((ours != theirs).sum()))


def test_floats_between_roundings_are_exact_where_scales_are_powers_of_two(
    net: tuple[fx.GraphModule, tuple[int, ...]], tmp_path: Path
) -> None:
    """Optimizations off: every operator runs in float32 between DequantizeLinear and QuantizeLinear."""
    gm, shape = net
    seek_ties(gm, "powers", parity=0)
    file = export_onnx(gm, tmp_path / "net.onnx")
    x = torch.randn(2, *shape[1:])
    ours = qgraph.Simulator(qgraph.convert(gm))(x)
    for optimized in (False, True):
        assert torch.equal(ours, engine.outputs(str(file), (x,), optimized=optimized)[0]), optimized


class Halves(nn.Module):
    """One half of the channels plus the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :8] + x[:, 8:]


@pytest.mark.parametrize("kind", ["conv", "add"])
def test_floats_between_roundings_differ_only_next_to_ties(kind: str, tmp_path: Path) -> None:
    """The cause of what differs with optimizations off: float32 sums, or zero points added before or after rounding."""
    example = torch.randn(4, 8, 20, 20).repeat(1, 2, 1, 1)  # so that the sum's scale is twice the input's
    gm = prepared(nn.Conv2d(16, 24, 3) if kind == "conv" else Halves(), example)
    if kind == "conv":
        on_ties(gm)
    else:
        seek_ties(gm, "powers", parity=1)
    x = real_inputs(gm, (4, 16, 20, 20))
    frozen = freeze(gm)
    file = export_onnx(gm, tmp_path / "net.onnx")
    (floats,) = engine.outputs(str(file), (x,), optimized=False)
    run = qgraph.Simulator(qgraph.convert(gm)).run(x, record=True)
    node = next(n for n in frozen.graph.nodes if info(n).op.name in ("conv2d", "add"))
    exact = _exact(frozen, node, run.values)
    differs = run.output != floats
    distance = (exact - torch.floor(exact) - 0.5).abs()
    assert differs.any(), "a case that seeks ties finds some"
    assert distance[differs].max() < 1e-3 < distance.max()
    step = info(node).qparams
    assert step is not None
    assert torch.all((run.output - floats).abs() <= step.scale * 1.001)


def _exact(frozen: fx.GraphModule, node: fx.Node, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The result of `node` in steps of its scale, float64."""
    operands = []
    for used in node.all_input_nodes:
        qparams = info(used).qparams
        assert qparams is not None
        operands.append(dequantize(values[info(used).site.removesuffix(".fake_quant")], qparams).double())
    result = info(node).qparams
    assert result is not None
    if node.op == "call_module":
        module = frozen.get_submodule(str(node.target))
        real = torch.nn.functional.conv2d(
            operands[0], module.quantized_weight().double(), module.quantized_bias().double()
        )
    else:
        real = operands[0] + operands[1]
    return real / result.scale.double()


@pytest.mark.parametrize("net", [("mobilenetv2", "uint8"), ("mixed", "int8")], indirect=True, ids="-".join)
def test_onnxruntime_runs_integer_kernels(net: tuple[fx.GraphModule, tuple[int, ...]], tmp_path: Path) -> None:
    import onnx

    gm, _ = net
    file = export_onnx(gm, tmp_path / "net.onnx")
    engine.session_of(str(file), optimized=True, saved=str(tmp_path / "optimized.onnx"))
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "GlobalAveragePool", "Concat"} & set(kinds)
    products = sum(info(node).op.name in ("conv2d", "linear") for node in gm.graph.nodes)
    assert kinds.count("QLinearConv") + kinds.count("QGemm") == products

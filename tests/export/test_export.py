"""What stands in an exported file, and what is refused."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph import export_onnx, info
from qgraph.errors import InternalError, StateError, UserError
from qgraph.ir.node_info import module_of
from qgraph.lowering.products import accumulator_step
from qgraph.numerics import QParams, bias_codes, quantize
from qgraph.quantization import freeze
from tests.conformance import engine_onnxruntime as engine
from tests.export.nets import Mixed, prepared, seek_ties

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Island(nn.Module):
    """A function in float behind codes: the stub ends the quantized part."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.quant, self.dequant = qgraph.QuantStub(), qgraph.DeQuantStub()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.dequant(F.relu(self.quant(x))))


def mixed(**options: Any) -> fx.GraphModule:
    return prepared(Mixed(), torch.randn(2, 3, 12, 10), **options)


def initializers(file: Path) -> dict[str, torch.Tensor]:
    model = onnx.load(file)
    return {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}


def same_parameters(found: dict[str, torch.Tensor], scale: str, zero: str, qparams: QParams) -> bool:
    zeros = qparams.zero_points().to(qparams.qtype.storage).expand(qparams.scale.shape)
    return (
        found[scale].dtype == torch.float32
        and torch.equal(found[scale].view(torch.int32), qparams.scale.view(torch.int32))
        and found[zero].dtype == qparams.qtype.storage
        and torch.equal(found[zero], zeros)
    )


@pytest.mark.parametrize("target", ["onnxruntime", "bpu"])
def test_every_site_has_its_parameters_to_the_bit(target: str, tmp_path: Path) -> None:
    gm = mixed(target=target)
    file, frozen = export_onnx(gm, tmp_path / "net.onnx"), freeze(gm)
    found, graph = initializers(file), onnx.load(file).graph
    rounded = {tuple(node.input[1:]): node for node in graph.node if node.op_type == "QuantizeLinear"}
    read = {tuple(node.input) for node in graph.node if node.op_type == "DequantizeLinear"}
    sites = 0
    for node in frozen.graph.nodes:
        record = info(node)
        if record.qparams is None or record.op.name in ("fake_quant", "item") or record.qparams.qtype == qgraph.qint32:
            continue
        sites += 1
        scale, zero = f"{record.site}.scale", f"{record.site}.zero_point"
        assert same_parameters(found, scale, zero, record.qparams), record.site
        assert (scale, zero) in rounded, record.site
        if record.weight_qparams is None:
            continue
        module, source = module_of(node), info(node.all_input_nodes[0]).qparams
        weight = f"{record.site}.weight"
        assert same_parameters(found, f"{weight}.scale", f"{weight}.zero_point", record.weight_qparams)
        assert torch.equal(found[f"{weight}.codes"], quantize(module.weight, record.weight_qparams))
        assert (f"{weight}.codes", f"{weight}.scale", f"{weight}.zero_point") in read
        step = accumulator_step(source, record.weight_qparams)
        assert torch.equal(found[f"{record.site}.bias.codes"], bias_codes(module.bias, step).int())
        assert torch.equal(found[f"{record.site}.bias.scale"], step.float())
    assert sites > 10


def test_names_metadata_and_origins(tmp_path: Path) -> None:
    model = onnx.load(export_onnx(mixed(), tmp_path / "net.onnx", opset=19))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["qgraph.target"] == "onnxruntime"
    assert properties["qgraph.form"] == "qdq"
    assert '"stem.0": "stem.0.codes"' in properties["qgraph.sites"]
    assert [opset.version for opset in model.opset_import if not opset.domain] == [19]
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    assert conv.doc_string.startswith("stem.0, stem")
    assert "nets.py:" in conv.doc_string
    (x,) = model.graph.input
    assert [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim] == ["batch", 3, 12, 10]


def test_a_fixed_batch(tmp_path: Path) -> None:
    model = onnx.load(export_onnx(mixed(), tmp_path / "net.onnx", dynamic_batch=False))
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 12, 10]
    assert [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] == [2, 10]


@pytest.mark.parametrize("opset", [13, 15, 17, 19, 21, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    gm = mixed()
    x = torch.randn(2, 3, 12, 10)
    (theirs,) = engine.outputs(str(export_onnx(gm, tmp_path / "net.onnx", opset=opset)), (x,), optimized=True)
    assert torch.equal(qgraph.Simulator(qgraph.convert(gm))(x), theirs)


def test_sixteen_bits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    gm = prepared(
        model,
        torch.randn(1, 3, 9, 9),
        target="bpu",
        qconfig=qgraph.calibration_8bit_weight_16bit_act_qconfig_setter,
    )
    with pytest.raises(UserError, match="opset 20 cannot quantize to") as caught:
        export_onnx(gm, tmp_path / "net.onnx", opset=20)
    assert "opset=21" in str(caught.value)
    found = initializers(export_onnx(gm, tmp_path / "net.onnx", opset=21))
    assert found["0.zero_point"].dtype == torch.int16
    seek_ties(gm, "powers")  # float32 holds sums of 16 bits too then
    file, x = export_onnx(gm, tmp_path / "exact.onnx"), torch.randn(3, 3, 9, 9)
    ours = qgraph.Simulator(qgraph.convert(gm))(x)
    for optimized in (False, True):
        assert torch.equal(ours, engine.outputs(str(file), (x,), optimized=optimized)[0])


class Indices(nn.Module):
    """Whole numbers from reals."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmin(1)


ISLANDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "layer_norm": nn.LayerNorm(8),
    "layer_norm_plain": nn.LayerNorm((6, 8), elementwise_affine=False),
    "batch_norm": nn.BatchNorm2d(4).eval(),
    "softmax": lambda x: F.softmax(x, 1),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "conv": nn.Conv2d(4, 5, 3, padding=1, stride=2),
    "conv_transpose": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    "linear": nn.Linear(8, 5),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "arithmetic": lambda x: (x * 2 - 1.5) / (x + 3) - x.sub(x, alpha=0.5),
    "flipped": lambda x: 1 - x,
    "clamp": lambda x: x.clamp(max=0.5) + F.relu6(x * 4),
    "exp": lambda x: torch.exp(x * -1) + torch.tanh(x) + torch.sigmoid(x) + torch.reciprocal(x + 1),
    "rsqrt": lambda x: torch.rsqrt(x + 0.5),
    "leaky_relu": lambda x: F.leaky_relu(x - 0.5, 0.3),
    "mean": lambda x: x.mean(1) + x.mean((1, 2)).unsqueeze(1)[..., :8].mean(-1, keepdim=True).unsqueeze(1),
    "sum": lambda x: x.sum((1, -1), keepdim=True) + x.amax(2, keepdim=True),
    "max_pool": lambda x: F.max_pool2d(x, 2, 1, 1),
    "max_pool_ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max_pool_ceil_dropped": lambda x: F.max_pool2d(x, 2, 4, 1, ceil_mode=True),
    "max_pool_ceil_both": lambda x: F.max_pool2d(x, (2, 3), (4, 2), 1, ceil_mode=True),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool_ceil_both": lambda x: F.avg_pool2d(x, (2, 3), (4, 2), 1, ceil_mode=True, count_include_pad=False),
    "avg_pool_exclusive": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_pool_ceil": lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False),
    "bilinear_corners": lambda x: F.interpolate(x, size=(9, 11), mode="bilinear", align_corners=True),
    "reshape": lambda x: x.reshape(x.shape[0], 2, -1).flatten(1).unflatten(1, (12, 16)),
    "reshape_two": lambda x: x.reshape(x.shape[0] * 2, 2, 6, 8).reshape(x.shape[0], 4, 6, 8),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1) + torch.arange(8.0).expand(x.shape[0], 3, 6, 8),
    "permute": lambda x: x.permute(0, 3, 1, 2).transpose(1, -1).unsqueeze(-1).squeeze(-1),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "slice": lambda x: x[:, 1, None, ..., ::3] + x[..., -1:, 2:3],
    "flip": lambda x: torch.flip(x, (1, -1)) + torch.roll(x, (1, -2), (1, 3)),
    "select": lambda x: x.select(1, 2).narrow(2, 1, 4),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0, 0])),
    "split": lambda x: torch.cat([x.split([1, 3], 1)[1], x.chunk(2, 1)[0], torch.stack(x.unbind(1)[:2], 1)], 1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect") + F.pad(x, (1, 2, 2, 1), mode="replicate"),
    "compare": lambda x: torch.where(x > 0.5, x, -x) + torch.where(x <= x.flip(1), x, 0.5 * x),
    "masked_fill": lambda x: x.masked_fill(x != 0, 2.0) + torch.maximum(x, 1 - x) + torch.minimum(x, x * x),
    "functions": lambda x: torch.log(x + 1) + torch.sqrt(x) + torch.erf(x) + torch.sin(x) + torch.cos(x).abs(),
    "rounding": lambda x: torch.floor(x * 3) + torch.ceil(x) + torch.round(x * 2) + torch.sign(x - 0.1),
    "activations": lambda x: F.elu(x - 1) + F.softplus(x) + F.mish(x) + F.selu(x - 1) + F.celu(x - 1, 0.5),
    "pow": lambda x: (x + 0.5) ** 2 + torch.pow(x + 0.5, 1.7),
    "prelu": nn.PReLU(4, 0.3),
    "embedding": nn.Sequential(Indices(), nn.Embedding(4, 5)),
    "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "cumsum": lambda x: x.cumsum(2).movedim(1, -1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(2), x * 2),
    "several": lambda x: (x * 2, x[:, 0], x),
}


@pytest.mark.parametrize("name", ISLANDS)
def test_islands_compute_what_torch_computes(name: str, tmp_path: Path) -> None:
    gm = prepared(Island(ISLANDS[name]), torch.randn(2, 4, 6, 8))
    frozen = freeze(gm)
    file = export_onnx(frozen, tmp_path / "net.onnx")
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, 6, 8)
        expected = frozen(x)
        theirs = engine.outputs(str(file), (x,), optimized=True)
        for one, two in zip(expected if isinstance(expected, tuple) else (expected,), theirs, strict=True):
            torch.testing.assert_close(two, one.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["layer_norm", "gelu", "hardswish", "sum", "nearest", "bilinear_corners", "split"])
def test_islands_before_newer_operators(name: str, tmp_path: Path) -> None:
    gm = prepared(Island(ISLANDS[name]), torch.randn(2, 4, 6, 8))
    frozen, x = freeze(gm), torch.randn(2, 4, 6, 8)
    (theirs,) = engine.outputs(str(export_onnx(gm, tmp_path / "net.onnx", opset=13)), (x,), optimized=True)
    torch.testing.assert_close(theirs, frozen(x).detach(), rtol=1e-5, atol=1e-6)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cross(self.head(x)[..., :3], self.head(x)[..., 1:])


def test_an_operator_without_a_form_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    gm = prepared(Sparse(), torch.randn(2, 8))
    (tmp_path / "net.onnx").write_text("before")
    with pytest.raises(UserError) as caught:
        export_onnx(gm, tmp_path / "net.onnx")
    text = str(caught.value)
    assert all(part in text for part in ("linalg_cross", "cannot be exported to ONNX", "node ", "test_export.py:"))
    assert (tmp_path / "net.onnx").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = mixed()
    with pytest.raises(UserError, match="cannot be written"):
        export_onnx(gm, tmp_path / "missing" / "net.onnx")

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(UserError, match="disk full") as caught:
        export_onnx(gm, tmp_path / "net.onnx")
    assert "net.onnx" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = mixed()
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "onnx":
            raise ImportError("No module named 'onnx'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "onnx"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"qgraph-fx\[onnx\]"):
        export_onnx(gm, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"opset": 12}, "from 13 to 23"),
        ({"opset": "21"}, "opset is '21'"),
        ({"form": "integers"}, '"qdq" or "qoperator"'),
        ({"path": 3}, "path is a int"),
    ],
)
def test_options(options: dict[str, Any], part: str, tmp_path: Path) -> None:
    arguments = {"path": tmp_path / "net.onnx", **options}
    with pytest.raises(UserError) as caught:
        export_onnx(mixed(), **arguments)
    assert part in str(caught.value)


def test_graphs_in_other_stages(tmp_path: Path) -> None:
    gm = mixed()
    with pytest.raises(UserError, match="needs a prepared graph"):
        export_onnx(qgraph.convert(gm), tmp_path / "net.onnx")
    with pytest.raises(UserError, match="prepared"):
        export_onnx(Mixed(), tmp_path / "net.onnx")  # type: ignore[arg-type]
    raw = qgraph.prepare(Mixed().eval(), (torch.randn(2, 3, 12, 10),), target="onnxruntime")
    with pytest.raises(StateError, match="calibrated"):
        export_onnx(raw, tmp_path / "net.onnx")


def test_a_batch_that_cannot_change(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([row * 2 for row in x.relu()])

    gm = qgraph.prepare(Fixed().eval(), (torch.randn(2, 5),), target="onnxruntime")
    qgraph.calibrate(gm, [(torch.randn(2, 5),)], progress=False)
    with pytest.raises(UserError, match="batch size of this model cannot change"):
        export_onnx(gm, tmp_path / "net.onnx", dynamic_batch=True)


def test_exporting_changes_nothing(tmp_path: Path) -> None:
    gm = mixed()
    before, text = {k: v.clone() for k, v in gm.state_dict().items()}, str(gm.graph)
    states = {name: module.state for name, module in gm.named_modules() if hasattr(module, "state")}
    export_onnx(gm, tmp_path / "a.onnx")
    export_onnx(freeze(gm), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert str(gm.graph) == text
    assert all(torch.equal(before[k], v) for k, v in gm.state_dict().items())
    assert states == {name: module.state for name, module in gm.named_modules() if hasattr(module, "state")}


def test_a_model_onnx_refuses_is_a_bug_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(onnx.checker, "check_model", refuses)
    with pytest.raises(InternalError, match="onnx refuses"):
        export_onnx(mixed(), tmp_path / "net.onnx")

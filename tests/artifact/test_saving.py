"""What cannot be saved is refused by name; files appear whole or not at all; operators of other packages."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
import qgraph.ir.copying
import qgraph.nn.fused
from qgraph.artifact import load, save
from qgraph.artifact.known import KnownFunctions, check_method, class_name, function_name, module_classes
from qgraph.artifact.modules import read_module, write_module
from qgraph.artifact.records import RecordReader, RecordWriter
from qgraph.artifact.tensors import TensorReader, TensorWriter
from qgraph.errors import ArtifactError, UserError
from qgraph.ir.node_info import KEY, info
from qgraph.ir.op_table import OPS
from tests.artifact.graphs import GRAPHS, integer_of
from tests.support.models import Forward

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return GRAPHS["residual"]()[0]


# --- writing at once -------------------------------------------------------------------------------------------------


def test_an_existing_file_is_replaced(graph: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "model.qgraph"
    path.write_text("old")
    save(graph, str(path))
    load(str(path))
    assert os.listdir(tmp_path) == ["model.qgraph"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_nothing_is_left_of_a_failed_write(
    function: str, graph: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "model.qgraph"
    path.write_text("old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UserError, match="cannot be written") as refused:
        save(graph, path)
    assert "No space left" in str(refused.value)
    assert os.listdir(tmp_path) == ["model.qgraph"]
    assert path.read_text() == "old"


def test_an_interrupt_leaves_nothing(graph: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(graph, tmp_path / "model.qgraph")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(graph: fx.GraphModule, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "model.qgraph", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot be written"):
            save(graph, path)
    assert os.listdir(tmp_path) == ["folder"]


def test_only_integer_graphs(tmp_path: Path) -> None:
    captured = qgraph.trace(nn.Linear(2, 2).eval(), torch.randn(1, 2))
    for wrong in (captured, nn.Linear(2, 2)):
        with pytest.raises(UserError, match="only integer graphs are saved"):
            save(wrong, tmp_path / "a")
    assert os.listdir(tmp_path) == []


# --- what a file cannot hold -----------------------------------------------------------------------------------------


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Mapping(OrderedDict):
    pass


def refused(model: nn.Module, tmp_path: Path, *example: Any, leaf_modules: Any = ()) -> str:
    prepared = qgraph.prepare(model.eval(), example, leaf_modules=leaf_modules)
    qgraph.calibrate(prepared, [example], progress=False)
    with pytest.raises(ArtifactError) as error:
        save(qgraph.convert(prepared), tmp_path / "a")
    assert os.listdir(tmp_path) == []
    return str(error.value)


def test_a_module_of_the_user(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Strange())
    message = refused(model, tmp_path, torch.randn(2, 4), leaf_modules=Strange)
    assert "module 1 of class tests.artifact.test_saving.Strange" in message
    assert "where: node " in message
    assert "do not name it in leaf_modules" in message


def test_a_module_that_was_changed(tmp_path: Path) -> None:
    threshold = nn.Threshold(0.1, 20.0)
    threshold.colour = "red"
    model = nn.Sequential(nn.Linear(4, 4), threshold)
    message = refused(model, tmp_path, torch.randn(2, 4))
    assert "its attribute colour is 'red'" in message


def test_a_function_of_the_user(graph: fx.GraphModule, tmp_path: Path) -> None:
    copied = qgraph.ir.copying.copy_graph(graph)
    node = next(node for node in copied.graph.nodes if node.name == "generated_flatten_0")
    node.target = lambda x, start_dim: x.flatten(start_dim)
    with pytest.raises(ArtifactError, match=r"cannot hold a call of tests\.artifact\.test_saving") as error:
        save(copied, tmp_path / "a")
    assert "node generated_flatten_0" in str(error.value)
    assert "models.py:" in str(error.value)


def test_methods_arguments_and_tensors(graph: fx.GraphModule, tmp_path: Path) -> None:
    def change(apply: Callable[[fx.Node], Any]) -> str:
        copied = qgraph.ir.copying.copy_graph(graph)
        apply(next(node for node in copied.graph.nodes if node.name == "generated_flatten_0"))
        with pytest.raises(ArtifactError) as error:
            save(copied, tmp_path / "a")
        return str(error.value)

    def method(node: fx.Node) -> None:
        node.op, node.target = "call_method", "numpy"

    assert "the method 'numpy'" in change(method)
    assert "cannot hold a set" in change(lambda node: setattr(node, "kwargs", {"start_dim": {1}}))


def test_an_output_with_a_state_of_its_own(tmp_path: Path) -> None:
    fc = nn.Linear(4, 4)
    message = refused(Forward(lambda m, x: Mapping(a=m.fc(x)), fc=fc), tmp_path, torch.randn(2, 4))
    assert "an output of class Mapping" in message
    assert "return a dict" in message


def test_ordered_dictionaries(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    gm = integer_of(Forward(lambda m, x: OrderedDict({"a b": m.fc(x), "c": x}), fc=nn.Linear(4, 4)), x)
    save(gm, tmp_path / "a")
    one, two = gm(x), load(tmp_path / "a")(x)
    assert type(two) is OrderedDict
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


# --- the closed lists ------------------------------------------------------------------------------------------------


def test_functions_are_found_by_their_names() -> None:
    known = KnownFunctions()
    for op in OPS:
        for function in (op.target, *op.functions):
            if function is not None:
                assert known.function(known.name(function)) is function
    names = {
        torch.fft.fft: "torch.fft.fft",
        F.pad: "torch.nn.functional.pad",
        torch.erf: "torch.erf",
        getattr: "getattr",
    }
    for function, name in names.items():
        assert known.name(function) == function_name(function) == name
        assert known.function(name) is function


@pytest.mark.parametrize(
    "name",
    [
        "eval",
        "exec",
        "open",
        "__import__",
        "builtins.eval",
        "os.system",
        "torch.load",
        "torch.save",
        "torch.compile",
        "torch.ops.load_library",
        "torch.hub.load",
        "subprocess.run",
        "operator.methodcaller",
        "operator.attrgetter",
        "setattr",
        "torch.from_file",
        "map",
        "print",
        "torch.jit.load",
        "torch.classes.load_library",
        "torch.Tensor.__reduce_ex__",
        "torch.Tensor.numpy",
        "qgraph.load",
    ],
)
def test_functions_that_are_not_known(name: str) -> None:
    with pytest.raises(ArtifactError, match="not known here"):
        KnownFunctions().function(name)


@pytest.mark.parametrize(
    "name",
    [
        "numpy",
        "__reduce__",
        "__class__",
        "tolist",
        "apply_",
        "map_",
        "set_",
        "register_hook",
        "data_ptr",
        "share_memory_",
    ],
)
def test_methods_that_are_not_known(name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot hold a call of the method"):
        check_method(name)


MODULES = [
    nn.LayerNorm(4),
    nn.LayerNorm((2, 4), eps=1e-3, bias=False),
    nn.LayerNorm(4, elementwise_affine=False),
    nn.BatchNorm1d(4, momentum=None),
    nn.GroupNorm(2, 4),
    nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    nn.RMSNorm(4),
    nn.PReLU(4),
    nn.Linear(3, 2, bias=False),
    nn.Bilinear(2, 3, 4),
    nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", groups=2, padding_mode="reflect"),
    nn.ConvTranspose1d(4, 6, 3, output_padding=1, stride=2, bias=False),
    nn.Embedding(5, 3, padding_idx=1),
    nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    nn.GRU(3, 4, bias=False, batch_first=True),
    nn.RNN(3, 4, nonlinearity="relu"),
    nn.GRUCell(3, 4),
    nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    nn.MultiheadAttention(4, 2, bias=False),
    nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
    nn.Softmax(dim=1),
    nn.GELU("tanh"),
    nn.LeakyReLU(0.25),
    nn.AdaptiveMaxPool2d((2, None)),
    nn.MaxPool2d(3, return_indices=True),
    nn.Unflatten(1, (2, 2)),
    nn.PixelShuffle(2),
    nn.ConstantPad2d(1, 2.5),
    nn.Dropout(0.25),
    nn.Threshold(0.5, 20),
    nn.Hardtanh(-2, 2),
    qgraph.nn.Affine(torch.randn(4, 1), torch.randn(4, 1)),
    qgraph.nn.as_fused(nn.Conv1d(2, 3, 3)),
    qgraph.nn.as_fused(nn.Linear(2, 3, bias=False)),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_modules(module: nn.Module) -> None:
    if hasattr(module, "activation"):
        module.activation = qgraph.nn.Activation.RELU6
    module = module.eval()
    tensors = TensorWriter()
    written = write_module(RecordWriter(tensors, KnownFunctions()), module, "path")
    reader = RecordReader(TensorReader(tensors.member(), tensors.strides), None, KnownFunctions())
    built = read_module(reader, written, "path")
    assert type(built) is type(module)
    assert repr(built) == repr(module)
    assert built.training is False
    ours, theirs = dict(module.state_dict(keep_vars=True)), dict(built.state_dict(keep_vars=True))
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert type(theirs[name]) is type(tensor)
        assert torch.equal(theirs[name], tensor)
        assert not theirs[name].is_meta
    if isinstance(module, nn.RNNBase) and not module.proj_size:
        x = torch.randn(2, 2, 3)
        assert torch.equal(built(x)[0], module(x)[0])


def test_modules_that_hold_others_are_not_known() -> None:
    classes = module_classes()
    for name in ("Sequential", "ModuleList", "Module", "TransformerEncoderLayer", "LazyLinear", "DataParallel"):
        assert f"torch.nn.{name}" not in classes
    assert class_name(nn.Linear) == "torch.nn.Linear"
    assert classes["qgraph.nn.fused.FusedConv2d"] is qgraph.nn.fused.FusedConv2d


def test_shared_modules_and_weights_stay_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(10, 4)

    def forward(m: nn.Module, tokens: torch.Tensor) -> Any:
        return m.fc(m.table(tokens)), m.other(tokens + 0) * 2

    model = Forward(forward, table=table, other=table, fc=nn.Linear(4, 2))
    tokens = torch.randint(0, 10, (2, 3))
    gm = integer_of(model, tokens)
    save(gm, tmp_path / "a")
    loaded = load(tmp_path / "a")

    def identities(graph: fx.GraphModule) -> list[int]:
        parameters = list(dict(graph.named_parameters(remove_duplicate=False)).values())
        return [next(i for i, other in enumerate(parameters) if other is tensor) for tensor in parameters]

    assert identities(gm) == identities(loaded)
    assert all(torch.equal(one, two) for one, two in zip(gm(tokens), loaded(tokens), strict=True))


# --- other packages --------------------------------------------------------------------------------------------------

_PACKAGE = """
import inspect, sys, torch
import qgraph
from qgraph.ir.arguments import bind
from qgraph.ir.op import Op, OpKind, QuantRule, ShapeRule
from qgraph.ir.op_table import OPS
from qgraph.lowering import Lowering, register_lowering, requantized_to
from qgraph.simulator import register_operator

def maximum(x, y, *, trace=None):
    return torch.maximum(x, y)

def register():
    register_operator("maximum", "(Tensor x, Tensor y) -> Tensor", maximum, torch.maximum)
    class MaximumLowering(Lowering):
        "The larger code."
        def lower(self, node, ctx):
            result = ctx.qparams(node)
            operands = [requantized_to(value, result, node, ctx, role) for role, value in bind(node).nodes()]
            return ctx.integer("maximum", *operands, like=node)
    register_lowering("maximum", MaximumLowering())
    OPS.define(Op(name="maximum", kind=OpKind.SELECT, signature=inspect.signature(lambda input, other: None),
        operands=("input", "other"), target=torch.maximum, quant=QuantRule.OWN, lowering="maximum",
        shape=ShapeRule.BROADCAST))
"""


def test_operators_of_other_packages(tmp_path: Path) -> None:
    """Saved and loaded where they are registered; named where they are not."""
    if "maximum" in {op.name for op in OPS}:
        pytest.skip("maximum is an operator of qgraph itself")
    (tmp_path / "package.py").write_text(_PACKAGE)
    toml = (ROOT / "qgraph/targets/bpu.toml").read_text().replace('"relu", "relu6",', '"relu", "relu6", "maximum",')
    (tmp_path / "chip.toml").write_text(toml)
    maker = (
        "import package; package.register(); import torch, qgraph\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x, y): return torch.maximum(x, y)\n"
        "torch.manual_seed(0); e = (torch.randn(2, 3), torch.randn(2, 3))\n"
        "p = qgraph.prepare(M().eval(), e, target='chip.toml'); qgraph.calibrate(p, [e], progress=False)\n"
        "g = qgraph.convert(p); assert 'qgraph.maximum' in qgraph.print_graph(g)\n"
        "qgraph.save(g, 'a.qgraph'); h = qgraph.load('a.qgraph')\n"
        "assert torch.equal(qgraph.Simulator(g)(*e), qgraph.Simulator(h)(*e))\n"
        "assert qgraph.graph_info(g).target == qgraph.graph_info(h).target\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    subprocess.run([sys.executable, "-c", maker], check=True, cwd=tmp_path, env=environment)
    with pytest.raises(ArtifactError, match="maximum") as error:
        load(tmp_path / "a.qgraph")
    assert "import the package that" in str(error.value)


def test_a_broken_graph_is_not_saved(graph: fx.GraphModule, tmp_path: Path) -> None:
    copied = qgraph.ir.copying.copy_graph(graph)
    node = next(node for node in copied.graph.nodes if node.name == "conv1")
    node.meta[KEY] = dataclasses.replace(info(node), site="stem")
    with pytest.raises(qgraph.VerifyError, match="breaks 1 rule"):
        save(copied, tmp_path / "a")


def test_paths_are_texts_or_paths(graph: fx.GraphModule) -> None:
    with pytest.raises(UserError, match="the path is a NoneType"):
        save(graph, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the path is a Residual"):
        load(graph)  # type: ignore[arg-type]

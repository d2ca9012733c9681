"""What is saved is what is loaded: text, records, tensors, results, guard; the same graph gives the same bytes."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.artifact import load, save
from qgraph.artifact.conformance import compare_values
from qgraph.capture.boundary.guard import InputGuard
from qgraph.capture.values.structure import leaves
from qgraph.errors import UserError
from qgraph.ir.node_info import KEY, graph_info, info, tensor_at, update_graph_info
from qgraph.ir.text import print_graph
from qgraph.numerics import QParams, qint8
from qgraph.simulator import Simulator
from tests.artifact.graphs import GRAPHS, Pair, float_convolution, members_of
from tests.support.models import Residual, image


@pytest.fixture(scope="module", params=list(GRAPHS))
def saved(request, tmp_path_factory) -> tuple[fx.GraphModule, fx.GraphModule, tuple[Any, ...], Path]:
    torch.manual_seed(0)
    gm, inputs = GRAPHS[request.param]()
    path = tmp_path_factory.mktemp("saved") / "model.qgraph"
    save(gm, path)
    return gm, load(path), inputs, path


def same(one: Any, two: Any) -> bool:
    """Deep equality of records and outputs, tensors by bits and strides."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.stride() == two.stride() and compare_values(one, two) == (0, 0.0, "")
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def test_text(saved) -> None:
    gm, loaded, _, path = saved
    assert print_graph(loaded) == print_graph(gm)
    assert members_of(path)["graph.txt"].decode() == print_graph(gm)


def test_records(saved) -> None:
    gm, loaded, *_ = saved
    nodes, others = list(gm.graph.nodes), list(loaded.graph.nodes)
    assert [node.name for node in nodes] == [node.name for node in others]
    for node, other in zip(nodes, others, strict=True):
        assert same(info(node), info(other)), node.name
    expected, found = dict(vars(graph_info(gm))), dict(vars(graph_info(loaded)))
    assert same(expected, found)
    assert found["target"] is not expected["target"]
    assert isinstance(loaded, fx.GraphModule)
    assert list(loaded.meta) == [KEY]


def test_tensors(saved) -> None:
    gm, loaded, *_ = saved
    for node in gm.graph.find_nodes(op="get_attr"):
        one, two = tensor_at(gm, node.target), tensor_at(loaded, node.target)
        assert same(one.detach(), two.detach())
        assert (type(one), one.requires_grad) == (type(two), two.requires_grad)
    assert gm.state_dict().keys() == loaded.state_dict().keys()  # the order is that of the file


def test_outputs_and_every_tensor_on_the_way(saved) -> None:
    gm, loaded, inputs, _ = saved
    one, two = Simulator(gm).run(*inputs, record=True), Simulator(loaded).run(*inputs, record=True)
    assert same(one.values, two.values)
    assert same(one.output, two.output)
    assert same(gm(*inputs), loaded(*inputs))
    assert one.report() == two.report()


def test_same_bytes(saved, tmp_path: Path) -> None:
    gm, loaded, _, path = saved
    for number, graph in enumerate((gm, loaded, copy.deepcopy(gm))):
        save(graph, tmp_path / f"{number}.qgraph")
        assert (tmp_path / f"{number}.qgraph").read_bytes() == path.read_bytes()


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from tests.artifact.graphs import GRAPHS; from qgraph import save;"
        "torch.manual_seed(0); save(GRAPHS['attention']()[0], sys.argv[1])"
    )
    for number in "12":
        path = tmp_path / number
        subprocess.run([sys.executable, "-c", code, path], check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_guard(saved) -> None:
    gm, loaded, inputs, _ = saved
    one, two = (next(m for m in graph.modules() if isinstance(m, InputGuard)) for graph in (gm, loaded))
    for name in ("names", "fixed", "layout", "proven"):
        assert getattr(one, name) == getattr(two, name)
    assert one.choice == two.choice
    assert list(map(str, one.conditions)) == list(map(str, two.conditions))

    def message(graph: fx.GraphModule, *given: Any) -> str:
        with pytest.raises(UserError) as refused:
            graph(*given)
        return str(refused.value)

    for wrong in _wrong(inputs):
        assert message(gm, *wrong) == message(loaded, *wrong)


def _wrong(inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    first, *rest = inputs
    if isinstance(first, torch.Tensor):
        return [(first[..., :1],), (first.double(),), (None,), (first[:0],)]
    x, other = first["x"], first["rest"]
    return [
        ({"x": x, "rest": other}, 3.0),
        ({"rest": other, "x": x}, *rest),
        ({"x": x, "rest": (*other[:2], "word")}, *rest),
        ({"x": x, "rest": list(other)}, *rest),
        ({"x": x[:1], "rest": other}, *rest),
    ]


def test_conditions_of_the_batch(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] * 2 > 3:
                return self.fc(x)
            return self.fc(x) + 1

    torch.manual_seed(0)
    prepared = qgraph.prepare(Branching().eval(), (torch.randn(2, 4),))
    qgraph.calibrate(prepared, [(torch.randn(2, 4),)], progress=False)
    gm = qgraph.convert(prepared)
    save(gm, tmp_path / "a.qgraph")
    loaded = load(tmp_path / "a.qgraph")
    assert torch.equal(loaded(torch.ones(3, 4)), gm(torch.ones(3, 4)))
    with pytest.raises(UserError, match="does not serve a batch size of 1"):
        gm(torch.ones(1, 4))
    with pytest.raises(UserError, match="does not serve a batch size of 1") as refused:
        loaded(torch.ones(1, 4))
    assert "test_round_trip.py" in str(refused.value)


def test_symbolic_capture_and_sizes(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            batch, tokens, width = x.shape
            return self.fc(x).reshape(batch, tokens * 2, width // 2), x.size(0) * 2 + 1, x.new_zeros(batch, 2)

    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for method in ("symbolic", "jit"):
        prepared = qgraph.prepare(Sizes().eval(), (x,), method=method)
        qgraph.calibrate(prepared, [(x,)], progress=False)
        gm = qgraph.convert(prepared)
        save(gm, tmp_path / "a.qgraph")
        loaded = load(tmp_path / "a.qgraph")
        assert print_graph(loaded) == print_graph(gm)
        larger = torch.randn(7, 5, 8)
        assert same(loaded(larger), gm(larger))


def test_a_graph_that_was_captured_again(tmp_path: Path) -> None:
    x = image(2)
    prepared = qgraph.prepare(qgraph.trace(Residual().eval(), x), (x,))
    qgraph.calibrate(prepared, [(x,)], progress=False)
    gm = qgraph.convert(prepared)
    save(gm, tmp_path / "a.qgraph")
    loaded = load(tmp_path / "a.qgraph")
    guards = [path for path, module in gm.named_modules() if isinstance(module, InputGuard)]
    assert guards == ["_input_guard_"]
    assert [path for path, module in loaded.named_modules() if isinstance(module, InputGuard)] == guards
    assert torch.equal(loaded(image(3) * 0), gm(image(3) * 0))


def test_zero_points_and_axes(tmp_path: Path) -> None:
    gm, _ = GRAPHS["residual"]()
    nodes = {node.name: node for node in gm.graph.nodes}
    scales = torch.tensor([0.1, 1 / 3, 2.0**-20])
    kept = {
        "stem": QParams(torch.tensor(1 / 3), qint8, torch.tensor(-3)),
        "conv1": QParams(scales, qint8, torch.tensor([0, 5, -7]), axis=1),
        "conv2": QParams(scales, qint8, torch.zeros(3, dtype=torch.int64), axis=0),
    }
    for name, qparams in kept.items():
        nodes[name].meta[KEY] = dataclasses.replace(info(nodes[name]), qparams=qparams, weight_qparams=qparams)
    save(gm, tmp_path / "a.qgraph")
    loaded = {node.name: info(node) for node in load(tmp_path / "a.qgraph").graph.nodes}
    for name, qparams in kept.items():
        assert same(loaded[name].qparams, qparams)
        assert same(loaded[name].weight_qparams, qparams)


def test_modes_of_the_caller_make_no_difference(tmp_path: Path) -> None:
    gm, _ = GRAPHS["islands"]()
    save(gm, tmp_path / "a.qgraph")
    with torch.inference_mode(), torch.device("meta"):
        loaded = load(tmp_path / "a.qgraph")
    assert same(loaded.state_dict(), load(tmp_path / "a.qgraph").state_dict())
    assert not any(tensor.is_inference() for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert print_graph(loaded) == print_graph(gm)


def test_odd_names_and_numbers(tmp_path: Path) -> None:
    gm, _ = GRAPHS["residual"]()
    update_graph_info(gm, model="Modèle", notes=("ä\u2028\n\"'\\", ""), stateful=True, batch_fixed="why not")
    save(gm, tmp_path / "a.qgraph")
    assert same(graph_info(load(tmp_path / "a.qgraph")), graph_info(gm))


def test_classes_of_outputs_are_named_by_the_caller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, inputs = float_convolution()
    save(gm, tmp_path / "a.qgraph")
    with pytest.raises(qgraph.ArtifactError, match=r"the class tests.artifact.graphs.Pair") as refused:
        load(tmp_path / "a.qgraph")
    assert "classes=[Pair]" in str(refused.value)
    loaded = load(tmp_path / "a.qgraph", classes=[Pair])
    assert same(loaded(*inputs), gm(*inputs))
    assert type(loaded(*inputs)) is Pair
    assert loaded.depth.weight.stride() == gm.depth.weight.stride()


def test_without_example(tmp_path: Path) -> None:
    gm, inputs = GRAPHS["residual"]()
    save(gm, tmp_path / "a.qgraph", example=False)
    loaded = load(tmp_path / "a.qgraph")
    assert graph_info(loaded).example is None
    assert torch.equal(loaded(*inputs), gm(*inputs))
    data = (tmp_path / "a.qgraph").read_bytes()
    assert inputs[0].numpy().tobytes() not in data
    save(gm, tmp_path / "b.qgraph")
    assert inputs[0].numpy().tobytes() in (tmp_path / "b.qgraph").read_bytes()


def test_the_loaded_graph_is_a_graph_like_others(tmp_path: Path) -> None:
    gm, _ = GRAPHS["residual"]()
    save(gm, tmp_path / "a.qgraph")
    loaded = load(tmp_path / "a.qgraph")
    copied = copy.deepcopy(loaded)
    x = image(5)
    assert torch.equal(copied(x), gm(x))
    with pytest.raises(UserError, match="takes 1 inputs"):
        loaded(x, x)
    assert not any(module.training for module in loaded.modules())
    assert not list(leaves(graph_info(loaded).example.args))
    assert torch.equal(loaded.to("cpu")(x), gm(x))

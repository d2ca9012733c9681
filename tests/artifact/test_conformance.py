"""Packs: what they hold, ties that are ties, and differences that are found at the right site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import qgraph.cli
from qgraph.artifact import load, pack, read_pack, run, save
from qgraph.artifact.conformance import compare_values
from qgraph.artifact.inputs import generated_inputs, input_uses, ties
from qgraph.errors import ArtifactError, UserError
from qgraph.ir.node_info import graph_info
from qgraph.ir.text import print_graph
from qgraph.numerics import QParams, parse_qtype, qint8
from qgraph.simulator import KERNEL_SETS, Simulator
from tests.artifact.graphs import GRAPHS, Pair, float_convolution, members_of, write_members
from tests.support.models import image

CASES = ["example", "uniform", "extremes", "zeros", "ties", "special"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[fx.GraphModule, Path]:
    torch.manual_seed(0)
    gm, _ = GRAPHS["residual"]()
    path = tmp_path_factory.mktemp("pack") / "model.pack.qgraph"
    assert pack(gm, path) == CASES
    return gm, path


@pytest.mark.parametrize("name", list(GRAPHS))
def test_every_tensor_is_equal(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, _ = GRAPHS[name]()
    pack(gm, tmp_path / "a")
    report = run(tmp_path / "a")
    assert report.first is None
    sites = len(Simulator(gm).sites)
    for case in CASES:
        compared = [site for site in report.sites if site.case == case]
        assert len([site for site in compared if site.op != "output"]) == sites
        assert len(compared) > sites
    assert "differing" in report.table()


def test_holds_what_the_simulator_computes(packed) -> None:
    gm, path = packed
    loaded, cases = read_pack(path)
    assert print_graph(loaded) == print_graph(gm) == print_graph(load(path))
    for case in cases:
        result = Simulator(gm).run(case.inputs["x"], record=True)
        assert list(case.values) == list(result.values)
        for site, value in result.values.items():
            assert compare_values(value, case.values[site]) == (0, 0.0, "")
        assert compare_values(result.output, case.output) == (0, 0.0, "")


def test_same_seed_same_bytes(packed, tmp_path: Path) -> None:
    gm, path = packed
    pack(gm, tmp_path / "a")
    pack(gm, tmp_path / "b", seed=7)
    assert (tmp_path / "a").read_bytes() == path.read_bytes() != (tmp_path / "b").read_bytes()


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 0.1, 1 / 3, 0.0233874, 1e-30, 3e30])
def test_ties_are_exact(qtype: str, scale: float) -> None:
    zero = torch.tensor(3) if qtype == "uint8" else None
    qparams = QParams(torch.tensor(scale), parse_qtype(qtype), zero)
    found = ties(qparams)
    assert found.dtype is torch.float32
    products = (found * (1 / qparams.scale)).double()
    assert torch.equal(products - products.floor(), torch.full_like(products, 0.5))
    steps = qparams.qtype.qmax - qparams.qtype.qmin + 2
    reached = products.floor().unique()
    assert steps * 0.8 < reached.numel() <= steps
    assert torch.equal(reached, _reachable(qparams)), "no tie is missed for looking too near"


def _reachable(qparams: QParams) -> torch.Tensor:
    """Every k for which one of 33 neighbours is an exact tie."""
    zero = int(qparams.zero_points())
    half = torch.arange(qparams.qtype.qmin - zero - 1, qparams.qtype.qmax - zero + 1).float() + 0.5
    bits = (half * qparams.scale).view(torch.int32)
    near = (bits + torch.arange(-16, 17, dtype=torch.int32).unsqueeze(1)).view(torch.float32)
    return half[(near * (1 / qparams.scale) == half).any(0)].floor().double()


def test_the_inputs_of_a_pack(packed) -> None:
    gm, path = packed
    _, cases = read_pack(path)
    x = {case.name: case.inputs["x"] for case in cases}
    qparams = next(iter(input_uses(gm, {"x": x["example"]}).values())).qparams
    assert qparams is not None
    real = {name: (value / qparams.scale) for name, value in x.items()}
    halves = (x["ties"] * (1 / qparams.scale)) % 1
    assert torch.equal(halves, torch.full_like(halves, 0.5))
    assert torch.equal(x["example"], graph_info(gm).example.kwargs["x"])
    assert qint8.qmin * 1.1 - 1 <= real["uniform"].min() < qint8.qmin
    assert qint8.qmax < real["uniform"].max() <= qint8.qmax * 1.1 + 1
    assert real["extremes"].abs().max() > 3 * qint8.qmax
    assert not x["zeros"].any()
    assert x["zeros"].signbit().any()
    assert not x["zeros"].signbit().all()
    assert x["special"].isnan().any()
    assert x["special"].isinf().any()
    codes = {case.name: case.values["x.quant"] for case in cases}
    assert codes["extremes"].min() == qint8.qmin
    assert codes["extremes"].max() == qint8.qmax
    assert len({value.numpy().tobytes() for value in x.values()}) == len(CASES)


def test_values_that_reach_float_arithmetic_are_finite(tmp_path: Path) -> None:
    gm, _ = GRAPHS["islands"]()
    example = dict(graph_info(gm).example.kwargs)
    for _, inputs in generated_inputs(gm, example, 0):
        assert inputs.keys() == example.keys()
        assert inputs["inputs_1"] == 2.0
        assert inputs["inputs_0"]["rest"][1:] == (None, "text")
        assert inputs["inputs_0"]["x"].isfinite().all()


def test_integers_stay_those_of_the_example() -> None:
    gm, (tokens,) = GRAPHS["integers"]()
    for _, inputs in generated_inputs(gm, dict(graph_info(gm).example.kwargs), 0):
        (found,) = inputs.values()
        assert found.dtype is torch.int64
        assert torch.equal(found.flatten().sort().values, tokens.flatten().sort().values)


def test_example_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, _ = GRAPHS["residual"]()
    save(gm, tmp_path / "a", example=False)
    bare = load(tmp_path / "a")
    with pytest.raises(UserError, match="no example inputs"):
        pack(bare, tmp_path / "b")
    pack(bare, tmp_path / "b", example_inputs=image(5))
    assert run(tmp_path / "b").first is None
    assert all(len(case.output) == 5 for case in read_pack(tmp_path / "b")[1])
    with pytest.raises(UserError, match="do not fit the graph, whose inputs are x"):
        pack(bare, tmp_path / "c", example_inputs={"y": image(1)})


# --- differences -----------------------------------------------------------------------------------------------------


def test_a_kernel_that_differs_is_found_where_it_does(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = packed
    table = dict(KERNEL_SETS["reference"])
    exact = table["conv", "*"]

    def wrong(*args: Any, trace: Any = None, **kwargs: Any) -> torch.Tensor:
        found = exact(*args, trace=trace, **kwargs)
        if kwargs["low"] == 0:  # the first convolution with a relu is conv1
            found = found.clone()
            found[0, 0, 0, :2] ^= 1
        return found

    table["conv", "*"] = wrong
    monkeypatch.setitem(KERNEL_SETS, "wrong", table)
    report = run(path, kernels="wrong")
    assert report.first is not None
    assert (report.first.case, report.first.site, report.first.op) == ("example", "conv1", "conv2d")
    assert (report.first.differing, report.first.elements, report.first.largest) == (2, 512, 1.0)
    assert "2 of 512" in report.table()
    assert "conv1" in report.table()
    with pytest.raises(UserError, match="no kernel set is named"):
        run(path, kernels="missing")


def test_comparison_of_values() -> None:
    one = torch.tensor([1.0, torch.nan, 0.0, torch.inf])
    assert compare_values(one, one.clone()) == (0, 0.0, "")
    assert compare_values(one, torch.tensor([1.0, torch.nan, -0.0, torch.inf]))[0] == 1
    assert compare_values(one, torch.tensor([1.5, torch.nan, 0.0, torch.inf])) == (1, 0.5, "")
    assert compare_values(one, torch.tensor([1.0, 2.0, 0.0, torch.inf]))[0] == 1
    assert compare_values(one, one.double())[0] == 4
    assert "float64" in compare_values(one, one.double())[2]
    assert compare_values(one, one[:2])[0] == 4
    assert compare_values(one, None)[2] == "NoneType in place of [4] torch.float32"
    low, high = torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max
    assert compare_values(torch.tensor([low], dtype=torch.int8), torch.tensor([high], dtype=torch.int8))[1] == 255.0


def test_tampered_packs(packed, tmp_path: Path) -> None:
    _, path = packed
    members = members_of(path)
    document = json.loads(members["cases.json"])
    document["cases"][0]["values"].pop("stem")
    write_members(tmp_path / "a", {**members, "cases.json": json.dumps(document).encode()})
    with pytest.raises(ArtifactError, match=r"nothing uses the tensor 'example\.stem'"):
        run(tmp_path / "a")
    save(load(path), tmp_path / "b")
    with pytest.raises(ArtifactError, match="no conformance pack"):
        run(tmp_path / "b")


def test_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, _ = float_convolution()
    pack(gm, tmp_path / "a")
    with pytest.raises(ArtifactError, match="Pair"):
        run(tmp_path / "a")
    assert run(tmp_path / "a", classes=[Pair]).first is None


# --- the command line ------------------------------------------------------------------------------------------------


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    monkeypatch.setattr("sys.argv", ["qgraph", *arguments])
    with pytest.raises(SystemExit) as ended:
        qgraph.cli.main()
    written = capsys.readouterr()
    return ended.value.code, written.out, written.err


def test_commands(packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gm, path = packed
    model, made = str(tmp_path / "model.qgraph"), str(tmp_path / "made.qgraph")
    save(gm, model)
    code, out, _ = command(monkeypatch, capsys, "conformance", "pack", model, made)
    assert (code, out) == (0, f"{made}: 6 cases: {', '.join(CASES)}\n")
    assert Path(made).read_bytes() == path.read_bytes()
    code, out, _ = command(monkeypatch, capsys, "conformance", "run", made)
    assert code == 0
    assert [line.split() for line in out.splitlines()[2:]] == [[case, "10", "0"] for case in CASES]
    code, out, _ = command(monkeypatch, capsys, "simulate", model)
    assert code == 0
    assert "conv1" in out
    code, _, err = command(monkeypatch, capsys, "conformance", "run", model)
    assert code == 2
    assert "no conformance pack" in err


def test_exit_code_of_a_difference(packed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = packed
    table = dict(KERNEL_SETS["reference"])
    exact = table["linear", "*"]
    table["linear", "*"] = lambda *args, trace=None, **kwargs: exact(*args, trace=trace, **kwargs) + 1
    monkeypatch.setitem(KERNEL_SETS, "wrong", table)
    code, out, _ = command(monkeypatch, capsys, "conformance", "run", str(path), "--kernels", "wrong")
    assert code == 1
    assert "10 of 10" in out

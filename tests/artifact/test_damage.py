"""Damaged and hostile files: an `ArtifactError`, or the same graph; never another error, never a hang."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import qgraph
from qgraph.artifact import load, save
from qgraph.artifact.container import _zipped
from qgraph.errors import ArtifactError
from qgraph.ir.text import print_graph
from qgraph.simulator import Simulator
from tests.artifact.graphs import GRAPHS, members_of, write_members


@pytest.fixture(scope="module", params=["residual", "islands"])
def original(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("original") / "model.qgraph"
    save(GRAPHS[request.param]()[0], path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "model.qgraph"
    save(GRAPHS["residual"]()[0], path)
    return path


def loaded(path: Path) -> fx.GraphModule | None:
    try:
        return load(path)
    except ArtifactError as error:
        message = str(error)
    assert str(path) in message
    return None


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_flipped_bytes(original: Path, tmp_path: Path) -> None:
    data, text = original.read_bytes(), print_graph(load(original))
    drawn = random.Random(0)
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(drawn.choice((1, 1, 4))):
            broken[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        (tmp_path / "a").write_bytes(broken)
        gm = loaded(tmp_path / "a")
        refused += gm is None
        if gm is not None:
            save(gm, tmp_path / "b")
            assert (tmp_path / "b").read_bytes() == data, "only what holds nothing may change"
            assert print_graph(gm) == text
    assert refused > 130


def test_every_byte_of_the_members_is_protected(small: Path, tmp_path: Path) -> None:
    members = members_of(small)
    drawn = random.Random(1)
    for name, data in members.items():
        for _ in range(12):
            broken = bytearray(data)
            broken[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
            (tmp_path / "a").write_bytes(_zipped({**members, name: bytes(broken)}))  # with right zip checksums
            with pytest.raises(ArtifactError):
                load(tmp_path / "a")


def test_truncations_and_additions(original: Path, tmp_path: Path) -> None:
    data = original.read_bytes()
    drawn = random.Random(2)
    for length in (0, 1, 21, 22, len(data) - 1, *(drawn.randrange(len(data)) for _ in range(40))):
        (tmp_path / "a").write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            load(tmp_path / "a")
    (tmp_path / "a").write_bytes(data + bytes(1 << 17))
    with pytest.raises(ArtifactError):
        load(tmp_path / "a")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(qgraph.UserError, match="cannot be read"):
            load(path)


# --- the container ---------------------------------------------------------------------------------------------------


def test_other_versions(small: Path, tmp_path: Path) -> None:
    members = members_of(small)
    for version in (2, 0, -1, 10**30):
        head = {**json.loads(members["format.json"]), "version": version, "made_by": "qgraph 99", "new": {}}
        members["format.json"] = json.dumps(head).encode()
        write_members(tmp_path / "a", {**members, "more.bin": b""})
        with pytest.raises(
            ArtifactError, match=rf"version {version} of the format, this qgraph reads version 1"
        ) as error:
            load(tmp_path / "a")
        assert "made by qgraph 99" in str(error.value)


@pytest.mark.parametrize("version", [True, "1", None, 1.0, []])
def test_versions_that_are_none(small: Path, tmp_path: Path, version: Any) -> None:
    members = members_of(small)
    head = {**json.loads(members["format.json"]), "version": version}
    write_members(tmp_path / "a", {**members, "format.json": json.dumps(head).encode()})
    with pytest.raises(ArtifactError, match="does not name a version"):
        load(tmp_path / "a")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "folder/evil", "..", "a\\b", "C:evil", "ä"])
def test_names_that_leave_the_file(small: Path, tmp_path: Path, name: str) -> None:
    write_members(tmp_path / "a", {**members_of(small), name: b"x"})
    with pytest.raises(ArtifactError, match="plain names without folders"):
        load(tmp_path / "a")


def test_members(small: Path, tmp_path: Path) -> None:
    members = members_of(small)
    write_members(tmp_path / "a", {**members, "more.json": b"{}"})
    with pytest.raises(ArtifactError, match=r"other members than a graph: more\.json"):
        load(tmp_path / "a")
    for name in members:
        rest = {key: data for key, data in members.items() if key != name}
        (tmp_path / "a").write_bytes(_zipped(rest))
        with pytest.raises(ArtifactError):
            load(tmp_path / "a")
    write_members(tmp_path / "a", {**members, **{f"m{number}": b"" for number in range(100)}})
    with pytest.raises(ArtifactError, match="too many"):
        load(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(small: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        for name, data in members_of(small).items():
            archive.writestr(name, data)
        archive.writestr("graph.json", b"{}")
    with pytest.raises(ArtifactError, match="twice"):
        load(tmp_path / "a")


def test_compressed_members(small: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members_of(small).items():
            archive.writestr(name, data)
        archive.writestr("bomb.bin", bytes(1 << 26))
    assert (tmp_path / "a").stat().st_size < 1 << 20
    with pytest.raises(ArtifactError, match="is compressed"):
        load(tmp_path / "a")


def test_sizes_that_are_lies(small: Path, tmp_path: Path) -> None:
    data = bytearray(small.read_bytes())
    entry = data.rfind(b"PK\x01\x02", 0, data.rfind(b"tensors.safetensors"))
    data[entry + 20 : entry + 28] = b"\xf0\xff\xff\x7f" * 2  # both sizes of the central directory
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ArtifactError, match="larger than the file"):
        load(tmp_path / "a")


def test_too_large(small: Path) -> None:
    size = small.stat().st_size
    load(small, max_bytes=size)
    with pytest.raises(ArtifactError, match=f"has {size} bytes, more than the {size - 1} allowed"):
        load(small, max_bytes=size - 1)


# --- JSON ------------------------------------------------------------------------------------------------------------


def changed(path: Path, out: Path, change: Callable[[Any], Any]) -> Path:
    """A file whose graph.json was changed, with right checksums."""
    members = members_of(path)
    document = json.loads(members["graph.json"])
    change(document)
    write_members(out, {**members, "graph.json": json.dumps(document).encode()})
    return out


_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1 << 70, 0.5, "", "x", "__class__", [], {}, [[]], {"tuple": []}, {"node": "x"}),
    *({"node": "nobody"}, {"tensor": "nothing"}, {"float": "nan"}, {"dtype": "int8"}, {"dict": [[1]]}, {"what": 1}),
    *({"slice": [1]}, {"range": [0, 1, 0]}, {"class": "os.system", "fields": {}}, {"class": "dict", "entries": [1]}),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _places(entry, (*path, key))
    elif isinstance(value, list):
        for position, entry in enumerate(value):
            yield from _places(entry, (*path, position))


def _mutate(document: Any, drawn: random.Random) -> None:
    places = [path for path in _places(document) if path]
    *owner, key = drawn.choice(places)
    inner = document
    for step in owner:
        inner = inner[step]
    kind = drawn.randrange(6)
    if kind < 3:
        inner[key] = drawn.choice(_VALUES)
    elif kind == 3:
        del inner[key]
    elif kind == 4 and isinstance(inner, list):
        inner.insert(key, inner[drawn.randrange(len(inner))])
    elif isinstance(inner, dict):
        inner[drawn.choice(("x", "class", "target", "name", "axis", "same_as", "args"))] = inner.pop(key)
    else:
        drawn.shuffle(inner)


@pytest.mark.parametrize(("seed", "count"), [(3, 50), pytest.param(4, 2000, marks=pytest.mark.slow)])
def test_mutated_json(original: Path, tmp_path: Path, seed: int, count: int) -> None:
    """With right checksums: refused, or a graph that is one."""
    members = members_of(original)
    drawn = random.Random(seed)
    refused = 0
    for _ in range(count):
        document = json.loads(members["graph.json"])
        for _ in range(drawn.choice((1, 1, 3))):
            _mutate(document, drawn)
        write_members(tmp_path / "a", {**members, "graph.json": json.dumps(document).encode()})
        gm = loaded(tmp_path / "a")
        refused += gm is None
        if gm is not None:
            assert print_graph(gm)
    assert refused > count * 0.4


def _node(document: Any, name: str) -> Any:
    return next(node for node in document["nodes"] if node["name"] == name)


def _swap_nodes(document: Any) -> None:
    nodes = document["nodes"]
    first = next(position for position, node in enumerate(nodes) if node["name"] == "stem")
    nodes[first], nodes[first + 5] = nodes[first + 5], nodes[first]


def _set(name: str, key: str, value: Any) -> Callable[[Any], None]:
    return lambda document: _node(document, name).__setitem__(key, value)


def _deep(document: Any) -> None:
    value: Any = []
    for _ in range(60):
        value = [value]
    _node(document, "generated_flatten_0")["kwargs"] = {"start_dim": value}


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing node": (_set("stem", "args", [{"node": "nobody"}] * 7), "'nobody', which does not exist or comes later"),
    "itself": (_set("conv1", "args", [{"node": "conv1"}] * 7), "'conv1', which does not exist or comes later"),
    "later node": (_swap_nodes, "comes later"),
    "unknown function": (_set("generated_flatten_0", "target", "os.system"), "'os.system', which is not known here"),
    "unknown integer operator": (_set("stem", "target", "qgraph.konv"), "integer operator 'konv'"),
    "hidden integer operator": (_set("stem", "target", "qgraph.__class__"), "integer operator '__class__'"),
    "builtin": (_set("stem", "target", "eval"), "'eval', which is not known here"),
    "unknown op": (lambda d: _node(d, "stem")["info"].update(op="made_up"), "operator 'made_up'"),
    "method": (
        lambda d: _node(d, "generated_flatten_0").update(call="method", target="__reduce__"),
        "the method '__reduce__'",
    ),
    "attribute": (
        lambda d: _node(d, "generated_flatten_0").update(
            target="getattr", args=[{"node": "conv2"}, "__class__"], kwargs={}
        ),
        "attribute '__class__'",
    ),
    "argument name": (_set("generated_flatten_0", "kwargs", {"a=1, **globals()": 1}), "an argument is called"),
    "input name": (_set("x", "target", "x=__import__('os')"), "an input is called"),
    "node name": (_set("x", "name", "x; import os"), "is taken or no name"),
    "taken name": (_set("stem", "name", "x"), "is taken or no name"),
    "constant path": (
        lambda d: d["constants"].update({'a"b': {"tensor": "stem_weight"}}),
        "a part of the model cannot be called",
    ),
    "own name": (lambda d: d["constants"].update({"forward": {"tensor": "stem_weight"}}), "cannot be called 'forward'"),
    "unknown module": (
        lambda d: d["modules"].update({"m": {"class": "os.System"}}),
        "module of class 'os.System', which is not known",
    ),
    "container module": (
        lambda d: d["modules"].update({"m": {"class": "torch.nn.Sequential"}}),
        "module of class 'torch.nn.Sequential', which is not known",
    ),
    "many layers": (
        lambda d: d["modules"].update(
            {"m": {"class": "torch.nn.LSTM", "options": {"input_size": 1, "hidden_size": 1, "num_layers": 10**9}}}
        ),
        "fewer tensors than layers",
    ),
    "huge module": (
        lambda d: d["modules"].update(
            {"m": {"class": "torch.nn.Linear", "options": {"in_features": 10**6, "out_features": 10**6}}}
        ),
        "do not fit its class: bias, weight",
    ),
    "class of an input": (
        lambda d: d["info"]["example"]["kwargs"].update(x={"class": "subprocess.Popen", "entries": ["ls"]}),
        "use the class subprocess.Popen",
    ),
    "class in arguments": (
        _set("generated_flatten_0", "args", [{"class": "torch.return_types.max", "entries": [1, 2]}]),
        "an argument of a node is an instance of a class",
    ),
    "missing argument": (
        _set("stem", "kwargs", {"format": "int8"}),
        "the argument stride of qgraph::conv is missing",
    ),
    "kind of option": (
        lambda d: _node(d, "stem")["kwargs"].update(groups="1"),
        "the argument groups of qgraph::conv is 1, not int",
    ),
    "shape": (
        lambda d: _node(d, "stem_weight")["info"]["value"].update(shape=[1]),
        r"its tensor is i8\[4,3,3,3\], its record says i8\[1\]",
    ),
    "dtype": (lambda d: _node(d, "stem_weight")["info"]["value"].update(dtype="int9"), "dtype"),
    "negative shape": (lambda d: _node(d, "stem")["info"]["value"].update(shape=[-1]), "is not possible"),
    "strides": (lambda d: d["strides"].update(stem_weight=[1, 2, 3, 4]), "leave gaps"),
    "missing tensor": (lambda d: d["constants"]["stem_weight"].update(tensor="nothing"), "no tensor 'nothing'"),
    "unused tensor": (
        lambda d: d["constants"]["conv2_weight"].update(tensor="conv1_weight"),
        "nothing uses the tensor",
    ),
    "stage": (lambda d: d["info"].update(stage="fused"), "a graph in stage fused"),
    "scale": (lambda d: _node(d, "stem")["info"]["qparams"].update(scale=0.0), "not finite and positive"),
    "zero point": (lambda d: _node(d, "stem")["info"]["qparams"].update(zero_point=1000), "no code of int8"),
    "arithmetic of the target": (lambda d: d["info"]["target"]["arithmetic"].update(sum="int32"), "not an arithmetic"),
    "unknown field": (lambda d: _node(d, "stem")["info"].update(colour="red"), "unknown key 'colour'"),
    "missing field": (lambda d: _node(d, "stem")["info"].pop("site"), "lacks 'site'"),
    "kind of field": (lambda d: _node(d, "stem")["info"].update(site=5), "a str is expected, found '5'"),
    "no nodes": (lambda d: d.update(nodes=[]), "0 output nodes"),
    "two outputs": (lambda d: d["nodes"].append({**d["nodes"][-1], "name": "output_1"}), "output"),
    "two sites": (lambda d: _node(d, "conv1")["info"].update(site="stem"), "breaks a rule"),
    "option": (_set("generated_flatten_0", "kwargs", {"tuple": []}), "breaks a rule"),
    "deep": (_deep, "nested more than"),
    "guard": (lambda d: d["modules"]["_input_guard"].update(rules=[]), "one rule for each input"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_changes_that_are_refused(name: str, small: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    with pytest.raises(ArtifactError, match=message) as refused:
        load(changed(small, tmp_path / "a.qgraph", change))
    assert "a.qgraph" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100000,
        b'{"a":' * 100000,
        b"{",
        b"\xff",
        b"[]",
        b'{"info": {}, "info": {}}',
        b'{"info": NaN}',
        b"1" * 10000,
    ],
)
def test_json_that_is_none(text: bytes, small: Path, tmp_path: Path) -> None:
    write_members(tmp_path / "a", {**members_of(small), "graph.json": text})
    with pytest.raises(ArtifactError):
        load(tmp_path / "a")


def test_tensors_of_another_size(small: Path, tmp_path: Path) -> None:
    members = members_of(small)
    drawn = random.Random(4)
    for _ in range(60):
        broken = bytearray(members["tensors.safetensors"])
        length = int.from_bytes(broken[:8], "little") + 8
        broken[drawn.randrange(length)] = drawn.randrange(256)
        write_members(tmp_path / "a", {**members, "tensors.safetensors": bytes(broken)})
        gm = loaded(tmp_path / "a")
        assert gm is None or print_graph(gm)
    for broken in (b"", members["tensors.safetensors"][:-1], members["tensors.safetensors"] + b"0"):
        write_members(tmp_path / "a", {**members, "tensors.safetensors": bytes(broken)})
        with pytest.raises(ArtifactError, match="tensors cannot be read"):
            load(tmp_path / "a")


def test_a_file_packed_by_another_tool(small: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_STORED) as archive:
        for name, data in reversed(members_of(small).items()):
            archive.writestr(name, data)
    assert io.BytesIO((tmp_path / "a").read_bytes()).read() != small.read_bytes()
    assert print_graph(load(tmp_path / "a")) == print_graph(load(small))
    Simulator(load(tmp_path / "a"))

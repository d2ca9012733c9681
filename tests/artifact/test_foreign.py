"""Files of other programs: refused with what they look like and the call that is meant."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from qgraph.artifact import load
from qgraph.artifact.conformance import read_pack
from qgraph.errors import ArtifactError
from qgraph.targets.find import BUILT_IN
from tests.packaging.sources import ROOT


def _zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _onnx() -> bytes:
    graph = onnx.helper.make_graph([], "empty", [], [])
    return onnx.helper.make_model(graph, producer_name="test").SerializeToString()


def _script() -> bytes:
    return _written(lambda buffer: torch.jit.save(torch.jit.script(nn.ReLU()), buffer))


def _exported() -> bytes:
    program = torch.export.export(nn.ReLU(), (torch.randn(2),))
    return _written(lambda buffer: torch.export.save(program, buffer))


LINEAR = nn.Linear(2, 2)
FILES: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "readme": (lambda: (ROOT / "README.md").read_bytes(), ["it is text"]),
    "target": (lambda: (ROOT / f"qgraph/targets/{BUILT_IN[0]}.toml").read_bytes(), ["it is text", "get_target"]),
    "json": (lambda: json.dumps({"nodes": ["format.json"]}).encode(), ["it is text"]),
    "png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(40), ["a PNG image"]),
    "jpeg": (lambda: b"\xff\xd8\xff\xe0" + bytes(40), ["a JPEG image"]),
    "empty": (lambda: b"", ["it is empty", "copy it again"]),
    "zip": (lambda: _zip(readme=b"x"), ["a zip file of readme"]),
    "empty zip": (lambda: _zip(), ["an empty zip file"]),
    "checkpoint": (
        lambda: _written(lambda b: torch.save(LINEAR.state_dict(), b)),
        ["a checkpoint of torch", "torch.load", "trace, prepare, convert and save"],
    ),
    "old checkpoint": (
        lambda: _written(lambda b: torch.save(LINEAR.state_dict(), b, _use_new_zipfile_serialization=False)),
        ["old checkpoint", "torch.load"],
    ),
    "script": (_script, ["a TorchScript archive", "torch.jit.load"]),
    "exported": (_exported, ["an exported program", "torch.export.load"]),
    "onnx": (_onnx, ["an ONNX model", "onnxruntime", "export_onnx"]),
    "tflite": (lambda: bytes([28, 0, 0, 0]) + b"TFL3" + bytes(40), ["TensorFlow Lite"]),
    "safetensors": (lambda: safetensors_bytes({"a": torch.ones(2)}), ["a safetensors file", "load_file"]),
    "npz": (lambda: _written(lambda b: np.savez(b, a=np.ones(2))), ["arrays of numpy", "numpy.load"]),
    "npy": (lambda: _written(lambda b: np.save(b, np.ones(2))), ["an array of numpy", "numpy.load"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", FILES)
def test_the_file_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    make, words = FILES[name]
    path = tmp_path / "model.qgraph"
    path.write_bytes(make())
    for read in (load, read_pack):
        with pytest.raises(ArtifactError) as raised:
            read(path)
        message = str(raised.value)
        for word in ("the file is no artefact of qgraph", str(path), "qgraph.save", *words):
            assert word in message, message
        assert "altered" not in message


def test_what_cannot_be_told_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(bytes(range(128, 256)) * 4)
    with pytest.raises(ArtifactError, match="no artefact of qgraph, or a damaged one"):
        load(path)

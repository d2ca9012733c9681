"""Files of other programs: what they look like, and which call reads them."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

from qgraph.errors import ArtifactError

_START = "qgraph.load reads what qgraph.save or qgraph conformance pack wrote"
_FLOAT = f"read it with torch.load, put it into the float model, then trace, prepare, convert and save; {_START}"
_RUN_ONNX = f"run it with onnxruntime; qgraph writes ONNX (export_onnx) and does not read it; {_START}"
_RUN_TFLITE = f"run it with LiteRT; {_START}"
_TEXT = f"a target is read with qgraph.get_target; {_START}"


@dataclass(frozen=True)
class Foreign:
    """What a file looks like, and what to do with it."""

    looks: str
    fix: str = _START

    def error(self, where: str) -> ArtifactError:
        """Says that the file is none of qgraph's."""
        return ArtifactError("the file is no artefact of qgraph", where=where, why=f"it is {self.looks}", fix=self.fix)


def foreign_zip(names: list[str]) -> Foreign:
    """What a readable zip file without qgraph's own members is."""
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends:
        return Foreign(
            "a TorchScript archive (torch.jit.save)",
            f"trace the Python model that it was made from; torch.jit.load reads it; {_START}",
        )
    if "archive_format" in ends or any(name.startswith("serialized_exported_program") for name in ends):
        return Foreign("an exported program (torch.export.save)", f"torch.export.load reads it; {_START}")
    if "data.pkl" in ends:
        return Foreign("a checkpoint of torch (torch.save)", _FLOAT)
    if names and all(name.endswith(".npy") for name in names):
        return Foreign("arrays of numpy (numpy.savez)", f"numpy.load reads them; {_START}")
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return Foreign(f"a zip file of {shown}" if names else "an empty zip file")


def foreign_file(data: bytes) -> Foreign | None:
    """What a file that is no zip file is; None where it cannot be told."""
    if not data:
        return Foreign("empty", f"nothing was written to it, or it was cut off: copy it again; {_START}")
    for looks, found in _KINDS:
        if looks(data):
            return found
    return None


def _starts(*magic: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(magic)


def _is_safetensors(data: bytes) -> bool:
    # Eight bytes of length, then a JSON header of that length.
    length = int.from_bytes(data[:8], "little")
    return data[8:9] == b"{" and 0 < length <= len(data) - 8 and _is_json(data[8 : 8 + length])


def _is_onnx(data: bytes) -> bool:
    # A protobuf has no magic number: the IR version (field 1), then the producer, the domain, or the graph.
    return bool(re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", data))


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _is_text(data: bytes) -> bool:
    try:
        return data.decode("utf-8").replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    except UnicodeDecodeError:
        return False


_KINDS: tuple[tuple[Callable[[bytes], bool], Foreign], ...] = (
    (_starts(b"\x89PNG"), Foreign("a PNG image")),
    (_starts(b"\xff\xd8\xff"), Foreign("a JPEG image")),
    (_starts(b"GIF8"), Foreign("a GIF image")),
    (_starts(b"%PDF"), Foreign("a PDF document")),
    (_starts(b"\x1f\x8b"), Foreign("compressed with gzip", f"unpack it first; {_START}")),
    (_starts(b"\x93NUMPY"), Foreign("an array of numpy (numpy.save)", f"numpy.load reads it; {_START}")),
    (_starts(b"\x89HDF"), Foreign("an HDF5 file")),
    (lambda data: data[4:8] == b"TFL3", Foreign("a model of TensorFlow Lite", _RUN_TFLITE)),
    (_starts(*(b"\x80" + bytes([version]) for version in range(2, 6))), Foreign("a pickle or old checkpoint", _FLOAT)),
    (_is_safetensors, Foreign("a safetensors file", f"safetensors.torch.load_file reads it; {_START}")),
    (_is_onnx, Foreign("an ONNX model, by its first bytes", _RUN_ONNX)),
    (_is_text, Foreign("text", _TEXT)),
)


def names_in_zip(data: bytes) -> list[str] | None:
    """The members of a zip file; None where it is none, or too broken to list them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.namelist()
    except Exception:  # noqa: BLE001 - zipfile raises a dozen kinds on damaged files
        return None

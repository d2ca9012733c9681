"""The file: a zip of uncompressed members, each with its SHA-256, written at once or not at all.

    format.json       {"format": "qgraph", "version": 1, "kind": "graph", "made_by": "qgraph 0.1.0"}
    ...               what the kind says
    checksums.txt     one line a member, as `sha256sum -c` reads them

Nothing is compressed: equal contents are equal bytes, and no member can be larger than the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgraph.artifact.foreign import Foreign, foreign_file, foreign_zip, names_in_zip
from qgraph.errors import ArtifactError, UserError
from qgraph.files import write_at_once

FORMAT = "qgraph"
VERSION = 1
FORMAT_MEMBER = "format.json"
CHECKSUMS_MEMBER = "checksums.txt"
MAX_BYTES = 4 << 30
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MOST_MEMBERS = 16
DAMAGED = "the file was cut off or altered after it was written: copy it again, or save the graph again"


def write_container(path: str | os.PathLike[str], kind: str, made_by: str, members: Mapping[str, bytes]) -> None:
    """Writes a file in one step: under another name in the same folder, then renamed.

    Raises:
        UserError: the folder does not exist or cannot be written; nothing is left behind.
    """
    head = {"format": FORMAT, "version": VERSION, "kind": kind, "made_by": made_by}
    contents = {FORMAT_MEMBER: f"{json.dumps(head)}\n".encode(), **members}
    contents[CHECKSUMS_MEMBER] = _checksums(contents)
    write_at_once(_path(path), _zipped(contents))


def _path(path: object) -> Path:
    """`path` as a path.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"the path is a {type(path).__name__}", fix="give the file's name")
    return Path(path)


def read_container(path: str | os.PathLike[str], max_bytes: int) -> tuple[str, dict[str, bytes]]:
    """Kind and members of a file, checksums checked.

    Raises:
        ArtifactError: it is no such file, it is damaged, or a newer version.
        UserError: it cannot be read.
    """
    members = _members(_read(_path(path), max_bytes), str(path))
    try:
        return _kind(members), members
    except ArtifactError as error:
        error.where = str(path)
        raise


def parse_json(data: bytes, name: str) -> Any:
    """The document of a member.

    Raises:
        ArtifactError: it is no JSON, names a key twice, holds a number that JSON does not have, or is nested too deep.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} cannot be read", why=f"{type(error).__name__}: {error}", fix=DAMAGED) from error


def format_json(document: Mapping[str, Any]) -> bytes:
    """A document with one line for each entry of its lists and objects, the same for the same document."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join("  " + _dumped(entry) for entry in value) + "\n ]"
        elif isinstance(value, dict) and value:
            entries = (f"  {_dumped(name)}: {_dumped(entry)}" for name, entry in value.items())
            text = "{\n" + ",\n".join(entries) + "\n }"
        else:
            text = _dumped(value)
        parts.append(f" {_dumped(key)}: {text}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def _dumped(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ArtifactError(
                    f"the file has {size} bytes, more than the {max_bytes} allowed",
                    where=str(path),
                    fix="if you trust it, allow more: max_bytes=",
                )
            return file.read(max_bytes)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read",
            why=f"{type(error).__name__}: {error}",
            fix="give the path of a file that qgraph.save or qgraph conformance pack wrote",
        ) from error


def _members(data: bytes, where: str) -> dict[str, bytes]:
    foreign = _foreign(data)
    if foreign is not None:
        raise foreign.error(where)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_entries(entries, len(data))
            return {entry.filename: archive.read(entry) for entry in entries}
    except ArtifactError as error:
        error.where = where
        raise
    except Exception as error:  # zipfile raises a dozen kinds on damaged files
        raise ArtifactError(
            "the file is no artefact of qgraph, or a damaged one",
            where=where,
            why=f"{type(error).__name__}: {error}",
            fix=DAMAGED,
        ) from error


def _foreign(data: bytes) -> Foreign | None:
    """What the file is, if it is surely none of qgraph's: a damaged one still names some of its members."""
    is_zip = any(magic in data for magic in (b"PK\x03\x04", b"PK\x01\x02"))
    if is_zip and any(name.encode() in data for name in (FORMAT_MEMBER, CHECKSUMS_MEMBER)):
        return None
    names = names_in_zip(data)
    return foreign_file(data) if names is None else foreign_zip(names)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Before a byte of a member is read."""
    names = [entry.filename for entry in entries]
    if len(entries) > _MOST_MEMBERS or len(set(names)) != len(names):
        raise ArtifactError("the file holds a member twice, or too many of them", why=", ".join(names[:8]), fix=DAMAGED)
    for entry in entries:
        plain = entry.filename.replace(".", "").replace("_", "")
        if not (plain.isascii() and plain.isalnum()) or ".." in entry.filename:
            raise ArtifactError(
                f"a member is called {entry.filename!r}", why="members are plain names without folders", fix=DAMAGED
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ArtifactError(
                f"the member {entry.filename} is compressed",
                why="members are stored as they are, so that none can be larger than the file",
                fix="pack the file again without compression (zip -0), or save the graph again",
            )
    if sum(entry.file_size for entry in entries) > size:
        raise ArtifactError("the members claim to be larger than the file", fix=DAMAGED)


def _kind(members: dict[str, bytes]) -> str:
    if FORMAT_MEMBER not in members:
        raise ArtifactError(f"the file has no {FORMAT_MEMBER}", why="its other members are there", fix=DAMAGED)
    head = parse_json(members[FORMAT_MEMBER], FORMAT_MEMBER)
    if not isinstance(head, dict) or head.get("format") != FORMAT or type(head.get("version")) is not int:
        raise ArtifactError(f"{FORMAT_MEMBER} does not name a version of the format", fix=DAMAGED)
    if head["version"] != VERSION:
        raise ArtifactError(
            f"the file has version {head['version']} of the format, this qgraph reads version {VERSION}",
            why=f"it was made by {str(head.get('made_by'))[:80]}",
            fix="load it with the version of qgraph that made it, or a newer one",
        )
    rest = {name: data for name, data in members.items() if name != CHECKSUMS_MEMBER}
    if members.get(CHECKSUMS_MEMBER) != _checksums(rest):
        raise ArtifactError("the checksums do not fit the contents", why=_altered(members), fix=DAMAGED)
    if set(head) != {"format", "version", "kind", "made_by"} or not isinstance(head["kind"], str):
        raise ArtifactError(f"{FORMAT_MEMBER} does not say what the file holds", fix=DAMAGED)
    return head["kind"]


def _checksums(members: Mapping[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(members.items())).encode()


def _altered(members: Mapping[str, bytes]) -> str:
    lines = set(members.get(CHECKSUMS_MEMBER, b"").decode("utf-8", "replace").splitlines())
    rest = {name: data for name, data in members.items() if name != CHECKSUMS_MEMBER}
    wrong = [name for name, data in rest.items() if _checksums({name: data}).decode().strip() not in lines]
    return f"altered: {', '.join(wrong)}" if wrong else f"{CHECKSUMS_MEMBER} itself was altered"


# --- writing ---------------------------------------------------------------------------------------------------------


def _zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # else the bytes depend on the system
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()

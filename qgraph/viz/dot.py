"""DOT text that survives any name, and files made of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import pydot

from qgraph.errors import DrawError

FORMATS = (".dot", ".svg", ".png")


def quoted(text: str) -> str:
    r"""`text` as a quoted DOT string that is shown exactly as it is.

    pydot leaves quoted strings alone. By itself it would let graphviz read backslashes as escapes (`\N` is the node's
    name), `&lt;` as an entity, `<...>` as HTML, and a node called `graph` as a keyword.
    """
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    escaped = shown.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;").replace("\n", "\\n")
    return f'"{escaped}"'


def write(dot: pydot.Dot, path: str | Path) -> Path:
    """Writes a pydot graph as .dot, .svg or .png, the whole file or nothing.

    Raises:
        DrawError: the ending is unknown, graphviz is missing or fails, or the file cannot be written.
    """
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in FORMATS:
        ending = f"the ending {target.suffix!r} names no known format" if target.suffix else "it has no ending"
        raise DrawError(f"cannot draw to {target.name!r}", why=ending, fix=f"use one of {', '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise DrawError(
            f"cannot draw to {target}", why=f"the folder {target.parent} does not exist", fix="create it first"
        )
    text = dot.to_string().encode()
    _replace(target, text if kind == ".dot" else _laid_out(text, target, kind.removeprefix(".")))
    return target


def _laid_out(text: bytes, target: Path, kind: str) -> bytes:
    program = shutil.which("dot")
    if program is None:
        raise DrawError(
            f"{target.suffix} pictures need the program 'dot' of graphviz, which is not installed",
            where=str(target),
            fix="install it (Debian: apt-get install graphviz, macOS: brew install graphviz), or draw to .dot",
        )
    done = subprocess.run([program, f"-T{kind}"], input=text, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode or not done.stdout:
        first_lines = "\n".join(said.splitlines()[:5])
        raise DrawError(
            "graphviz could not lay the graph out",
            where=str(target),
            why=f"dot ended with status {done.returncode}: {first_lines}",
            fix="draw to .dot and look at it",
        )
    if "too large for cairo" in said:
        warnings.warn(f"{target} is too large for a bitmap and was scaled down: draw to .svg to read it", stacklevel=4)
    return done.stdout


def _replace(target: Path, data: bytes) -> None:
    """Writes beside the file and renames, so that no reader ever sees half of it."""
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}", delete=False) as file:
            written = Path(file.name)
        try:
            written.write_bytes(data)
            written.chmod(0o666 & ~_umask())
            written.replace(target)
        except OSError:
            written.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DrawError(
            f"cannot write {target}", why=f"{type(error).__name__}: {error}", fix="choose a file you may write"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

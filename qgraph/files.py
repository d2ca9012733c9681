"""Files that are written at once."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from qgraph.errors import UserError


def write_at_once(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all.

    Raises:
        UserError: it cannot be written; what stood there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be written",
            why=f"{type(error).__name__}: {error}",
            fix="give the path of a file in an existing folder that you may write to",
        ) from error

"""Whether compiled loops are there: the optional extra `fast`.

`QGRAPH_NUMBA=0` in the environment says that they are not.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from typing import Any


@lru_cache
def loops(name: str = "compiled") -> Any:
    """A module of compiled loops, None without numba; imported when first asked for, because numba is large."""
    if os.environ.get("QGRAPH_NUMBA") == "0":
        return None
    try:
        return importlib.import_module(f"qgraph.simulator.fast.{name}")
    except ModuleNotFoundError as missing:
        if missing.name != "numba":
            raise
        return None

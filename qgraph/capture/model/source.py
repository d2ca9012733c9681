"""Finding the user's line: the innermost frame outside torch, qgraph and Python's own library."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

import torch
from torch import nn

import qgraph
from qgraph.ir.node_info import SourceLine

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(str(module.__file__))) + os.sep for module in (torch, qgraph))
_PYTHON = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_MODELS = (os.path.join(_LIBRARIES[1], "demo") + os.sep,)
_TYPED = ("<stdin>", "<python-input", "<ipython-input")  # code typed into an interpreter
_is_user_file: dict[str, bool] = {}


def user_frame() -> FrameType | None:
    """The innermost frame of user code; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_code(frame.f_code):
        frame = frame.f_back
    return frame


def calling_file() -> str:
    """File of the innermost frame outside torch and qgraph; Python's own library counts."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return frame.f_code.co_filename if frame is not None else ""


def user_line() -> SourceLine | None:
    """File, line and function of the innermost user frame."""
    frame = user_frame()
    if frame is None:
        return None
    return SourceLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def line_of_error(error: BaseException) -> str | None:
    """File and line of the innermost user frame that an error passed through."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if is_user_file(name):
            line = f"{name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return line


def functional_module() -> tuple[nn.Module, str] | None:
    """The `FloatFunctional` whose method is running and the method's name, if user code called one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_code(frame.f_code):
        if frame.f_code.co_filename.endswith("functional_modules.py"):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                return owner, frame.f_code.co_name
        frame = frame.f_back
    return None


def is_user_code(code: CodeType) -> bool:
    """Whether code belongs neither to Python, torch nor qgraph (whose demo models count as user code)."""
    return is_user_file(code.co_filename)


def is_user_file(name: str) -> bool:
    """As `is_user_code`, for a file name."""
    known = _is_user_file.get(name)
    if known is None:
        library = name.startswith(_LIBRARIES) and not name.startswith(_MODELS)
        library |= name.startswith(_PYTHON) and "-packages" not in name
        generated = name.startswith("<") and not name.startswith(_TYPED)
        known = _is_user_file[name] = not library and not generated
    return known

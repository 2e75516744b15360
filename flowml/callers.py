"""Finds the line of the user's code that called the library or raised, for warnings and errors from elsewhere."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

from flowml.errors import FlowmlWarning

_LIBRARY = frozenset({"contextlib", "flowml", "flowml_native", "flowml_runtime", "functools", "jax"})
"""The packages of flowml, and those that stand between its functions and their callers."""


def warn(text: str) -> None:
    """Warn at the line of the user's code that called the library, however far below it this is called."""
    warnings.warn(text, FlowmlWarning, stacklevel=_calling()[1] + 1)


def calling_line() -> str:
    """The innermost line that is not the library's: "train.py:12 (main)"."""
    frame, _ = _calling()
    if _is_library(frame):
        return "an unknown line"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"


def raising_line(error: BaseException) -> str:
    """The innermost line that is not the library's and in which `error` was raised: "train.py:12 (main)". "" if there
    is none."""
    found, place = "", error.__traceback__
    while place is not None:
        frame = place.tb_frame
        if not _is_library(frame):
            found = f"{os.path.basename(frame.f_code.co_filename)}:{place.tb_lineno} ({frame.f_code.co_name})"
        place = place.tb_next
    return found


def _calling() -> tuple[FrameType, int]:
    """The innermost frame that is not the library's, and how many frames it is above the function that asks. On a
    thread of the library it is the outermost frame."""
    frame, level = sys._getframe(2), 1  # pyright: ignore[reportPrivateUsage]
    while _is_library(frame) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return frame, level


def _is_library(frame: FrameType) -> bool:
    """Told by the module, because methods that dataclasses make have no file."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARY

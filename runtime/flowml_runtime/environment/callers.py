"""Finds the line of the user's code that called the library, for errors that are raised later and elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

import flowml
import flowml_runtime

_LIBRARY = tuple(
    str(Path(file).parent) + os.sep for file in (flowml.__file__, flowml_runtime.__file__, jax.__file__) if file
)
"""The folders of flowml, its runtime, and JAX."""


def calling_line() -> str:
    """The innermost line that is not the library's: "train.py:12 (main)"."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_code.co_filename.startswith(_LIBRARY):
        if frame.f_back is None:
            return "an unknown line"
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"


def calling_level() -> int:
    """The `stacklevel` with which a warning of the caller shows that line."""
    frame, level = sys._getframe(1), 1  # pyright: ignore[reportPrivateUsage]
    while frame.f_code.co_filename.startswith(_LIBRARY) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return level

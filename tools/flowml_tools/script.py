"""Loads a user's Python file, and reports errors of its code like `python FILE`.

A traceback shows the frames of the file and of the code it calls, without the frames of this command.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from flowml_tools.command import CommandError


def script(text: str) -> Path:
    """The Python file that `text` names."""
    path = Path(text)
    if path.is_dir():
        raise CommandError(f"{text!r} is a folder; give a Python file")
    if not path.is_file():
        raise CommandError(f"there is no file {text!r}")
    return path


def load(path: Path) -> ModuleType:
    """Import `path` as a module named after the file (not `__main__`), with its folder first on `sys.path`."""
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{str(path)!r} is not a Python file; its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with own_errors(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def own_errors(path: Path) -> Generator[None]:
    """Print the traceback of an exception raised by the file's code and exit 1; errors of flowml's pass through."""
    from flowml.errors import FlowmlError

    try:
        yield
    except (CommandError, FlowmlError):
        raise
    except Exception as error:
        frames = error.__traceback__
        while frames is not None and Path(frames.tb_frame.f_code.co_filename).resolve() != path.resolve():
            frames = frames.tb_next
        if frames is None and not isinstance(error, SyntaxError):
            raise
        traceback.print_exception(type(error), error, frames)
        raise SystemExit(1) from error

"""The command as a user runs it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

TIMEOUT_S = 100


class Flowml(Protocol):
    def __call__(self, *arguments: str | Path, check: bool = False) -> subprocess.CompletedProcess[str]: ...


COMMAND = (sys.executable, "-c", "import sys; from flowml_tools.entry import main; sys.exit(main())")


@pytest.fixture
def flowml(tmp_path: Path) -> Flowml:
    """Runs `flowml ARGUMENTS` to its end, in an empty folder."""

    def run(*arguments: str | Path, check: bool = False) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment()
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


def environment() -> dict[str, str]:
    """The tests' own environment, with the places that flowml is imported from when it is not installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@contextmanager
def started(folder: Path, *arguments: str | Path) -> Generator[subprocess.Popen[str]]:
    """`flowml ARGUMENTS` in the background; whatever the test does, it is gone at the end."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,  # so that Ctrl-C, which reaches a whole process group, can be sent
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def start_flowml(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(started(tmp_path, *arguments))

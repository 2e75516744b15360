"""Other processes to compare with: started pinned to their cores, spoken to by lines, and gone when their block ends.

What they do is in `roles`. A peer reads its orders from stdin, so it ends with the process that measures, however that
one ends; its own process group keeps a Ctrl-C at the terminal for the owner to handle.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import IO

from flowml_tools.bench.rows import BenchError

EDGE_BYTES = 64 * 2**20
"""What the peers of `transport` send."""

ANSWER_TIMEOUT_S = 60.0


class Process:
    """A peer that runs."""

    def __init__(self, role: str, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self._role = role
        self._process = process
        self._log = log
        self.pid = process.pid

    def read(self) -> str:
        """The peer's next line. Raises BenchError if none comes in a minute, or the peer has ended."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)
        if not ready:
            raise BenchError(f"{self._role} did not answer within {ANSWER_TIMEOUT_S:g} s")
        line = self._process.stdout.readline()  # a peer answers with one line at a time, so no second one is buffered
        if not line:
            raise BenchError(f"{self._role} ended: {self._last_words()}")
        return line.strip()

    def ask(self, order: str) -> str:
        """Give an order and wait for the answer."""
        assert self._process.stdin is not None
        try:
            # Past the file's buffer, which would try what failed once more on closing.
            os.write(self._process.stdin.fileno(), f"{order}\n".encode())
        except OSError:
            raise BenchError(f"{self._role} ended: {self._last_words()}") from None
        return self.read()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@contextmanager
def peer(
    role: str, *arguments: str, cores: Sequence[int], pass_fds: Sequence[int] = (), grace_s: float = 0.0
) -> Generator[Process]:
    """A process in this role, on these cores. One that starts others itself needs `grace_s` to end them."""
    own = ",".join(map(str, cores))
    command = [sys.executable, "-m", "flowml_tools.bench.roles", role, own, *arguments]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            pass_fds=pass_fds,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield Process(role, process, log)
        finally:
            _end(process, grace_s)


def _end(process: subprocess.Popen[str], grace_s: float) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()


def installed(package: str) -> bool:
    return find_spec(package) is not None

"""Starts peer processes pinned to cores, exchanges lines with them, and ends them with their block.

Their programs are in `roles`, and for other frameworks in `foreign`. A peer reads its orders from stdin, so it ends
with the measuring process, even if that is killed. It has its own process group, so that a Ctrl-C at the terminal goes
only to the measuring process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from flowml_tools.bench import foreign_environment
from flowml_tools.bench.rows import BenchError

EDGE_BYTES = 64 * 2**20
"""The size of the array that the peers of `transport` send."""

ANSWER_TIMEOUT_S = 60.0
FOREIGN = Path(__file__).with_name("foreign.py")
FOREIGN_ENDS_S = 15.0
SEALED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--fork", "--kill-child", "--pid", "--mount", "--mount-proc", "--net", "--ipc"),
)
"""Starts a process whose children, network and file systems end with it. It ends with the measuring process, even if
that is killed, because a stopped framework would not see the end of its stdin."""


class Process:
    """A running peer."""

    def __init__(self, role: str, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self._role = role
        self._process = process
        self._log = log
        self.pid = process.pid

    def read(self) -> str:
        """The peer's next line. Raises BenchError if none arrives within a minute, or if the peer has ended."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)
        if not ready:
            raise BenchError(f"{self._role} did not answer within {ANSWER_TIMEOUT_S:g} s")
        line = self._process.stdout.readline()  # a peer writes one line per answer, so no second line is buffered
        if not line:
            raise BenchError(f"{self._role} ended: {self._last_words()}")
        return line.strip()

    def ask(self, order: str) -> str:
        """Send an order and wait for the answer."""
        self.give(order)
        return self.read()

    def give(self, order: str) -> None:
        """Send an order; `read` waits for the answer. Peers that work together all get their orders first."""
        assert self._process.stdin is not None
        try:
            # Bypass the file's buffer, which would repeat a failed write when it is closed.
            os.write(self._process.stdin.fileno(), f"{order}\n".encode())
        except OSError:
            raise BenchError(f"{self._role} ended: {self._last_words()}") from None

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class Framework:
    """The processes of another framework. They are stopped except while they answer an order.

    Its idle workers poll, and would take time from the cores on which others are measured.
    """

    def __init__(self, process: Process) -> None:
        self._process = process

    def ask(self, order: str) -> str:
        """Send an order twice and return the second answer, because a process is slow after it was stopped."""
        self.go_on()
        try:
            self._process.ask(order)
            return self._process.ask(order)
        finally:
            self.stand_still()

    def stand_still(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


@contextmanager
def peer(
    role: str, *arguments: str, cores: Sequence[int], pass_fds: Sequence[int] = (), grace_s: float = 0.0
) -> Generator[Process]:
    """A process in this role on these cores. A process that starts others gets `grace_s` to end them."""
    command = [sys.executable, "-m", "flowml_tools.bench.roles", role, listed(cores), *arguments]
    with _started(role, command, pass_fds, grace_s) as process:
        yield process


@contextmanager
def foreign(role: str, *arguments: str, cores: Sequence[int]) -> Generator[Framework]:
    """A process of another framework, in its environment and in separate namespaces. It is ready when this returns.

    Raises BenchError if there is no environment, or if the system does not let its user make namespaces.
    """
    python = foreign_environment.python()
    for program in ("setpriv", "unshare"):
        if not shutil.which(program):
            raise BenchError(f"needs `{program}` of util-linux, to keep what it opens and leaves to itself")
    own_user = () if os.geteuid() == 0 else ("--map-root-user",)
    command = [*SEALED, *own_user, str(python), "-I", str(FOREIGN), role, listed(cores)]
    with _started(role, [*command, *arguments], (), FOREIGN_ENDS_S) as process:
        process.read()
        framework = Framework(process)
        framework.stand_still()
        try:
            yield framework
        finally:
            framework.go_on()


def framework(
    stack: ExitStack, role: str, name: str, nbytes: int, shares: Sequence[Sequence[int]]
) -> tuple[Framework | None, str]:
    """A framework with two workers on these shares of the cores and its `name`, or None and the reason."""
    every = sorted(os.sched_getaffinity(0))
    workers = [listed(own) for own in shares]
    try:
        return stack.enter_context(foreign(role, str(nbytes), *workers, cores=every)), name
    except BenchError as error:
        return None, f"{role}: {error}"


def listed(cores: Sequence[int]) -> str:
    """The cores as an argument of a role."""
    return ",".join(map(str, cores))


@contextmanager
def _started(role: str, command: Sequence[str], pass_fds: Sequence[int], grace_s: float) -> Generator[Process]:
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

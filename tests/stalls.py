"""Processes that the test started stand still: one for a block, or each for a random while, again and again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from tests.conftest import wait_until


def stop(pid: int) -> None:
    """Stop a process, and return when all of its threads have stopped. One that runs may answer until then."""
    psutil.Process(pid).send_signal(signal.SIGSTOP)
    states = Path(f"/proc/{pid}/task").glob
    wait_until(lambda: all(_state(s) == "T" for s in states("*/stat")), f"all threads of process {pid} are stopped")


def _state(stat: Path) -> str:
    return stat.read_text().rpartition(")")[2].split()[0]


@contextmanager
def stopped(pid: int) -> Generator[None]:
    """In the block the process stands still."""
    try:
        stop(pid)
        yield
    finally:
        psutil.Process(pid).send_signal(signal.SIGCONT)


@contextmanager
def stalls(pids: Sequence[int], seed: int, longest_s: float = 0.008) -> Generator[None]:
    """Until the block ends, a process chosen at random stands still for a random time, then another."""
    rng = np.random.default_rng(seed)
    over = threading.Event()

    def stall() -> None:
        while not over.is_set():
            process = psutil.Process(int(rng.choice(pids)))
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
                try:
                    over.wait(rng.uniform(0, longest_s))
                finally:
                    process.send_signal(signal.SIGCONT)
            over.wait(rng.uniform(0, longest_s / 2))

    thread = threading.Thread(target=stall)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def processes_of_this_test() -> list[psutil.Process]:
    """The processes under this one: workers, and the one that forks them."""
    return psutil.Process().children(recursive=True)

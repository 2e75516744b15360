"""Shares compilations between the workers of one machine: each executable is compiled by one of them.

The workers use JAX's persistent compilation cache in one folder. A worker that is about to compile takes the turn of
the executable, which is a lock on a file. If another worker has the turn, it compiles something else first. In the end
it finds the executables of the others in the cache. The kernel releases the turns of a process that ends.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from flowml_runtime.environment.spread import Spread

MOST_BYTES = 256 * 2**20
"""The most bytes of executables in a folder of a cluster's own. The oldest ones are removed."""

WAIT_S = 600.0
"""How long a worker waits for a turn before it compiles in any case: the process that has it may be suspended."""

LOOK_S = 0.01
"""How often a waiting worker looks. A lock with a time limit does not exist."""

_CACHED = "-cache"
"""The end of the names of JAX's files."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Turns:
    """The turns in one folder. Without a folder every turn is free, because nobody shares it."""

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES, spread: Spread | None = None) -> None:
        self._folder = folder
        self._spread = spread or Spread()
        self._most_bytes = most_bytes

    def make_all(self, makes: Mapping[K, Callable[[], T]], name: Callable[[K], str]) -> dict[K, T]:
        """Make everything, in parallel, and first what no other process makes now.

        `name` is that of a key's turn; "" for what takes no time.
        """
        spread = self._spread
        threads = max(1, min(len(makes), len(spread.cores)))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="flowml-compile", initializer=spread.here)
        with pool, spread.first():

            def made(keys: list[K], wait_s: float) -> dict[K, T]:
                def one(key: K) -> dict[K, T]:
                    with self._turn(name(key), wait_s) as mine:
                        return {key: makes[key]()} if mine or wait_s else {}

                return {key: value for found in pool.map(one, keys) for key, value in found.items()}

            first = made(list(makes), 0.0)
            result = first | made([key for key in makes if key not in first], WAIT_S)
        with suppress(OSError):  # another worker removes files at the same time
            self._prune()
        return result

    def _prune(self) -> None:
        """Remove the oldest executables if there are too many bytes. A worker that misses one compiles it again."""
        if self._folder is None:
            return
        with os.scandir(self._folder) as entries:
            files = [(e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in entries if e.name.endswith(_CACHED)]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._most_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _turn(self, name: str, wait_s: float) -> Generator[bool]:
        """Hold a turn in the block. False if another process has had it for so long, or if it cannot be taken."""
        if self._folder is None or not name:
            yield True
            return
        try:
            handle = os.open(self._folder / f"{name}.turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # no more descriptors, or the disk is full: every process compiles for itself
            yield True
            return
        try:
            yield _locked(handle, wait_s)
        finally:
            os.close(handle)


def _locked(handle: int, wait_s: float) -> bool:
    until, pause = time.monotonic() + wait_s, threading.Event()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
        pause.wait(LOOK_S)

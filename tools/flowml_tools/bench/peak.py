"""The most memory that a process has had together with those that it has started: a context manager.

Pages that several of them share count once: it is the sum of their proportional set sizes. A process of its own looks
at them, because some programs must stay without other threads. To look at a large process takes long, so it does
that a twentieth of the time at most.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

import psutil

_LEAST_S = 0.2
"""The least time between two looks."""
_REST = 20
"""How much longer than a look the time until the next one is."""


class Peak:
    """Looks at this process from the beginning of the block to its end. `nbytes` is then the largest sum."""

    nbytes = 0

    def __enter__(self) -> Self:
        command = [sys.executable, __file__, str(os.getpid())]  # by path: it needs nothing else of flowml
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._watcher.stdout is not None
        self._watcher.stdout.readline()  # no deadline: it writes one at its beginning
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found, _ = self._watcher.communicate("\n")  # no deadline: it ends at that
        self.nbytes = int(found) if found else 0


def _nbytes(process: psutil.Process) -> int:
    """The memory of a process and of those that it has started, without this one."""
    family = [process, *(p for p in process.children(recursive=True) if p.pid != os.getpid())]
    return sum(map(_own, family))


def _own(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0  # it has ended
    return getattr(info, "pss", info.uss)  # only Linux knows how many share a page


def _watch(pid: int) -> None:
    process, pause = psutil.Process(pid), _LEAST_S
    most = _nbytes(process)
    print(flush=True)
    while not select.select([sys.stdin], [], [], pause)[0]:
        began = time.perf_counter()
        most = max(most, _nbytes(process))
        pause = max(_LEAST_S, _REST * (time.perf_counter() - began))
    print(max(most, _nbytes(process)), flush=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]))

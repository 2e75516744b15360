"""Sets how a worker's C library allocates memory. glibc reads the settings only from the environment of a new process.

The settings make glibc request huge pages. XLA allocates the memory of each large result again, and the kernel provides
it by pages: pages of 2 MiB save thousands of page faults a step in a program that passes 64 MiB through two workers.

They also make glibc return unused memory. By default it keeps up to 64 MiB for each thread that ever freed an array of
16 to 32 MiB, so that a worker's memory would grow for minutes and not show how much is in use. With the settings,
arrays of 16 MiB or more are returned at once; smaller ones leave up to 32 MiB per thread.

And they have threads share two arenas. By default there are up to eight for each core. Each run of a fit has threads of
its own, what one frees is of no use to those of other arenas, and a worker grew for as long as it ran, although it
freed all that a fit had allocated.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
BEGUN = "FLOWML_BEGUN_ANEW"
"""Set when a program has been restarted. glibc removes `VARIABLE` from the environment of an interpreter that is setuid
or has capabilities; without this mark such a program would restart for ever."""

_SETTINGS = {"hugetlb": 1, "mmap_threshold": 16 * 2**20, "trim_threshold": 32 * 2**20, "arena_max": 2}


def environment() -> Mapping[str, str]:
    """This process's environment with the settings added, unless it already has such settings."""
    return {VARIABLE: ":".join(f"glibc.malloc.{k}={v}" for k, v in _SETTINGS.items()), **os.environ}


def reexec() -> None:
    """Restart this program with the settings. Returns if they are in force already, or if it has other threads.

    For commands that own the whole process.
    """
    begun = VARIABLE in os.environ or BEGUN in os.environ
    if not begun and sys.platform == "linux" and sys.executable and threading.active_count() == 1:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment(), BEGUN: "1"})

"""How a worker's C library hands out memory: settings that only take effect from the environment of a new process.

glibc is to ask for huge pages. XLA gets the memory of each large result anew, which the kernel hands out by pages:
those of 2 MiB spare a program that passes 64 MiB through two workers thousands of faults a step.

And it is to give back what it need not keep. By itself it keeps up to 64 MiB for each thread that ever freed an array
of 16 to 32 MiB, so that a worker's memory would grow for minutes and say nothing of what is in use. From 16 MiB on,
arrays now go back at once; smaller ones leave up to 32 MiB a thread.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
BEGUN = "FLOWML_BEGUN_ANEW"
"""Set when a program has begun anew. glibc takes `VARIABLE` away from an interpreter that is setuid or has
capabilities, which would else begin anew for ever."""

_SETTINGS = {"hugetlb": 1, "mmap_threshold": 16 * 2**20, "trim_threshold": 32 * 2**20}


def environment() -> Mapping[str, str]:
    """This process's environment with the settings, unless it has some of its own."""
    return {VARIABLE: ":".join(f"glibc.malloc.{k}={v}" for k, v in _SETTINGS.items()), **os.environ}


def reexec() -> None:
    """Replace this program by itself with the settings in force; returns if they are, or if it has other threads.

    For commands that are the whole process.
    """
    begun = VARIABLE in os.environ or BEGUN in os.environ
    if not begun and sys.platform == "linux" and sys.executable and threading.active_count() == 1:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment(), BEGUN: "1"})

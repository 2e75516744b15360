"""Checks before workers are started whether the machine has enough resources for them.

The figures are the measured needs of a worker before its first plan, rounded down: workers that do not fit by these
figures do not fit. Plans need more.
"""

from __future__ import annotations

import math
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowml.errors import ClusterError
from flowml_runtime.environment.machine import available_memory_bytes, cores

WORKER_BYTES = 12 * 2**20
WORKER_THREADS = 20
OWN_DESCRIPTORS = 24
DESCRIPTORS = 2
"""Descriptors of the starting process for each worker: the connections of the coordinator and of the driver."""

CORE_S = 0.04
"""Seconds of a core that a worker takes to start."""

_PIDS = (Path("/sys/fs/cgroup/pids.max"), Path("/proc/sys/kernel/threads-max"), Path("/proc/sys/kernel/pid_max"))


@dataclass(frozen=True)
class Room:
    """The resources available for workers. None means no limit."""

    cores: int
    memory_bytes: int
    descriptors: int | None
    threads: int | None


def room() -> Room:
    """The resources of this machine that this process can use now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    descriptors = None if soft == resource.RLIM_INFINITY else soft - used
    threads: list[int] = []
    for file in _PIDS:
        with suppress(OSError, ValueError):  # no such limit, or "max"
            threads.append(int(file.read_text()))
    own, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() and own != resource.RLIM_INFINITY:  # the limit does not apply to root
        threads.append(own)
    return Room(len(cores()), available_memory_bytes(), descriptors, min(threads, default=None))


def check_room(workers: int, start_timeout_s: float, there: Room) -> None:
    """Raises ClusterError if this many workers cannot be started, or not in time."""

    def refuse(need: str, have: str, fits: int, fix: str = "") -> None:
        fewer = f"start at most {fits}" if fits > 0 else "start them on another machine"
        raise ClusterError(f"{workers} workers need at least {need}, and there {have}; {fewer}{fix}")

    memory = workers * WORKER_BYTES
    if memory > there.memory_bytes:
        free = f"is {there.memory_bytes / 2**30:.1f} GiB free"
        refuse(f"{memory / 2**30:.1f} GiB of memory", free, there.memory_bytes // WORKER_BYTES)
    files = workers * DESCRIPTORS + OWN_DESCRIPTORS
    if there.descriptors is not None and files > there.descriptors:
        fits = (there.descriptors - OWN_DESCRIPTORS) // DESCRIPTORS
        refuse(
            f"{files} open files", f"are {there.descriptors} left", fits, f", or raise the limit: ulimit -n {2 * files}"
        )
    threads = workers * WORKER_THREADS
    if there.threads is not None and threads > there.threads:
        refuse(f"{threads} threads", f"may be {there.threads}", there.threads // WORKER_THREADS, ", or raise the limit")
    seconds = workers * CORE_S / there.cores
    if seconds > start_timeout_s:
        have = f"are {start_timeout_s:g} s on {there.cores} cores"
        fits = int(start_timeout_s * there.cores / CORE_S)
        refuse(
            f"{seconds:.2g} s to start", have, fits, f", or allow more with start_timeout_s={math.ceil(2 * seconds)}"
        )

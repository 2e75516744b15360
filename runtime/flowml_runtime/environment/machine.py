"""Reads the cores and memory of this machine, and shares the cores out among workers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def share_cores(available: tuple[int, ...], workers: int) -> list[tuple[int, ...]]:
    """Each worker's cores: adjacent cores, in shares as equal as possible. With too few cores, one core each."""
    n = len(available)
    if workers > n:
        return [(available[i * n // workers],) for i in range(workers)]
    return [available[i * n // workers : (i + 1) * n // workers] for i in range(workers)]


def memory_bytes() -> int:
    """The memory of the machine, or of the container if that is less."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return total


def available_memory_bytes() -> int:
    """The memory that is free, or can be freed, on the machine or in the container."""
    available = psutil.virtual_memory().available
    try:
        return min(available, int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text()))
    except (OSError, ValueError):
        return available

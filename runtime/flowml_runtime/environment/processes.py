"""Identifies the machine, and sees whether another process of this machine is at work, or saves something."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import psutil

SUSPENDED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
SAVING = "flowml:saving"
"""The name of a process that is about to end and still writes what would be lost with it."""


def call_process(name: str) -> None:
    """Set the name of this process in `ps` and `top`."""
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write(name[:15])
    except OSError:
        return


def saves(pid: int) -> bool:
    """Whether a process of this machine has called itself `SAVING` and goes on. A suspended one does not."""
    try:
        found = psutil.Process(pid)
        return found.name() == SAVING and found.status() not in (*SUSPENDED, psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@functools.cache
def machine() -> str:
    """Identifies the kernel and the namespace of process numbers. "" if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class AtWork:
    """Sees whether processes of this machine are at work."""

    def __init__(self) -> None:
        self._cpu_s: dict[int, float] = {}
        """Process -> its CPU time at the last call."""

    def __call__(self, pid: int) -> bool:
        """Whether a process has run since the last call, or would run if it got a core.

        False for one that is suspended, asleep or ended. Call it several times: the first call
        has no earlier CPU time and sees only the state of the threads.
        """
        try:
            found = psutil.Process(pid)
            if found.status() in (*SUSPENDED, psutil.STATUS_ZOMBIE):
                return False
            used = sum(found.cpu_times()[:2])
            before, self._cpu_s[pid] = self._cpu_s.get(pid, used), used
            return used > before or _wants_core(pid)
        except (psutil.Error, OSError):
            return False


def _wants_core(pid: int) -> bool:
    """Whether a thread of the process runs, or waits for a core or a disk."""
    stats = (entry.read_text() for entry in Path(f"/proc/{pid}/task").glob("*/stat"))
    return any(stat.rpartition(")")[2].split()[0] in ("R", "D") for stat in stats)

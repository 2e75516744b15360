"""Detects use of a cluster in a forked process.

A child of `os.fork` has copies of its parent's objects, but not their threads. A wait for such a thread would never
end, and the copy would send on its parent's connections. Therefore objects of a process record its id when they are
made, and check it at every entry point.

A child cannot start a cluster of its own either if XLA or gRPC ran in its parent, because they would wait for missing
threads. It can if its parent had only imported them; the zygote relies on this (`launch.zygote`).
"""

from __future__ import annotations

import os

from flowml.errors import ClusterError
from flowml.ir._jax import backends_started

_process = os.getpid()
_used = False
"""Whether this process has started a cluster."""
_spoiled = 0
"""The id of the ancestor in which XLA or gRPC ran at the fork from which this process descends; 0 if none."""


def this_process() -> int:
    """The id of this process, without a system call."""
    return _process


def is_foreign(owner: int) -> bool:
    """Whether this process is a fork of `owner`, the value of `this_process` in the owning process."""
    return owner != _process


def check_owner(owner: int, what: str = "this cluster") -> None:
    """Raises ClusterError in a fork of the process `owner`."""
    if owner != _process:
        raise ClusterError(
            f"{what} belongs to process {owner}, and this is process {_process}, a fork of it that has none of its "
            "threads; use the cluster in the process that started it, or start children with "
            'multiprocessing.get_context("spawn") and a cluster in each'
        )


def check_startable() -> None:
    """Called where a cluster is started or joined. Raises ClusterError where that would hang."""
    global _used
    if _spoiled:
        raise ClusterError(
            f"process {_process} is a fork of process {_spoiled}, in which JAX or a cluster had started: their threads "
            "are not in the fork, so no cluster can run here; start the process with "
            'multiprocessing.get_context("spawn"), or fork before the first use of JAX'
        )
    _used = True


def _before() -> None:
    global _spoiled
    if not _spoiled and (_used or backends_started()):
        _spoiled = _process


def _in_parent() -> None:
    global _spoiled
    if _spoiled == _process:
        _spoiled = 0


def _in_child() -> None:
    global _process, _used
    _process, _used = os.getpid(), False


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)

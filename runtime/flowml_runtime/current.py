"""Finds the current cluster: that of the innermost `with cluster:` block around the code that asks.

Blocks belong to a context (`contextvars`). Each thread has its own context. Each asyncio task has one too, which starts
as a copy of the context that created the task. A block in one thread or task therefore does not affect another thread
or task that is inside a block. A thread that is in no block, such as one of a thread pool, uses the block of the main
thread, or else the only block of the process. If there are several, the caller has to name a cluster.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flowml.errors import ClusterError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Block(Generic[T]):
    value: T
    outer: _Block[T] | None
    """The enclosing block in the same context."""
    main: bool
    """Whether the main thread entered it."""


class Blocks(Generic[T]):
    """The open blocks of the process. Safe to use from any thread."""

    def __init__(self) -> None:
        self._inner: ContextVar[_Block[T] | None] = ContextVar("flowml_block", default=None)
        self._open: list[_Block[T]] = []
        """Replaced as a whole and never modified, so that readers need no lock."""
        self._lock = threading.Lock()

    def enter(self, value: T) -> None:
        main = threading.current_thread() is threading.main_thread()
        block = _Block(value, self._innermost(), main)
        self._inner.set(block)
        with self._lock:
            self._open = [*self._open, block]

    def leave(self, value: T) -> None:
        """Leave the block of `value`, in whichever context it was entered. Copies of that context see it ended too."""
        with self._lock:
            self._open = [b for b in self._open if b.value is not value]
        self._inner.set(self._innermost())

    def current(self) -> T:
        """The value of the current block. Raises ClusterError if there is none, or more than one to choose from."""
        block = self._innermost()
        if block is not None:
            return block.value
        opened = self._open
        outer = {b.outer for b in opened}
        inner = [b for b in opened if b not in outer]
        found = [b for b in inner if b.main] or inner
        if len(found) == 1:
            return found[0].value
        if found:
            raise ClusterError(
                f"{threading.current_thread().name} is in no `with cluster:` block, and there are {len(found)} of "
                "other threads and tasks; give cluster=, or enter a `with cluster:` block here"
            )
        raise ClusterError("there is no cluster; work inside `with fm.Cluster.local(workers=2):`, or give cluster=")

    def _innermost(self) -> _Block[T] | None:
        """The innermost open block of this context. It skips blocks that another context has left."""
        block, opened = self._inner.get(), self._open  # no deadline: reading a context variable does not wait
        while block is not None and block not in opened:
            block = block.outer
        return block


blocks: Blocks[Any] = Blocks()
"""The open blocks of clusters, real and simulated."""

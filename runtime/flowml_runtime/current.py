"""Which cluster is the current one: that of the innermost `with cluster:` block, seen from where the question is asked.

Blocks belong to a context (`contextvars`): each thread has its own, and so has each asyncio task, which begins with a
copy of that of the code that made it. So a block in one thread or task changes nothing for another that is in a block
of its own. A thread that is in none, such as a worker of a thread pool, sees the block of its process: the main
thread's, or else the only one there is. With several to choose from it has to be told.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

from flowml.errors import ClusterError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Block(Generic[T]):
    value: T
    outer: _Block[T] | None
    """The block that this one is inside of, in the same context."""
    main: bool
    """Whether the main thread entered it."""


class Blocks(Generic[T]):
    """The blocks that the process is in. Safe to use from any thread."""

    def __init__(self) -> None:
        self._inner: ContextVar[_Block[T] | None] = ContextVar("flowml_block", default=None)
        self._open: list[_Block[T]] = []
        """Replaced, never changed."""
        self._lock = threading.Lock()

    def enter(self, value: T) -> None:
        main = threading.current_thread() is threading.main_thread()
        block = _Block(value, self._innermost(), main)
        self._inner.set(block)
        with self._lock:
            self._open = [*self._open, block]

    def leave(self, value: T) -> None:
        """Leave the block of `value`, wherever it was entered: contexts that were copied from there see it ended."""
        with self._lock:
            self._open = [b for b in self._open if b.value is not value]
        self._inner.set(self._innermost())

    def current(self) -> T:
        """Raises ClusterError if there is none, or too many."""
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
                "other threads and tasks; give cluster=, or use one in a block of its own"
            )
        raise ClusterError("there is no cluster; work inside `with fm.Cluster.local(workers=2):`, or give cluster=")

    def _innermost(self) -> _Block[T] | None:
        """Of this context, without the blocks that were left in another one."""
        block, opened = self._inner.get(), self._open  # no deadline: no wait at all, a context variable
        while block is not None and block not in opened:
            block = block.outer
        return block

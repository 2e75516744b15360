"""The rendezvous of one worker: where a Recv meets the value that was pushed to it.

A sender never waits for a receiver to ask, so a value may arrive before or after the executor wants it.
Whoever comes second completes the meeting: the table holds, under a key, either the value or the one
waiter. Values are grouped by scope (plan, step, device); cancelling a scope drops its values, wakes its
waiter and refuses what still arrives for it, so that a failed step leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

REMEMBERED_CANCELLATIONS = 4096
"""Cancelled scopes remembered, to refuse values that were under way. Far more than steps in flight at once."""

Scope = tuple[str, int, str]
"""(plan id, step, device)"""

Key = tuple[str, int, int]
"""(kind, index, microbatch) within a scope"""


class Cancelled(Exception):
    """The step (or its plan) was given up while somebody waited for one of its values."""


class _Waiter:
    __slots__ = ("arrived", "cancelled", "value")

    def __init__(self) -> None:
        self.arrived = threading.Lock()  # a bare lock as a latch: one futex, where an Event takes three locks
        self.arrived.acquire()
        self.cancelled = False
        self.value: Any = None


class Mailbox:
    """Values for the executors of one process. Safe to use from any thread; no call but `take` ever waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: set[str] = set()
        self._table: dict[Scope, dict[Key, Any]] = {}
        self._cancelled: OrderedDict[Scope, None] = OrderedDict()

    def open(self, plan_id: str) -> None:
        """Accept values of this plan from now on."""
        with self._lock:
            self._plans.add(plan_id)

    def close(self, plan_id: str) -> None:
        """Drop every value of the plan, wake all who wait for one, and refuse what comes later."""
        with self._lock:
            self._plans.discard(plan_id)
            for scope in [s for s in self._table if s[0] == plan_id]:
                self._drop(scope)
            for scope in [s for s in self._cancelled if s[0] == plan_id]:
                del self._cancelled[scope]

    def put(self, scope: Scope, key: Key, value: Any) -> None:
        """Leave a value, or hand it to the one who waits. A closed plan or cancelled scope takes none."""
        with self._lock:
            if scope[0] not in self._plans or scope in self._cancelled:
                return
            values = self._table.setdefault(scope, {})
            waiter = values.get(key)
            if not isinstance(waiter, _Waiter):
                values[key] = value
                return
            self._remove(scope, values, key)
            waiter.value = value
        waiter.arrived.release()

    def take(self, scope: Scope, key: Key, timeout_s: float) -> Any:
        """The value under `key`, which leaves the table. Raises Cancelled, or TimeoutError after `timeout_s`."""
        with self._lock:
            if scope[0] not in self._plans or scope in self._cancelled:
                raise Cancelled
            values = self._table.setdefault(scope, {})
            if key in values:
                value = values[key]
                self._remove(scope, values, key)
                return value
            waiter = values[key] = _Waiter()
        if not waiter.arrived.acquire(timeout=timeout_s):
            self._give_up(scope, key, waiter)
        if waiter.cancelled:
            raise Cancelled
        return waiter.value

    def cancel(self, scope: Scope) -> None:
        """Give up a scope: whoever waits in it gets Cancelled, its values are dropped."""
        with self._lock:
            if scope[0] not in self._plans:
                return
            self._cancelled[scope] = None
            if len(self._cancelled) > REMEMBERED_CANCELLATIONS:
                self._cancelled.popitem(last=False)
            self._drop(scope)

    def is_cancelled(self, scope: Scope) -> bool:
        return scope in self._cancelled or scope[0] not in self._plans

    def __len__(self) -> int:
        """Values that wait to be taken."""
        with self._lock:
            return sum(not isinstance(v, _Waiter) for values in self._table.values() for v in values.values())

    def _give_up(self, scope: Scope, key: Key, waiter: _Waiter) -> None:
        with self._lock:
            values = self._table.get(scope)
            if values is not None and values.get(key) is waiter:
                self._remove(scope, values, key)
                raise TimeoutError
        waiter.arrived.acquire()  # the value came between the deadline and the lock: it counts

    def _remove(self, scope: Scope, values: dict[Key, Any], key: Key) -> None:
        del values[key]
        if not values:
            del self._table[scope]

    def _drop(self, scope: Scope) -> None:
        for waiter in self._table.pop(scope, {}).values():
            if isinstance(waiter, _Waiter):
                waiter.cancelled = True
                waiter.arrived.release()

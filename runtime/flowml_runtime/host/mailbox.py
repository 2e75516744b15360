"""The rendezvous of one worker: where a Recv meets the value that was pushed to it.

The rules are those of `protocol.rendezvous`, one table a plan with a stream a device; added here are the
lock and the waiting. Cancelling a scope (a step of a plan on one device) drops its values, wakes its waiter
and refuses what still arrives for it, so that a failed step leaves nothing behind.
"""

from __future__ import annotations

import threading
from typing import Any

from flowml_runtime.protocol.rendezvous import Cancelled, Rendezvous

Scope = tuple[str, int, str]
"""(plan id, step, device)"""

Key = tuple[str, int, int]
"""(kind, index, microbatch) within a scope"""


class _Waiter:
    __slots__ = ("arrived", "cancelled", "value")

    def __init__(self) -> None:
        self.arrived = threading.Lock()  # a bare lock as a latch: one futex, where an Event takes three locks
        self.arrived.acquire()
        self.cancelled = False
        self.value: Any = None

    def cancel(self) -> None:
        self.cancelled = True
        self.arrived.release()


class Mailbox:
    """Values for the executors of one process. Safe to use from any thread; no call but `take` ever waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: dict[str, Rendezvous[Any, _Waiter]] = {}
        self._untidy: set[tuple[str, str]] = set()
        """(plan, device) with cancelled steps, which `finish` has to forget."""

    def open(self, plan_id: str) -> None:
        """Accept values of this plan from now on."""
        with self._lock:
            self._plans.setdefault(plan_id, Rendezvous())

    def close(self, plan_id: str) -> None:
        """Drop every value of the plan, wake all who wait for one, and refuse what comes later."""
        with self._lock:
            table = self._plans.pop(plan_id, None)
            waiters = table.close() if table is not None else ()
            self._untidy = {u for u in self._untidy if u[0] != plan_id}
        for waiter in waiters:
            waiter.cancel()

    def put(self, scope: Scope, key: Key, value: Any) -> None:
        """Leave a value, or hand it to the one who waits. A closed plan or cancelled scope takes none.

        Raises ProtocolError for a value that came before, or one too many.
        """
        plan_id, step, device = scope
        with self._lock:
            table = self._plans.get(plan_id)
            waiter = table.put((device, step, *key), value) if table is not None else None
        if waiter is not None:
            waiter.value = value
            waiter.arrived.release()

    def take(self, scope: Scope, key: Key, timeout_s: float) -> Any:
        """The value under `key`, which leaves the table. Raises Cancelled, or TimeoutError after `timeout_s`."""
        plan_id, step, device = scope
        with self._lock:
            table = self._plans.get(plan_id)
            if table is None:
                raise Cancelled(scope)
            waiter = _Waiter()
            value = table.claim((device, step, *key), waiter)
        if value is not None:
            return value
        if not waiter.arrived.acquire(timeout=timeout_s):
            self.cancel(scope)  # nobody will ask for this step again; unless the value came just now, it ends here
            waiter.arrived.acquire()
            if waiter.cancelled:
                raise TimeoutError
        if waiter.cancelled:
            raise Cancelled(scope)
        return waiter.value

    def cancel(self, scope: Scope) -> None:
        """Give up a scope: whoever waits in it gets Cancelled, its values are dropped."""
        plan_id, step, device = scope
        with self._lock:
            table = self._plans.get(plan_id)
            if table is None or table.is_over(device, step):
                return
            waiters = table.cancel_step(device, step)
            self._untidy.add((plan_id, device))
        for waiter in waiters:
            waiter.cancel()

    def finish(self, scope: Scope) -> None:
        """The device takes no more from this step or earlier ones. Frees the memory of cancellations."""
        plan_id, step, device = scope
        if (plan_id, device) not in self._untidy:
            return
        with self._lock:
            self._untidy.discard((plan_id, device))
            table = self._plans.get(plan_id)
            if table is not None:
                table.advance(device, step + 1)

    def skip_to(self, plan_id: str, device: str, step: int) -> None:
        """The device takes nothing more from steps before `step`: drops what came for them and what still comes."""
        with self._lock:
            table = self._plans.get(plan_id)
            waiters = table.advance(device, step) if table is not None else ()
        for waiter in waiters:
            waiter.cancel()

    def is_cancelled(self, scope: Scope) -> bool:
        table = self._plans.get(scope[0])
        return table is None or table.is_over(scope[2], scope[1])

    def __len__(self) -> int:
        """Values that wait to be taken."""
        with self._lock:
            return sum(len(table) for table in self._plans.values())

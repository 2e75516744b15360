"""Matches received values with the Recv instructions of one worker.

The rules are those of `protocol.rendezvous`, with one table for each plan and one stream for each device. This module
adds the lock and the waiting. Cancelling a scope (a step of a plan on one device) drops its values, wakes its waiter
and refuses later values, so that a failed step leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from flowml_runtime.protocol.rendezvous import Cancelled, Rendezvous

Scope = tuple[str, int, str]
"""(plan id, step, device)"""

Key = tuple[str, int, int]
"""(kind, index, microbatch) within a scope"""


class Claim:
    """The right to one value, made by `Mailbox.claim`. If the value is not here, its owner waits or is called back."""

    __slots__ = ("_arrived", "_lock", "_resume", "cancelled", "done", "expired", "value")

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        """The mailbox's lock, which guards the claim until it is done."""
        self._arrived: threading.Lock | None = None
        self._resume: Callable[[], None] | None = None
        self.done = False
        self.cancelled = False
        self.expired = False
        """Whether it was cancelled because its deadline passed."""
        self.value: Any = None

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the claim is done; False if that takes longer."""
        with self._lock:
            if self.done:
                return True
            self._arrived = threading.Lock()  # a bare lock as a latch: one futex, where an Event takes three locks
            self._arrived.acquire()  # no deadline: the lock is new
        return self._arrived.acquire(timeout=timeout_s)

    def then(self, resume: Callable[[], None]) -> bool:
        """Call `resume` once the claim is done, on the thread that completes it. False if it is done already."""
        with self._lock:
            if not self.done:
                self._resume = resume
            return not self.done

    def settle(self, value: Any, *, cancelled: bool = False) -> None:
        """For the mailbox, which holds the lock: set the outcome."""
        self.value, self.cancelled, self.done = value, cancelled, True

    def wake(self) -> None:
        """For the mailbox, after it has released the lock: call the owner, or wake it."""
        resume, self._resume = self._resume, None  # breaks the cycle, else neither would be freed, nor the value
        if resume is not None:
            resume()
        elif self._arrived is not None:
            self._arrived.release()


class Parked(Exception):
    """A step cannot continue before `claim` is done, and must not block its thread meanwhile."""

    def __init__(self, claim: Claim) -> None:
        super().__init__("a value that has not come")
        self.claim = claim


class Mailbox:
    """Values for the executors of one process. Safe to use from any thread; only `take` and `Claim.wait` ever wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: dict[str, Rendezvous[Any, Claim]] = {}
        self._untidy: set[tuple[str, str]] = set()
        """(plan, device) with cancelled steps, which `finish` removes."""

    def open(self, plan_id: str) -> None:
        """Start to accept values of this plan."""
        with self._lock:
            self._plans.setdefault(plan_id, Rendezvous())

    def close(self, plan_id: str) -> None:
        """Drop all values of the plan, wake all waiters, and refuse later values."""
        with self._lock:
            table = self._plans.pop(plan_id, None)
            claims = _cancelled(table.close()) if table is not None else ()
            self._untidy = {u for u in self._untidy if u[0] != plan_id}
        for claim in claims:
            claim.wake()

    def put(self, scope: Scope, key: Key, value: Any) -> None:
        """Store a value, or give it to its waiter. Values of a closed plan or a cancelled scope are dropped.

        Raises ProtocolError for a duplicate value, or one too many.
        """
        plan_id, step, device = scope
        with self._lock:
            table = self._plans.get(plan_id)
            claim = table.put((device, step, *key), value) if table is not None else None
            if claim is not None:
                claim.settle(value)
        if claim is not None:
            claim.wake()

    def claim(self, scope: Scope, key: Key) -> Claim:
        """Remove and claim the value under `key`, or claim it for when it comes. Raises Cancelled."""
        plan_id, step, device = scope
        claim = Claim(self._lock)
        with self._lock:
            table = self._plans.get(plan_id)
            if table is None:
                raise Cancelled(scope)
            value = table.claim((device, step, *key), claim)
            if value is not None:
                claim.settle(value)
        return claim

    def take(self, scope: Scope, key: Key, timeout_s: float) -> Any:
        """Remove and return the value under `key`. Raises Cancelled, or TimeoutError after `timeout_s`."""
        claim = self.claim(scope, key)
        if not claim.done and not claim.wait(timeout_s) and self.expire(scope, claim):
            raise TimeoutError
        if claim.cancelled:
            raise Cancelled(scope)
        return claim.value

    def cancel(self, scope: Scope) -> None:
        """Cancel a step on one device: drop its values, wake its waiter, and refuse later values."""
        with self._lock:
            claims = self._give_up(scope)
        for claim in claims:
            claim.wake()

    def expire(self, scope: Scope, claim: Claim) -> bool:
        """Cancel the scope of an overdue claim. False, without effect, if the claim is done.

        One lock decides between the value and the deadline, so a step that got its value continues.
        """
        with self._lock:
            if claim.done:
                return False
            claim.expired = True
            claims = self._give_up(scope)
        for cancelled in claims:
            cancelled.wake()
        return True

    def _give_up(self, scope: Scope) -> tuple[Claim, ...]:
        """Cancel the scope. Returns the claims to wake. The lock is held."""
        plan_id, step, device = scope
        table = self._plans.get(plan_id)
        if table is None or table.is_over(device, step):
            return ()
        self._untidy.add((plan_id, device))
        return _cancelled(table.cancel_step(device, step))

    def finish(self, scope: Scope) -> None:
        """The device takes no more values of this step or earlier ones. Frees the records of cancellations."""
        plan_id, step, device = scope
        if (plan_id, device) not in self._untidy:
            return
        with self._lock:
            self._untidy.discard((plan_id, device))
            table = self._plans.get(plan_id)
            if table is not None:
                table.advance(device, step + 1)

    def skip_to(self, plan_id: str, device: str, step: int) -> None:
        """The device takes no more values of steps before `step`: drop those that came, and those that come later."""
        with self._lock:
            table = self._plans.get(plan_id)
            claims = _cancelled(table.advance(device, step)) if table is not None else ()
        for claim in claims:
            claim.wake()

    def is_cancelled(self, scope: Scope) -> bool:
        table = self._plans.get(scope[0])
        return table is None or table.is_over(scope[2], scope[1])

    def __len__(self) -> int:
        """Number of values that wait to be taken."""
        with self._lock:
            return sum(len(table) for table in self._plans.values())


def _cancelled(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    """The claims, marked as cancelled. The mailbox's lock is held."""
    found = tuple(claims)
    for claim in found:
        claim.settle(None, cancelled=True)
    return found

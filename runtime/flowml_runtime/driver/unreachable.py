"""Decides when a worker's report counts that it cannot reach another worker.

    Unreachable              worker -> driver    its connection to a peer has ended
    Unreachable              driver -> worker    the same, sent back: does the worker hear anybody?
    Unreachable, heard       worker -> driver    it does, so the peer is lost

If only the way to a worker is cut, the worker says of all others that it cannot reach them, and the driver hears that.
The worker cannot answer the question, and what the others say of it is confirmed meanwhile. What a worker that counts
as lost says of others counts for nothing, also once it is found again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flowml_runtime import wire


class Reports:
    """The reports about the plans of one driver. Safe to use from any thread."""

    def __init__(self, tell: Callable[[str, wire.Wire], None], settle: Callable[[str], None]) -> None:
        """`settle` waits until what a peer has sent before its end is processed: it may be all of a step."""
        self._tell = tell
        self._settle = settle
        self._lock = threading.Lock()
        self._lost: dict[str, set[str]] = {}
        """The workers of each plan that count as lost because of a report."""

    def counts(self, sender: str, report: wire.Unreachable) -> bool:
        """Whether the peer of a report is lost. Sends the report back first if its sender may hear nobody."""
        if sender != report.worker:
            return False
        with self._lock:
            lost = self._lost.get(report.plan_id, set[str]())
            if report.worker in lost or report.peer in lost:
                return False
            if report.heard:
                self._lost.setdefault(report.plan_id, lost).add(report.peer)
        if report.heard:
            self._settle(report.peer)
        else:
            self._tell(sender, report)
        return report.heard

    def forget(self, plan_id: str) -> None:
        """The plan has ended."""
        with self._lock:
            self._lost.pop(plan_id, None)


def unreachable(report: wire.Unreachable) -> str:
    """Why the peer of a report is lost."""
    return f"{report.worker} cannot reach it: {report.reason}"

"""Adds gradients that are gathered over steps, on a lane beside the executor, which does not wait for the sums."""

from __future__ import annotations

from collections.abc import Sequence

from flowml_runtime.execution.future import Future
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.mailbox import Cancelled
from flowml_runtime.execution.programs import Array, TaskFunction

Gradients = Future[Sequence[Array]]
"""The gradients of one part in a step, or the sum over several steps, which may not be computed yet."""


def known(arrays: Sequence[Array]) -> Gradients:
    """Gradients that are already computed."""
    found: Gradients = Future("a gradient", _same)
    found.complete(list(arrays))
    return found


def added(lane: Lane, device: str, add: TaskFunction, a: Gradients, b: Gradients) -> Gradients:
    """The sum of two. The lane may not have computed them yet; it computes sums in order."""
    total: Gradients = Future("a sum of gradients", _same)

    def work() -> None:
        total.complete(list(add(*a.result(), *b.result())))  # no deadline: the lane has computed both already

    def failed(error: BaseException) -> None:
        total.complete(None, error)

    if not lane.put(work, failed):
        total.complete(None, Cancelled(device))
    return total


def _same(arrays: Sequence[Array]) -> Sequence[Array]:
    return arrays

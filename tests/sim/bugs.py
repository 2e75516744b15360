"""Bugs that are planted into the machines, one at a time, to see whether the campaign finds them.

Each patches the real machine in this process only. Nothing of it is in the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from flowml.policy import Arrivals, Wait, spec
from flowml_runtime.protocol.training import replica
from flowml_runtime.protocol.training.accounts import Accounts
from flowml_runtime.protocol.training.accumulator import Accumulator
from flowml_runtime.protocol.training.decision import Decision
from flowml_runtime.protocol.training.home import Home
from flowml_runtime.protocol.training.ledger import Ledger, WorkQueue
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.worker import TrainingWorker

Patch = pytest.MonkeyPatch


def _applies_a_repeated_contribution(patch: Patch) -> None:
    patch.setattr(Home, "_too_late", lambda *_: False)


def _forgets_a_late_contribution(patch: Patch) -> None:
    patch.setattr(Decision, "_arrive_late", lambda *_: None)


def _lets_a_reader_go_a_clock_early(patch: Patch) -> None:
    real = replica.can_read
    patch.setattr(replica, "can_read", lambda mine, clocks, bound, *rest: real(mine, clocks, bound + 1, *rest))


def _loses_a_requeued_item(patch: Patch) -> None:
    patch.setattr(WorkQueue, "requeue", lambda *_: None)


def _divides_by_those_that_are_there(patch: Patch) -> None:
    """The mean of a quorum that folds late work in is over all replicas, on time or late."""
    real = spec.coefficients
    patch.setattr(spec, "coefficients", lambda apply, weights, each, absent: real(apply, weights, each))


def _commits_before_the_quorum(patch: Patch) -> None:
    real: Callable[..., Any] = Decision._decide  # pyright: ignore[reportPrivateUsage]

    def decide(self: Decision, now: float) -> list[Any]:
        def hurried(quorum: object, arrivals: Arrivals, now: float) -> object:
            arrivals.hopeful = 0 if arrivals.count > 1 else arrivals.hopeful
            return asked(quorum, arrivals, now) if arrivals.count else Wait()

        kind = type(self._group.quorum)  # pyright: ignore[reportPrivateUsage]
        asked: Callable[..., object] = kind.decide
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(kind, "decide", hurried)
            return real(self, now)

    patch.setattr(Decision, "_decide", decide)


def _counts_folded_items_as_used(patch: Patch) -> None:
    real: Callable[..., None] = Ledger._account  # pyright: ignore[reportPrivateUsage]

    def account(self: Ledger, who: int, item: object, fate: str, missing: tuple[int, ...] = ()) -> None:
        real(self, who, item, "used" if fate == "folded" else fate, missing)

    patch.setattr(Ledger, "_account", account)


def _loses_a_settlement(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Accounts._settle  # pyright: ignore[reportPrivateUsage]
    patch.setattr(Accounts, "_settle", lambda self, clocks: real(self, clocks)[:1])


def _does_not_wait_for_its_own_writes(patch: Patch) -> None:
    patch.setattr(replica, "window", lambda *_: 0)


def _mixes_up_the_decisions_of_groups(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Replica._commit  # pyright: ignore[reportPrivateUsage]

    def commit(self: Any, event: Any) -> list[Any]:
        return real(self, msgspec.structs.replace(event, group=0))

    patch.setattr(Replica, "_commit", commit)


def _retires_while_a_sum_is_under_way(patch: Patch) -> None:
    patch.setattr(Replica, "_has_sums", lambda *_: True)


def _loses_what_a_late_push_had_gathered(patch: Patch) -> None:
    def discard(self: Any, clock: int) -> None:
        self._tried.pop(clock, None)

    patch.setattr(Accumulator, "discard", discard)


def _contributes_to_the_fit_after_its_own(patch: Patch) -> None:
    real: Callable[..., Any] = TrainingWorker.contribution

    def contribution(self: Any, start: Any, *args: Any, **options: Any) -> Any:
        sent = real(self, start, *args, **options)
        run = self._fit.run if self._fit else start.run
        return type(sent)(sent.to, msgspec.structs.replace(sent.message, run=run))

    patch.setattr(TrainingWorker, "contribution", contribution)


BUGS: dict[str, Callable[[Patch], None]] = {
    "a repeated contribution is applied again": _applies_a_repeated_contribution,
    "a late contribution is forgotten": _forgets_a_late_contribution,
    "a reader goes on a clock early": _lets_a_reader_go_a_clock_early,
    "a requeued item is lost": _loses_a_requeued_item,
    "the mean is over those that are there": _divides_by_those_that_are_there,
    "a clock is committed before its quorum": _commits_before_the_quorum,
    "folded items are counted as used": _counts_folded_items_as_used,
    "a settlement is lost": _loses_a_settlement,
    "a replica reads without its own writes": _does_not_wait_for_its_own_writes,
    "the decisions of groups are mixed up": _mixes_up_the_decisions_of_groups,
    "a stage retires while a sum is under way": _retires_while_a_sum_is_under_way,
    "what a late push had gathered is lost": _loses_what_a_late_push_had_gathered,
    "a step contributes to the fit after its own": _contributes_to_the_fit_after_its_own,
}


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """The machines of this process have this bug inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        BUGS[bug](patch)
        yield

"""Bugs planted into the roster and the coordinator, each of which random lives of a cluster find within 1,000 seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.membership import Append, ConnectionLost, Coordinator, ProcessExited
from flowml_runtime.protocol.roster import Left, Record, Roster
from tests.protocol.test_random_membership import Membership

WITHIN, STEPS = 1000, 40
Patch = pytest.MonkeyPatch


def life(seed: int) -> None:
    """The random life of a cluster that a seed determines. Raises where something does not hold."""
    rng, world = random.Random(seed), Membership()
    small = lambda: rng.randint(0, 3)  # noqa: E731
    workers = ("worker:0", "worker:1")
    steps: list[Callable[[], object]] = [
        lambda: world.joins(rng.choice(("", *workers, "driver", "x")), small(), small()),
        lambda: world.offers(small()),
        lambda: world.is_missed(rng.choice(workers), rng.random() < 0.5),
        lambda: world.loses(small(), rng.choice((ConnectionLost, ProcessExited))),
        lambda: world.ticks({small() for _ in range(small())}, rng.uniform(0, 0.5)),
        lambda: world.restarts(rng.random() < 0.5),
    ]
    world.begin()
    for _ in range(STEPS):
        rng.choice(steps)()
        world.holds()


def _forgets_the_incarnation_of_a_lost_worker(patch: Patch) -> None:
    real: Callable[..., None] = Roster.apply

    def apply(self: Any, record: Record) -> None:
        real(self, record)
        for name in record.names if isinstance(record, Left) else ():
            self.lives.pop(name, None)

    patch.setattr(Roster, "apply", apply)


def _forgets_incarnations_when_the_log_is_compacted(patch: Patch) -> None:
    real: Callable[..., Any] = Roster.whole

    def whole(self: Any) -> Any:
        found = real(self)
        return msgspec.structs.replace(found, lives={n: i for n, i in found.lives.items() if n in self.members})

    patch.setattr(Roster, "whole", whole)


def _counts_no_change_when_a_member_is_lost(patch: Patch) -> None:
    """As a roster that is read again from its log: the next coordinator gives a number for two views."""
    real: Callable[..., None] = Roster.__init__

    def begin(self: Any, records: Any = ()) -> None:
        found = list(records)
        real(self, found)
        self.epoch -= any(isinstance(record, Left) for record in found)

    patch.setattr(Roster, "__init__", begin)


def _tells_before_it_has_logged(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Coordinator.step

    def step(self: Any, event: Any) -> list[Any]:
        return sorted(real(self, event), key=lambda action: isinstance(action, Append))

    patch.setattr(Coordinator, "step", step)


def _keeps_a_spare_that_has_become_a_worker(patch: Patch) -> None:
    real: Callable[..., None] = Roster.apply

    def apply(self: Any, record: Record) -> None:
        if not isinstance(record, Left) or not record.names[0].startswith("spare"):
            real(self, record)

    patch.setattr(Roster, "apply", apply)


def _admits_an_incarnation_again(patch: Patch) -> None:
    real: Callable[..., int] = Coordinator._latest_life  # pyright: ignore[reportPrivateUsage]
    patch.setattr(Coordinator, "_latest_life", lambda self, name: real(self, name) - 1)


BUGS: dict[str, Callable[[Patch], None]] = {
    "the incarnation of a lost worker is forgotten": _forgets_the_incarnation_of_a_lost_worker,
    "incarnations are forgotten when the log is compacted": _forgets_incarnations_when_the_log_is_compacted,
    "a loss does not count as a change": _counts_no_change_when_a_member_is_lost,
    "members are told before the log is": _tells_before_it_has_logged,
    "a spare that has become a worker stays": _keeps_a_spare_that_has_become_a_worker,
    "an incarnation is admitted again": _admits_an_incarnation_again,
}


@contextmanager
def planted(bug: str) -> Generator[None]:
    with Patch.context() as patch:
        BUGS[bug](patch)
        yield


def broken(seed: int) -> str:
    """What does not hold in the life of a seed; "" if all does."""
    try:
        life(seed)
    except (AssertionError, ProtocolError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_of_the_roster_is_found(bug: str) -> None:
    with planted(bug):
        seed = next((seed for seed in range(WITHIN) if broken(seed)), None)
    assert seed is not None
    assert broken(seed) == "", "without the bug the same life holds"


def test_random_lives_of_a_cluster_hold() -> None:
    assert [found for seed in range(300) if (found := broken(seed))] == []

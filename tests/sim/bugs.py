"""Bugs that are planted into the machines, one at a time, to see whether the campaign finds them.

Each patches the real machine in this process only. Nothing of it is in the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from flowml.policy import UNBOUNDED, Arrivals, Every, Quorum, Wait, spec
from flowml_runtime.protocol.training import replica, silent
from flowml_runtime.protocol.training.accounts import Accounts
from flowml_runtime.protocol.training.accumulator import Accumulator
from flowml_runtime.protocol.training.decision import Decision
from flowml_runtime.protocol.training.home import Home
from flowml_runtime.protocol.training.ledger import Ledger, WorkQueue
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.portions import Portions
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.site import Site
from flowml_runtime.protocol.training.snapshot import Snapshots
from flowml_runtime.protocol.training.stage import Hold
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.untold import Untold
from flowml_runtime.protocol.training.worker import TrainingWorker
from flowml_runtime.sim import arithmetic
from flowml_runtime.sim.neighbours import Neighbours
from flowml_runtime.sim.sites import Member
from flowml_runtime.worker.training.exchange.mirrors import Filtered
from flowml_runtime.worker.training.filtered import Encoder
from flowml_runtime.worker.training.own_values import OwnRhythm
from flowml_runtime.worker.training.published import PublicCopy

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

    def account(self: Ledger, who: int, fates: Iterable[tuple[object, str]], *rest: tuple[int, ...]) -> None:
        real(self, who, [(item, "used" if fate == "folded" else fate) for item, fate in fates], *rest)

    patch.setattr(Ledger, "_account", account)


def _loses_a_settlement(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Accounts._settle  # pyright: ignore[reportPrivateUsage]
    patch.setattr(Accounts, "_settle", lambda self, clocks, **how: real(self, clocks, **how)[:1])


def _drops_what_a_lost_replica_has_not_told(patch: Patch) -> None:
    patch.setattr(Untold, "fates", lambda *_: [])


def _skips_the_clock_of_a_push_of_own_parameters(patch: Patch) -> None:
    bounded = property(
        lambda self: frozenset(s.policy.every for s in self.stores if not s.clocked and s.policy.staleness < UNBOUNDED)
    )
    patch.setattr(Terms, "_awaited", bounded)


def _does_not_wait_for_its_own_writes(patch: Patch) -> None:
    patch.setattr(replica, "window", lambda *_: 0)


def _takes_in_each_step(patch: Patch) -> None:
    """Also between two takes of `Every(push, pull)`."""
    patch.setattr(Replica, "takes", lambda *_: True)


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


# Codes, copies, cuts, own parameters, filters, sites, gossip and shared memory.


def _decodes_with_a_wrong_coefficient(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Home._decode  # pyright: ignore[reportPrivateUsage]

    def decode(self: Any, index: int, row: Any, coefficients: Any, clock: int) -> list[Any]:
        wrong = {r: c if n else c * 1.01 for n, (r, c) in enumerate(coefficients.items())}
        return real(self, index, row, wrong, clock)

    patch.setattr(Home, "_decode", decode)


def _counts_each_copy_of_a_portion(patch: Patch) -> None:
    patch.setattr(Portions, "_counts", lambda *_: True)


def _weighs_a_cut_step_as_a_whole_one(patch: Patch) -> None:
    real: Callable[..., Any] = TrainingWorker.contribution

    def contribution(self: Any, *args: Any, weight: int, **options: Any) -> Any:
        whole = self._fit._terms.microbatches if self._fit else 1
        return real(self, *args, weight=-(-weight // whole) * whole, **options)

    patch.setattr(TrainingWorker, "contribution", contribution)


def _folds_late_work_in_twice(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Home._apply  # pyright: ignore[reportPrivateUsage]

    def apply(self: Any, index: int, chosen: Any, clock: int | None = None, **options: Any) -> list[Any]:
        late = chosen[-1:] if len(chosen) > 1 and options.get("living") else []
        return real(self, index, [*chosen, *late], clock, **options)

    patch.setattr(Home, "_apply", apply)


def _takes_global_parameters_before_it_has_pushed_its_own(patch: Patch) -> None:
    patch.setattr(OwnRhythm, "takes", lambda self, clock: not self.mixes or self._taken < 0)


def _loses_the_residual_with_a_dropped_push(patch: Patch) -> None:
    patch.setattr(Encoder, "settle", lambda *_, **__: None)


def _ends_without_what_filters_still_keep(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Filtered.encode

    def encode(self: Any, clock: int, delta: Any, params: Any, *, last: bool) -> list[Any]:
        if last:
            self.kept.clear()
        return real(self, clock, delta, params, last=last)

    patch.setattr(Filtered, "encode", encode)


def _publishes_differences_of_versions(patch: Patch) -> None:
    """And not to what readers hold, who lack what filters have left out of those before."""
    real: Callable[..., Any] = PublicCopy.advance
    newest: dict[int, list[Any]] = {}

    def advance(self: Any, version: int, values: Any) -> Any:
        held, before = self.values, newest.get(id(self))
        self.values = before if held and before else held
        made = real(self, version, values)
        if held and before:
            self.values = [h + (v - b) for h, v, b in zip(held, self.values, before, strict=True)]
        newest[id(self)] = list(values)
        return made

    patch.setattr(PublicCopy, "advance", advance)


def _answers_each_push(patch: Patch) -> None:
    """Also one after which the replica does not take, so that bytes do not fall with the rhythm of takes."""
    patch.setattr(Every, "asks", lambda *_: True)


def _answers_a_push_to_all(patch: Patch) -> None:
    patch.setattr(Places, "told", lambda self, store, home, replica=None: self.readers[store][home])


def _sums_a_site_before_its_quorum(patch: Patch) -> None:
    real: Callable[..., Any] = Site.__init__

    def begin(self: Any, terms: Any, group: Any, number: int, began: float = 0.0, *rest: Any) -> None:
        real(self, terms, group, number, began, *rest)
        if isinstance(group.site_quorum, Quorum):
            inside = replace(self._inside, quorum=Quorum(1, late=group.site_quorum.late))
            self._decision = Decision(terms, inside, began)

    patch.setattr(Site, "__init__", begin)


def _waits_in_a_site_past_its_limit(patch: Patch) -> None:
    real: Callable[..., Any] = Site.__init__

    def begin(self: Any, terms: Any, group: Any, number: int, began: float = 0.0, *rest: Any) -> None:
        real(self, terms, group, number, began, *rest)
        if isinstance(group.site_quorum, Quorum):
            inside = replace(self._inside, quorum=msgspec.structs.replace(group.site_quorum, limit_s=math.inf))
            self._decision = Decision(terms, inside, began)

    patch.setattr(Site, "__init__", begin)


def _loses_a_late_contribution_of_a_site(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Site._forward  # pyright: ignore[reportPrivateUsage]

    def forward(self: Any, store: int, clock: int, row: Any, folded: Any, **options: Any) -> list[Any]:
        return real(self, store, clock, row, folded=(), **options)

    patch.setattr(Site, "_forward", forward)


def _adds_late_contributions_of_a_site_as_they_are(patch: Patch) -> None:
    """Without the decay of `Fold`."""
    real: Callable[..., list[Any]] = Site._forward  # pyright: ignore[reportPrivateUsage]

    def forward(self: Any, *arguments: Any, **options: Any) -> list[Any]:
        *rest, made = real(self, *arguments, **options)
        return [*rest, replace(made, contributions=tuple((handles, 1.0) for handles, _ in made.contributions))]

    patch.setattr(Site, "_forward", forward)


def _divides_the_step_of_a_site_by_all_of_its_replicas(patch: Patch) -> None:
    """Also where not all of them are in the sum."""
    real: Callable[..., Any] = arithmetic.for_leader

    def for_leader(training: Any, message: Any, given: Any, share: Any = None) -> Any:
        site = training.stores[message.store].site_of(message.replica)
        whole = len(site.replicas) * training.microbatches
        return real(training, msgspec.structs.replace(message, weight=whole), given, share)

    patch.setattr(arithmetic, "for_leader", for_leader)


def _goes_on_with_parameters_that_its_leader_has_updated(patch: Patch) -> None:
    patch.setattr(arithmetic.Arithmetic, "follow", lambda *_: None)


def _counts_a_site_as_one_replica(patch: Patch) -> None:
    real: Callable[..., None] = Member.__init__

    def begin(self: Any, *args: Any) -> None:
        real(self, *args)
        self.weight = 1

    patch.setattr(Member, "__init__", begin)


def _leaves_before_it_has_relayed_the_sum_of_its_site(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Member.total

    def total(self: Any, part: int, clock: int, given_up: Any) -> list[Any]:
        early = [] if self.leads or self._store in self._node.world.layout.local else [None]
        return real(self, part, clock, given_up) or early

    patch.setattr(Member, "total", total)


def _averages_without_a_late_neighbour(patch: Patch) -> None:
    """And the weights of the others are not raised instead, so that a round takes something from the mean."""

    def end(self: Any, step: Any) -> bool:
        if self._gossip.due(step.clock):
            told, weights = self._node.told, self._gossip.weights(self._number, len(self._workers), step.clock)
            keys = {j: (self._store, self._at[0], self._senders[j], step.clock) for j in weights if j != self._number}
            theirs = {j: told.pop(key) for j, key in keys.items() if key in told}
            there = {j: w for j, w in weights.items() if j in theirs or j == self._number}
            self._node.world.values.mix(self._at, self._store, there, theirs)
        return True

    patch.setattr(Neighbours, "end", end)


def _saves_before_all_is_applied(patch: Patch) -> None:
    patch.setattr(Home, "rests", lambda *_: True)


def _drops_all_items_of_a_silent_replica(patch: Patch) -> None:
    patch.setattr(silent, "joined", lambda _: [])


def _stops_for_a_hold_that_is_over(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Replica._take  # pyright: ignore[reportPrivateUsage]

    def take(self: Any, event: Any) -> list[Any]:
        self._held = -1 if isinstance(event, Hold) else self._held
        return real(self, event)

    patch.setattr(Replica, "_take", take)


def _counts_who_had_stopped_for_a_withdrawn_snapshot(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Snapshots.withdraw

    def withdraw(self: Any, ids: Any) -> list[Any]:
        before = dict(self._paused)
        done = real(self, ids)
        self._paused = before
        return done

    patch.setattr(Snapshots, "withdraw", withdraw)


def _counts_late_answers_to_a_withdrawn_snapshot(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Snapshots.take

    def take(self: Any, ids: Any, peer: str, message: Any, handle: Any) -> list[Any]:
        return real(self, ids, peer, msgspec.structs.replace(message, number=self._number), handle)

    patch.setattr(Snapshots, "take", take)


def _withdraws_a_snapshot_without_a_new_hold(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Snapshots.withdraw

    def withdraw(self: Any, ids: Any) -> list[Any]:
        real(self, ids)
        return []

    patch.setattr(Snapshots, "withdraw", withdraw)


def _does_not_count_a_shared_update(patch: Patch) -> None:
    real: Callable[..., list[Any]] = Home._count  # pyright: ignore[reportPrivateUsage]

    def count(self: Any, update: Any) -> list[Any]:
        return real(self, msgspec.structs.replace(update, applied=update.clock != 1))

    patch.setattr(Home, "_count", count)


BUGS: dict[str, Callable[[Patch], None]] = {
    "a repeated contribution is applied again": _applies_a_repeated_contribution,
    "a late contribution is forgotten": _forgets_a_late_contribution,
    "a reader goes on a clock early": _lets_a_reader_go_a_clock_early,
    "a requeued item is lost": _loses_a_requeued_item,
    "the mean is over those that are there": _divides_by_those_that_are_there,
    "a clock is committed before its quorum": _commits_before_the_quorum,
    "folded items are counted as used": _counts_folded_items_as_used,
    "a settlement is lost": _loses_a_settlement,
    "what a lost replica has not told is dropped": _drops_what_a_lost_replica_has_not_told,
    "a push of own parameters is left out": _skips_the_clock_of_a_push_of_own_parameters,
    "a replica reads without its own writes": _does_not_wait_for_its_own_writes,
    "a replica takes more often than its policy says": _takes_in_each_step,
    "the decisions of groups are mixed up": _mixes_up_the_decisions_of_groups,
    "a stage retires while a sum is under way": _retires_while_a_sum_is_under_way,
    "what a late push had gathered is lost": _loses_what_a_late_push_had_gathered,
    "a step contributes to the fit after its own": _contributes_to_the_fit_after_its_own,
    "a code is decoded with a wrong coefficient": _decodes_with_a_wrong_coefficient,
    "each copy of a portion counts": _counts_each_copy_of_a_portion,
    "a cut step weighs as a whole one": _weighs_a_cut_step_as_a_whole_one,
    "late work is folded in twice": _folds_late_work_in_twice,
    "global parameters are taken before the own are pushed": _takes_global_parameters_before_it_has_pushed_its_own,
    "a residual is lost with a dropped push": _loses_the_residual_with_a_dropped_push,
    "mirrors end without what filters still keep": _ends_without_what_filters_still_keep,
    "differences of versions are published": _publishes_differences_of_versions,
    "each push is answered with a version": _answers_each_push,
    "all get the answer to a push of one": _answers_a_push_to_all,
    "a site is summed before its quorum": _sums_a_site_before_its_quorum,
    "a site waits past its limit": _waits_in_a_site_past_its_limit,
    "a late contribution to a site is lost": _loses_a_late_contribution_of_a_site,
    "a late contribution to a site does not decay": _adds_late_contributions_of_a_site_as_they_are,
    "the step of a site is divided by all of its replicas": _divides_the_step_of_a_site_by_all_of_its_replicas,
    "a replica does not follow the leader of its site": _goes_on_with_parameters_that_its_leader_has_updated,
    "a site counts as one replica": _counts_a_site_as_one_replica,
    "a replica leaves before it has relayed a sum": _leaves_before_it_has_relayed_the_sum_of_its_site,
    "a late neighbour is left out of an average": _averages_without_a_late_neighbour,
    "a snapshot is taken before all is applied": _saves_before_all_is_applied,
    "a snapshot without a silent replica drops all of its items": _drops_all_items_of_a_silent_replica,
    "a replica stops for a hold that is over": _stops_for_a_hold_that_is_over,
    "who had stopped for a withdrawn snapshot counts": _counts_who_had_stopped_for_a_withdrawn_snapshot,
    "late answers to a withdrawn snapshot count": _counts_late_answers_to_a_withdrawn_snapshot,
    "a snapshot is withdrawn without a new hold": _withdraws_a_snapshot_without_a_new_hold,
    "a shared update is not counted": _does_not_count_a_shared_update,
}


@contextmanager
def planted(bug: str) -> Generator[None]:
    """The machines of this process have this bug inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        BUGS[bug](patch)
        yield

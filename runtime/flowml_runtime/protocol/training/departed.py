"""Settles the work of a replica that is lost while its run goes on without it.

    WorkerLost -> LeaveOut to all workers -> LeftOut from each with homes -> each item of the replica has a fate

A run goes on without a lost worker where no replica ever waits for another (`waits_for_none`), and where the worker had
nothing but stages of replicas (`alone_on`). The homes take nothing more from a lost replica, and say what they have:

* An item that all stores have is used, also if its replica has not said so.
* An item that no store has goes back to the queue, also if its replica has settled it before a push that never came.
* An item that only some stores have is used, and the ledger counts it as `partly`. Other items of the same push were
  sent with it, so this is at most one push of a lost replica.

Until all homes have answered, no replica is told that there are no more items. A step that is done again is reported
once: the report that came first counts. Of a step that counts, and that its replica could not report any more, the
history is told.

So items are remembered that are settled as used, and that stores may lack. Snapshots have them too (`unsent`): in a run
that begins without a lost replica they have the same fates, by what the stores of the snapshot have. In a run with
other members replicas have other clocks than their items of before, which are `owed` there: a store has them when the
first push of the replica in this run has come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

from flowml.policy import UNBOUNDED, Consensus, Gossip
from flowml.policy.apply import base_of
from flowml_runtime import wire
from flowml_runtime.protocol.training.ledger import Asked, Ledger, LedgerState, Settled
from flowml_runtime.protocol.training.notes import NoteLeftOut
from flowml_runtime.protocol.training.owed import Owed, lacking, reached
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import RETIRED, Terms
from flowml_runtime.protocol.training.work import Work

Unsent = tuple[int, int, wire.Item]
"""(replica, clock, item)"""

_BEFORE = -1
"""In place of the clock of an item that is owed."""


def waits_for_none(terms: Terms) -> bool:
    """Whether no replica ever waits for another one, and a run goes on without a lost one. A replica has one stage, and
    no state of the model."""
    return terms.stages == 1 and not terms.stateful and applies_alone(terms)


def applies_alone(terms: Terms) -> bool:
    """Whether each store applies every contribution alone as it arrives, and lets replicas read however late others
    are."""

    def alone(store: StoreTerms) -> bool:
        policy = store.policy
        among = store.collective or store.shared or bool(store.sites) or isinstance(policy.remote, Gossip)
        if store.clocked or among or isinstance(base_of(policy.apply), Consensus):
            return False
        return policy.staleness == UNBOUNDED and policy.quorum.need(terms.replicas) == 1

    return not terms.couplings and all(map(alone, terms.stores))


def alone_on(worker: str, terms: Terms, places: Places) -> tuple[int, ...]:
    """The replicas that are lost with a worker, if a run of `waits_for_none` can go on without them; else none. It
    cannot without the last ones, a home, or the first replica where that keeps the optimizer's state for the result."""
    replicas = tuple(sorted({replica for replica, _ in places.stages_on(worker)}))
    live = {replica for replica, stages in enumerate(places.stages) if stages}
    keeps = min(live, default=0) in replicas and any(store.policy.local for store in terms.stores)
    return () if places.stores_on(worker) or keeps or live <= set(replicas) else replicas


class Departed:
    """The items of replicas that are lost, or that may be, and that have not certainly reached all stores."""

    def __init__(self, terms: Terms, ledger: Ledger, *, saves: bool, outlives: bool) -> None:
        """`saves`: the run takes snapshots. `outlives`: the fit goes on after a loss."""
        self.goes_on = saves and outlives and waits_for_none(terms)
        self._saves, self._keeps = saves, saves and not terms.aligned
        pushes = (s.every * max(1, s.policy.quorum.need(terms.replicas)) for s in terms.stores if self._keeps)
        self._most = None if outlives else max(pushes, default=0)
        """The number of a replica's newest items of which a snapshot may lack some. None: all since the last one, as
        it is not known what of them has arrived when the replica is lost."""
        self._terms, self._ledger = terms, ledger
        self._used: dict[int, dict[int, wire.Item]] = {}
        """Replica -> clock -> an item that is settled as used, and that some store may lack."""
        self._owed: dict[int, tuple[Owed, ...]] = {}
        """Replica -> its items of earlier runs that some store lacks."""
        self._acted: set[int] = set()
        """The replicas that have used an item in this run."""
        self._reported: dict[int, set[int]] = {}
        """Replica -> the clocks that it has reported since the newest snapshot."""
        self._reached: dict[int, dict[int, int]] = {}
        """Lost replica -> store -> the clock that its home has said. Some have not answered yet."""
        self._over: set[int] = set()
        """The lost replicas whose items are settled. What comes from them later is of no use."""
        self._again: set[int] = set()
        """The numbers of items that go back to the queue, of steps that were reported."""
        self._waiting: list[wire.Ask] = []
        self._stopped: wire.Stopped | None = None
        """Where the run began, if it goes on."""

    def restore(self, state: LedgerState | None, lost: Collection[int], stopped: wire.Stopped | None) -> None:
        """A run begins at a snapshot without these replicas, where stores stood as `stopped` says. Others do again what
        no store has of them."""
        if state is None:
            return
        self._stopped = stopped
        for replica, clock, item in state.unsent if self._keeps else ():
            self._used.setdefault(replica, {})[clock] = item
            self._reported.setdefault(replica, set()).add(clock)
        for one in state.owed if self._saves else ():
            self._owed[one.replica] = (*self._owed.get(one.replica, ()), one)
        for replica in lost if self._keeps else ():
            nothing = (0,) * len(self._terms.stores)
            self._settle(replica, nothing if stopped is None else reached(self._terms, stopped, replica), 0)

    def unsent(self) -> tuple[Unsent, ...]:
        """For a snapshot: the items that are used, and that their replicas have not sent to all stores."""
        return tuple((r, clock, item) for r, found in sorted(self._used.items()) for clock, item in found.items())

    def owed(self, taken: wire.Stopped) -> tuple[Owed, ...]:
        """The items of earlier runs that some store of a snapshot lacks."""
        return tuple(o for r in sorted(self._owed) for o in self._still(r, reached(self._terms, taken, r)))

    def without(self, work: Work, taken: wire.Stopped, replicas: Collection[int]) -> LedgerState | None:
        """The accounts at a snapshot without these replicas, whose items have the fates that stores say. None if it is
        not known what replicas have told and not sent. A step that counts and was not reported has no values for the
        history."""
        if not self._keeps:
            return None
        all_held = tuple(RETIRED if r in replicas else clock for r, clock in enumerate(taken.clocks))
        ledger = Ledger(work)
        ledger.restore(self._ledger.kept(all_held), taken.clocks)
        then = Departed(self._terms, ledger, saves=True, outlives=True)
        then._stopped, then._owed = self._stopped, dict(self._owed)
        then._used = {replica: dict(found) for replica, found in self._used.items()}
        for replica in replicas:
            then._settle(replica, reached(self._terms, taken, replica), 0)
        ledger.validate()
        return msgspec.structs.replace(ledger.kept(taken.clocks), unsent=then.unsent(), owed=then.owed(taken))

    def saved(self, taken: wire.Stopped, without: Collection[int] = ()) -> None:
        """A snapshot was taken, which says what the stores have."""
        for known in (self._used, self._reported):
            for replica, found in known.items():
                if replica in without:
                    continue
                sent = min(reached(self._terms, taken, replica))
                for clock in [clock for clock in found if clock < sent]:
                    found.pop(clock) if isinstance(found, dict) else found.discard(clock)

    def ignores(self, message: wire.Ask | wire.Settled) -> bool:
        """Whether a message of a lost replica comes too late. An Ask may have to wait until homes have answered."""
        if message.replica in self._over:
            return True
        if isinstance(message, wire.Settled):
            if self._keeps:
                used = [(self._ledger.clock_of(item), item) for item, fate in message.fates if fate == "used"]
                known = self._used.setdefault(message.replica, {})
                known.update(used)
                self._acted.update((message.replica,) if used else ())
                for clock in sorted(known)[: -self._most] if self._most and len(known) > self._most else ():
                    del known[clock]
            return False
        if not self._reached or not message.clocks:
            return False
        waits = bool(self._waiting) or not self._ledger.has_more_than(len(message.clocks), message.replica)
        self._waiting += [message] if waits else []
        return waits

    def counted(self, report: wire.Report) -> bool:
        """Whether the values of a report are the first ones of their item."""
        if not self._keeps or not report.slots:
            return True
        if report.replica in self._over:
            return False
        if self._most is None:
            self._reported.setdefault(report.replica, set()).add(report.clock)
        return report.item.sequence not in self._again

    def lose(self, replicas: Iterable[int]) -> None:
        """The homes are asked what they have of these replicas."""
        self._reached.update((replica, {}) for replica in replicas)

    def answered(self, told: wire.LeftOut, cause: int) -> list[NoteLeftOut]:
        """A worker says what its homes have of a lost replica. After the last one its items are settled."""
        found = self._reached.get(told.replica)
        if found is None:
            return []
        found.update(told.stores)
        if len(found) < len(self._terms.stores):
            return []
        del self._reached[told.replica]
        return [self._settle(told.replica, tuple(found[store] for store in sorted(found)), cause)]

    def take_waiting(self) -> Iterator[wire.Ask]:
        """What was asked for meanwhile, once all homes have answered."""
        waiting = [] if self._reached else self._waiting
        self._waiting = [] if waiting else self._waiting
        return (ask for ask in waiting if ask.replica not in self._over)

    def close(self) -> None:
        """The run is over. A replica that has had no item in it, because there were fewer than replicas, has not pushed
        what it had gathered before."""
        began = self._stopped
        if began is None:
            return
        for replica in self._used.keys() | self._owed.keys():
            aligned = self._terms.aligned
            pushed = began.clocks[replica] <= self._terms.last_clock if aligned else replica in self._acted
            if pushed or replica in self._over:
                continue
            used, known = self._used.get(replica, {}), reached(self._terms, began, replica)
            since = (Owed(replica, replica, item, lacking(clock, known)) for clock, item in used.items())
            for one in (*self._owed.get(replica, ()), *since):
                lose(self._ledger, one, self._terms)

    def _still(self, replica: int, there: Sequence[int]) -> tuple[Owed, ...]:
        """What a replica still owes to stores that have so much of it: one that has more than at the beginning has a
        push."""
        if self._stopped is None:
            return ()
        began = reached(self._terms, self._stopped, replica)
        found = (
            msgspec.structs.replace(one, lacking=tuple(n for n in one.lacking if there[n] <= began[n]))
            for one in self._owed.get(replica, ())
        )
        return tuple(one for one in found if one.lacking)

    def _settle(self, replica: int, there: Sequence[int], cause: int) -> NoteLeftOut:
        self._over.add(replica)
        used, reported = self._used.pop(replica, {}), self._reported.pop(replica, set[int]())
        granted = {clock: item for _, clock, item in self._ledger.held(replica)} if self._keeps else {}
        before = [(_BEFORE, one) for one in self._still(replica, there)]
        since = [(c, Owed(replica, replica, i, lacking(c, there))) for c, i in sorted({**used, **granted}.items())]
        self._owed.pop(replica, None)
        returned: list[wire.Item] = []
        missed: list[wire.Item] = []
        for clock, one in (*before, *since):
            item, known = one.item, clock == _BEFORE or clock in reported
            if len(one.lacking) + len(one.lost) == len(there):
                if clock not in granted:
                    self._ledger.take_back(one.done_by, clock, item, one.lost)
                self._ledger.step(Asked(one.done_by, (), (item,)))
                returned.append(item)
                self._again.update((item.sequence,) if known else ())
                continue
            if clock in granted:
                self._ledger.step(Settled(replica, ((item, "used"),)))
            if one.lacking:
                self._ledger.note_partly(one.lacking, one.lost)
            missed += [] if known or item.sequence in self._again else [item]
        return NoteLeftOut(replica, tuple(there), tuple(returned), tuple(missed), cause)


def lose(ledger: Ledger, owed: Owed, terms: Terms) -> None:
    """The stores that lack an item do not get it any more. One that none has is dropped; with common clocks stores with
    decisions have it."""
    if not terms.aligned and len(owed.lacking) + len(owed.lost) == len(terms.stores):
        ledger.take_back(owed.done_by, _BEFORE, owed.item, owed.lost)
        ledger.step(Settled(owed.done_by, ((owed.item, "dropped"),)))
    elif owed.lacking:
        ledger.note_partly(owed.lacking, owed.lost)

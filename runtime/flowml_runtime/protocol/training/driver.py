"""The driver's state machine in training decides how a fit begins, which replica gets which work, and when it ends.

    Ask             a replica asks for work items, and the `Ledger` grants them. Their data are sent before the grant,
                    if the driver feeds the workers.
    Settled         the fate of items, for the ledger and the history.
    Report          the loss of a step, for the history.
    Commit          which reports of a clock count, for the history: those of replicas that some group of stores due at
                    that clock includes. Noted only if a decision may leave a replica out. It also says what the clock
                    waited for.
    Staleness       how stale the applied contributions were, for the history.
    NonFinite       which replicas' gradients were left out because they hold NaN or infinity, for the summary.
    StoreValue      a home has finished a store. The value of the store's first home counts, once; other homes hold
                    copies of it.
    OwnState        the last optimizer state of a store whose parameters replicas update themselves. That of the
                    first replica that takes part counts.
    ModelState      the last state of the model on a stage. It comes before the Retired of the stage.
    Traffic         the bytes that a worker has sent for each store. The newest message counts.
    Paused, Exported, Buffers, Copied   a snapshot is taken: see `snapshot`.
    Retired         a stage pushes nothing more.
    LeftOut         what homes have of a lost replica: see `departed`.

The fit is over when every stage of every replica that is not lost has retired, every home has finished its stores, and
the last snapshot is complete.
These messages may arrive in any order, and repeatedly. Messages of other runs, and all after the end, are dropped.
An error on a worker, or its loss, ends the fit with an error. There are two exceptions: after every stage has retired,
a worker that has sent all of its result may be lost. And where no replica waits for another, a run goes on without a
worker that had nothing but stages of replicas (`departed`), if others still have items to take.

What the caller must do:

1. Give one event at a time, messages from one worker in the order in which it sent them.
2. Carry the actions out in the order of the list.
3. Give Stop when the fit ends for any reason, and no event after it.
4. Keep the arrays of a handle until one action names it: Note, Keep, KeepState, KeepModel, Save or Release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training import silent
from flowml_runtime.protocol.training.accounts import joined
from flowml_runtime.protocol.training.actions import Received, Release, Send
from flowml_runtime.protocol.training.commits import Commits
from flowml_runtime.protocol.training.departed import Departed, alone_on
from flowml_runtime.protocol.training.ledger import Asked, Ledger, LedgerState, Settled, Work
from flowml_runtime.protocol.training.notes import (
    Note,
    NoteCommit,
    NoteFates,
    NoteForwarded,
    NoteLeftOut,
    NoteNonFinite,
    NoteStaleness,
    NoteWaits,
)
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.snapshot import Offer, Rhythm, Save, Snapshots
from flowml_runtime.protocol.training.store import Handle
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms
from flowml_runtime.protocol.training.untold import Untold


class Begin(msgspec.Struct, frozen=True):
    """Begin the fit: the workers have loaded its plan."""


class StepFailed(msgspec.Struct, frozen=True):
    """A worker has reported a failure."""

    message: wire.StepFailed


class WorkerLost(msgspec.Struct, frozen=True):
    """A worker of the plan is lost. `may_leave`: the fit may go on without its replicas."""

    worker: str
    reason: str
    may_leave: bool = False


class Pause(msgspec.Struct, frozen=True):
    """Take a snapshot soon: after a push that is within so many clocks, or at once (`Snapshots.pause`)."""

    pushed_within: int = 0
    leaving: tuple[int, ...] = ()


class Withdraw(msgspec.Struct, frozen=True):
    """Let the replicas go on that stand for a snapshot, because late ones hold it up."""


class Stop(msgspec.Struct, frozen=True):
    """The fit has ended, with or without an error."""


Event = Begin | Received | StepFailed | WorkerLost | ReplicaLost | Pause | Offer | Withdraw | Stop


class SendStore(msgspec.Struct, frozen=True):
    """Send a store's first value to its homes."""

    store: int
    to: tuple[str, ...]
    cause: int


class SendBuffers(msgspec.Struct, frozen=True):
    """Send the workers the buffers of the snapshot from which the run goes on. `SendStore` sends those of homes."""

    cause: int


class SendModel(msgspec.Struct, frozen=True):
    """Send each stage the first state of the model that stays there."""

    cause: int


class SendSource(msgspec.Struct, frozen=True):
    """Send each worker the leaves of the source that its stages read."""

    cause: int


class Feed(msgspec.Struct, frozen=True):
    """Send the stages of a replica the examples of a work item."""

    replica: int
    item: wire.Item
    cause: int


class Keep(msgspec.Struct, frozen=True):
    """This is the store's final value."""

    store: int
    handle: Handle | None
    cause: int


class KeepState(msgspec.Struct, frozen=True):
    """This is the last optimizer state of a store whose parameters replicas update themselves."""

    store: int
    handle: Handle | None
    cause: int


class KeepModel(msgspec.Struct, frozen=True):
    """This is the last state of the model on a stage of a replica."""

    replica: int
    stage: int
    handle: Handle | None
    cause: int


class Fail(msgspec.Struct, frozen=True):
    """The fit cannot continue, because a worker has failed or is lost."""

    reason: wire.StepFailed | WorkerLost
    cause: int


class LeaveOut(msgspec.Struct, frozen=True):
    """The run goes on without a lost worker, on which these replicas were."""

    worker: str
    replicas: tuple[int, ...]
    reason: str
    cause: int


class Over(msgspec.Struct, frozen=True):
    """The fit is over."""

    cause: int


Action = (
    Send
    | SendStore
    | SendBuffers
    | Save
    | SendModel
    | SendSource
    | Feed
    | Note
    | NoteFates
    | NoteCommit
    | NoteWaits
    | NoteForwarded
    | NoteStaleness
    | NoteNonFinite
    | Keep
    | KeepState
    | KeepModel
    | Release
    | Fail
    | LeaveOut
    | NoteLeftOut
    | Over
)


class TrainingDriver:
    """The driver's machine for one fit."""

    def __init__(
        self,
        start: wire.StartTraining,
        terms: Terms,
        work: Work,
        places: Places,
        rhythm: Rhythm | None = None,
        ledger: LedgerState | None = None,
        *,
        outlives: bool = False,
    ) -> None:
        """`rhythm` says when to take snapshots. `ledger`: the accounts of the snapshot from which the run goes on.
        `outlives`: the fit goes on after a loss."""
        clocks = start.stopped.clocks if start.stopped else (0,)
        self.ledger = Ledger(work)
        if ledger is not None:
            self.ledger.restore(ledger, clocks)
        for replica in places.lost:
            self.ledger.step(ReplicaLost(replica))
        self._departed = Departed(terms, self.ledger, saves=rhythm is not None, outlives=outlives)
        self._departed.restore(ledger, places.lost, start.stopped)
        self._sharded = work.sharded
        self._sated: set[int] = set()
        """The replicas that know that there are no more items for them."""
        stages = start.stopped.stages if start.stopped else ()
        self._untold = Untold(terms, {s.replica: s.unsettled for s in stages if s.stage == 0})
        self.snapshots = Snapshots(terms, places, rhythm, max(clocks))
        """When snapshots are taken, and what has come of one."""
        self.traffic: dict[str, wire.Traffic] = {}
        """The newest Traffic message of each worker."""
        self.versions: dict[int, int] = {}
        """Store -> the version of its final value, for the values that have arrived."""
        self.number = 0
        """The number of the newest event."""
        self._start = msgspec.structs.replace(start, hold=self.snapshots.hold)
        self._steps = range(start.run, start.run + terms.most_clocks)
        self._work, self._item_size = work, work.item_size
        self._terms, self._places, self._all = terms, places, places.workers
        self._first = min(set(range(terms.replicas)).difference(places.lost))
        """The first replica that takes part."""
        self._stateful = bool(terms.stateful)
        self._to_retire = {(r, s) for r, stages in enumerate(places.stages) for s in range(len(stages))}
        self._to_finish = {(store, home) for store, homes in enumerate(places.homes) for home in homes}
        self._commits = Commits(terms, max(clocks))
        self._closed = False
        """Whether the ledger is closed, because the fit is over."""
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether every stage has retired, every store is finished, and the last snapshot is here."""
        return not self._to_retire and not self._to_finish and not self.snapshots.under_way

    @property
    def trained(self) -> bool:
        """Whether every stage has retired, so that only the result has to be sent."""
        return not self._to_retire

    @property
    def hold(self) -> int:
        """The clock before which replicas stop next."""
        return self.snapshots.hold

    @property
    def aligned(self) -> bool:
        """Whether replicas share clocks."""
        return self._terms.aligned

    @property
    def heard(self) -> int:
        """How much has come of a snapshot that late replicas hold up, which others could go on without; 0: of none."""
        return self.snapshots.heard

    def unfinished(self, worker: str) -> tuple[int, ...]:
        """The stores that a worker has not finished, by their numbers."""
        return tuple(sorted(store for store, home in self._to_finish if home == worker))

    def step(self, event: Event) -> list[Action]:
        """Process one event. Raises ProtocolError for an event that breaks the protocol."""
        self.number += 1
        if self._ended:
            handle = event.handle if isinstance(event, Received) else None
            return [] if handle is None else [Release(handle, self.number)]
        if type(event) is Received:  # not `match`: nearly every event is one
            actions = self._receive(event)
            return [*actions, *self._hear(event)] if self.snapshots.silent else actions
        match event:
            case Begin():
                return self._begin()
            case StepFailed(message) if message.step not in self._steps:
                return []
            case StepFailed(message):  # one that could not send to another names that
                lost = WorkerLost(message.worker, message.error) if message.kind == "lost" else None
                return [Fail(lost or message, self.number)]
            case WorkerLost():
                return self._lose(event)
            case Pause(within, leaving):
                return [*self.snapshots.pause(self._ids(), self.ledger.newest, within, leaving)]
            case Offer():
                self.snapshots.offer = event
                return []
            case Withdraw():
                return [*self.snapshots.withdraw(self._ids())]
            case ReplicaLost(replica):
                self.ledger.step(event)
                go_on = self.snapshots.lose(self._ids())
                return [*go_on, *self._close(retired=[at for at in self._to_retire if at[0] == replica])]
            case Stop():
                self._ended = True
                return [Send(self._all, wire.StopTraining(**self._ids()))]

    def goes_on_without(self, worker: str) -> tuple[int, ...]:
        """The replicas without which the run would go on if this worker were lost now; none if it would end."""
        if not (self._departed.goes_on and self.snapshots.active):
            return ()
        lost = alone_on(worker, self._terms, self._places)
        if self._sharded and lost:  # another one has to take what is left of their shards
            live = set(range(self._terms.replicas)).difference(self._places.lost, lost)
            return lost if live - self._sated else ()
        return () if self._sated else lost

    def _lose(self, event: WorkerLost) -> list[Action]:
        """Go on without a worker, or end the fit."""
        done = not self._to_retire and not self.snapshots.under_way and not self.unfinished(event.worker)
        if done or event.worker not in self._places.workers:
            return []
        replicas = self.goes_on_without(event.worker) if event.may_leave else ()
        if not replicas:
            return [Fail(event, self.number)]
        self._places = self._places.without(replicas)
        self._first = min(set(range(self._terms.replicas)).difference(self._places.lost))
        self._departed.lose(replicas)
        for replica in replicas:
            self.ledger.step(ReplicaLost(replica))
        ids, workers = self._ids(), self._places.workers
        told = [Send(workers, wire.LeaveOut(**ids, replica=replica)) for replica in replicas]
        self._to_retire.difference_update([at for at in self._to_retire if at[0] in replicas])
        left = LeaveOut(event.worker, replicas, event.reason, self.number)
        return [*told, *self.snapshots.leave(ids, self._places), left]

    def kept(self, taken: Save) -> LedgerState | None:
        """The accounts at a snapshot, just after it was taken; None if they are unknown without a silent replica."""
        clocks = taken.stopped.clocks
        if taken.without and not self._terms.aligned:
            return self._departed.without(self._work, taken.stopped, taken.without)
        unsent, owed = self._departed.unsent(), self._departed.owed(taken.stopped)
        state = msgspec.structs.replace(self.ledger.kept(clocks), unsent=unsent, owed=owed)
        return silent.without(state, self._work, clocks, taken.without, self._untold) if taken.without else state

    def final_order(self) -> list[int]:
        """The stores in the order in which their values are taken.

        Several stores may keep the same leaf of optimizer state, such as a count of steps. The last one wins, which is
        the store with the most applies.
        """
        return sorted(self.versions, key=lambda store: (self.versions[store], -store))

    def validate(self) -> None:
        """Check the ledger, and that no item is outstanding at the end."""
        self.ledger.validate()
        ensure(not self.over or not self.ledger.outstanding, f"{self.ledger.outstanding} items are unaccounted for")

    def _ids(self) -> dict[str, Any]:
        return {"plan_id": self._start.plan_id, "run": self._start.run, "cause": self.number}

    def _begin(self) -> list[Action]:
        stores = [SendStore(store, homes, self.number) for store, homes in enumerate(self._places.homes)]
        model = [SendModel(self.number)] if self._stateful else []
        source = [SendSource(self.number)] if self._start.source == "shipped" else []
        buffers = [SendBuffers(self.number)] if self._start.stopped else []
        return [Send(self._places.workers, self._start), *model, *buffers, *stores, *source]

    def _receive(self, event: Received) -> list[Action]:
        message, cause = event.message, self.number
        if message.run != self._start.run or message.plan_id != self._start.plan_id:
            return [] if event.handle is None else [Release(event.handle, cause)]
        frequent = self._FREQUENT.get(type(message))  # not `match`, which is slow for messages of each step
        if frequent is not None:
            return frequent(self, message, event)
        match message:
            case wire.Traffic():
                self.traffic[event.peer] = message
                return []
            case wire.Retired(replica=replica, stage=stage):
                return self._close(retired=[(replica, stage)])
            case wire.LeftOut():
                told = self._departed.answered(message, cause)
                return [*told, *(a for ask in self._departed.take_waiting() for a in self._grant(ask))]
            case wire.Commit(clock=clock, group=group, coefficients=given):
                if not self._commits.is_new(group, clock):
                    return []
                self._untold.note(message, self.ledger.held)
                joined = self._commits.joined(message)
                if joined is None:
                    return []
                waits, excluded = joined
                counted = self._commits.take(group, clock, excluded)  # one clock at a time with a code
                noted = [NoteCommit(decided, without, given, cause) for decided, without in counted]
                return [NoteWaits(group, clock, waits, excluded, cause), *noted]
            case wire.Staleness(stores=stores):
                return [NoteStaleness(stores, cause)]
            case wire.Forwarded():
                return [NoteForwarded(message, cause)]
            case wire.NonFinite():
                return [NoteNonFinite(message.store, message.clock, message.replicas, message.weight, cause)]
            case wire.StoreValue():
                return self._finish(event.peer, message, event.handle)
            case wire.OwnState(store=store, replica=replica) if replica == self._first:
                return [KeepState(store, event.handle, cause)]
            case wire.Paused() | wire.Exported() | wire.Buffers() | wire.Copied():
                made = self.snapshots.take(self._ids(), event.peer, message, event.handle)
                for action in made:
                    if isinstance(action, Save):
                        self._departed.saved(action.stopped, action.without)
                return [*made, *self._close()]
            case wire.ModelState(replica=replica, stage=stage):
                return [KeepModel(replica, stage, event.handle, cause)]
            case _:
                raise ProtocolError(f"the driver has no use for {type(message).__name__} during training")

    def _report(self, message: wire.Report, event: Received) -> list[Action]:
        self._untold.report(message.replica, message.clock)
        if self._departed.counted(message):
            return [Note(message, event.handle, self.number)]
        known = Note(msgspec.structs.replace(message, slots=()), None, self.number)
        return [known, *([] if event.handle is None else [Release(event.handle, self.number)])]

    def _ask(self, message: wire.Ask, _: Received) -> list[Action]:
        return [] if self._departed.ignores(message) else self._grant(message)

    def _settled(self, message: wire.Settled, _: Received) -> list[Action]:
        if self._departed.ignores(message):
            return []
        self.ledger.step(Settled(message.replica, message.fates, message.missing, message.left_out, message.late))
        return [NoteFates(message.fates, message.missing, message.late, self.number)]

    _FREQUENT: ClassVar[dict[type, Callable[[TrainingDriver, Any, Received], list[Action]]]] = {
        wire.Report: _report,
        wire.Ask: _ask,
        wire.Settled: _settled,
    }

    def _hear(self, event: Received) -> Sequence[Action]:
        """Note that a replica runs that held a snapshot up."""
        return self.snapshots.hear(self._ids(), event.peer, event.message, self.ledger.newest)

    def _grant(self, ask: wire.Ask) -> list[Action]:
        actions: list[Action] = []
        for grant in self.ledger.step(Asked(ask.replica, ask.clocks, ask.returned, ask.copy)):
            fed, usual = self._start.source == "fed", self._item_size
            actions += [Feed(grant.replica, i, self.number) for _, i in grant.items if fed or i.size != usual]
            self._sated.update((grant.replica,) if grant.exhausted else ())
            answer = wire.Grant(**self._ids(), replica=grant.replica, items=grant.items, exhausted=grant.exhausted)
            actions.append(Send(self._places.stages[grant.replica][:1], answer))
        return actions

    def _finish(self, home: str, value: wire.StoreValue, handle: Handle | None) -> list[Action]:
        actions: list[Action] = []
        if (value.store, home) in self._to_finish and home == self._places.homes[value.store][0]:
            self.versions[value.store] = value.version
            actions = [Keep(value.store, handle, self.number)]
        elif handle is not None:
            actions = [Release(handle, self.number)]
        return [*actions, *self._close(finished={(value.store, home)})]

    def _close(self, retired: Iterable[tuple[int, int]] = (), finished: Iterable[tuple[int, str]] = ()) -> list[Action]:
        """Note which stages have retired, and which homes have finished which stores. Returns Over when all have."""
        self._to_retire.difference_update(retired)
        self._to_finish.difference_update(finished)
        if self._closed or not self.over:
            return []
        self._closed = True
        noted = [action for replica in self.ledger.lost for action in self._settle(replica)]
        self._departed.close()
        self.ledger.close()
        return [*noted, Over(self.number)]

    def _settle(self, replica: int) -> list[Action]:
        """Settle the items of a lost replica, whose fates it has not told."""
        noted: list[Action] = []
        for (missing, left_out, late), fates in joined(self._untold.fates(replica, self.ledger.held(replica))):
            self.ledger.step(Settled(replica, tuple(fates), missing, left_out, late))
            noted.append(NoteFates(tuple(fates), missing, late, self.number))
        return noted

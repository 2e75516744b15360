"""Takes the snapshots of one fit in the driver, and decides when they are due and what becomes of them.

The fit goes on while a thread writes them (`writing`), after the records before them were shown (`unshown`). If the
disk refuses, the fit goes on with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from flowml.callers import warn
from flowml.devices import worker_of
from flowml.plan import Training
from flowml.training.without import left_out
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.training.copied import Copied, Copies
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.kept import KeptFit
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.newcomers import forgotten, with_newcomers
from flowml_runtime.driver.training.parts import Parts
from flowml_runtime.driver.training.patience import Patience
from flowml_runtime.driver.training.regrouping import Regrouped
from flowml_runtime.driver.training.reshaping import reshaped
from flowml_runtime.driver.training.result import restored
from flowml_runtime.driver.training.snapshots import Figures, Snapshot, Trees, taken
from flowml_runtime.driver.training.training_session import TrainingSession
from flowml_runtime.driver.training.unshown import Unshown
from flowml_runtime.driver.training.validation import Validation
from flowml_runtime.driver.training.writing import Writer
from flowml_runtime.protocol.training.clocks import after_push
from flowml_runtime.protocol.training.driver import Pause, TrainingDriver
from flowml_runtime.protocol.training.ledger import LedgerState
from flowml_runtime.protocol.training.snapshot import Offer, Rhythm, Save
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.weak import weakly

LEAST_PAUSE_S = 0.25
"""The least time between two snapshots that are taken for memory."""
PUSH_WITHIN_S = 10.0
"""How long a replica that leaves may go on to its next push. It may have half a minute in all."""
MOST_SHARE = 1 / 20
"""Of the time of a fit, for such snapshots."""


class Saving:
    """The snapshots of one fit: the one from which it goes on, if any, and those that it writes, if any."""

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        resumed: Snapshot | None = None,
        figures: Figures | None = None,
        trees: Trees = (None, None, None),
        model: Model | None = None,
        kept: KeptFit | None = None,
    ) -> None:
        """`trees` are those with which the fit begins, `model` the model's state. The workers keep snapshots too if
        `kept` is given."""
        self.validation: Validation | None = None
        self.resumed = resumed
        self.first = resumed.content.steps if resumed else 0
        """The number of steps that are done already."""
        self._checkpoint = checkpoint
        self._figures = figures
        self.trees = trees
        self.model = model or Model()
        self._kept = kept
        self._saved_step = self._validated_step = self.first
        self._on_disk = self.first
        """The step of the newest snapshot that is written, or will be next. After a loss, that in memory is newer."""
        self._saved_at: float | None = None
        self._owed: Snapshot | None = None
        """The one from which the run goes on, if the run before was to write it or an older one."""
        self._dropped = False
        """Whether this run has ended while a snapshot waited to be written."""
        self._writer = None if checkpoint is None else Writer(checkpoint)
        self._unshown = None if self._writer is None else Unshown(self._writer, weakly(self._put), self.first)
        self.keeps = False
        """Whether the newest snapshot stays in memory, so that the fit can go on from it after a loss."""
        self.newest = resumed
        """The newest snapshot in memory."""
        self._known_as: tuple[str, Mapping[str, Any]] | None = None
        """The key by which workers know the newest snapshot in memory, and its arrays."""
        self.total = 0
        """The number of steps of the whole fit, once a run begins."""
        self._kept_at: float | None = None
        self._stood_at: float | None = None
        """Since when replicas stand for the snapshot that is being taken."""
        self._pause_s = LEAST_PAUSE_S
        self._patience = Patience()
        self._measured: tuple[int, float] | None = None
        """After how many steps, and when, the time of a step is measured from: the first ones compile."""
        self.copies: Copies | None = None
        """What workers keep of each other's state."""
        self.regroups: Callable[[], bool] = lambda: False
        """Whether the run is to end at the next snapshot, and another one with other replicas begins there."""
        self.waits_for_push = False
        """Whether replicas leave at such a snapshot, which would lose what they have not pushed."""
        self.leaving: Callable[[], tuple[int, ...]] = tuple
        """The replicas that take no part in the run that begins there."""
        self._aligned = False
        """Whether replicas share clocks."""
        self._machine: TrainingDriver | None = None
        self._withdrawn = False
        """Whether a snapshot was withdrawn, so that the next one is not due at a clock."""

    def again(self, training: Training, total: int) -> Saving:
        """The snapshots of the run of `training` that goes on from the newest one in memory, or from the beginning."""
        newest, trees = self._newest(), self.trees
        there = {stage.replica for stage in newest.content.stopped.stages} if newest is not None else set[int]()
        grows = bool(there) and not there.issuperset(training.live)  # with portions no replica has a state of its own
        found = newest and (self._grown(newest, training, total) if grows else newest.of_live(training, total))
        if found is not None:
            pairs = zip(trees[:2], (found.content.params, found.content.opt_state), strict=True)
            params, state = (restored(tree, found.leaves(leaves)) for tree, leaves in pairs)
            trees = params, state, trees[2]
        ended = newest.states(training, self.model) if newest is not None else self.model.replicas
        model = self.model.without(training.lost, ended)
        model = model.with_sums() if grows else model
        after = Saving(self._checkpoint, found, self._figures, trees, model, self._kept)
        after.keeps, after.validation, after.copies = self.keeps, self.validation, self.copies
        after._on_disk, after.total, after._known_as = self._on_disk, total, self._known_as
        after._owed = newest if self._dropped else None
        if after.validation is not None:
            after.validation.go_back(after.first)
        return after

    def _newest(self) -> Snapshot | None:
        """The newest snapshot: the one in memory, or a newer one of which workers have copies."""
        copied = self.copies and self.copies.newest
        if self.copies is None or copied is None or self._figures is None:
            return self.newest
        if self.newest is not None and self.newest.content.steps >= copied.step:
            return self.newest
        buffers = self.copies.recovered()
        if buffers is None:
            return self.newest
        about = copied.training, self._figures, copied.step, copied.stopped, copied.ledger
        self.newest = taken(*about, buffers, self.trees, self.model, {})
        return self.newest

    def _grown(self, newest: Snapshot, training: Training, total: int) -> Snapshot:
        """The snapshot for more replicas than it is of."""
        assert self._figures is not None
        return reshaped(newest, training, total, self._figures, self.model).snapshot

    def begin(self, workers: Collection[str]) -> str:
        """A run begins on these workers. Returns the name under which they keep the fit, "" if they do not."""
        if self._kept is None:
            return ""
        key, arrays = self._known_as or ("", None)
        is_known = self.newest is not None and self.newest.arrays is arrays
        self._kept.begin(workers, key, self.newest if is_known else None)
        return self._kept.fit

    def open(self, session: TrainingSession, workers: Collection[str]) -> None:
        """A run begins on these workers, which may write what they keep, unless the fit goes on from what is in memory
        here. Callbacks have had the records before it."""
        if self._owed is not None and self._owed.content.steps > self._on_disk:
            self._put(self._owed)
        self._owed = None
        real = self._figures is not None and self._figures.workers == "real"
        if self._writer is not None and real and not self.keeps:
            self._writer.open(session, workers)

    def rhythm(self, training: Training) -> Rhythm | None:
        """The rhythm of snapshots, where replicas share clocks."""
        if not self.wanted:
            return None
        written = self._checkpoint.every_steps if self._checkpoint else None
        copied = self.copies.rhythm(training) if self.copies else 0
        terms = Terms.of(training, 0)  # without common clocks the machine notes what is sent only if the fit goes on
        partial = (self.keeps or terms.aligned) and "sum" not in self.model.rules  # what a silent one adds is not known
        return Rhythm(written or 0, self.validation.every if self.validation else 0, copied, partial)

    @property
    def wanted(self) -> bool:
        """Whether there are snapshots at all."""
        return self._checkpoint is not None or self.validation is not None or self.keeps or self.copies is not None

    def events(self, machine: TrainingDriver, step: int, now: float) -> Iterator[Offer | Pause]:
        """What the driver's machine is to hear of, after `step` steps of the whole fit."""
        if self._unshown is not None:
            self._unshown.wait(now)
        self._machine, known = machine, machine.snapshots
        offer = None if self._writer is None else self._writer.offer(known.offer)
        if offer is not None:
            yield offer
        if not known.misses and self.due(step, now, aligned=machine.aligned, partial=bool(known.silent)):
            yield Pause(self.push_within(step, now), self.leaving())

    def due(self, step: int, now: float, *, aligned: bool, partial: bool = False) -> bool:
        """Whether a snapshot is due that the rhythm of clocks does not bring. A `partial` one is not validated."""
        self._aligned = aligned
        if self._saved_at is None:
            self._saved_at = self._kept_at = now
        if self._measured is None and step > self.first:
            self._measured = step, now
        if self.keeps and now - (self._kept_at or 0.0) >= self._pause_s:
            return True
        if partial:
            return self._is_old(step, now)
        if self._may_end():
            return True
        if self._checkpoint is not None and self._checkpoint.every_s is not None and self._is_old(step, now):
            return True
        return (self._withdrawn or not aligned) and (self._is_old(step, now) or self._is_unmeasured(step))

    def _may_end(self) -> bool:
        """Whether the run is to end for another one, in which each replica has an item: it pushes with its last one
        what it has gathered before."""
        machine = self._machine
        return self.regroups() and (machine is None or machine.aligned or machine.ledger.has_one_each)

    def until(self, step: int, now: float, heard: int) -> float:
        """The time at which to withdraw the snapshot for which replicas stand, after `step` steps of the whole fit."""
        self._stood_at = now if self._stood_at is None else self._stood_at
        since, at = self._measured or (step, now)
        return self._patience.until((now - at) / max(step - since, 1), now, heard)

    def push_within(self, step: int, now: float) -> int:
        """After how many steps at most the next push must be, so that a run that is to end ends after it."""
        if self._measured is None or not self.waits_for_push or not self._may_end():
            return 0
        if not self._aligned and not self.leaving():
            return 0  # those that stay need no push before others join
        since, at = self._measured
        return int(PUSH_WITHIN_S * (step - since) / max(now - at, 1e-9))

    def _ends_here(self, training: Training, step: int, now: float, *, pushed: bool) -> bool:
        """Whether the run is to end with a snapshot after so many steps, which is one after a push if `pushed`."""
        if not self._may_end():
            return False
        if not self._aligned:
            return pushed or self.push_within(step, now) == 0
        rhythms = (store.policy.every for store in training.stores)
        return after_push(rhythms, step, self.push_within(step, now)) == step

    def withdrawn(self) -> None:
        """The snapshot that was asked for, or that was due at a clock, is not taken, because a replica is late."""
        self._withdrawn, self._stood_at = True, None
        self._patience.withdrawn()

    def _is_old(self, step: int, now: float) -> bool:
        """Whether the last checkpoint is older than it should be."""
        known, saved_at = self._checkpoint, now if self._saved_at is None else self._saved_at
        if known is None or step <= self._saved_step or (self._writer is not None and self._writer.busy):
            return False
        if known.every_s is not None:
            return now - saved_at >= known.every_s
        return known.every_steps is not None and step // known.every_steps > self._saved_step // known.every_steps

    def _is_unmeasured(self, step: int) -> bool:
        """Whether a validation is due."""
        every = self.validation.every if self.validation else 0
        return every > 0 and step // every > self._validated_step // every

    def save(
        self,
        training: Training,
        step: int,
        action: Save,
        ledger: LedgerState | None,
        take: Callable[[int | None], Any],
        now: float,
        key: str,
    ) -> None:
        """Write a snapshot, or have it validated, or both. `take` gives the arrays of a handle. Workers know it by
        `key`. Raises Regrouped if the run is to end with it, before replicas are told to go on."""
        buffers: dict[str, Mapping[str, Any]] = {
            owner: dict(zip(names, take(handle), strict=True))
            for owner, names, handle in action.buffers
            if action.whole and (handle is not None or not names)
        }
        written = {owner: names for owner, names, handle in action.buffers if names and handle is None}
        figures, parts = self._figures, self._writer and self._writer.written(action.folder)
        if figures is not None and step != self.first and action.without:
            if ledger is not None and (self.newest is None or step > self.newest.content.steps):
                self._take_partial(training, step, action, ledger, buffers, now, key)
            self._patience.went_on()
            self._note_kept(now)
        elif figures is not None and step != self.first and ledger is not None:
            if action.copied and self.copies is not None:
                owners = {owner: names for owner, names, _ in action.buffers}
                self.copies.newest = Copied(key, training, step, action.stopped, ledger, owners)
            if action.whole:
                about = training, figures, step, action.stopped, ledger
                snapshot = taken(*about, buffers, self.trees, self.model, written if parts else {})
                self._take(snapshot, now, key, parts, over=action.last)
                parts = None
        if parts is not None:
            parts.remove()
        self._stood_at = None
        if not action.whole or action.last or action.without:
            return
        if self._ends_here(training, step, now, pushed=action.after_push):
            raise Regrouped

    def _take(self, snapshot: Snapshot, now: float, key: str, parts: Parts | None, *, over: bool) -> None:
        """Keep, write and validate a snapshot, as far as these are due. Workers write `parts` of it."""
        step = snapshot.content.steps
        self._withdrawn = False
        self._patience.taken(now)
        self._keep(snapshot, now)
        if self._kept is not None:
            self._kept.completed(key, snapshot)
            self._know_as(key, snapshot)
        if self.validation is not None and parts is None and (over or self._is_unmeasured(step)):
            self._validated_step = step
            values = zip((*self.trees[:2], self.model.state()), snapshot.trees, strict=True)
            params, _, state = (restored(like, snapshot.leaves(leaves)) for like, leaves in values)
            self.validation.give(step, params, state)
        if over or parts is not None or self._is_old(step, now):
            self._write(snapshot, now, parts)

    def _take_partial(
        self,
        training: Training,
        step: int,
        action: Save,
        ledger: LedgerState,
        buffers: Mapping[str, Mapping[str, Any]],
        now: float,
        key: str,
    ) -> None:
        """Keep and write a snapshot without silent replicas, in which these begin anew."""
        assert self._figures is not None
        ended = self.model.replicas if self.newest is None else self.newest.states(training, self.model)
        model, others = self.model.without((*training.lost, *action.without), ended), left_out(training, action.without)
        known = forgotten(buffers, action.without, training)
        found = taken(others, self._figures, step, action.stopped, ledger, known, self.trees, model, {}).of_live(
            others, self.total
        )
        model = model.after(found.states(others, model))
        snapshot = with_newcomers(found, action.without, training, self.total, model)
        self._keep(snapshot, now)
        if self.copies is not None:
            self.copies.without_copies = step
        if self._kept is not None:
            new = snapshot.content.owners.keys() - found.content.owners.keys()
            silent = {worker_of(device) for replica in action.without for device in training.replicas[replica]}
            self._kept.completed(key, snapshot, new, silent)
            self._know_as(key, snapshot)
        if self._is_old(step, now):
            self._write(snapshot, now)

    def _write(self, snapshot: Snapshot, now: float, parts: Parts | None = None) -> None:
        """Write a snapshot, after the records before it. Workers write `parts` of it."""
        if self._unshown is not None:
            self._saved_step, self._saved_at = snapshot.content.steps, now
            self._unshown.put(snapshot, parts, now)

    def _put(self, snapshot: Snapshot, parts: Parts | None = None) -> None:
        assert self._writer is not None
        self._on_disk = snapshot.content.steps
        self._writer.put(snapshot, parts)
        if snapshot.content.figures.workers != "real":
            self._writer.flush()  # how fast the disk is changes nothing in virtual time

    def shown(self, steps: int) -> None:
        """Callbacks have had the records of so many steps."""
        if self._unshown is not None:
            self._unshown.shown(steps)

    def _keep(self, snapshot: Snapshot, now: float) -> None:
        """Keep a snapshot in memory."""
        if self.keeps:
            self.newest = snapshot
            self._note_kept(now)

    def _know_as(self, key: str, snapshot: Snapshot) -> None:
        """Workers have been told of a snapshot. Its arrays are remembered as long as it is in memory anyway."""
        self._known_as = (key, snapshot.arrays) if self.newest is snapshot else None

    def _note_kept(self, now: float) -> None:
        """The next snapshot is due when the fit has trained much longer than replicas stood."""
        took = 0.0 if self._stood_at is None else now - self._stood_at
        self._kept_at, self._pause_s = now, max(LEAST_PAUSE_S, took / MOST_SHARE)

    @property
    def measures(self) -> bool:
        """Whether there are values that `validated` will measure, or records that it will return."""
        waits = self.validation is not None and self.validation.waits
        return waits or (self.copies is not None and self.copies.releases)

    def validated(self, records: Iterable[Record], *, hold: int | None, over: bool) -> Iterable[Record]:
        """Measure what is to be validated. Returns these records and those before that waited for the results. `hold`:
        as in `Validation.completed`."""
        if self.copies is not None:
            records = self.copies.take(records, over=over)
        if self.validation is None:
            return records
        self.validation.run()
        return self.validation.completed(records, hold=hold, over=over)

    def leave(self) -> None:
        """The fit ends with an error: write the newest snapshot in memory, if none on the disk is as new."""
        newest = self.newest
        if self._writer is not None and newest is not None and newest.content.steps > self._on_disk:
            self._put(newest)
            self.finish()

    def finish(self) -> None:
        """Wait until the last snapshot is written. Warns if it could not be."""
        if self._writer is not None and self._unshown is not None:
            self._dropped = self._unshown.drop()
            self._writer.close()
        self.tell()

    def tell(self) -> None:
        """Warn if a snapshot could not be written."""
        for wrong in () if self._writer is None else self._writer.take_wrong():
            warn(wrong)

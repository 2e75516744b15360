"""Takes the snapshots of one fit in the driver: when they are due, and a thread that writes them.

The fit goes on while the thread writes. A snapshot waits until the one before is written, so that a slow disk slows the
fit down instead of filling memory. If the disk refuses, the fit goes on with a warning.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from flowml.errors import CheckpointError, FlowmlWarning
from flowml.plan import Training
from flowml_runtime import service
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.kept import KeptFit
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.patience import Patience
from flowml_runtime.driver.training.result import restored
from flowml_runtime.driver.training.snapshots import Figures, Snapshot, Trees, taken
from flowml_runtime.driver.training.validation import Validation
from flowml_runtime.protocol.training.ledger import LedgerState
from flowml_runtime.protocol.training.snapshot import Rhythm, Save

LEAST_PAUSE_S = 0.25
"""The least time between two snapshots that are taken for memory."""
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
        self._saved_at: float | None = None
        self._writer: threading.Thread | None = None
        self._wrong: str | None = None
        self.keeps = False
        """Whether the newest snapshot stays in memory, so that the fit can go on from it after a loss."""
        self.newest = resumed
        """The newest snapshot in memory."""
        self._kept_at: float | None = None
        self._asked_at: float | None = None
        """When the snapshot for memory became due that is being taken."""
        self._pause_s = LEAST_PAUSE_S
        self._patience = Patience()
        self._measured: tuple[int, float] | None = None
        """After how many steps, and when, the time of a step is measured from: the first ones compile."""
        self._withdrawn = False
        """Whether a snapshot was withdrawn, so that the next one is not due at a clock."""

    def again(self, training: Training) -> Saving:
        """The snapshots of the run of `training` that goes on from the newest one in memory, or from the beginning."""
        found, trees = self.newest and self.newest.of_live(training), self.trees
        if found is not None:
            pairs = zip(trees[:2], (found.content.params, found.content.opt_state), strict=True)
            params, state = (restored(tree, found.leaves(leaves)) for tree, leaves in pairs)
            trees = params, state, trees[2]
        ended = self.newest.states(training, self.model) if self.newest is not None else self.model.replicas
        model = self.model.without(training.lost, ended)
        after = Saving(self._checkpoint, found, self._figures, trees, model, self._kept)
        after.keeps, after.validation = self.keeps, self.validation
        if after.validation is not None:
            after.validation.go_back(after.first)
        return after

    def begin(self, workers: Iterable[str]) -> str:
        """A run begins on these workers. Returns the name under which they keep the fit, "" if they do not."""
        if self._kept is None:
            return ""
        self._kept.begin(workers)
        return self._kept.fit

    @property
    def rhythm(self) -> Rhythm | None:
        """The rhythm of snapshots, where replicas share clocks."""
        if not self.wanted:
            return None
        written = self._checkpoint.every_steps if self._checkpoint else None
        return Rhythm(written or 0, self.validation.every if self.validation else 0)

    @property
    def wanted(self) -> bool:
        """Whether there are snapshots at all."""
        return self._checkpoint is not None or self.validation is not None or self.keeps

    def due(self, step: int, now: float, *, aligned: bool) -> bool:
        """Whether a snapshot is due that the rhythm of clocks does not bring."""
        if self._saved_at is None:
            self._saved_at = self._kept_at = now
        if self._measured is None and step > self.first:
            self._measured = step, now
        if self.keeps and now - (self._kept_at or 0.0) >= self._pause_s:
            self._asked_at = now if self._asked_at is None else self._asked_at
            return True
        if self._checkpoint is not None and self._checkpoint.every_s is not None and self._is_old(step, now):
            return True
        return (self._withdrawn or not aligned) and (self._is_old(step, now) or self._is_unmeasured(step))

    def until(self, step: int, now: float, heard: int) -> float:
        """The time at which to withdraw the snapshot for which replicas stand, after `step` steps of the whole fit."""
        since, at = self._measured or (step, now)
        return self._patience.until((now - at) / max(step - since, 1), now, heard)

    def withdrawn(self) -> None:
        """The snapshot that was asked for, or that was due at a clock, is not taken, because a replica is late."""
        self._withdrawn, self._asked_at = True, None
        self._patience.withdrawn()

    def _is_old(self, step: int, now: float) -> bool:
        """Whether the last checkpoint is older than it should be."""
        known, saved_at = self._checkpoint, now if self._saved_at is None else self._saved_at
        if known is None or step <= self._saved_step:
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
        ledger: LedgerState,
        take: Callable[[int | None], Any],
        now: float,
        key: str,
    ) -> None:
        """Write a snapshot, or have it validated, or both. `take` gives the arrays of a handle. Workers know it by
        `key`."""
        buffers: dict[str, Mapping[str, Any]] = {
            owner: dict(zip(names, take(handle), strict=True)) for owner, names, handle in action.buffers
        }
        if self._figures is None or step == self.first:
            return
        self._withdrawn = False
        self._patience.taken(now)
        snapshot = taken(training, self._figures, step, action.stopped, ledger, buffers, self.trees, self.model)
        over = action.last
        self._keep(snapshot, now)
        if self._kept is not None:
            self._kept.completed(key, snapshot)
        if self.validation is not None and (over or self._is_unmeasured(step)):
            self._validated_step = step
            values = zip((*self.trees[:2], self.model.state()), snapshot.trees, strict=True)
            params, _, state = (restored(like, snapshot.leaves(leaves)) for like, leaves in values)
            self.validation.give(step, params, state)
        if self._checkpoint is not None and (over or self._is_old(step, now)):
            self._saved_step, self._saved_at = step, now
            self.finish()
            self._writer = service.start("checkpoint", partial(self._write, snapshot), self._failed)

    def _keep(self, snapshot: Snapshot, now: float) -> None:
        """Keep a snapshot in memory. The next one is due when the fit has trained much longer than this one took."""
        if self.keeps:
            took = 0.0 if self._asked_at is None else now - self._asked_at
            self.newest, self._kept_at, self._asked_at = snapshot, now, None
            self._pause_s = max(LEAST_PAUSE_S, took / MOST_SHARE)

    @property
    def measures(self) -> bool:
        """Whether there are values that `validated` will measure."""
        return self.validation is not None and self.validation.waits

    def validated(self, records: Iterable[Record], *, hold: int | None, over: bool) -> Iterable[Record]:
        """Measure what is to be validated. Returns these records and those before that waited for the results. `hold`:
        as in `Validation.completed`."""
        if self.validation is None:
            return records
        self.validation.run()
        return self.validation.completed(records, hold=hold, over=over)

    def finish(self) -> None:
        """Wait until the last snapshot is written. Warns if it could not be."""
        if self._writer is not None:
            self._writer.join()  # no deadline: a disk takes as long as it takes
            self._writer = None
        self.tell(stacklevel=6)

    def tell(self, stacklevel: int = 5) -> None:
        """Warn if a snapshot could not be written."""
        if self._wrong is not None:
            wrong, self._wrong = self._wrong, None
            warnings.warn(wrong, FlowmlWarning, stacklevel=stacklevel)

    def _write(self, snapshot: Snapshot) -> None:
        assert self._checkpoint is not None
        directory = self._checkpoint.directory
        try:
            snapshot.write(directory, self._checkpoint.keep)
        except (OSError, CheckpointError) as error:
            self._wrong = (
                f"the checkpoint after step {snapshot.content.steps} could not be written to {directory}: {error}; the "
                "fit goes on, and older checkpoints are as they were; see whether the disk is full or read-only"
            )

    def _failed(self, reason: str) -> None:
        self._wrong = f"a checkpoint could not be written: {reason}; the fit goes on without it"

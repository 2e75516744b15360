"""Takes the snapshots of one fit in the driver: when they are due, and a thread that writes them.

The fit goes on while the thread writes. A snapshot waits until the one before is written, so that a slow disk slows the
fit down instead of filling memory. If the disk refuses, the fit goes on with a warning.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flowml.errors import CheckpointError, FlowmlWarning
from flowml.plan import Training
from flowml_runtime import service
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.snapshots import Figures, Snapshot, taken
from flowml_runtime.protocol.training.ledger import LedgerState
from flowml_runtime.protocol.training.snapshot import Rhythm, Save


class Saving:
    """The snapshots of one fit: the one from which it goes on, if any, and those that it writes, if any."""

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        resumed: Snapshot | None = None,
        figures: Figures | None = None,
        trees: tuple[Any, Any] = (None, None),
        model: Model | None = None,
    ) -> None:
        """`trees` are the parameters and the optimizer state with which the fit begins, `model` the model's state."""
        self.resumed = resumed
        self.first = resumed.content.steps if resumed else 0
        """The number of steps that are done already."""
        self._checkpoint = checkpoint
        self._figures = figures
        self.trees = trees
        self._model = model or Model()
        self._saved_step = self.first
        self._saved_at: float | None = None
        self._writer: threading.Thread | None = None
        self._wrong: str | None = None

    @property
    def rhythm(self) -> Rhythm | None:
        """The rhythm of snapshots, where replicas share clocks."""
        return None if self._checkpoint is None else Rhythm(self._checkpoint.every_steps or 0)

    def due(self, step: int, now: float, *, aligned: bool) -> bool:
        """Whether a snapshot is due that the rhythm of clocks does not bring."""
        known = self._checkpoint
        if known is None:
            return False
        if self._saved_at is None:
            self._saved_at = now
        if known.every_s is not None:
            return step > self._saved_step and now - self._saved_at >= known.every_s
        every = known.every_steps
        return every is not None and not aligned and step // every > self._saved_step // every

    def save(
        self,
        training: Training,
        step: int,
        action: Save,
        ledger: LedgerState,
        take: Callable[[int | None], Any],
        now: float,
    ) -> None:
        """Write a snapshot. `take` gives the arrays of a handle."""
        buffers: dict[str, Mapping[str, Any]] = {
            owner: dict(zip(names, take(handle), strict=True)) for owner, names, handle in action.buffers
        }
        self._saved_step, self._saved_at = step, now
        if self._checkpoint is None or self._figures is None or step == self.first:
            return
        snapshot = taken(training, self._figures, step, action.stopped, ledger, buffers, self.trees, self._model)
        self.finish()
        self._writer = service.start("checkpoint", partial(self._write, snapshot), self._failed)

    def finish(self) -> None:
        """Wait until the last snapshot is written. Warns if it could not be."""
        if self._writer is not None:
            self._writer.join()  # no deadline: a disk takes as long as it takes
            self._writer = None
        if self._wrong is not None:
            wrong, self._wrong = self._wrong, None
            warnings.warn(wrong, FlowmlWarning, stacklevel=6)

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

"""Writes the checkpoints of a fit on a thread of its own, so that no step waits for the disk.

At most one snapshot is written at a time, and at most one waits. A newer one takes the place of the one that waits:
with a slow disk there are fewer checkpoints, and neither the fit nor its memory depends on how slow it is.
"""

from __future__ import annotations

import threading

from flowml.errors import CheckpointError
from flowml_runtime import service
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.training.snapshots import Snapshot


class Writer:
    """The thread that writes the snapshots of one fit. The fit's thread calls it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._changed = threading.Condition()
        self._waiting: Snapshot | None = None
        self._busy = False
        self._wrong: str | None = None

    def put(self, snapshot: Snapshot) -> None:
        """Write a snapshot soon. Does not wait."""
        with self._changed:
            self._waiting = snapshot
            if not self._busy:
                self._busy = True
                service.start("checkpoint", self._run, self._failed)

    def flush(self) -> None:
        """Wait until the last snapshot is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)  # no deadline: a disk takes as long as it takes

    def take_wrong(self) -> str | None:
        """Why the last snapshot could not be written, in words, once."""
        with self._changed:
            wrong, self._wrong = self._wrong, None
        return wrong

    def _run(self) -> None:
        while True:
            with self._changed:
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
            self._write(snapshot)
            del snapshot

    def _write(self, snapshot: Snapshot) -> None:
        directory = self._checkpoint.directory
        try:
            snapshot.write(directory, self._checkpoint.keep)
        except (OSError, CheckpointError) as error:
            self._tell(
                f"the checkpoint after step {snapshot.content.steps} could not be written to {directory}: {error}; the "
                "fit goes on, and older checkpoints are as they were; see whether the disk is full or read-only"
            )

    def _failed(self, reason: str) -> None:
        self._tell(f"a checkpoint could not be written: {reason}; the fit goes on without it")
        with self._changed:
            self._busy, self._waiting = False, None
            self._changed.notify_all()

    def _tell(self, wrong: str) -> None:
        with self._changed:
            self._wrong = wrong

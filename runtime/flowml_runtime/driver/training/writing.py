"""Writes the checkpoints of a fit on a thread of its own, so that no step waits for the disk.

Workers write what they keep into folders that this thread has made (`parts`), and it completes them one after the
other. At most two are in use: one is being written, and one waits. As long as both are, no checkpoint is taken. There
is one more while a checkpoint waits for the records before it (`unshown`).

If the driver needs the buffers itself, it has whole snapshots. At most one of them is written at a time, and at most
one waits. A newer one takes the place of the one that waits: with a slow disk there are fewer checkpoints, and neither
the fit nor its memory depends on how slow it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from functools import partial

from flowml.errors import FlowmlError
from flowml.render.units import listed
from flowml_runtime import service
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.training.parts import Parts
from flowml_runtime.driver.training.snapshots import Snapshot
from flowml_runtime.driver.training.training_session import TrainingSession
from flowml_runtime.environment import checkpoints
from flowml_runtime.protocol.training.snapshot import Offer

MOST_FOLDERS = 2


class Writer:
    """The thread that writes the snapshots of one fit. The fit's thread calls it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Snapshot | None, Parts | None]] = deque()
        """What is to be written. Without a snapshot the parts are to be removed."""
        self._folders = 0
        """Those that are not complete or removed."""
        self._busy = False
        self._wrong: list[str] = []
        self._make: Callable[[], Parts] | None = None
        """Makes a folder for workers. None if they write nothing."""
        self._ready: Parts | None = None
        """The next folder."""
        self._told = ""
        """The folder of which the fit has heard."""
        self._used: dict[str, Parts] = {}
        """The folders that workers were told of."""
        self._refused = False
        """Whether the disk has refused a folder. Then the driver writes, and says what is wrong."""
        self.more = False
        """Whether there may be one folder more."""
        self._elsewhere: set[str] = set()
        """The workers that see another disk, which was said."""

    def open(self, session: TrainingSession, workers: Collection[str]) -> None:
        """Workers may write from now on."""
        self._make = partial(Parts, session, self._checkpoint.directory, tuple(workers))
        self._prepare()

    def offer(self, there: Offer) -> Offer | None:
        """The folder into which workers may write next, if it is another one than that which is known."""
        if self._make is None:
            return None
        with self._changed:
            ready = self._ready
            if ready is not None and self._told == str(ready.folder) != there.folder:
                for parts in self._used.values():  # that snapshot was withdrawn
                    self._waiting.append((None, parts))
                self._used, self._ready = {self._told: ready}, None
                self._start()
            if self._ready is None:
                now = Offer(busy=not self._refused)
            else:
                now = Offer(str(self._ready.folder), self._ready.token)
            self._told = now.folder
        return None if now == there else now

    @property
    def busy(self) -> bool:
        """Whether workers write, and have no folder for more."""
        return self._make is not None and self._ready is None and not self._refused

    def written(self, folder: str) -> Parts | None:
        """What workers write into a folder."""
        with self._changed:
            return self._used.pop(folder, None)

    def put(self, snapshot: Snapshot, parts: Parts | None = None) -> None:
        """Write a snapshot soon, or what workers have not written of it. Does not wait."""
        with self._changed:
            if parts is None:
                self._waiting = deque(waiting for waiting in self._waiting if waiting[1] is not None)
            self._waiting.append((snapshot, parts))
            self._start()

    def discard(self, parts: Parts) -> None:
        """Remove what workers have written of a snapshot that nobody is to go on from."""
        with self._changed:
            self._waiting.append((None, parts))
            self._start()

    def flush(self) -> None:
        """Wait until the last snapshot is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)  # no deadline: a disk takes as long as it takes

    def close(self) -> None:
        """`flush`, and remove the folders that are not used."""
        self.flush()
        self._make = None
        for parts in (*self._used.values(), *([self._ready] if self._ready else [])):
            parts.remove()
        self._used, self._ready = {}, None
        checkpoints.remove_withdrawn(self._checkpoint.directory)

    def take_wrong(self) -> list[str]:
        """Why snapshots could not be written, in words, once."""
        if not self._wrong:
            return []
        with self._changed:
            wrong, self._wrong = self._wrong, []
        return wrong

    def _start(self) -> None:
        """Have the thread look for work. The caller holds the lock."""
        if not self._busy:
            self._busy = True
            service.start("checkpoint", self._run, self._failed)

    def _run(self) -> None:
        while True:
            self._prepare()
            with self._changed:
                if not self._waiting:
                    self._busy = False
                    self._changed.notify_all()
                    return
                snapshot, parts = self._waiting.popleft()
            self._write(snapshot, parts)
            if parts is not None:
                with self._changed:
                    self._folders -= 1
            del snapshot, parts

    def _prepare(self) -> None:
        """Make the next folder."""
        make = self._make
        if make is None or self._ready is not None or self._folders >= MOST_FOLDERS + self.more or self._refused:
            return
        try:
            ready = make()
        except OSError:  # the next snapshot comes here, and the same disk says what is wrong
            self._refused = True
            return
        with self._changed:
            self._ready, self._folders = ready, self._folders + 1

    def _write(self, snapshot: Snapshot | None, parts: Parts | None) -> None:
        directory, keep = self._checkpoint.directory, self._checkpoint.keep
        try:
            if snapshot is not None and parts is not None:
                parts.complete(snapshot.content.steps, *snapshot.encoded(), keep)
                self._tell_of(parts)
            elif snapshot is not None:
                snapshot.write(directory, keep)
                self._refused = False
        except (OSError, FlowmlError) as error:
            assert snapshot is not None
            self._tell(
                f"the checkpoint after step {snapshot.content.steps} could not be written to {directory}: {error}; the "
                f"fit goes on, and older checkpoints are as they were{checkpoints.advice(error)}"
            )
        if parts is not None:
            parts.remove()

    def _tell_of(self, parts: Parts) -> None:
        """Say once of each worker that it sees another disk."""
        new = [worker for worker in parts.elsewhere if worker not in self._elsewhere]
        if new:
            self._elsewhere.update(new)
            see, they = ("does", "it keeps") if len(new) == 1 else ("do", "they keep")
            self._tell(
                f"{listed(tuple(new))} {see} not see {self._checkpoint.directory}, so what {they} comes to the driver, "
                "which writes it; give fm.Checkpoint a directory that all machines share"
            )

    def _failed(self, reason: str) -> None:
        self._tell(f"a checkpoint could not be written: {reason}; the fit goes on without it")
        with self._changed:
            self._busy = False
            self._waiting.clear()
            self._changed.notify_all()

    def _tell(self, wrong: str) -> None:
        with self._changed:
            self._wrong.append(wrong)

"""The driver's side of checkpoints that workers write: it offers folders, hears what is in them, and has them complete.

    a folder with a token -> Export tells workers -> each writes its file, and tells what is in it (`Wrote`)
                          -> all have told -> the driver writes the rest, and the manifest last

A folder counts when the manifest is there and the folder has its name, after all files are on the disk. So if the
driver, a worker or the disk fails at any moment before, the checkpoint that was there stays, and nothing is a mixture
of both. The last message of a worker may be lost: the driver asks for it again. The token is known to the workers of
the fit only. A worker that does not read it at that path sees another disk; then its arrays come here, and the driver
writes them. The driver in turn looks at each file for the bytes that its worker claims to have written there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flowml.errors import CheckpointError, FlowmlError
from flowml_runtime import wire
from flowml_runtime.driver.training.training_session import TrainingSession
from flowml_runtime.environment import checkpoints
from flowml_runtime.environment.checkpoints import Entry

CHECK_S = 1.0
"""How often to see whether the cluster was closed."""
ASK_S = 5.0
"""After how long without word of a folder to ask those that have not told all whether they have."""


class Parts:
    """A folder for one snapshot, and what workers have written into it."""

    def __init__(self, session: TrainingSession, directory: Path, workers: Collection[str]) -> None:
        """Raises OSError if the disk refuses."""
        self.folder, self.token = checkpoints.offered(directory.resolve()), ""
        self._session = session
        self._changed = threading.Condition()
        self._missing = set(workers)
        """The workers that have not told all."""
        self._entries: dict[str, Entry] = {}
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._wrong = ""
        self.elsewhere: tuple[str, ...] = ()
        """The workers that do not see the folder."""
        try:
            self.token = checkpoints.invite(self.folder)
        except OSError:
            self.remove()
            raise
        session.register(self.token, self)

    # The endpoint's threads.

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        if not isinstance(message, wire.Wrote):
            return
        copies = [np.array(array) for array in arrays]  # what arrived may lie in memory that its sender needs again
        with self._changed:
            if peer not in self._missing:
                return
            if copies:
                self._arrays.update(zip(message.names, copies, strict=True))
                self.elsewhere = tuple(dict.fromkeys((*self.elsewhere, peer)))
            file = checkpoints.part_of(peer)
            for name, part in zip(message.names, message.parts, strict=False):
                self._entries[name] = Entry(name, part.spec, part.offset, part.checksum, file)
            if message.error:
                self._wrong = self._wrong or f"{peer} could not write its part: {message.error}"
            if message.last:
                self._missing.discard(peer)
                self._changed.notify_all()

    def on_lost(self, peer: str, reason: str) -> None:
        with self._changed:
            if peer in self._missing:
                self._wrong = self._wrong or f"{peer} was lost before it had written its part ({reason})"
                self._changed.notify_all()

    # The thread that writes.

    def complete(self, step: int, content: bytes, names: Collection[str], rest: Mapping[str, Any], keep: int) -> None:
        """Wait until the workers have written, then write the `rest`, and complete the snapshot. `names` are those of
        all arrays of the workers.

        Raises CheckpointError if one of them is not there, OSError if the disk refuses.
        """
        self._wait()
        there = self._entries.keys() | self._arrays.keys()
        lacking = sorted(set(names) - there - rest.keys())
        if lacking:
            raise CheckpointError(f"workers have written nothing of {lacking[0]!r}, which they keep")
        for file, size in self._sizes().items():
            path = self.folder / file
            if not path.exists() or path.stat().st_size < size:
                raise CheckpointError(f"{path} has not the {size} bytes here that a worker has written there")
        mine, here = list[Entry](), {**rest, **self._arrays}
        if here:
            mine = checkpoints.write_arrays(self.folder / checkpoints.DATA, here)
        checkpoints.complete(self.folder, content, [*mine, *self._entries.values()], keep, step)
        self._session.unregister(self.token)

    def remove(self) -> None:
        """The snapshot is not completed."""
        self._session.unregister(self.token)
        checkpoints.withdraw(self.folder)

    def _wait(self) -> None:
        """Wait for the workers. A disk may take any time, and the loss of a worker ends the wait."""
        asked = time.monotonic()
        while not self._told_within(min(CHECK_S, ASK_S)):
            self._session.check_workers("no checkpoint can be written")
            if time.monotonic() >= asked + ASK_S:
                asked = time.monotonic()
                self._ask()
        if self._wrong:
            raise CheckpointError(self._wrong)

    def _told_within(self, timeout_s: float) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._wrong or not self._missing, timeout_s))

    def _ask(self) -> None:
        """Ask those again that have not told all."""
        with self._changed:
            missing = sorted(self._missing)
        for worker in missing:
            with suppress(FlowmlError):  # its loss ends the wait
                self._session.endpoint.send(worker, wire.AskWrote(plan_id=self.token))

    def _sizes(self) -> dict[str, int]:
        """The bytes that each file has at least."""
        found: dict[str, int] = {}
        for entry in self._entries.values():
            found[entry.file] = max(found.get(entry.file, 0), entry.offset + entry.spec.nbytes)
        return found

"""Writes what this worker keeps of a snapshot into the folder of its driver, while the run goes on.

    Export with a folder -> what lives between steps -> the run goes on -> one file on the disk -> Wrote to the driver

Buffers that steps may overwrite are copied first. Others are replaced by steps, and stay until they are written. The
driver bounds how many wait: it offers no more folders than it waits for. A worker that does not see the folder, which
is on another machine, sends them to the driver. A driver that misses the last message about a folder asks for it again.
The driver makes the snapshot complete when it has all (`driver.training.parts`), so that a worker that is lost in
between leaves the checkpoint that was there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from flowml.errors import CheckpointError, FlowmlError
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.environment import checkpoints
from flowml_runtime.execution.faults import one_line, refusal
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array
from flowml_runtime.transport.endpoint import Sender

MAX_REASON = 10_000
"""The most characters of the reason why a file could not be written."""

MOST_KNOWN = 8
"""Of so many folders a worker can say again what it said. A driver waits for two."""

Buffers = Mapping[str, Array]


class CheckpointParts:
    """What one worker writes of checkpoints. It outlives the runs that are saved."""

    def __init__(self, name: str, endpoint: Sender) -> None:
        self._name = name
        self._endpoint = endpoint
        self._lane = Lane(f"{name} checkpoints")
        self._lock = threading.Lock()
        self._writing = 0
        self._said: dict[str, wire.Wrote | None] = {}
        """Token of a folder -> the last message about it; None while there is none."""

    @property
    def writes(self) -> bool:
        """Whether something is being written."""
        return self._writing > 0

    def begin(self, driver: str, folder: str, token: str, owners: int) -> Part:
        """The part of a snapshot that so many owners have here."""
        with self._lock:
            self._said[token] = None
            while len(self._said) > MOST_KNOWN:
                del self._said[next(iter(self._said))]
        part = Part(owners, partial(self._put, driver, folder, token))
        part.check()
        return part

    def say_again(self, driver: str, token: str) -> None:
        """The driver lacks the last message about a folder. One that is written to says it later."""
        with self._lock:
            known, said = token in self._said, self._said.get(token)
        if not known:
            said = wire.Wrote(plan_id=token, error="this worker knows nothing of it")
        if said is not None:
            with suppress(FlowmlError):  # the driver is lost
                self._endpoint.send(driver, said)

    def close(self) -> None:
        self._lane.close()

    def join(self, timeout_s: float) -> None:
        self._lane.join(timeout_s)

    def _put(self, driver: str, folder: str, token: str, found: Mapping[str, Buffers]) -> None:
        with self._lock:
            self._writing += 1
        failed = partial(self._failed, driver, token)
        if not self._lane.put(partial(self._write, driver, folder, token, found), failed):
            self._done()

    def _write(self, driver: str, folder: str, token: str, found: Mapping[str, Buffers]) -> None:
        arrays = {f"{owner}/{name}": array for owner, named in found.items() for name, array in named.items()}
        file, tell = checkpoints.part_of(self._name), partial(self._tell, driver, token)
        entries: list[checkpoints.Entry] | None = []
        try:
            if arrays:
                entries = checkpoints.write_invited(Path(folder), file, token, arrays)
        except (OSError, CheckpointError) as error:
            tell(error=refusal(error)[:MAX_REASON])
        else:
            if entries is None:
                for owner, named in found.items():
                    self._tell(driver, token, {f"{owner}/{name}": array for name, array in named.items()})
            parts = tuple(wire.Part(e.spec, e.offset, e.checksum) for e in entries or ())
            tell(names=tuple(e.name for e in entries or ()), parts=parts)
        self._done()

    def _failed(self, driver: str, token: str, error: BaseException) -> None:
        self._tell(driver, token, error=one_line(error)[:MAX_REASON])
        self._done()

    def _done(self) -> None:
        with self._lock:
            self._writing -= 1

    def _tell(self, driver: str, token: str, arrays: Mapping[str, Array] | None = None, **about: Any) -> None:
        if arrays is not None:
            specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays.values())
            about = {"names": tuple(arrays), "specs": specs, "last": False}
        message = wire.Wrote(plan_id=token, **about)
        if message.last:
            with self._lock:
                if token in self._said:
                    self._said[token] = message
        with suppress(FlowmlError):  # the driver is lost
            self._endpoint.send(driver, message, list((arrays or {}).values()))


class Part:
    """The part of one snapshot that a worker has. Lanes call it."""

    def __init__(self, owners: int, complete: Any) -> None:
        """`complete` is called with the buffers of so many owners."""
        self._owners, self._complete = owners, complete
        self._lock = threading.Lock()
        self._told = 0
        self._found: dict[str, Buffers] = {}

    def add(self, owner: str, buffers: Buffers) -> None:
        """The buffers of an owner, which nobody overwrites. There are none if they are told to the driver."""
        with self._lock:
            self._told += 1
            if buffers:
                self._found[owner] = buffers
        self.check()

    def check(self) -> None:
        """Write the part if all is there."""
        with self._lock:
            if self._told != self._owners:
                return
            self._told, found = -1, self._found
        self._complete(found)

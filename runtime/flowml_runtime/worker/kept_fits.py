"""Keeps a worker's parts of the newest snapshots of fits, for another driver if theirs dies.

`protocol.training.kept_fits` decides what is kept and for whom. The buffers are copies on the host, made when a
snapshot is taken, because steps overwrite those of the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from flowml.plan import ArraySpec
from flowml_runtime import service, wire
from flowml_runtime.environment.last_checkpoints import Known
from flowml_runtime.environment.processes import SAVING, call_process
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array
from flowml_runtime.protocol.training import kept_fits as protocol
from flowml_runtime.transport.endpoint import Sender
from flowml_runtime.worker.last_checkpoint import Found, write_last

_Buffers = dict[str, Any]


@dataclass(frozen=True)
class _Whole:
    """What is known of a complete snapshot: the steps before it, its content, and the arrays that nobody keeps."""

    steps: int
    content: np.ndarray
    rest: _Buffers
    fixed: _Buffers
    """Those that are the same in all snapshots."""


DRIVER_LOST_S = 0.1
"""How long a worker that ends waits for the loss of a driver whose fit it keeps. If that lives, it goes on without."""


class KeptFits:
    """What one worker keeps. Safe to use from any thread."""

    def __init__(self, name: str, endpoint: Sender, orphan_s: float, hosts: Callable[[str], bool]) -> None:
        """Without a driver a fit is kept for `orphan_s` seconds. `hosts` says whether a plan is loaded here."""
        self._name = name
        self._endpoint = endpoint
        self._hosts = hosts
        self._machine = protocol.KeptFits(orphan_s)
        self._changed = threading.Condition()
        self._parts: dict[tuple[str, str], dict[str, _Buffers]] = {}
        """(fit, key) -> the buffers of each owner here."""
        self._wholes: dict[tuple[str, str], _Whole] = {}
        """(fit, key) -> what is known of a complete snapshot."""
        self._answers = Lane(f"{name} kept fits")
        self._writes = Lane(f"{name} last checkpoints")
        self._wake_at: float | None = None
        self._ticks = False
        """Whether a thread waits for that time."""
        self._closed = False
        self._cut_off = False

    def on_message(
        self,
        driver: str,
        message: wire.Claim | wire.Completed | wire.Recover | wire.Released,
        arrays: Sequence[Array],
    ) -> None:
        fit = message.plan_id
        with self._changed:
            match message:
                case wire.Claim():
                    asked = (message.number, message.lasts, message.directory, message.keep)
                    self._step(protocol.Claim(driver, fit, *asked))
                case wire.Completed(key=key):
                    self._wholes[fit, key] = self._whole(message, arrays)
                    self._step(protocol.Completed(driver, fit, key))
                case wire.Recover():
                    self._recover(driver, message)
                case wire.Released(over=over):
                    self._step(protocol.Released(driver, fit, over))

    def export(
        self,
        driver: str,
        fit: str,
        of: tuple[str, int, int],
        owner: str,
        arrays: Mapping[str, Array],
        *,
        complete: str = "",
        lent: bool = True,
    ) -> bool:
        """Keep the buffers of an owner, or copies of them if they are `lent`. `of` is the plan, the run and the number
        of the snapshot, and `complete` is as in `protocol.Exported`. False if the fit is not that driver's."""
        kept = _copies(tuple(arrays), tuple(arrays.values())) if lent else dict(arrays)
        with self._changed:
            return self._take(driver, fit, of, owner, kept, complete)

    def repeat(self, driver: str, fit: str, of: tuple[str, int, int], owner: str, complete: str) -> bool:
        """Keep the buffers of an owner that are here as part of the `complete` snapshot. False if they are not."""
        with self._changed:
            kept = self._parts.get((fit, complete), {}).get(owner)
            return kept is not None and self._take(driver, fit, of, owner, kept, complete)

    def _take(self, driver: str, fit: str, of: tuple[str, int, int], owner: str, kept: _Buffers, complete: str) -> bool:
        if not self._hosts(of[0]):  # its driver was lost, which may be known here already
            return False
        key = protocol.key_of(*of)
        self._parts.setdefault((fit, key), {})[owner] = kept
        self._step(protocol.Exported(driver, fit, key, complete))
        return (fit, key) in self._parts

    def on_lost(self, driver: str) -> None:
        with self._changed:
            self._step(protocol.DriverLost(driver))
            self._changed.notify_all()

    @property
    def writes(self) -> bool:
        """Whether the last checkpoint of a fit is being written."""
        return self._machine.writes

    def leave(self) -> None:
        """This worker is about to end: write the last checkpoints of fits without a driver."""
        with self._changed:
            self._step(protocol.Leave())

    def finish(self, timeout_s: float, *, cut_off: bool = False) -> None:
        """`leave`, and wait until they are written. Those who would kill this process see that it writes. What has
        ended this worker may have ended a driver too, of whose loss it hears a moment later.

        One that is `cut_off` from the coordinator cannot know that a driver is lost, and takes no directory from it.
        """
        with self._changed:
            self._cut_off = cut_off
            self._step(protocol.Leave())
            self._changed.wait_for(lambda: not self._machine.is_driven, min(timeout_s, DRIVER_LOST_S))
            if self._machine.writes:
                call_process(SAVING)
            self._changed.wait_for(lambda: not self._machine.writes, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._answers.close()
        self._writes.close()

    def join(self, timeout_s: float) -> None:
        self._answers.join(timeout_s)
        self._writes.join(timeout_s)

    def _step(self, event: protocol.Event) -> None:
        """Give the machine an event. The caller holds the lock."""
        for action in self._machine.step(event, time.monotonic()):
            match action:
                case protocol.Answer():
                    self._send(action.driver, self._claimed(action))
                case protocol.Drop(fit, key):
                    self._parts.pop((fit, key), None)
                    self._wholes.pop((fit, key), None)
                case protocol.Write():
                    self._writes.put(partial(self._write, action), lambda _: None)
                case protocol.Wake(at):
                    self._wake(at)

    def _claimed(self, answer: protocol.Answer) -> wire.Claimed:
        fit, versions = answer.fit, list[wire.Version]()
        if not answer.owner:
            complete, keys = self._machine.keys(fit)
            for key in keys:
                steps = self._wholes[fit, key].steps if (fit, key) in self._wholes else 0
                owners = tuple(self._parts.get((fit, key), ()))
                versions.append(wire.Version(key, owners, key == complete, steps))
        about: dict[str, Any] = {"owner": answer.owner, "orphan_s": self._machine.orphan_s, "lost": answer.lost}
        return wire.Claimed(plan_id=fit, number=answer.number, **about, versions=tuple(versions))

    def _recover(self, driver: str, message: wire.Recover) -> None:
        at = message.plan_id, message.key
        whole = self._wholes.get(at)
        rest = None if whole is None else {"": whole.content, **whole.rest}
        found = self._parts.get(at, {}).get(message.owner) if message.owner else rest
        ids: dict[str, Any] = {"plan_id": message.plan_id, "number": message.number}
        if found is None:
            self._send(driver, wire.Recovered(**ids, found=False))
            return
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in found.values())
        self._send(driver, wire.Recovered(**ids, names=tuple(found), specs=specs), list(found.values()))

    def _whole(self, message: wire.Completed, arrays: Sequence[Array]) -> _Whole:
        """What a message tells. What is the same in all snapshots comes with the first one."""
        (content, *_), rest = arrays, arrays[1 : len(message.names) + 1]
        fixed: _Buffers = _copies(message.fixed, arrays[len(message.names) + 1 :])
        before = self._wholes.get((message.plan_id, self._machine.keys(message.plan_id)[0]))
        if not fixed and before is not None:
            fixed = before.fixed
        return _Whole(message.steps, np.array(content), _copies(message.names, rest), fixed)

    def _write(self, asked: protocol.Write) -> None:
        found: dict[str, Found] = {}
        with self._changed:
            asked = replace(asked, lost=()) if self._cut_off else asked
            for key in asked.keys:
                parts, whole = self._parts.get((asked.fit, key), {}), self._wholes.get((asked.fit, key))
                arrays = {f"{owner}/{name}": a for owner, named in parts.items() for name, a in named.items()}
                known = None if whole is None else Known(whole.steps, whole.content.tobytes())
                found[key] = Found({**arrays, **(whole.rest | whole.fixed if whole else {})}, known)
        whole = False
        with service.going_on("the last checkpoint of a fit could not be written"):
            whole = write_last(asked, self._name, found)
        with self._changed:
            self._step(protocol.Written(asked.fit, whole))
            self._changed.notify_all()

    def _send(self, driver: str, message: wire.Claimed | wire.Recovered, arrays: Sequence[Array] = ()) -> None:
        """Send on another thread, because receiving threads must not wait. If the driver is lost, nobody asks."""
        self._answers.put(partial(self._endpoint.send, driver, message, arrays), lambda _: None)

    def _wake(self, at: float) -> None:
        """Have a Tick at this time, the next that is needed."""
        self._wake_at = at
        self._changed.notify_all()
        if not self._ticks:
            self._ticks = True
            service.start(f"{self._name} orphans", self._tick, lambda _: None)

    def _tick(self) -> None:
        with self._changed:
            while self._wake_at is not None and not self._closed:
                left = self._wake_at - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                else:
                    self._wake_at = None
                    self._step(protocol.Tick())
            self._ticks = False


def _copies(names: Sequence[str], arrays: Sequence[Array]) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in zip(names, arrays, strict=True)}

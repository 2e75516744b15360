"""Keeps a worker's parts of the newest snapshots of fits, for another driver if theirs dies.

`protocol.training.kept_fits` decides what is kept and for whom. The buffers are copies on the host, made when a
snapshot is taken, because steps overwrite those of the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from flowml.plan import ArraySpec
from flowml_runtime import service, wire
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array
from flowml_runtime.protocol.training import kept_fits as protocol
from flowml_runtime.transport.endpoint import Sender

_Buffers = Mapping[str, np.ndarray]


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
        self._contents: dict[tuple[str, str], tuple[int, _Buffers]] = {}
        """(fit, key) -> the steps of a complete snapshot, and its content with the arrays that nobody keeps."""
        self._answers = Lane(f"{name} kept fits")
        self._wake_at: float | None = None
        self._ticks = False
        """Whether a thread waits for that time."""
        self._closed = False

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
                    self._step(protocol.Claim(driver, fit, message.number))
                case wire.Completed(key=key, steps=steps, names=names):
                    self._contents[fit, key] = steps, _copies(("", *names), arrays)
                    self._step(protocol.Completed(driver, fit, key))
                case wire.Recover():
                    self._recover(driver, message)
                case wire.Released(over=over):
                    self._step(protocol.Released(driver, fit, over))

    def export(self, driver: str, fit: str, of: tuple[str, int, int], owner: str, arrays: Mapping[str, Array]) -> None:
        """Keep the buffers of an owner. `of` is the plan, the run and the number of the snapshot."""
        copies, key = _copies(tuple(arrays), tuple(arrays.values())), protocol.key_of(*of)
        with self._changed:
            if not self._hosts(of[0]):  # its driver was lost, which may be known here already
                return
            self._parts.setdefault((fit, key), {})[owner] = copies
            self._step(protocol.Exported(driver, fit, key))

    def on_lost(self, driver: str) -> None:
        with self._changed:
            self._step(protocol.DriverLost(driver))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._answers.close()

    def join(self, timeout_s: float) -> None:
        self._answers.join(timeout_s)

    def _step(self, event: protocol.Event) -> None:
        """Give the machine an event. The caller holds the lock."""
        for action in self._machine.step(event, time.monotonic()):
            match action:
                case protocol.Answer():
                    self._send(action.driver, self._claimed(action))
                case protocol.Drop(fit, key):
                    self._parts.pop((fit, key), None)
                    self._contents.pop((fit, key), None)
                case protocol.Wake(at):
                    self._wake(at)

    def _claimed(self, answer: protocol.Answer) -> wire.Claimed:
        fit, versions = answer.fit, list[wire.Version]()
        if not answer.owner:
            complete, keys = self._machine.keys(fit)
            for key in keys:
                steps = self._contents[fit, key][0] if key == complete else 0
                owners = tuple(self._parts.get((fit, key), ()))
                versions.append(wire.Version(key, owners, key == complete, steps))
        about: dict[str, Any] = {"owner": answer.owner, "orphan_s": self._machine.orphan_s, "lost": answer.lost}
        return wire.Claimed(plan_id=fit, number=answer.number, **about, versions=tuple(versions))

    def _recover(self, driver: str, message: wire.Recover) -> None:
        at = message.plan_id, message.key
        found = self._parts.get(at, {}).get(message.owner) if message.owner else self._contents.get(at, (0, None))[1]
        ids: dict[str, Any] = {"plan_id": message.plan_id, "number": message.number}
        if found is None:
            self._send(driver, wire.Recovered(**ids, found=False))
            return
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in found.values())
        self._send(driver, wire.Recovered(**ids, names=tuple(found), specs=specs), list(found.values()))

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

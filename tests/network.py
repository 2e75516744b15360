"""A cluster inside the test's own process: real workers and a real session, joined by direct calls.

It has no queues and no threads of its own, so that a test of the executor or session sees only theirs, and
`lose` makes a worker vanish at an exact moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import msgspec

from flowml.devices import Device, as_devices
from flowml.errors import WorkerLostError
from flowml.placement.links import SAME_PROCESS
from flowml.plan import ArraySpec, Plan
from flowml_runtime import wire
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.session import Session
from flowml_runtime.worker.worker import Worker

Receive = Callable[[str, wire.Wire, Sequence[Any]], None]


class DirectEndpoint:
    """Delivers on the sender's thread."""

    def __init__(self, name: str, receivers: dict[str, Receive]) -> None:
        self.name = name
        self.receivers = receivers
        self.sent: list[tuple[str, wire.Wire]] = []

    def send(self, peer: str, message: wire.Wire, arrays: Sequence[Any] = (), timeout_s: float | None = None) -> None:
        self.sent.append((peer, message))
        receive = self.receivers.get(peer)
        if receive is None:
            raise WorkerLostError(f"{peer} is gone", worker=peer)
        receive(self.name, message, list(arrays))

    def way(self, peer: str) -> str:
        return SAME_PROCESS if peer in self.receivers else ""

    def expect(self, peer: str) -> None:
        """Nothing is ever awaited: the sender's thread delivers."""

    def reserve(self, peer: str, specs: Sequence[ArraySpec], messages: int) -> None:
        """Nothing is copied."""

    def waiting(self, peer: str) -> int:
        return 0

    def settle(self, peer: str) -> None:
        """Nothing is ever on its way."""


class Network:
    """`workers` workers of one device each, and the driver's session. Use as a context manager."""

    def __init__(
        self,
        workers: int = 2,
        *,
        python: bool = True,
        deadline_s: float = 60.0,
        in_flight: int = 16,
        local: bool = False,
        devices: Sequence[Any] = (),
    ) -> None:
        self.receivers: dict[str, Receive] = {}
        self.devices: tuple[Device, ...] = as_devices([f"worker:{n}" for n in range(workers)])
        self.driver = DirectEndpoint("driver", self.receivers)
        self.session = Session(self.driver, self.devices, in_flight=in_flight, deadline_s=deadline_s)
        self.receivers["driver"] = self.session.on_message
        self.workers: list[Worker] = []
        self._options: dict[str, Any] = {"python": python}
        for n in range(workers):
            worker = self.start(n, devices[n] if devices else jax.local_devices()[0])
            if local:
                self.session.attach(worker)

    def load(self, plan: Plan, deadline_s: float) -> LoadedPlan:
        """Load a plan whose steps wait so long on the workers, whatever the deadlines of the driver and other plans."""
        driver: Any = self.driver
        send = driver.send

        def send_with_deadline(peer: str, message: wire.Wire, arrays: Sequence[Any] = (), *limit: float | None) -> None:
            if isinstance(message, wire.LoadPlan):
                message = msgspec.structs.replace(message, deadline_s=deadline_s)
            send(peer, message, arrays, *limit)

        driver.send = send_with_deadline
        try:
            return self.session.load(plan)
        finally:
            driver.send = send

    def start(self, number: int, device: Any = None) -> Worker:
        """A worker under this number, be it the first or one that takes the place of one that was lost."""
        name = self.devices[number].worker
        places = {self.devices[number].name: device or jax.local_devices()[0]}
        worker = Worker(name, places, DirectEndpoint(name, self.receivers), **self._options)
        self.receivers[name] = worker.on_message
        self.workers.append(worker)
        return worker

    def lose(self, name: str) -> None:
        """The worker is gone: nothing reaches it or comes from it, and all peers are told."""
        del self.receivers[name]
        self.session.on_lost(name, "connection closed")
        for worker in self.workers:
            worker.on_lost(name, "connection closed")

    def held_values(self) -> int:
        """Values that wait in the workers' mailboxes."""
        return sum(len(w.mailbox) for w in self.workers)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        for worker in self.workers:
            worker.close()

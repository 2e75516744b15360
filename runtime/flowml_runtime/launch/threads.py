"""Starts workers inside this process, which pass arrays by reference: for notebooks, debugging and tests."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import jax

from flowml.devices import Device
from flowml_runtime.execution.programs import ExecutableCache, JaxDevice
from flowml_runtime.transport.endpoint import Endpoint, ThreadHub
from flowml_runtime.worker.leaving import Departure
from flowml_runtime.worker.worker import Worker


class ThreadWorkers:
    """The workers of one process, by name. Their devices are mapped to this process's JAX devices in turn."""

    def __init__(self, hub: ThreadHub, devices: Mapping[str, Sequence[Device]]) -> None:
        """Starts nothing yet."""
        real = jax.local_devices(backend="cpu")
        names = [(worker, device.name) for worker, own in devices.items() for device in own]
        self._hub = hub
        self._devices: dict[str, dict[str, JaxDevice]] = {worker: {} for worker in devices}
        for i, (worker, name) in enumerate(names):
            self._devices[worker][name] = real[i % len(real)]
        self._cache = ExecutableCache()
        self._running: dict[str, tuple[Worker, Endpoint]] = {}
        self._departures: list[Departure] = []
        self._lock = threading.Lock()
        """Held while a worker is started: two threads may ask for one."""

    def start(self, name: str) -> Worker:
        """Start a worker, unless one that has this name is there."""
        with self._lock:
            if name in self._running:
                return self._running[name][0]
            endpoint = self._hub.endpoint(name)
            worker = Worker(name, self._devices[name], endpoint, python=True, cache=self._cache)
            endpoint.start(worker.on_message, worker.on_lost)
            self._running[name] = worker, endpoint
            return worker

    def end(self, name: str) -> bool:
        """Close a worker, which the others lose. Returns whether there was one."""
        worker, endpoint = self._running.pop(name, (None, None))
        if worker is not None and endpoint is not None:
            endpoint.close()
            worker.close()
        return worker is not None

    def leave(self, name: str) -> None:
        """Have a worker hand over what it does, and then end. Does not wait."""
        worker, _ = self._running[name]
        departure = Departure(lambda: worker.idle, lambda _: self._end(name, worker))
        self._departures.append(departure)
        departure.begin()

    def _end(self, name: str, worker: Worker) -> None:
        """End a worker, unless another has its name by now."""
        running = self._running.get(name)
        if running is not None and running[0] is worker:
            self.end(name)

    def close(self) -> None:
        """Close all workers."""
        for departure in self._departures:
            departure.cancel()
        for name in reversed(list(self._running)):
            self.end(name)

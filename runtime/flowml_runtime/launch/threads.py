"""Starts workers inside this process, which pass arrays by reference: for notebooks, debugging and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from flowml.devices import Device
from flowml_runtime.execution.programs import ExecutableCache
from flowml_runtime.transport.endpoint import Endpoint, ThreadHub
from flowml_runtime.worker.worker import Worker


def start_workers(hub: ThreadHub, devices: Mapping[str, Sequence[Device]]) -> list[tuple[Worker, Endpoint]]:
    """Start a worker for each name. Its devices are mapped to this process's JAX devices in turn."""
    real = jax.local_devices(backend="cpu")
    started: list[tuple[Worker, Endpoint]] = []
    cache = ExecutableCache()
    taken = 0
    for name, own in devices.items():
        endpoint = hub.endpoint(name)
        named = {d.name: real[(taken + i) % len(real)] for i, d in enumerate(own)}
        taken += len(own)
        worker = Worker(name, named, endpoint, python=True, cache=cache)
        endpoint.start(worker.on_message, worker.on_lost)
        started.append((worker, endpoint))
    return started

"""Applies the faults of a simulated cluster to its messages.

A connection delivers each message once and in order, whatever the network does. So a lost message is a delay, which all
messages after it on its connection share, and only contributions may be repeated: a replica sends one again if it
cannot know that it has arrived.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from flowml.sim import Disorder, Partition
from flowml_runtime import wire
from flowml_runtime.sim.heap import Clock
from flowml_runtime.sim.network import DRIVER


class NetworkFaults:
    """Implements `network.Tamper`."""

    def __init__(self, clock: Clock, faults: Sequence[Partition | Disorder], seed: int) -> None:
        self._clock = clock
        self._rng = random.Random(seed)
        self._disorders = [f for f in faults if isinstance(f, Disorder)]
        self._partitions = [
            (f, frozenset(f"worker:{w}" for w in f.workers)) for f in faults if isinstance(f, Partition)
        ]

    def delays(self, source: str, to: str, message: object) -> tuple[float, ...]:
        now, rng = self._clock.now, self._rng
        held, copies = 0.0, 1
        for partition, inside in self._partitions:
            if partition.start_s <= now < partition.end_s and (source in inside) != (to in inside):
                held = max(held, partition.end_s - now)
        if DRIVER in (source, to):
            return (held,)
        for disorder in self._disorders:
            if not disorder.start_s <= now < disorder.end_s:
                continue
            while rng.random() < disorder.lost:
                held += disorder.resend_s
            copies += isinstance(message, wire.Contribution) and rng.random() < disorder.repeated
        active = [d for d in self._disorders if d.delay_s and d.start_s <= now < d.end_s]
        return tuple(held + sum(rng.expovariate(1 / d.delay_s) for d in active) for _ in range(copies))

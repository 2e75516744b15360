"""Carries out one rank's part of a sum over replicas in virtual time, with values, as real groups do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowml_runtime.execution.future import Future
from flowml_runtime.execution.programs import Array
from flowml_runtime.protocol import collective, schedules
from flowml_runtime.sim.values import Chunk
from flowml_runtime.transport.buffers import BufferPool
from flowml_runtime.worker.training.exchange.collectives import Flight, flat, parts_of


class Flying:
    """One rank's part of a sum, with values."""

    def __init__(self, schedule: schedules.Schedule, rank: int, arrays: Sequence[Array], pool: BufferPool) -> None:
        self._shapes = [np.shape(a) for a in arrays]
        self._pool = pool
        future: Future[Any] = Future("a sum", list)
        self._flight = Flight("a sum", (0, 0), flat(arrays), schedule, rank, future, math.inf)

    @property
    def done(self) -> bool:
        return self._flight.machine.done

    def started(self) -> list[Chunk]:
        return self._carry_out(collective.Started())

    def received(self, peer: int, chunk: Chunk) -> list[Chunk]:
        return self._carry_out(collective.Received(peer, chunk.action.piece, chunk.action.take, chunk.value))

    def _carry_out(self, event: collective.Event) -> list[Chunk]:
        chunks, _ = self._flight.carry_out(self._flight.machine.step(event), self._pool)
        return [Chunk(action.peer, action, values, values.nbytes) for action, values in chunks]

    def total(self) -> Sequence[Array]:
        return parts_of(self._flight.result(self._pool), self._shapes)

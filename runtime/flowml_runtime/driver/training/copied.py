"""The driver's side of `replicate=`: which snapshot the workers have copies of, and how it comes back after a loss.

    all replicas stop -> each worker copies what it keeps to others (`worker.training.copying`) -> all go on

The driver has no arrays of such a snapshot, only where the machines stood and what the ledger said. A step is
*acknowledged* when a snapshot with it is complete: callbacks and the history get its record then, and not before. So
what was told is never done again. After a loss the driver asks the workers that are left for the buffers. Of a snapshot
without silent replicas the driver has the arrays, and there are no copies.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flowml.devices import Device
from flowml.plan import Training
from flowml_runtime import wire
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.kept import KeptFit
from flowml_runtime.protocol.training.ledger import LedgerState


@dataclass(frozen=True)
class Copied:
    """A snapshot of which the workers have all copies, without its arrays. `key` is what they know it by, `owners` are
    the names of the buffers of each owner, and `step` is the number of steps before it."""

    key: str
    training: Training
    step: int
    stopped: wire.Stopped
    ledger: LedgerState
    owners: Mapping[str, tuple[str, ...]]


class Keeper(Protocol):
    """Where the copies of a fit are: on real workers (`kept.KeptFit`), or on simulated ones."""

    fit: str

    def begin(self, workers: Collection[str], /) -> None:
        """A run begins on these workers."""
        ...

    def buffers(self, key: str, owners: Mapping[str, Sequence[str]], /) -> dict[str, dict[str, Any]] | None:
        """The buffers of these owners, by owner and name. None if something is nowhere any more."""
        ...

    def release(self, *, over: bool) -> None:
        """The fit has ended here."""
        ...


@runtime_checkable
class HasKeeper(Protocol):
    """A session that knows what its workers keep, because they are simulated."""

    def keeper(self, fit: str, /) -> Keeper: ...


class Copies:
    """The copies that the workers of one fit keep of each other's state."""

    def __init__(self, kept: Keeper, count: int, devices: Sequence[Device]) -> None:
        """Each worker has `count` copies on others."""
        self._kept = kept
        self._count = count
        self._memory: dict[str, int] = {}
        for device in devices:
            self._memory[device.worker] = max(self._memory.get(device.worker, 0), device.memory_bytes or 1)
        self.newest: Copied | None = None
        """The newest snapshot of which there are copies."""
        self.without_copies = 0
        """The steps of a newer snapshot in the driver's memory, without silent replicas, which needs no copies."""
        self._waiting: list[Record] = []
        """Records of steps that are not acknowledged."""

    def begin(self, workers: Iterable[str]) -> wire.Copies:
        """A run begins on these workers."""
        workers = tuple(workers)
        self._kept.begin(workers)
        memory = tuple((worker, self._memory.get(worker, 1)) for worker in workers)
        return wire.Copies(self._count, self._kept.fit, memory)

    @staticmethod
    def rhythm(training: Training) -> int:
        """After how many clocks there are new copies: as often as homes get something."""
        return min(max(store.policy.every.push // store.policy.every.fragments, 1) for store in training.stores)

    def recovered(self) -> dict[str, dict[str, Any]] | None:
        """The buffers of the newest snapshot, by owner. None if one is nowhere any more."""
        if self.newest is None:
            return None
        return self._kept.buffers(self.newest.key, self.newest.owners)

    @property
    def acknowledged(self) -> int:
        return max(0 if self.newest is None else self.newest.step, self.without_copies)

    @property
    def releases(self) -> bool:
        """Whether records wait whose steps are acknowledged."""
        return bool(self._waiting) and self._waiting[0]["step"] < self.acknowledged

    def take(self, records: Iterable[Record], *, over: bool) -> list[Record]:
        """The records of acknowledged steps, among these and those that wait. At the end of a fit all are."""
        self._waiting.extend(records)
        ready = [r for r in self._waiting if over or r["step"] < self.acknowledged]
        self._waiting = self._waiting[len(ready) :]
        return ready

    def go_back(self, step: int) -> list[Record]:
        """The records before `step` that waited. Those after it are made again."""
        found, self._waiting = [r for r in self._waiting if r["step"] < step], []
        return found


@contextmanager
def copying(cluster: Any, count: int) -> Generator[Copies | None]:
    """Have workers keep `count` copies of each other's state for as long as a fit takes; 0: none."""
    if not count:
        yield None
        return
    workers = list(dict.fromkeys(device.worker for device in cluster.devices))
    if count >= len(workers):
        raise ValueError(
            f"replicate={count}: so many copies of what a worker keeps need {count + 1} workers, and the cluster has "
            f"{len(workers)}; give replicate={len(workers) - 1}, or more workers"
        )
    session, fit = cluster.session, f"copies-{uuid.uuid4().hex}"
    if isinstance(session, HasKeeper):
        kept = session.keeper(fit)
    else:
        session.check_workers("they have no copies of each other's state (replicate=)")
        kept = KeptFit(session, fit, workers, 0.0, lasts=False)
    try:
        yield Copies(kept, count, cluster.devices)
    finally:
        kept.release(over=True)

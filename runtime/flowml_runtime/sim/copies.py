"""The copies that simulated workers have of each other's state (`replicate=`), for as long as a fit takes.

Workers send copies along chains as real ones do (`worker.training.copying`), and the same machine says what each keeps
(`protocol.training.kept_fits`). After a loss the driver finds here what is on workers that have been there since. That
it would ask them takes no virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from flowml_runtime import wire
from flowml_runtime.execution.programs import Array
from flowml_runtime.protocol.training.kept_fits import Claim, Drop, Event, Exported, KeptFits, key_of
from flowml_runtime.sim.network import DRIVER
from flowml_runtime.worker.training.copying import Copying
from flowml_runtime.worker.training.resident import Arrays


class OfWorker:
    """What one worker keeps."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._machine = KeptFits(orphan_s=0.0)
        self.parts: dict[str, dict[str, tuple[float, Arrays]]] = {}
        """The key of a snapshot -> the time at which the buffers of each owner came, and these."""

    def step(self, event: Event) -> None:
        for action in self._machine.step(event, 0.0):
            if isinstance(action, Drop):
                self.parts.pop(action.key, None)

    def export(
        self,
        driver: str,
        fit: str,
        of: tuple[str, int, int],
        owner: str,
        arrays: Arrays,
        *,
        complete: str = "",
        lent: bool = True,
    ) -> bool:
        """As `worker.kept_fits.KeptFits.export`."""
        key, found = key_of(*of), {name: np.array(a) if lent else a for name, a in arrays.items()}
        self.parts.setdefault(key, {})[owner] = self._now(), found
        self.step(Exported(driver, fit, key, complete))
        return key in self.parts

    def repeat(self, driver: str, fit: str, of: tuple[str, int, int], owner: str, complete: str) -> bool:
        """As `worker.kept_fits.KeptFits.repeat`."""
        kept = self.parts.get(complete, {}).get(owner)
        return kept is not None and self.export(driver, fit, of, owner, kept[1], complete=complete, lent=False)


class SimulatedCopies:
    """The copies of one fit, on all workers. The driver uses it as `driver.training.copied` says."""

    def __init__(self, fit: str, now: Callable[[], float], was_there: Callable[[str, float], bool]) -> None:
        """`was_there` says of a worker whether it has been there since a time."""
        self.fit = fit
        self._now, self._was_there = now, was_there
        self._numbers = count(1)
        self._workers: dict[str, OfWorker] = {}

    def of(self, worker: str) -> OfWorker:
        return self._workers.setdefault(worker, OfWorker(self._now))

    def begin(self, workers: Iterable[str]) -> None:
        """A run begins on these workers."""
        for worker in workers:
            self.of(worker).step(Claim(DRIVER, self.fit, next(self._numbers), lasts=False))

    def buffers(self, key: str, owners: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]] | None:
        """The buffers of these owners, by owner and name. None if something is nowhere any more."""
        found: dict[str, dict[str, Any]] = {}
        for owner, names in owners.items():
            places = ((w, kept.parts.get(key, {}).get(owner)) for w, kept in self._workers.items())
            there = (part[1] for worker, part in places if part is not None and self._was_there(worker, part[0]))
            arrays = next(there, None)
            if arrays is None:
                return None
            found[owner] = {name: arrays[name] for name in names}
        return found

    def release(self, *, over: bool) -> None:
        """The fit has ended."""
        self._workers.clear()


class _RunOf:
    """A run on a simulated worker, as `Copying` sees it."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self.me: str = node.name
        self.driver = DRIVER
        self.plan_id: str = node.start.plan_id
        self.number: int = node.start.run

    @property
    def stopped(self) -> bool:
        """A worker that stops has stopped at once here, and nothing more comes to it."""
        return False

    def send(self, worker: str, message: wire.Wire, arrays: Sequence[Array] = ()) -> None:
        self._node.send(worker, message, tuple(arrays) or None, sum(array.nbytes for array in arrays))


def copying_of(node: Any, copies: SimulatedCopies | None) -> Copying | None:
    """The copies of the run that begins on a worker, if there are any."""
    asked: wire.Copies | None = node.start.copies
    return None if asked is None or copies is None else Copying(_RunOf(node), asked, copies.of(node.name))

"""The driver's side of fits that outlive their driver: it claims one, and goes on with the snapshot that workers keep.

A fit is known by the identity that its directory of checkpoints has. The workers decide which driver has it
(`protocol.training.kept_fits`). They are asked in the order of their names, the first one alone, so that of two drivers
that claim a fit at the same time one has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import msgspec
import numpy as np

from flowml.errors import CheckpointError, DeadlineError, WorkerLostError
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.session import Session
from flowml_runtime.driver.training.snapshots import Content, Snapshot
from flowml_runtime.environment import last_checkpoints

OWNED_S = 10.0
"""How long to wait for the loss of the driver that has the fit. One that is gone is lost within seconds."""
AGAIN_S = 0.1
"""How long to wait before asking again."""
TELL_S = 1.0

_Answer = tuple[Any, Sequence[Any]]


class KeptFit:
    """A fit that this driver has claimed, on these workers. Only the thread of the fit calls it."""

    def __init__(
        self,
        session: Session,
        fit: str,
        workers: Sequence[str],
        wait_s: float,
        *,
        lasts: bool = True,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Waits so long for the loss of another driver that has it, and raises CheckpointError if that is not lost.
        Unless it `lasts`, it does not outlive this driver. If it does and no other driver comes, workers write its
        last `checkpoint`."""
        self.fit = fit
        self._lasts = lasts
        self._directory = None if checkpoint is None else checkpoint.directory
        self._session = session
        self._workers = tuple(workers)
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._answers: dict[int, _Answer | None] = {}
        """Number of a question -> the answer. None if the worker was lost."""
        self._asked: dict[int, str] = {}
        self.begun = False
        """Whether a run of the fit has begun."""
        self._told: set[str] = set()
        """The workers that have what no step changes."""
        self._written: dict[str, Any] = {}
        """Where the last checkpoint is written."""
        if checkpoint is not None:
            self._written = {"directory": str(checkpoint.directory.absolute()), "keep": checkpoint.keep}
        session.register(fit, self)
        claimed = self._claimed(wait_s)
        self._found: Mapping[str, tuple[wire.Version, ...]] = {w: answer.versions for w, answer in claimed.items()}
        self.keeps = all(answer.orphan_s for answer in claimed.values())
        """Whether the workers keep snapshots."""
        self.lost = {driver for answer in claimed.values() for driver in answer.lost}
        """The drivers that had it and were lost."""

    # The endpoint's threads.

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        if isinstance(message, wire.Claimed | wire.Recovered):
            self._answered(message.number, (message, [np.array(a) for a in arrays]))

    def on_lost(self, peer: str, reason: str) -> None:
        with self._changed:
            numbers = [n for n, worker in self._asked.items() if worker == peer]
        for number in numbers:
            self._answered(number, None)

    # The caller's thread.

    def newest(self, after: int) -> Snapshot | None:
        """The newest snapshot that the workers keep, if it has more than `after` steps and all of it is there."""
        complete = {v.key: v.steps for kept in self._found.values() for v in kept if v.complete and v.steps > after}
        for key in sorted(complete, key=lambda key: complete[key], reverse=True):
            found = self._recovered(key)
            if found is not None:
                return found
        return None

    def incomplete(self, after: int) -> int | None:
        """The steps of the newest snapshot of more than `after` steps of which the workers keep something; 0 if none
        was complete. None if nothing is kept of one."""
        found = [v.steps if v.complete else 0 for kept in self._found.values() for v in kept]
        return max(found, default=None) if not after or max(found, default=0) > after else None

    def begin(self, workers: Collection[str], key: str = "", snapshot: Snapshot | None = None) -> None:
        """A run begins on these workers, some of which may have taken the places of lost ones. If it goes on from the
        `snapshot` of which they have been told as `key`, they get what the lost ones had kept of it, so that it stays
        complete."""
        self.begun = True
        self._workers = tuple(dict.fromkeys((*self._workers, *workers)))
        self._told.clear()
        if snapshot is None:
            for worker in workers:
                self._session.tell(worker, self._claim(next(self._numbers)))
            return
        try:
            answers = self._ask(dict.fromkeys(workers, self._claim))
        except DeadlineError:  # the next snapshot is complete again
            return
        kept = (v for answer, _ in answers.values() for v in answer.versions if v.key == key)
        there = {owner for version in kept for owner in version.owners}
        self.completed(key, snapshot, snapshot.content.owners.keys() - there)

    def completed(self, key: str, snapshot: Snapshot, new: Collection[str] = (), without: Collection[str] = ()) -> None:
        """A snapshot is complete: each worker keeps its part, and the rest. What is not trained comes with the first
        snapshot of a run. No worker has parts of the `new` owners, and some are not told."""
        content = snapshot.content
        of_owners = {f"{owner}/{name}" for owner, names in content.owners.items() for name in names if owner not in new}
        leaves = [leaf.buffer for leaf in (*content.params, *content.opt_state, *content.state)]
        leaves += [f"{owner}/{name}" for owner in new for name in content.owners[owner]]
        rest = [buffer for buffer in dict.fromkeys(leaves) if buffer not in of_owners]
        fixed = [leaf.buffer for leaf in content.untrained]
        encoded = np.frombuffer(msgspec.json.encode(content), np.uint8)
        about: dict[str, Any] = {"plan_id": self.fit, "key": key, "steps": content.steps, "names": tuple(rest)}
        for worker in (worker for worker in self._workers if worker not in without):
            first = () if worker in self._told else tuple(fixed)
            arrays = [encoded, *(np.asarray(snapshot.arrays[name]) for name in (*rest, *first))]
            specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays)
            with suppress(WorkerLostError):
                self._session.endpoint.send(worker, wire.Completed(**about, fixed=first, specs=specs), arrays)
                self._told.add(worker)

    def buffers(self, key: str, owners: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]] | None:
        """What workers keep of a snapshot of these owners, by owner and name. None if something is nowhere any more."""
        answers = self._ask(dict.fromkeys(self._workers, self._claim))
        places: dict[str, list[str]] = {owner: [] for owner in owners}
        for worker, (answer, _) in answers.items():
            there = (o for version in answer.versions if version.key == key for o in version.owners if o in places)
            for owner in there:
                places[owner].append(worker)
        found: dict[str, Any] = {}
        while places and all(places.values()):
            wanted: dict[str, list[str]] = {}
            for owner, workers in places.items():
                wanted.setdefault(workers.pop(), []).append(owner)
            for worker, mine in wanted.items():
                read = self._read({worker: mine}, key)  # None if it is lost meanwhile: another may have them
                found |= read or {}
                places = places if read is None else {o: at for o, at in places.items() if o not in mine}
        if places:
            return None
        return {owner: {name: found[f"{owner}/{name}"] for name in names} for owner, names in owners.items()}

    def release(self, *, over: bool) -> None:
        """Leave the fit to the next driver, or have the workers forget it."""
        for worker in self._workers:
            self._session.tell(worker, wire.Released(plan_id=self.fit, over=over))
        self._session.unregister(self.fit)

    def _claimed(self, wait_s: float) -> dict[str, wire.Claimed]:
        """What the workers answer."""
        deadline = time.monotonic() + wait_s
        while True:
            found: dict[str, wire.Claimed] = {}
            for some in (self._workers[:1], self._workers[1:]):
                found |= {w: answer for w, (answer, _) in self._ask(dict.fromkeys(some, self._claim)).items()}
                owners = [answer.owner for answer in found.values() if answer.owner]
                if owners:
                    break
            else:
                return found
            if time.monotonic() >= deadline:
                self._session.unregister(self.fit)
                raise CheckpointError(
                    f"{owners[0]} is training this fit on the same workers; wait for its end, stop it, or give "
                    "another directory"
                )
            threading.Event().wait(AGAIN_S)

    def _claim(self, number: int) -> wire.Claim:
        return wire.Claim(plan_id=self.fit, number=number, lasts=self._lasts, **self._written)

    def _recovered(self, key: str) -> Snapshot | None:
        """A snapshot, of the parts that the workers keep. None if one is gone."""
        kept = {w: v for w, versions in self._found.items() for v in versions if v.key == key}
        source = next(w for w, version in kept.items() if version.complete)
        rest = self._read({source: [""]}, key)
        if rest is None:
            return None
        content = msgspec.json.decode(rest.pop("/").tobytes(), type=Content)
        arrays = {name.removeprefix("/"): array for name, array in rest.items()}
        places = {owner: worker for worker, version in kept.items() for owner in version.owners}
        gone = [o for o, names in content.owners.items() if o not in places and not arrays.keys() >= _named(o, names)]
        written = self._on_disk(key, content, gone) if gone else {}
        if written is None:
            return None
        wanted: dict[str, list[str]] = {}
        for owner in content.owners:
            if owner in places:
                wanted.setdefault(places[owner], []).append(owner)
        parts = self._read(wanted, key)
        return None if parts is None else Snapshot(content, arrays | written | parts)

    def _on_disk(self, key: str, content: Content, owners: Sequence[str]) -> dict[str, Any] | None:
        """What workers that have left since have written of these owners. None if it is not all there."""
        if self._directory is None:
            return None
        try:
            found = last_checkpoints.read(self._directory, key, owners)
        except CheckpointError:
            return None
        names = {name for owner in owners for name in _named(owner, content.owners[owner])}
        return found if found.keys() >= names else None

    def _read(self, wanted: Mapping[str, Sequence[str]], key: str) -> dict[str, Any] | None:
        """The buffers of these owners at these workers, by "owner/name"."""
        found: dict[str, Any] = {}
        for place in range(max(map(len, wanted.values()), default=0)):  # one owner of each worker at a time
            asked = {worker: owners[place] for worker, owners in wanted.items() if place < len(owners)}

            def question(owner: str) -> Callable[[int], wire.Recover]:
                return lambda number: wire.Recover(plan_id=self.fit, number=number, key=key, owner=owner)

            answers = self._ask({worker: question(owner) for worker, owner in asked.items()})
            if len(answers) < len(asked) or not all(answer.found for answer, _ in answers.values()):
                return None
            for worker, (answer, arrays) in answers.items():
                found.update((f"{asked[worker]}/{n}", a) for n, a in zip(answer.names, arrays, strict=True))
        return found

    def _ask(self, questions: Mapping[str, Callable[[int], wire.Wire]]) -> dict[str, _Answer]:
        """The answers of workers. Those that are lost have none."""
        numbers = {worker: next(self._numbers) for worker in questions}
        with self._changed:
            self._asked |= {number: worker for worker, number in numbers.items()}
        for worker, number in numbers.items():
            try:
                self._session.endpoint.send(worker, questions[worker](number))
            except WorkerLostError:
                self._answered(number, None)
        deadline_s = self._session.deadline_s
        with self._changed:
            if not self._changed.wait_for(lambda: self._answers.keys() >= set(numbers.values()), deadline_s):
                late = next(w for w, number in numbers.items() if number not in self._answers)
                raise DeadlineError(
                    f"{late} has not said for {deadline_s:g} s what it keeps of the fit; see whether it is stuck",
                    worker=late,
                )
            found = {worker: self._answers.pop(number) for worker, number in numbers.items()}
        return {worker: answer for worker, answer in found.items() if answer is not None}

    def _answered(self, number: int, answer: _Answer | None) -> None:
        with self._changed:
            if self._asked.pop(number, None) is not None:
                self._answers[number] = answer
                self._changed.notify_all()


def _named(owner: str, names: Iterable[str]) -> set[str]:
    """The names of the arrays of an owner."""
    return {f"{owner}/{name}" for name in names}


@contextmanager
def claimed(
    cluster: Any, fit: str, wait_s: float = OWNED_S, checkpoint: Checkpoint | None = None
) -> Generator[KeptFit]:
    """Have a fit on a cluster whose workers outlive their drivers. Raises CheckpointError if another driver has it."""
    workers = list(dict.fromkeys(d.worker for d in cluster.devices))
    kept = KeptFit(cluster.session, fit, workers, wait_s, checkpoint=checkpoint)
    over = False
    try:
        yield kept
        over = True
    finally:
        kept.release(over=over)

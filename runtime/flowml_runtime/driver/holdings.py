"""Keeps account of the values that stay on the workers for one driver: brings, loads, reads and frees them."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowml.arrays import dtype_of
from flowml.devices import Device
from flowml.errors import CheckpointError, ClusterError, DeadlineError, FlowmlError, WorkerLostError
from flowml.ir._jax import exact_types, explicit_transfers
from flowml.plan import ArraySpec
from flowml_runtime import service, wire
from flowml_runtime.driver.call_io import restored
from flowml_runtime.driver.remote import Batch, Kind, Remote
from flowml_runtime.environment.checkpoints import Entry
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.programs import Array
from flowml_runtime.membership.advice import BEGIN_AGAIN
from flowml_runtime.transport.arrays import own_copy, shaped, wire_layout
from flowml_runtime.transport.endpoint import Sender

TELL_S = 1.0
"""How long a message that frees values may wait for room."""

CLOSE_S = 5.0
MOST = 0.9
"""The share of a device's memory that kept values may take."""

SHOWN = 5

PIECE_BYTES = 8 * 2**20
"""The most bytes of a lent array in one message."""


@dataclass(frozen=True)
class _Asked:
    """A question that a worker was asked, and the answer to come."""

    worker: str
    question: wire.Recall | wire.Write | wire.ReadFile
    future: Future[list[Any]]


class Holdings:
    """The kept values of one session. Safe to use from any thread."""

    def __init__(self, endpoint: Sender, deadline_s: float) -> None:
        self._endpoint = endpoint
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._batches: weakref.WeakSet[Batch] = weakref.WeakSet()
        self._bytes: dict[str, int] = {}
        """Device -> bytes of the values that have not been freed."""
        self._next = 1
        self._asked = itertools.count(1)
        self._answers: dict[int, tuple[str, Future[list[Any]]]] = {}
        """Number of a question -> its worker and the answer: the values (Recall), where they are (Write), or whether
        they are kept (ReadFile)."""
        self.saved: list[Any] = []
        self._freed: queue.SimpleQueue[tuple[Batch, Sequence[int]] | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def asked(self) -> bool:
        """Whether an answer of a worker is outstanding."""
        return bool(self._answers)

    def batch(self, kinds: Sequence[Kind], call: str, sizes: Mapping[str, int] | None = None) -> Batch:
        """A new batch of values. `sizes` are their bytes by device, if known."""
        if sizes is None:
            sizes = bytes_on_devices(kinds)
        with self._lock:
            if self._closed:
                raise ClusterError("the cluster is closed; start another")
            if self._thread is None:
                self._thread = service.start("flowml-free", self._free, self._free_on)
            batch = Batch(self, self._next, kinds, call, sizes)
            self._next += len(kinds)
            self._batches.add(batch)
            for device, nbytes in sizes.items():
                self._bytes[device] = self._bytes.get(device, 0) + nbytes
        return batch

    def check_room(self, adds: Mapping[str, int], devices: Sequence[Device], call: str) -> None:
        """Raise ClusterError if a device has no room for so many more bytes."""
        for device in devices:
            more, limit = adds.get(device.name, 0), device.memory_bytes
            if more <= 0 or limit is None or self.on(device.name) + more <= MOST * limit:
                continue
            largest = ", ".join(f"{k.name!r} ({k.nbytes:,} bytes)" for k in self._largest(device.name))
            raise ClusterError(
                f"{call} would keep {more:,} bytes more on {device.name}, where kept values take "
                f"{self.on(device.name):,} of {limit:,} bytes; delete handles, or donate them to the call. The largest "
                f"are {largest or 'those of this call'}"
            )

    def on(self, device: str) -> int:
        """Bytes of the values on a device."""
        with self._lock:
            return self._bytes.get(device, 0)

    def next_number(self) -> int:
        """Values that are made from now on have this number or a later one."""
        return self._next

    def batches(self) -> list[Batch]:
        """Those with handles. What was freed before this call is not alive in them."""
        noted = threading.Event()
        self._freed.put(noted)
        noted.wait(CLOSE_S)
        with self._lock:
            return list(self._batches)

    def bring(self, arrays: Sequence[Any], kinds: Sequence[Kind], call: str) -> Batch:
        """Send arrays to the devices of their `kinds`, where they stay. Returns when they are on their way."""
        batch = self.batch(kinds, call)
        self._bring(batch, list(enumerate(arrays)))
        return batch

    def _bring(self, batch: Batch, arrays: Sequence[tuple[int, Any]]) -> None:
        """Send arrays of a batch, each with its index there."""
        kinds = batch.kinds
        for device in dict.fromkeys(kinds[i].device for i, _ in arrays):
            here = [(i, array) for i, array in arrays if kinds[i].device == device]
            names, specs = tuple(batch.first + i for i, _ in here), tuple(kinds[i].spec for i, _ in here)
            message = wire.Bring(device=device, names=names, specs=specs)
            sent = [_raw(array, kinds[i].spec) for i, array in here]
            self._endpoint.send(kinds[here[0][0]].worker, message, sent, self._deadline_s)

    def lend(self, data: np.ndarray[Any, Any], kind: Kind, call: str, *, whole: bool) -> Remote:
        """Send the bytes of an array that no step overwrites to a device, where it stays.

        They go in pieces, so that neither side holds a second copy; `whole` sends the array itself, for a worker in
        this process.
        """
        (remote,) = self.batch([kind], call).handles()
        if whole:
            message = wire.Bring(device=kind.device, names=(remote.number,), specs=(kind.spec,), lent=True)
            self._endpoint.send(kind.worker, message, [shaped(data, kind.spec)], self._deadline_s)
            return remote
        for start in range(0, data.nbytes, PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            specs = (ArraySpec(piece.shape, "uint8"),)
            part = wire.BringPiece(device=kind.device, name=remote.number, whole=kind.spec, start=start, specs=specs)
            self._endpoint.send(kind.worker, part, [piece], self._deadline_s)
        return remote

    def recall(self, remotes: Sequence[Remote]) -> list[jax.Array]:
        """The values of handles, brought here. Waits until they are made."""
        for remote in remotes:
            remote.made()
        found: dict[int, Array] = {}
        asked: list[tuple[list[int], _Asked]] = []
        for worker in dict.fromkeys(r.kind.worker for r in remotes):
            mine = [i for i, r in enumerate(remotes) if r.kind.worker == worker]
            recall = partial(wire.Recall, names=tuple(remotes[i].number for i in mine))
            asked.append((mine, self._ask(worker, recall)))
        for mine, answer in asked:
            try:
                found.update(zip(mine, self._answer(answer), strict=True))
            except FlowmlError:
                for i in mine:
                    remotes[i].made()  # the call may have failed meanwhile, and says more
                raise
        with explicit_transfers(), exact_types():
            return [
                restored(found[i], r.kind.spec, own=not isinstance(found[i], jax.Array)) for i, r in enumerate(remotes)
            ]

    def write(self, remotes: Sequence[Remote], folder: Path, token: str) -> Iterator[tuple[Remote, Entry]]:
        """Have the workers write values into a folder: each, and where it is. Waits until they are on the disk. Those
        of workers that do not see the folder are left out.

        Raises CheckpointError if a disk refuses, and what `recall` raises.
        """
        for remote in remotes:
            remote.made()
        parts: list[list[Remote]] = []
        for worker in dict.fromkeys(r.kind.worker for r in remotes):
            mine = [r for r in remotes if r.kind.worker == worker]
            parts += (mine[i : i + wire.MAX_ARRAYS] for i in range(0, len(mine), wire.MAX_ARRAYS))
        asked: list[tuple[list[Remote], str, _Asked]] = []
        for number, mine in enumerate(parts):
            file, names = f"worker{number}.bin", tuple(r.number for r in mine)
            question = partial(wire.Write, names=names, folder=str(folder.resolve()), file=file, token=token)
            asked.append((mine, file, self._ask(mine[0].kind.worker, question)))
        for mine, file, answer in asked:
            for remote, part in zip(mine, self._answer(answer), strict=False):
                yield remote, Entry("", part.spec, part.offset, part.checksum, file)

    def load(
        self, entries: Sequence[Entry], kinds: Sequence[Kind], folder: Path, elsewhere: Callable[[int], Any], call: str
    ) -> list[Remote]:
        """Have workers keep arrays of files, each on the device of its kind. Waits until they have read them. Those of
        workers that do not see the files are sent: `elsewhere` gives the array of each."""
        batch = self.batch(kinds, call)
        parts: dict[tuple[str, str], list[int]] = {}
        missing: list[int] = []
        for i, (entry, kind) in enumerate(zip(entries, kinds, strict=True)):
            if (entry.spec.shape, dtype_of(entry.spec.dtype)) != wire_layout(kind.spec)[:2]:
                missing.append(i)  # it has 64 bits there, and JAX would make 32 of them here
                continue
            parts.setdefault((kind.device, entry.file), []).append(i)
        asked: list[tuple[list[int], _Asked]] = []
        for (device, file), mine in parts.items():
            for start in range(0, len(mine), wire.MAX_ARRAYS):
                piece = mine[start : start + wire.MAX_ARRAYS]
                question = partial(
                    wire.ReadFile,
                    device=device,
                    names=tuple(batch.first + i for i in piece),
                    folder=str(folder.resolve()),
                    file=file,
                    parts=tuple(wire.Part(e.spec, e.offset, e.checksum) for e in (entries[i] for i in piece)),
                )
                asked.append((piece, self._ask(kinds[piece[0]].worker, question)))
        try:
            missing += [i for piece, answer in asked if not self._answer(answer)[0] for i in piece]
            self._bring(batch, [(i, elsewhere(i)) for i in missing])
        except FlowmlError:
            self.freed(batch, range(len(kinds)))
            raise
        return list(batch.handles())

    def freed(self, batch: Batch, indices: Sequence[int]) -> None:
        """Handles were deleted or donated. For finalizers: takes no lock, never waits."""
        self._freed.put((batch, indices))

    def used_up(self, batch: Batch, indices: Sequence[int]) -> None:
        """A call overwrites these values, so their worker forgets them without a message."""
        with self._lock:
            self._forget(batch, indices)

    def on_message(self, message: wire.Recalled | wire.Written | wire.FileRead, arrays: Sequence[Array]) -> None:
        with self._lock:
            _, future = self._answers.pop(message.number, ("", None))
        if future is None:
            return
        error: FlowmlError | None = None
        match message:
            case wire.FileRead():
                found: list[Any] = [message.kept]
            case wire.Written():
                found = list(message.parts)
                error = CheckpointError(f"kept values cannot be written: {message.error}") if message.error else None
            case wire.Recalled():
                found = list(arrays)
                error = FlowmlError(f"a kept value cannot be read: {message.error}") if message.error else None
        future.complete(found, error)

    def on_lost(self, worker: str, reason: str) -> None:
        """All values on a worker are lost."""
        with self._lock:
            for batch in self._batches:
                batch.lost = {**batch.lost, worker: reason}
            answers = [(n, f) for n, (w, f) in self._answers.items() if w == worker]
            for number, _ in answers:
                del self._answers[number]
        for _, future in answers:
            text = f"{worker} was lost ({reason}) before it answered; {BEGIN_AGAIN}"
            future.complete(None, WorkerLostError(text, worker=worker))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for batch in self._batches:
                batch.owner = None
            thread, self._thread = self._thread, None
            answers, self._answers = self._answers, {}
        for _, future in answers.values():
            future.complete(None, ClusterError("the cluster was closed"))
        if thread is not None:
            self._freed.put(None)
            if thread is not threading.current_thread():
                thread.join(CLOSE_S)

    def _ask(self, worker: str, question: Callable[..., wire.Recall | wire.Write | wire.ReadFile]) -> _Asked:
        number = next(self._asked)
        asked = _Asked(worker, question(number=number), Future("reading a kept value", list))
        with self._lock:
            self._answers[number] = worker, asked.future
        self._send(asked)
        return asked

    def _send(self, asked: _Asked) -> None:
        try:
            self._endpoint.send(asked.worker, asked.question, (), self._deadline_s)
        except WorkerLostError as lost:
            self.on_lost(asked.worker, str(lost))

    def _answer(self, asked: _Asked) -> list[Any]:
        """Wait for an answer. A computation or a disk may take any time, and a lost worker ends the wait. The worker is
        asked again meanwhile, in case that a message was lost: it answers a question that it is busy with once."""
        while True:
            try:
                return asked.future.result(self._deadline_s)
            except DeadlineError:
                if not asked.future.done():
                    self._send(asked)

    def _largest(self, device: str) -> list[Kind]:
        with self._lock:
            found = [b.kinds[i] for b in self._batches for i in b.alive if b.kinds[i].device == device]
        return sorted(found, key=lambda k: k.nbytes, reverse=True)[:SHOWN]

    def _free(self) -> None:
        # no deadline: the thread sleeps until it has work or is closed
        while (item := self._freed.get()) is not None:
            names: defaultdict[str, list[int]] = defaultdict(list)
            while item is not None:
                if isinstance(item, threading.Event):
                    item.set()
                else:
                    self._note(*item, names)
                try:
                    item = self._freed.get_nowait()
                except queue.Empty:
                    break
            for worker, numbers in names.items():
                with service.going_on("values could not be freed"):
                    self._drop(worker, numbers)
            if item is None:
                return
            del item

    def _note(self, batch: Batch, indices: Sequence[int], names: defaultdict[str, list[int]]) -> None:
        """Values are not needed any more: add them to the `names` of their workers, unless that was done before."""
        kinds, first = batch.kinds, batch.first
        with self._lock:
            freed = self._forget(batch, indices)
        for index in freed:
            if not batch.lost or kinds[index].worker not in batch.lost:
                names[kinds[index].worker].append(first + index)

    def _forget(self, batch: Batch, indices: Sequence[int]) -> set[int]:
        """Count values as freed, and return those that were not before. The caller holds the lock."""
        freed = batch.alive.intersection(indices)
        batch.alive -= freed
        kinds, whole = batch.kinds, len(freed) == len(batch.kinds)
        for device, nbytes in (batch.sizes if whole else bytes_on_devices([kinds[i] for i in freed])).items():
            self._bytes[device] -= nbytes
        return freed

    def _drop(self, worker: str, numbers: Sequence[int]) -> None:
        for start in range(0, len(numbers), wire.MAX_ARRAYS):
            try:
                part = tuple(numbers[start : start + wire.MAX_ARRAYS])
                self._endpoint.send(worker, wire.Drop(names=part), (), TELL_S)
            except (WorkerLostError, TimeoutError):
                return  # a worker that takes no message is lost soon

    def _free_on(self, reason: str) -> None:
        """The thread has failed: start another one, unless it was told to end."""
        with self._lock:
            if self._thread is threading.current_thread():
                self._thread = service.start("flowml-free", self._free, self._free_on)


def bytes_on_devices(kinds: Iterable[Kind]) -> dict[str, int]:
    """Device -> the bytes of the values there."""
    found: dict[str, int] = {}
    for kind in kinds:
        found[kind.device] = found.get(kind.device, 0) + kind.nbytes
    return found


def _raw(array: Any, spec: ArraySpec) -> Array:
    """An array as it is sent, which the caller may overwrite at once."""
    if spec.dtype.startswith("key<"):
        return jax.random.key_data(array)
    return array if isinstance(array, jax.Array) else own_copy(array, wire_layout(spec)[1])

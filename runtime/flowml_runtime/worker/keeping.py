"""Serves a driver's messages about the values that stay on this worker: bring, read, write, load and free them."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import jax
import numpy as np

from flowml.arrays import ArraySpec
from flowml.errors import FlowmlError
from flowml.ir._jax import exact_types
from flowml_runtime import service, wire
from flowml_runtime.environment.checkpoints import Entry, read_arrays, write_invited
from flowml_runtime.execution.faults import one_line, refusal
from flowml_runtime.execution.kept import Cell, Kept
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.mailbox import Scope
from flowml_runtime.execution.programs import Array, Held, JaxDevice
from flowml_runtime.execution.services import own_array
from flowml_runtime.transport.arrays import Buffer, aligned_empty, shaped, wire_layout
from flowml_runtime.transport.endpoint import Sender

MAX_REASON = 10_000
"""The most characters of the reason why a value cannot be read."""


class Keeping:
    """The kept values of one worker, for its drivers. Messages are processed in order on receiving threads."""

    def __init__(self, name: str, endpoint: Sender, devices: Mapping[str, JaxDevice]) -> None:
        self.kept = Kept()
        self._endpoint = endpoint
        self._devices = devices
        self._arriving: dict[tuple[str, int], tuple[Buffer, int]] = {}
        """(driver, name) -> the bytes of a value that comes in pieces, and how many are there."""
        self._asked: set[tuple[str, int]] = set()
        """(driver, number) of the questions that are being answered. One that comes again has its answer coming."""
        self._lent = LentMemory(f"{name} lent memory")
        self._answers = Lane(f"{name} kept values")
        """Sends what drivers read. A large value takes long to send."""

    def on_message(
        self,
        driver: str,
        message: wire.Bring | wire.BringPiece | wire.Recall | wire.Write | wire.ReadFile | wire.Drop,
        arrays: Sequence[Array],
    ) -> None:
        if isinstance(message, wire.Recall | wire.Write | wire.ReadFile):
            if (driver, message.number) in self._asked:
                return
            self._asked.add((driver, message.number))
        match message:
            case wire.Bring():
                device = self._devices.get(message.device)
                if device is not None:  # else no call finds the values, and each says so
                    self.kept.put(driver, message.names, [_placed(a, device, lent=message.lent) for a in arrays])
            case wire.BringPiece():
                self._take(driver, message, *arrays)
            case wire.Recall():
                self._read(driver, message, partial(self._answer, driver, message.number))
            case wire.Write():
                self._read(driver, message, partial(self._write, driver, message))
            case wire.ReadFile():
                self.kept.open(driver, _read_by(driver, message), 0, message.names)
                self._answers.put(
                    partial(self._read_file, driver, message), lambda _: self._file_read(driver, message, kept=False)
                )
            case wire.Drop():
                self.kept.drop(driver, message.names)

    def inputs(
        self,
        driver: str,
        feed: wire.Value,
        arrays: Sequence[Array],
        outputs: Sequence[int],
        overwritten: Container[int],
        donated: frozenset[int],
    ) -> Sequence[Array | Cell]:
        """The inputs of a step, in the order of its feed.

        `outputs` are the slots that the step keeps. It overwrites the inputs in `overwritten`, so it gets copies of
        those that are arrays of the caller, in the same process. The driver knows that kept values in `donated` inputs
        are gone.
        """
        if feed.keep:
            self.kept.open(driver, (feed.plan_id, feed.step, feed.device), feed.keep, outputs)
        if not feed.names:
            given = zip(feed.slots, arrays, strict=True) if overwritten else ()
            return [own_array(a) if s in overwritten else a for s, a in given] or arrays
        given = list(zip(feed.slots, feed.names, strict=True))
        last = [name for slot, name in given if name and slot in donated] if donated else ()
        cells = iter(self.kept.find(driver, [n for n in feed.names if n], last))
        sent = iter(arrays)
        return [
            next(cells) if name else own_array(next(sent)) if slot in overwritten else next(sent)
            for slot, name in given
        ]

    def held(self, driver: str, names: Sequence[tuple[str, int, int]], plan: str) -> Held:
        """The constants of a plan, given as (device, constant, name). Raises FlowmlError if one is not here."""
        cells = self.kept.find(driver, [name for *_, name in names])
        try:
            if any(cell.value is None for cell in cells):
                raise FlowmlError(f"{plan} came before an array that its function closes over; call the function again")
            return {(device, i): cell.value for (device, i, _), cell in zip(names, cells, strict=True)}
        finally:
            self.kept.leave(cells)

    def forget(self, driver: str) -> None:
        """A driver is lost: forget everything of it."""
        self.kept.forget(driver)
        self._asked -= {asked for asked in self._asked if asked[0] == driver}
        for key in [key for key in self._arriving if key[0] == driver]:
            del self._arriving[key]

    def close(self) -> None:
        self._answers.close()
        self._lent.close()

    def join(self, timeout_s: float) -> None:
        self._answers.join(timeout_s)

    def _take(self, driver: str, piece: wire.BringPiece, data: Array) -> None:
        """Add a piece to a value, and keep the value when all of its bytes are there.

        One that is incomplete, or of pieces that do not follow one another, is not kept, and the plan that needs it
        says so.
        """
        key, device = (driver, piece.name), self._devices.get(piece.device)
        nbytes = wire_layout(piece.whole)[2]
        whole, filled = (aligned_empty(nbytes), 0) if piece.start == 0 else self._arriving.pop(key, (None, 0))
        end = piece.start + data.nbytes
        if whole is None or device is None or filled != piece.start or end > nbytes:
            return
        whole[piece.start : end] = np.asarray(data).reshape(-1)
        if end < nbytes:
            self._arriving[key] = whole, end
        else:
            value = _placed(shaped(whole, piece.whole), device, lent=True)
            self._lent.watch(value)
            self.kept.put(driver, (piece.name,), [value])

    def _read(self, driver: str, asked: wire.Recall | wire.Write, use: Callable[[Sequence[Cell]], None]) -> None:
        """Use the cells of a question once they have a value."""
        cells = self.kept.find(driver, asked.names)

        def failed(_: BaseException) -> None:
            self._asked.discard((driver, asked.number))
            self.kept.leave(cells)

        def wait(begin: int) -> None:
            """Those before `begin` have a value."""
            for position in range(begin, len(cells)):
                claim = self.kept.claim(cells[position], sole=False)
                if claim.then(partial(wait, position)):
                    return
            self._answers.put(partial(use, cells), failed)

        wait(0)

    def _write(self, driver: str, message: wire.Write, cells: Sequence[Cell]) -> None:
        arrays, error = _values(cells)
        parts: Sequence[wire.Part] = ()
        try:
            named = {str(i): array for i, array in enumerate(arrays)}
            found = write_invited(Path(message.folder), message.file, message.token, named) if not error else None
            parts = [wire.Part(e.spec, e.offset, e.checksum) for e in found or ()]
        except (OSError, FlowmlError) as failure:
            error = refusal(failure)[:MAX_REASON]
        try:
            self._tell(driver, wire.Written(number=message.number, parts=tuple(parts), error=error))
        finally:
            self.kept.leave(cells)

    def _read_file(self, driver: str, message: wire.ReadFile) -> None:
        """Keep arrays of a file. Raises CheckpointError if it has none with these checksums."""
        device, pairs = self._devices[message.device], zip(message.names, message.parts, strict=True)
        entries = [Entry(str(name), part.spec, part.offset, part.checksum, message.file) for name, part in pairs]
        found = read_arrays(Path(message.folder), message.file, entries)
        values = [_placed(found.pop(str(name)), device) for name in message.names]
        self.kept.fill(_read_by(driver, message), message.names, values)
        self._file_read(driver, message, kept=True)

    def _file_read(self, driver: str, message: wire.ReadFile, *, kept: bool) -> None:
        self.kept.end(_read_by(driver, message), "its file is not seen from its worker")
        self._tell(driver, wire.FileRead(number=message.number, kept=kept))

    def _answer(self, driver: str, number: int, cells: Sequence[Cell]) -> None:
        arrays, error = _values(cells)
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays)
        try:
            self._tell(driver, wire.Recalled(number=number, error=error, specs=specs), arrays)
        finally:
            self.kept.leave(cells)

    def _tell(
        self, driver: str, answer: wire.Recalled | wire.Written | wire.FileRead, arrays: Sequence[Array] = ()
    ) -> None:
        self._asked.discard((driver, answer.number))  # first: the driver may ask again as soon as it has the answer
        with suppress(FlowmlError):  # the driver is lost
            self._endpoint.send(driver, answer, arrays)


def _read_by(driver: str, message: wire.ReadFile) -> Scope:
    """What makes the values of a file, as a step does."""
    return "", message.number, driver


def _values(cells: Sequence[Cell]) -> tuple[Sequence[np.ndarray], str]:
    """The values of cells, or why one does not exist."""
    error = next((c.error for c in cells if c.error), "")
    try:
        return ([], error) if error else ([np.asarray(c.value) for c in cells], "")
    except Exception as failure:  # the computation failed, or the value was donated
        return [], one_line(failure)[:MAX_REASON]


def _placed(array: Array, device: JaxDevice, *, lent: bool = False) -> jax.Array:
    """An array on a device: a copy, which a program may overwrite, unless it is only lent."""
    with exact_types():
        return jax.device_put(array if lent else own_array(array), device)


class LentMemory:
    """Gives back the memory of arrays that JAX did not allocate. JAX keeps such memory until its next operation.

    A value is dropped before the last program that reads it ends, so the end of the array itself is watched.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """Whether to continue. Finalizers run at any line of any thread, and may use no other queue."""
        self._watches = False

    def watch(self, array: jax.Array) -> None:
        """Give the memory of `array` back when nothing refers to it. Called on one thread."""
        weakref.finalize(array, self._ended.put, True).atexit = False
        if not self._watches:
            self._watches = True
            self._serve("")

    def close(self) -> None:
        self._ended.put(False)

    def _serve(self, reason: str) -> None:
        service.start(self._name, self._run, self._serve)

    def _run(self) -> None:
        while self._ended.get():  # no deadline: the thread sleeps until it has work or is closed
            with service.going_on("memory could not be given back"):
                jax.device_put(np.zeros(()))  # any operation

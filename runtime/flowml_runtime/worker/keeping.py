"""Serves a driver's messages about the values that stay on this worker: bring, read and free them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flowml.arrays import ArraySpec
from flowml.errors import FlowmlError
from flowml.ir._jax import exact_types
from flowml_runtime import wire
from flowml_runtime.execution.faults import one_line
from flowml_runtime.execution.kept import Cell, Kept
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array, JaxDevice
from flowml_runtime.transport.endpoint import Sender

MAX_REASON = 10_000
"""The most characters of the reason why a value cannot be read."""


class Keeping:
    """The kept values of one worker, for its drivers. Messages are processed in order on receiving threads."""

    def __init__(self, name: str, endpoint: Sender, devices: Mapping[str, JaxDevice]) -> None:
        self.kept = Kept()
        self._endpoint = endpoint
        self._devices = devices
        self._answers = Lane(f"{name} kept values")
        """Sends what drivers read. A large value takes long to send."""

    def on_message(self, driver: str, message: wire.Bring | wire.Recall | wire.Drop, arrays: Sequence[Array]) -> None:
        match message:
            case wire.Bring():
                device = self._devices.get(message.device)
                if device is not None:  # else no call finds the values, and each says so
                    self.kept.put(driver, message.names, [_placed(a, device) for a in arrays])
            case wire.Recall():
                self._read(driver, message.number, self.kept.find(driver, message.names), 0)
            case wire.Drop():
                self.kept.drop(driver, message.names)

    def inputs(
        self,
        driver: str,
        feed: wire.Value,
        arrays: Sequence[Array],
        outputs: Sequence[int],
        overwritten: Container[int],
    ) -> Sequence[Array | Cell]:
        """The inputs of a step, in the order of its feed.

        `outputs` are the slots that the step keeps. It overwrites the inputs in `overwritten`, so it gets copies of
        those that are arrays of the caller, in the same process.
        """
        if feed.keep:
            self.kept.open(driver, (feed.plan_id, feed.step, feed.device), feed.keep, outputs)
        if not feed.names:
            given = zip(feed.slots, arrays, strict=True) if overwritten else ()
            return [_copy(a) if s in overwritten else a for s, a in given] or arrays
        cells = iter(self.kept.find(driver, [n for n in feed.names if n]))
        sent = iter(arrays)
        given = zip(feed.slots, feed.names, strict=True)
        return [
            next(cells) if name else _copy(next(sent)) if slot in overwritten else next(sent) for slot, name in given
        ]

    def close(self) -> None:
        self._answers.close()

    def join(self, timeout_s: float) -> None:
        self._answers.join(timeout_s)

    def _read(self, driver: str, number: int, cells: Sequence[Cell], begin: int) -> None:
        """Answer once all cells have a value. Those before `begin` have one."""
        for position in range(begin, len(cells)):
            claim = self.kept.claim(cells[position], sole=False)
            if claim.then(partial(self._read, driver, number, cells, position)):
                return
        self._answers.put(partial(self._answer, driver, number, cells), lambda _: self.kept.leave(cells))

    def _answer(self, driver: str, number: int, cells: Sequence[Cell]) -> None:
        error = next((c.error for c in cells if c.error), "")
        arrays: Sequence[np.ndarray] = ()
        try:
            arrays = [] if error else [np.asarray(c.value) for c in cells]
        except Exception as failure:  # the computation failed, or the value was donated
            error = one_line(failure)[:MAX_REASON]
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays)
        try:
            self._endpoint.send(driver, wire.Recalled(number=number, error=error, specs=specs), arrays)
        except FlowmlError:
            return  # the driver is lost
        finally:
            self.kept.leave(cells)


def _placed(array: Array, device: JaxDevice) -> jax.Array:
    """A copy of an array on a device, which a program may overwrite."""
    with exact_types():
        return jax.device_put(_copy(array), device)


def _copy(array: Array) -> Array:
    """A copy of an array of the caller's. Arrays from other processes are nobody else's."""
    with exact_types():
        return jnp.copy(array) if isinstance(array, jax.Array) else array

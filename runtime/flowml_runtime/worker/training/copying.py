"""Sends copies of what lives here between steps to other workers, and keeps those of others.

A copy goes along a chain of workers (van Renesse and Schneider, *Chain replication*, OSDI 2004): each keeps it before
it passes it on, and the last one tells the driver. `protocol.training.ring` says who is in the chain of which owner.
Copies are kept as parts of the snapshot that they belong to (`worker.kept_fits`), and this worker keeps its own part
too: the copy of it may be on the worker that is lost.

Buffers that have not changed since the newest complete snapshot are not sent again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from flowml.arrays import ArraySpec
from flowml.errors import FlowmlError
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array
from flowml_runtime.protocol.training import actions as protocol
from flowml_runtime.protocol.training.kept_fits import key_of
from flowml_runtime.protocol.training.ring import Ring
from flowml_runtime.worker.training.resident import Arrays, Resident


class CopiedRun(Protocol):
    """A run of which there are copies: `run.Run`, or a simulated one."""

    @property
    def me(self) -> str: ...
    @property
    def driver(self) -> str: ...
    @property
    def plan_id(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def stopped(self) -> bool: ...
    def send(self, worker: str, message: wire.Wire, arrays: Sequence[Array] = ..., /) -> None: ...


class Keeps(Protocol):
    """Where a worker keeps copies: `worker.kept_fits`, or that of a simulated one."""

    def export(
        self,
        driver: str,
        fit: str,
        of: tuple[str, int, int],
        owner: str,
        arrays: Mapping[str, Array],
        *,
        complete: str = ...,
        lent: bool = ...,
    ) -> bool: ...
    def repeat(self, driver: str, fit: str, of: tuple[str, int, int], owner: str, complete: str) -> bool: ...


class Copying:
    """The copies of one run. Lanes call it; those of one owner always the same lane."""

    def __init__(self, run: CopiedRun, copies: wire.Copies, kept_fits: Keeps) -> None:
        self._run = run
        self._fit = copies.fit
        self._kept_fits = kept_fits
        self._ring = Ring(run.me, dict(copies.memory), copies.count)
        self._placing = threading.Lock()
        self._sent: dict[str, tuple[int, object]] = {}
        """Owner -> the number of the snapshot for which it was sent last, and what `Resident.state` was then."""

    def send(self, action: protocol.Export, resident: Resident, arrays: Arrays) -> None:
        """Keep what a resident has exported, and send it along the chain."""
        owner, state = resident.owner, None if resident.state is None else resident.state()
        number, before = self._sent.get(owner, (None, None))
        same = state is not None and state is before and number == action.complete
        self._sent[owner] = action.number, state
        about: dict[str, Any] = {"owner": owner, "worker": self._run.me, "number": action.number}
        ids: dict[str, Any] = {"plan_id": self._run.plan_id, "run": self._run.number, "cause": action.cause}
        copy = wire.Copy(**ids, **about, names=tuple(arrays), same=same, complete=action.complete)
        sent = {} if same else arrays
        self._keep(copy, sent, lent=state is None)
        with self._placing:
            chain = self._ring.chain(owner, sum(a.nbytes for a in arrays.values()))
        self._pass_on(copy, chain, sent)

    def take(self, copy: wire.Copy, arrays: Arrays) -> None:
        """Keep a copy of another worker, and pass it on."""
        self._keep(copy, arrays, lent=True)
        self._pass_on(copy, copy.rest, arrays)

    def _keep(self, copy: wire.Copy, arrays: Arrays, *, lent: bool) -> None:
        plan_id, run = copy.plan_id, copy.run
        complete = "" if copy.complete is None else key_of(plan_id, run, copy.complete)
        of, driver = (plan_id, run, copy.number), self._run.driver
        if copy.same:
            there = self._kept_fits.repeat(driver, self._fit, of, copy.owner, complete)
        else:
            there = self._kept_fits.export(driver, self._fit, of, copy.owner, arrays, complete=complete, lent=lent)
        if not there and not self._run.stopped:
            raise FlowmlError(
                f"{self._run.me} cannot keep the copy of {copy.owner!r} of {copy.worker}: it does not know the fit or "
                "the snapshot before; start the fit again"
            )

    def _pass_on(self, copy: wire.Copy, chain: tuple[str, ...], arrays: Mapping[str, Array]) -> None:
        if chain:
            specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays.values())
            told = msgspec.structs.replace(copy, rest=chain[1:], specs=specs)
            self._run.send(chain[0], told, list(arrays.values()))
            return
        ids: dict[str, Any] = {"plan_id": copy.plan_id, "run": copy.run, "cause": copy.cause, "number": copy.number}
        told = wire.Copied(**ids, owner=copy.owner, worker=copy.worker, names=copy.names)
        self._run.send(self._run.driver, told)

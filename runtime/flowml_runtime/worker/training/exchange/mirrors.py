"""Sends the other sites, or replicas, the changes of own parameters, and adds theirs to the own ones.

Each sender holds a mirror of the parameters. At the end of a step that is due it sends what its steps have changed
since the last time, encoded by the filters of the policy, to all others. What a filter leaves out stays in a residual
and goes with a later change, so a significance filter sends an element when its accumulated change is large beside the
parameter (Hsieh et al., *Gaia*, NSDI 2017). The last step sends everything, so all mirrors end with the same sum.

The other replicas of a site update the same parameters. Their steps count as those of the leader do, until it passes on
what it has joined.

With staleness s a sender waits, at the end of step c, for the changes of step c - s of all others, and for those of
which it has the positions (`positions`), and adds all that have come. With staleness 0 two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from flowml.arrays import ArraySpec
from flowml.devices import worker_of
from flowml.errors import FlowmlError
from flowml.plan import StoreSpec
from flowml.policy import Gossip, filters, newest_changes
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, LoadedProgram, aligned_copy, buffer_struct
from flowml_runtime.execution.services import host_view
from flowml_runtime.worker.training.exchange.positions import split
from flowml_runtime.worker.training.own_values import OwnValues
from flowml_runtime.worker.training.resident import Arrays, number, row, row_of, states, states_of
from flowml_runtime.worker.training.run import Run

Adopt = Callable[[Sequence[Array]], Sequence[Array]]


@dataclass
class Filtered:
    """The filters of one store between mirrors: what a sender keeps, and what it knows of each other sender."""

    spec: StoreSpec
    seed: tuple[int, ...]
    kept: dict[int, filters.State] = field(default_factory=dict[int, filters.State])
    known: dict[tuple[int, int], filters.State] = field(default_factory=dict[tuple[int, int], filters.State])

    def encode(self, clock: int, delta: Sequence[Any], params: Sequence[Any], *, last: bool) -> list[Any]:
        """The arrays to send. The `last` ones are the changes themselves, with all that is left of earlier ones."""
        sent: list[Any] = []
        for i, (value, parameter) in enumerate(zip(map(np.asarray, delta), map(np.asarray, params), strict=True)):
            state = self.kept.get(i, {})
            if last or not self.spec.policy.filters:
                left = state.get(filters.RESIDUAL)
                self.kept[i] = {n: a for n, a in state.items() if n != filters.RESIDUAL}  # nothing is left to send
                sent.append(value if left is None else (value + left).astype(value.dtype))
                continue
            context = filters.Context(seed=(*self.seed, i, clock), clock=clock, parameter=parameter)
            found, self.kept[i] = filters.encode(self.spec.policy.filters, value, state, context)
            sent += found
        return sent

    def export(self) -> Arrays:
        """All buffers, for a snapshot between two steps."""
        return {**states("kept", {(i,): state for i, state in self.kept.items()}), **states("known", self.known)}

    def restore(self, arrays: Arrays) -> None:
        """Go on with the buffers of a snapshot."""
        self.kept.update((i, state) for (i,), state in states_of(arrays, "kept").items())
        self.known.update(((source, i), state) for (source, i), state in states_of(arrays, "known").items())

    def decode(self, source: int, arrays: Sequence[Array], *, last: bool) -> Sequence[Array]:
        if last or not self.spec.policy.filters:
            return arrays
        left, found = iter([np.asarray(a) for a in arrays]), list[Array]()
        for i, spec in enumerate(self.spec.specs):
            key, form = (source, i), filters.Form.of(spec)
            try:
                value, self.known[key] = filters.decode(self.spec.policy.filters, left, form, self.known.get(key, {}))
            except filters.EncodingError as error:
                raise FlowmlError(
                    f"sender {source} sent for layer {self.spec.name!r} what its filters cannot have made: {error}; "
                    "see whether all workers run the same version of flowml"
                ) from None
            found.append(value)
        return found


class Mirror:
    """The own values of one store as a mirror, and the tasks that change it. Both clocks use it."""

    def __init__(
        self, spec: StoreSpec, number: int, share: float, loaded: LoadedProgram, dtype: str, seed: int
    ) -> None:
        """`share` is that of the steps of this sender in the parameters; its `number` is that among all senders."""
        assert spec.local is not None and spec.local.fold is not None and spec.local.mix is not None
        self.filtered = Filtered(spec, (seed, number))
        self._local = spec.local
        self._fold, self._join = loaded.tasks[spec.local.fold], loaded.tasks[spec.local.mix]
        self._one, self._share = (aligned_copy(np.array(x, dtype)) for x in (1.0, share))
        self._device = loaded.device

    def changes(self, clock: int, own: OwnValues, *, last: bool) -> Sequence[Any]:
        """What to send of the change of the own parameters."""
        return self.filtered.encode(
            clock, host_view(own.sent(), self._device), host_view(own.params, self._device), last=last
        )

    def join(self, own: OwnValues, before: Sequence[Array], deltas: Sequence[Sequence[Array]]) -> None:
        """Add the changes of others to the own parameters, which have just done a step from `before`."""
        total: Sequence[Array] = [
            aligned_copy(np.zeros(struct.shape, struct.dtype)) for struct in map(buffer_struct, self._local.accumulator)
        ]
        for delta in deltas:
            total = self._fold(*total, *delta, self._one)
        share = self._one if own.params is before else self._share
        results = self._join(*total, *own.params, *before, *own.started, share)
        own.params, own.started = results[: len(before)], results[len(before) :]


def share_of(spec: StoreSpec, replica: int, replicas: int) -> float:
    """The share of a sender's steps in the parameters: that of its replicas in the mean, and 1 in a sum."""
    site = spec.site_of(replica)
    return (len(site.replicas) if site else 1) / replicas if spec.policy.apply.averages else 1.0


class Mirrors:
    """The exchanges of one store on one stage of a sender. The executor's thread uses it, and no other.

    For another replica of its site it only weighs the steps.
    """

    def __init__(self, run: Run, store: int, replica: int, loaded: LoadedProgram, adopt: Adopt, dtype: str) -> None:
        spec, replicas = run.training.stores[store], run.training.replicas
        assert isinstance(spec.policy.remote, Gossip)
        self._run = run
        self._store = store
        self._replica = replica
        self._gossip = spec.policy.remote
        self._spec = spec
        self._adopt = adopt
        self._senders = spec.leaders or tuple(range(len(replicas)))
        self._leads = replica in self._senders
        self._workers = {r: worker_of(replicas[r][spec.parts[0].stage]) for r in self._senders}
        self._heard = dict.fromkeys((r for r in self._senders if r != replica), -1)
        """The newest clock of each other sender whose changes are added."""
        self._told = -1
        """The newest clock whose changes it has sent."""
        self._positions = run.positions[store]
        number, share = self._senders.index(spec.leader_of(replica)), share_of(spec, replica, len(replicas))
        self._mirror = Mirror(spec, number, share, loaded, dtype, run.start.seed)

    def export(self) -> Arrays:
        """All buffers, for a snapshot between two steps, with the changes of others that are not added yet."""
        run, mine = self._run, (self._store, self._replica)

        def come() -> bool:
            return all(c >= self._told or (*mine, s, self._told) in run.told for s, c in self._heard.items())

        with run.changed:
            what = f"the last changes of {self._spec.name!r} from all senders"
            run.wait_for(come, lambda: False, what, run.step_of(max(self._told, 0)))
            told = {(s, c): a for (*at, s, c), a in run.told.items() if (*at,) == mine and s in self._heard}
        waiting = {key: array for (source, c), a in told.items() for key, array in row(f"told/{source}.{c}", a).items()}
        heard = {f"heard/{source}": number(clock) for source, clock in self._heard.items()}
        return {**self._mirror.filtered.export(), **heard, **waiting}

    def restore(self, arrays: Arrays) -> None:
        """Go on with the buffers of a snapshot."""
        self._mirror.filtered.restore(arrays)
        self._heard = {source: int(arrays[f"heard/{source}"]) for source in self._heard}
        for key in arrays:
            if key.startswith("told/") and key.endswith("/0"):
                source, clock = map(int, key.split("/")[1].split("."))
                at = (self._store, self._replica, source, clock)
                self._run.told[at] = row_of(arrays, f"told/{source}.{clock}")

    def begin(self, clock: int, own: OwnValues, cause: int) -> None:
        """The step of `clock` begins."""

    def end(self, clock: int, own: OwnValues, before: Sequence[Array], cause: int, in_vain: Callable[[], bool]) -> None:
        """The step of `clock` has updated the own values, whose parameters were `before`."""
        self._mirror.join(own, before, ())
        last = clock == self._run.terms.last_clock
        if not self._leads or not (last or self._gossip.due(clock)):
            return
        self._tell(clock, list(map(np.asarray, self._mirror.changes(clock, own, last=last))), cause)
        deltas = self._receive(clock if last else clock - int(self._spec.policy.staleness), clock, in_vain)
        if deltas:
            self._mirror.join(own, own.params, deltas)

    def _tell(self, clock: int, arrays: Sequence[Array], cause: int) -> None:
        self._told = clock
        run = self._run
        ids: dict[str, Any] = {"plan_id": run.plan_id, "run": run.number, "cause": cause, "store": self._store}
        ahead, rest = split(self._positions, arrays)
        for other in self._heard:
            to, message = self._workers[other], wire.Gossip(**ids, replica=other, source=self._replica, clock=clock)
            if run.backlog.saturated(self._replica, clock, run.me, to, ahead):
                self._send(to, msgspec.structs.replace(message, ahead=True), ahead)
                self._send(to, message, rest)
            else:
                self._send(to, message, arrays)

    def _send(self, to: str, message: wire.Gossip, arrays: Sequence[Array]) -> None:
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays)
        self._run.send(to, msgspec.structs.replace(message, specs=specs), arrays)
        self._run.count_push(self._store, 0, sum(s.nbytes for s in specs), to)

    def _receive(self, until: int, now: int, in_vain: Callable[[], bool]) -> list[Sequence[Array]]:
        """The changes of others that have come, in the order of clocks and senders, once those `until` are here."""
        run, told = self._run, self._run.told
        newest = newest_changes(now, int(self._spec.policy.staleness), self._gossip.every)
        end = min(newest, run.terms.last_clock) + 1
        clocks = [c for c in range(min(self._heard.values(), default=now) + 1, end) if self._due(c)]
        keys = {(c, j): (self._store, self._replica, j, c) for c in clocks for j in self._heard if c > self._heard[j]}
        needed = [key for (c, _), key in keys.items() if c <= until]

        def come() -> bool:
            return all(key in told for key in needed) and not any(key in run.lists for key in keys.values())

        with run.changed:
            what = f"changes of {self._spec.name!r} up to step {until} from all other senders"
            run.wait_for(come, in_vain, what, run.step_of(now))
            there = {at: told.pop(key) for at, key in keys.items() if key in told}
        found: list[Sequence[Array]] = []
        for (clock, source), arrays in there.items():
            self._heard[source] = clock
            values = self._mirror.filtered.decode(source, arrays, last=clock == run.terms.last_clock)
            found.append(self._adopt(values))
        return found

    def _due(self, clock: int) -> bool:
        return clock == self._run.terms.last_clock or self._gossip.due(clock)

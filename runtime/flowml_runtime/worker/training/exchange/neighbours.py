"""Averages the parameters that a replica updates itself with those of its neighbours, as a gossip topology says.

In a round replica i gets x_i <- sum over j of W[i, j] x_j + (what its step has added to x_i), where all x are those
before the step (Lian et al., D-PSGD, NeurIPS 2017). They are sent when the step begins, so that they travel while it
computes. A replica waits for its neighbours at the end of the step, and so is never more than a round ahead of them.
With an outer optimizer, or filters that lose something, it sends at the end of the step instead (`averaging`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowml.arrays import ArraySpec
from flowml.devices import worker_of
from flowml.plan import StoreSpec
from flowml.policy import Gossip
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.services import host_view
from flowml_runtime.worker.training.exchange.averaging import Averaging
from flowml_runtime.worker.training.exchange.copies import Copies
from flowml_runtime.worker.training.filtered import packed, unpacked
from flowml_runtime.worker.training.own_values import OwnValues
from flowml_runtime.worker.training.resident import Arrays
from flowml_runtime.worker.training.run import Run

Adopt = Callable[[Sequence[Array]], Sequence[Array]]


class Neighbours:
    """The rounds of one store on one stage of a replica. The executor's thread uses it, and no other."""

    def __init__(self, run: Run, store: int, replica: int, loaded: LoadedProgram, adopt: Adopt, dtype: str) -> None:
        spec = run.training.stores[store]
        assert isinstance(spec.policy.remote, Gossip)
        self._run = run
        self._store = store
        self._senders = spec.leaders or run.training.live
        """The replicas that take part in rounds: one of each site. The graph is among them."""
        self._replica = self._senders.index(replica)
        """Its number among them."""
        self._gossip = spec.policy.remote
        self._spec: StoreSpec = spec
        self._averaging = Averaging(spec, loaded, dtype)
        self._copies: Copies | None = None
        """Made in the first round, if filters lose something."""
        self._at_end = self._averaging.outer or spec.policy.tracked
        self._adopt = adopt
        self._device = loaded.device
        stages = [run.training.replicas[r] for r in self._senders]
        self._workers = [worker_of(devices[spec.parts[0].stage]) for devices in stages]
        self._told = -1

    def export(self) -> Arrays:
        """The public copies, for a snapshot between two steps."""
        return {} if self._copies is None else self._copies.export()

    def restore(self, arrays: Arrays) -> None:
        """Go on with the public copies of a snapshot."""
        if arrays:
            self._copies = Copies(self._spec, self._replica, self._run.start.seed, ())
            self._copies.restore(arrays)

    def begin(self, clock: int, own: OwnValues, cause: int) -> None:
        """The step of `clock` begins. Sends what its round needs, if that is known already."""
        if self._told < clock and self._gossip.due(clock) and not self._at_end:
            self._told = clock
            self._tell(clock, self._packed(own.params), cause)

    def end(self, clock: int, own: OwnValues, before: Sequence[Array], cause: int, in_vain: Callable[[], bool]) -> None:
        """The step of `clock` has updated the own values, whose parameters were `before`. Ends a round if it is due."""
        if not self._gossip.due(clock):
            return
        mine = before
        if self._spec.policy.tracked:
            mine = before = self._follow(clock, own, cause)
        elif self._averaging.outer:
            mine = self._averaging.sent(own)
            self._tell(clock, self._packed(mine), cause)
        weights = self._gossip.weights(self._replica, len(self._workers), clock)
        theirs = self._wait(clock, [j for j in weights if j != self._replica], in_vain)
        self._averaging.mix(own, before, weights, {**theirs, self._replica: mine})

    def _follow(self, clock: int, own: OwnValues, cause: int) -> Sequence[Array]:
        """Send what filters make of the change of the public copy. Returns the copy after it."""
        if self._copies is None:
            first = host_view(own.started, self._device)
            self._copies = Copies(self._spec, self._replica, self._run.start.seed, first)
        self._tell(clock, self._copies.changes(clock, host_view(own.params, self._device)), cause)
        return self._adopt(self._copies.own)

    def _packed(self, values: Sequence[Array]) -> Sequence[Array]:
        chain, arrays = self._spec.policy.filters, host_view(values, self._device)
        return packed(chain, arrays) if chain else arrays

    def _tell(self, clock: int, arrays: Sequence[Any], cause: int) -> None:
        run = self._run
        ids: dict[str, Any] = {"plan_id": run.plan_id, "run": run.number, "cause": cause, "store": self._store}
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays)
        for other in self._gossip.readers(self._replica, len(self._workers), clock):
            message = wire.Gossip(
                **ids, replica=self._senders[other], source=self._senders[self._replica], clock=clock, specs=specs
            )
            run.send(self._workers[other], message, arrays)
            if self._workers[other] != run.me:
                run.count_crossing(self._store, sum(s.nbytes for s in specs))

    def _wait(self, clock: int, others: Sequence[int], in_vain: Callable[[], bool]) -> Mapping[int, Sequence[Array]]:
        run, told = self._run, self._run.told
        me = self._senders[self._replica]
        keys = {j: (self._store, me, self._senders[j], clock) for j in others}
        names = ", ".join(str(self._senders[j]) for j in others)
        with run.changed:
            what = f"parameters of {self._spec.name!r} from its neighbours, replicas {names}"
            run.wait_for(lambda: all(key in told for key in keys.values()), in_vain, what, run.step_of(clock))
            found = {j: told.pop(key) for j, key in keys.items()}
        chain, specs = self._spec.policy.filters, self._spec.specs * (2 if self._averaging.outer else 1)
        if self._copies is not None:
            found = self._copies.follow(found)
        elif chain:
            found = {j: unpacked(chain, specs, a, f"replica {self._senders[j]}") for j, a in found.items()}
        return {j: self._adopt(arrays) for j, arrays in found.items()}

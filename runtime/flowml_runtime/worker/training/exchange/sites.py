"""Passes values between the replicas of a site, for a store of which one of them, the leader, stands for all.

    replicas -> sum of their gradients (`reductions`) -> leader -> what the leader has got from outside -> replicas

A leader tells the others what it reads, once a step, so that it crosses between sites once. A message without arrays
says that nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from flowml.devices import worker_of
from flowml.plan import Site
from flowml.policy import Gossip
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array
from flowml_runtime.worker.training.exchange.neighbours import Adopt
from flowml_runtime.worker.training.exchange.positions import summed
from flowml_runtime.worker.training.own_values import OwnValues
from flowml_runtime.worker.training.run import Run


class Member:
    """One replica of a site, for one store on one stage. The executor's thread uses it, and no other."""

    def __init__(self, run: Run, store: int, stage: int, replica: int, site: Site) -> None:
        spec = run.training.stores[store]
        self.weight = 1 if isinstance(spec.policy.remote, Gossip) else len(site.replicas)
        """How many replicas its contributions stand for. Sites that gossip count alike, as their graph says."""
        self.leader = site.replicas[0]
        self.leads = replica == self.leader
        self.alone = len(site.replicas) == 1
        gathers = any(r.schedule == "gather" for r in site.reductions)
        self.served = spec.local is not None and (gathers or spec.sites_decide)
        """Whether only the leader updates the parameters of the site, and the others get them at each step."""
        self.exchanges = self.leads or (spec.policy.mirrored and not self.served)
        """Whether it has a part in exchanges between sites: as leader, or as one whose steps a mirror weighs."""
        self._run = run
        self._remote = spec.policy.remote
        self._store = store
        self._replica = replica
        self._others = [(r, worker_of(run.training.replicas[r][stage])) for r in site.replicas[1:]]
        self._specs = spec.specs
        self._name = spec.name
        self._summed = -1
        """The clock of the newest sum."""
        self._clock = -1
        """The clock for which the newest values were told, or heard."""
        self._version = -1
        self._values: Sequence[Array] = ()

    def tell(self, clock: int, values: Sequence[Array], cause: int, version: int = -1) -> None:
        """As the leader, tell the others the values for `clock`. Has no effect for a clock that they know.

        Values of the `version` that they have got last are not sent again.
        """
        if clock <= self._clock:
            return
        run, known = self._run, version >= 0 and version == self._version
        self._clock, self._version = clock, version
        specs, arrays = ((), ()) if known else (self._specs, values)
        ids: dict[str, Any] = {"plan_id": run.plan_id, "run": run.number, "cause": cause, "store": self._store}
        for other, worker in self._others:
            message = wire.Gossip(**ids, replica=other, source=self._replica, clock=clock, specs=specs)
            run.send(worker, message, arrays)
            run.count_publish(self._store, sum(s.nbytes for s in specs), worker)

    def hear(self, clock: int, in_vain: Callable[[], bool]) -> Sequence[Array]:
        """The values that the leader tells for `clock`."""
        if clock > self._clock:
            self._forget(self.leader, self._clock + 1, clock)
            what = f"parameters of {self._name!r} from replica {self.leader}, which leads the site"
            self._values = self._wait(self.leader, clock, in_vain, what) or self._values
            self._clock = clock
        return self._values

    def pass_on(self, clock: int, own: OwnValues, adopt: Adopt, cause: int, in_vain: Callable[[], bool]) -> None:
        """After a round of gossip, the leader tells the others the parameters with which the next step begins."""
        if self.alone or self.served or not isinstance(self._remote, Gossip):
            return
        if not self._remote.due(clock) and clock != self._run.terms.last_clock:
            return
        if self.leads:
            self.tell(clock + 1, [np.asarray(x) for x in own.params], cause)
        else:
            own.params = adopt(self.hear(clock + 1, in_vain))

    def give(self, part: int, clock: int, arrays: Sequence[Array]) -> None:
        """The gradients of a replica that is alone are the sum of its site."""
        with self._run.changed:
            self._run.told[self._store, self._replica, summed(part), clock] = arrays

    def total(
        self, part: int, clock: int, in_vain: Callable[[], bool], given_up: Callable[[int, int], bool]
    ) -> Sequence[Array]:
        """The sum of the gradients of the site at `clock`. Nothing, if none of them may be applied, or if the site has
        `given_up` (store, clock)."""
        self._forget(summed(part), self._summed + 1, clock)
        self._summed = clock
        what = f"the sum of gradients of {self._name!r} of its site"
        return self._wait(summed(part), clock, in_vain, what, partial(given_up, self._store, clock))

    def _forget(self, source: int, first: int, clock: int) -> None:
        """Drop what came for the clocks before `clock` that this replica has left out."""
        with self._run.changed:
            for earlier in range(first, clock):
                self._run.told.pop((self._store, self._replica, source, earlier), None)

    def _wait(
        self,
        source: int,
        clock: int,
        in_vain: Callable[[], bool],
        what: str,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Sequence[Array]:
        run, key = self._run, (self._store, self._replica, source, clock)
        with run.changed:
            run.wait_for(lambda: key in run.told or given_up(), in_vain, what, run.step_of(clock))
            return run.told.pop(key, ())

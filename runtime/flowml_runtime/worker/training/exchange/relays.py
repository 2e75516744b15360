"""Adds up for others: for the sites that decide for themselves, whose leaders pass values on too, and in a tree.

    children in a tree, and the parent itself -> Contribution -> its worker: sum -> Contribution -> parent or home
    replicas of a site -> Contribution -> the leader's worker: sum -> Contribution -> home
    replicas of a site -> Contribution -> the leader's worker: sum -> Gossip -> the leader, if sites decide alone
    home -> Published -> the leader's worker -> Published -> the workers of its site

The machine (`protocol.training.site`) says what a sum contains. Sums are added on a lane, so that control messages do
not wait for a large layer, and whether the leader's own step is late does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np

from flowml.arrays import ArraySpec, dtype_of
from flowml.plan import StoreSpec, Training
from flowml_runtime import wire
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array, aligned_copy
from flowml_runtime.protocol.training.actions import CountSum, Forward, PassOn
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.weak import weakly
from flowml_runtime.worker.training.exchange.reductions import sum_of
from flowml_runtime.worker.training.filtered import Encoder
from flowml_runtime.worker.training.publisher import Arrays, Publisher
from flowml_runtime.worker.training.resident import Resident, of_site
from flowml_runtime.worker.training.run import Fault, Run

Given = Sequence[tuple[Sequence[Sequence[Array]], float]]
"""The arrays of each part of each contribution, and its factor."""


class Relays:
    """The sites that one worker leads, in one run. The machine's thread calls it; it never waits."""

    def __init__(self, run: Run, payloads: dict[int, Sequence[Array]], on_fault: Fault) -> None:
        self._run = run
        self._payloads = payloads
        self._on_fault = on_fault
        self._lane = Lane(f"{run.me} sites run {run.number}")
        self._encoders = {leader: self._filters(leader) for leader in self._leaders()}
        """By leader, if the sums of its site are filtered."""
        self._sums = False
        """Whether there was a sum to send."""
        failed = partial(weakly(self._fail), 0, "publish")
        self._publisher = Publisher(f"{run.me} sites run {run.number}", weakly(self._send), failed, run.sender.waiting)

    def forward(self, action: Forward) -> None:
        """Add up contributions, and send the sum."""
        store, clock = action.parts[0].store, action.parts[0].clock
        given = [([self._payloads.pop(h) for h in handles], factor) for handles, factor in action.contributions]
        parameters = self._run.stores[store].values if store in self._run.stores else None
        name = f"store {self._run.training.stores[store].name}"
        job, self._sums = partial(self._forward, action, given, parameters), True
        self._lane.put(job, partial(self._fail, self._run.step_of(clock), name))

    def after(self, job: Callable[[], None]) -> None:
        """Do this when all sums so far have been sent."""
        if self._sums:
            self._lane.put(job, partial(self._fail, self._run.number, "the end of a stage"))
        else:
            job()

    def settle(self, action: CountSum) -> None:
        """The fate of sums is known, which may still be queued."""
        name = f"the site of replica {action.leader}"
        self._lane.put(partial(self._settle, action), partial(self._fail, self._run.step_of(action.clock), name))

    def pass_on(self, action: PassOn) -> None:
        """Send the version that is shown here, or news of it, to the site. Filters are on the way to its leader."""
        store = action.message.store
        values = self._run.stores[store].values if action.value else ()
        specs = self._run.training.stores[store].specs if action.value else ()
        message = msgspec.structs.replace(action.message, specs=specs, base=-1)
        for worker in action.to:
            self._publisher.publish(worker, message, values)

    def close(self) -> None:
        """Drop the queued work, and end the threads after their current job. Does not wait. Idempotent."""
        self._lane.close()
        self._publisher.close()

    def _forward(self, action: Forward, given: Given, parameters: Sequence[Array] | None) -> None:
        run, nbytes, first = self._run, 0, action.parts[0]
        for to, message in zip(action.to, action.parts, strict=True):
            arrays: Sequence[Array] = ()
            if isinstance(message, wire.Gossip):
                self._to_leader(to, message, given, action.share)
                continue
            if given:
                mine = [(parts[message.part], factor) for parts, factor in given]
                arrays = site_sum(run.training.stores[message.store], message.part, mine, action.share)
                specs = run.training.stores[message.store].parts[message.part].payload
                message = msgspec.structs.replace(message, specs=specs)
                encoder = self._encoders.get(message.replica)
                if encoder is not None and encoder.filters(message.store):
                    message, arrays = encoder.encode(message, arrays, parameters)
            sent = sum(s.nbytes for s in message.specs)
            run.count_push(message.store, message.part, sent, to, told=True)
            run.send(to, message, arrays)
            nbytes += sent
        if isinstance(first, wire.Contribution):
            run.send(run.driver, wire.Forwarded.of(first, nbytes))

    def _settle(self, action: CountSum) -> None:
        self._encoders[action.leader].settle(action.clock, action.stores, counts=action.counts)

    def _to_leader(self, to: str, message: wire.Gossip, given: Given, share: float | None) -> None:
        """Send the leader of a site the sum of gradients."""
        run, part = self._run, message.part or 0
        arrays = for_leader(run.training, message, [(parts[part], factor) for parts, factor in given], share)
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in map(np.asarray, arrays))
        if to != run.me:
            run.count_crossing(message.store, sum(s.nbytes for s in specs))
        run.send(to, msgspec.structs.replace(message, specs=specs), arrays)

    def _leaders(self) -> list[int]:
        """The leaders of the sites here whose sums are filtered, and the parents whose sums go to a home."""
        filtered = (s for s in self._run.training.stores if s.relayed and s.policy.home_filters)
        led = [site.replicas[0] for store in filtered for site in store.sites]
        for store in self._run.terms.stores:
            if store.tree is not None and store.policy.home_filters:
                led += store.tree.children_of(-1)
        relay = Places.of(self._run.training).stages
        return [leader for leader in dict.fromkeys(led) if relay[leader][:1] == (self._run.me,)]

    def _filters(self, leader: int) -> Encoder:
        """The filters of the sums of a site."""
        run = self._run
        encoder = Encoder(run.training.stores, leader, run.start.seed)
        run.encoders.append(encoder)
        for number, store in enumerate(run.training.stores):
            terms = run.terms.stores[number]
            if (terms.forwarded or terms.tree is not None) and store.policy.home_filters:
                both = partial(encoder.export, number), partial(encoder.restore, number)
                run.residents.add(Resident(of_site(leader, store.name, "filters"), *both, self._lane))
        return encoder

    def _send(self, worker: str, message: wire.Published, arrays: Arrays, timeout_s: float | None) -> None:
        self._run.send(worker, message, arrays, timeout_s)
        self._run.count_publish(message.store, sum(s.nbytes for s in message.specs), worker)

    def _fail(self, step: int, node: str, error: BaseException) -> None:
        if not self._run.stopped:
            self._on_fault(max(step, self._run.number), node, error)


def for_leader(
    training: Training,
    message: wire.Gossip,
    given: Sequence[tuple[Sequence[Array], float]],
    share: float | None = None,
) -> Sequence[Array]:
    """The sum of the gradients of a site, for a leader that updates parameters, or that adds it up with other leaders.

    The first divides by the number of all gradients of a step, so the sum is one as if all replicas had their share in
    it; weighted gradients carry what they are divided by. For the others the sum ends with the number of gradients.
    """
    store, number = training.stores[message.store], message.part or 0
    part, site = store.parts[number], store.site_of(message.replica)
    if store.collective:
        payload = [np.zeros(s.shape, dtype_of(s.dtype)) for s in part.payload]
        total = site_sum(store, number, given, share) if given else payload
        return [*total, np.full(1, message.weight, total[0].dtype)]
    if not given or site is None:
        return ()
    whole = 1.0 if len(given[0][0]) > len(part.leaves) else len(site.replicas) * training.microbatches / message.weight
    return site_sum(store, number, [(arrays, factor * whole) for arrays, factor in given], share)


def site_sum(
    store: StoreSpec, part: int, given: Sequence[tuple[Sequence[Array], float]], share: float | None
) -> list[Array]:
    """The sum of the contributions of a site, each times its factor. The weights that end them have no factors: their
    sum is multiplied by `share`, so that those that come later weigh what the others weigh on average."""
    total, spec = weighted_sum(given), store.parts[part]
    if share is None or (share == 1 and all(factor == 1 for _, factor in given)):
        return total
    if spec.pack is not None and store.applies.weighted:
        row = aligned_copy(np.asarray(total[0]))
        row[-1] = share * sum(np.asarray(row_of)[-1] for (row_of,), _ in given)
        return [row]
    count = len(spec.leaves)
    weights = [(arrays[count:], share) for arrays, _ in given]
    return [*total[:count], *(weighted_sum(weights) if len(total) > count else ())]


def weighted_sum(given: Sequence[tuple[Sequence[Array], float]]) -> list[Array]:
    """The sum of lists of arrays, each times its factor."""
    terms = [[np.asarray(a) for a in arrays] for arrays, _ in given]
    for term, (_, factor) in zip(terms, given, strict=True):
        if factor != 1:
            term[:] = [(a * np.asarray(factor, np.promote_types(a.dtype, np.float32))).astype(a.dtype) for a in term]
    return terms[0] if len(terms) == 1 else [sum_of([term[i] for term in terms]) for i in range(len(terms[0]))]

"""Holds the values of the stores on this worker, and applies and publishes them as the worker's machine decides.

The machine's thread only queues the actions. Applies, and reading their results to publish them, compute or wait; they
run on a thread of the store's device (a lane), so that control messages never wait for a large layer. The actions of a
store run in order, because they all go through one lane.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax

from flowml.arrays import ArraySpec
from flowml.devices import worker_of
from flowml_runtime import wire
from flowml_runtime.execution.kernels import Kernels
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.services import host_view
from flowml_runtime.protocol.training.actions import Apply, Couple, Load, Publish, Release, Return, Uncouple
from flowml_runtime.protocol.training.terms import RETIRED
from flowml_runtime.weak import weakly
from flowml_runtime.worker.training.applying import Given, Held, applied, check_student, given_of
from flowml_runtime.worker.training.coupled import CoupledHomes, Heard
from flowml_runtime.worker.training.exchange.agreement import Agreement
from flowml_runtime.worker.training.filtered import Decoder, Encoded
from flowml_runtime.worker.training.published import WHOLE, PublicCopy
from flowml_runtime.worker.training.publisher import Arrays, Publisher
from flowml_runtime.worker.training.resident import Arrays as Buffers
from flowml_runtime.worker.training.resident import Resident, loaded, of_home
from flowml_runtime.worker.training.run import Fault, Run

_Sent = Callable[[], Sequence[Array]]
"""Gives the arrays of a part, decoded. A lane calls it."""

HomeAction = Load | Apply | Couple | Uncouple | Publish | Return | Release

VALUES = "values"
"""What the owner of the parameters and the optimizer state of a home is called."""

_Contributed = Sequence[tuple[Sequence[_Sent], float]]
"""The parts of each contribution, and its coefficient."""

_Job = tuple[int, Callable[[], object]]
"""(store, the work to do for it, whose result is not used)"""


class Homes:
    """Carries out the actions on one worker's stores in one run. The machine's thread calls it; it never waits."""

    def __init__(
        self,
        run: Run,
        programs: Mapping[str, LoadedProgram],
        payloads: dict[int, Sequence[Array]],
        encoded: Encoded,
        agreement: Agreement,
        on_fault: Fault,
    ) -> None:
        self._run = run
        self._agreement = agreement
        self._programs = programs
        self._payloads = payloads
        self._encoded = encoded
        self._on_fault = on_fault
        self._specs = run.training.stores
        self._homes = {i: home for i, s in enumerate(self._specs) for home in s.copies if worker_of(home) == run.me}
        self._held: dict[int, Held] = {}
        self._coupled = {
            (c, home): CoupledHomes(run.training, c, programs[home])
            for c, coupling in enumerate(run.training.couplings)
            for home in dict.fromkeys(self._homes[s] for s in coupling.stores if s in self._homes)
        }
        kernels = {home: Kernels(programs[home].device) for home in self._homes.values()}
        self._decoder = Decoder(self._specs, {i: kernels[home] for i, home in self._homes.items()})
        self._in_turn: dict[int, int] = {}
        """The stores of the handles that are decoded, or will be by queued work, and wait to be applied or released."""
        self._decoded: dict[int, Sequence[Array]] = {}
        """The arrays of these handles. Lanes access it."""
        self._public = {
            i: PublicCopy(self._specs[i], (run.start.seed, i), kernels[home])
            for i, home in self._homes.items()
            if self._specs[i].policy.pull_filters
        }
        """By store what its readers hold, where it is filtered."""
        self._lanes = {home: Lane(f"{home} home run {run.number}") for home in dict.fromkeys(self._homes.values())}
        self._publisher = Publisher(
            f"{run.me} run {run.number}",
            weakly(self._send_published),
            partial(weakly(self._fail), run.number, "publish"),
            run.sender.waiting,
        )
        for store, home in self._homes.items():
            self._register(store, self._lanes[home])
        self._failed = False
        """Whether an apply or publication failed. Then no later one may run."""

    def _register(self, store: int, lane: Lane) -> None:
        """Tell the run what lives here between steps. Of copies with the same bits the first one stands for all."""
        spec, add = self._specs[store], self._run.residents.add
        if worker_of(spec.copies[0]) == self._run.me:
            values = partial(self._export, store)
            add(Resident(of_home(spec.name, VALUES), values, loaded, lane, lambda: self._held[store].values))
        if spec.policy.home_filters:
            known = partial(self._decoder.export, store), partial(self._decoder.restore, store)
            add(Resident(of_home(spec.name, "decoder"), *known, lane))
        if store in self._public:
            copy = self._public[store]
            restore = copy.restore if spec.policy.clocked else copy.restart  # else readers may have read other versions
            add(Resident(of_home(spec.name, "public"), copy.export, restore, lane))

    def _export(self, store: int) -> Buffers:
        held = self._held[store]
        return dict(zip((b.name for b in held.spec.buffers), host_view(held.values, held.program.device), strict=True))

    def carry_out(self, actions: Iterable[HomeAction]) -> None:
        """Queue the actions that one event has caused."""
        jobs: dict[str, list[_Job]] = {}
        """Grouped by device, so that each lane is woken once."""
        self._decode_in_turn(jobs)
        for action in actions:
            match action:
                case Load():
                    self._load(action)
                    continue
                case Release(handle):
                    if handle not in self._in_turn:
                        continue
                    store, job = self._in_turn[handle], self._sent(handle)
                case Apply(store):
                    job = partial(self._apply, action, self._taken(action))
                case Couple(stores=stores):
                    sent = {a.store: (a, self._taken(a)) for a in action.applies}
                    heard = [(who, self._payloads.pop(h) if h else ()) for who, h in action.given]
                    for home, mine in self._by_home(stores).items():
                        coupled = self._coupled[action.coupling, home]
                        jobs.setdefault(home, []).append(
                            (mine[0], partial(self._couple, action, coupled, mine, sent, heard))
                        )
                    continue
                case Uncouple(stores):
                    for home, mine in self._by_home(stores).items():
                        found = [c.clear for (_, where), c in self._coupled.items() if where == home]
                        jobs.setdefault(home, []).extend((mine[0], clear) for clear in found)
                    continue
                case Publish(store):
                    job = partial(self._publish, action)
                case Return(store):
                    job = partial(self._return, action)
            jobs.setdefault(self._homes[store], []).append((store, job))
        for home, ordered in jobs.items():
            self._lanes[home].put(partial(self._do, ordered), partial(self._fail, self._run.number, "a home"))

    def _by_home(self, stores: Iterable[int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for store in stores:
            found.setdefault(self._homes[store], []).append(store)
        return found

    def _taken(self, action: Apply) -> _Contributed:
        return [([self._sent(h) for h in handles], c) for handles, c in action.contributions]

    def _decode_in_turn(self, jobs: dict[str, list[_Job]]) -> None:
        """Decode what has come since this was called last and depends on what came before it. Whether and when it is
        applied makes no difference."""
        waiting = self._encoded.in_turn
        for handle in [h for h, message in waiting.items() if message.run == self._run.number]:
            message, arrays = waiting.pop(handle), self._payloads.pop(handle)
            self._in_turn[handle] = message.store
            job = partial(self._decode, handle, message, arrays)
            jobs.setdefault(self._homes[message.store], []).append((message.store, job))

    def _sent(self, handle: int) -> _Sent:
        if self._in_turn.pop(handle, None) is not None:
            return partial(self._decoded.pop, handle)
        arrays, message = self._payloads.pop(handle), self._encoded.alone.pop(handle, None)
        return (lambda: arrays) if message is None else partial(self._decoder.decode, message, arrays)

    def waiting(self, store: int, handle: int) -> tuple[_Sent, Lane]:
        """The arrays of a contribution that waits at a store here, and the lane on which to ask for them."""
        self.carry_out(())
        lane = self._lanes[self._homes[store]]
        if handle in self._in_turn:
            return partial(self._decoded.__getitem__, handle), lane
        arrays, message = self._payloads[handle], self._encoded.alone.get(handle)
        return (lambda: arrays) if message is None else partial(self._decoder.decode, message, arrays), lane

    def _load(self, action: Load) -> None:
        """Load a store's first value: parameters, then optimizer state."""
        spec, arrays = self._specs[action.store], self._payloads.pop(action.handle)
        home = self._homes[action.store]
        held = self._held[action.store] = Held(spec, home, self._programs[home], list(arrays), len(spec.leaves))
        if spec.policy.shared:
            self._run.shared[action.store] = held

    def close(self) -> None:
        """Drop the queued work, and end the threads after their current job. Does not wait. Idempotent."""
        for lane in self._lanes.values():
            lane.close()
        self._publisher.close()

    # A lane's thread.

    def _do(self, jobs: Sequence[_Job]) -> None:
        for store, job in jobs:
            if self._failed or self._run.stopped:
                return
            began = time.perf_counter()
            try:
                job()
                self._run.count_work(store, time.perf_counter() - began)
            except Exception as error:
                self._fail(self._run.step_of(self._held[store].clock), f"store {self._specs[store].name}", error)

    def _fail(self, step: int, node: str, error: BaseException) -> None:
        self._failed = True
        if not self._run.stopped:
            self._on_fault(step, node, error)

    def _decode(self, handle: int, message: wire.Contribution, arrays: Sequence[Array]) -> None:
        self._decoded[handle] = self._decoder.decode(message, arrays)

    def _given(self, action: Apply, sent: _Contributed) -> list[Given]:
        arrays = [([a for part in parts for a in part()], coefficient) for parts, coefficient in sent]
        return given_of(self._specs[action.store], arrays, action.staleness, action.full, action.decays)

    def _apply(self, action: Apply, sent: _Contributed) -> None:
        """Apply what was sent, in the order of replicas."""
        held, given = self._held[action.store], self._given(action, sent)
        recorder, step = self._run.recorder, self._run.step_of(action.version)
        with recorder.record(f"{held.home} home", "apply", f"store {held.spec.name}", step):
            results = applied(held.program, held.spec, held.values, given)
            if recorder.on:
                jax.block_until_ready(results)  # otherwise the recorder would not see the end of the task
        if self._run.start.on_nonfinite != "apply":
            check_student(held.spec, results)
        held.values = list(results)

    def _couple(
        self,
        action: Couple,
        coupled: CoupledHomes,
        stores: Sequence[int],
        sent: Mapping[int, tuple[Apply, _Contributed]],
        heard: Heard,
    ) -> None:
        """Compute a round of a coupling for these stores, which live on one device."""
        recorder, step = self._run.recorder, self._run.step_of(action.clock)
        values = {store: self._held[store].values for store in stores}
        what = f"round {action.round} of coupling {action.coupling}" if action.to else f"coupling {action.coupling}"
        with recorder.record(f"{self._homes[stores[0]]} home", "apply", what, step):
            if not action.to:
                for store, made in coupled.end(values, heard).items():
                    self._held[store].values = made
                return
            if action.round:
                shared = coupled.go_on(action.round, values, heard)
            else:
                shared = coupled.begin(values, {store: self._given(*sent[store]) for store in stores})
            arrays = host_view(shared, coupled.program.device)
        message = wire.Shared(
            plan_id=self._run.plan_id,
            run=self._run.number,
            cause=action.cause,
            coupling=action.coupling,
            round=action.round,
            clock=action.clock,
            stores=tuple(stores),
            specs=tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays),
        )
        others = sum(worker != self._run.me for worker in action.to)
        for store in stores:
            self._run.count_shared(store, coupled.shared_bytes(store, action.round) * others)
        for worker in action.to:
            self._run.send(worker, message, arrays)

    def _publish(self, action: Publish) -> None:
        """Give the parameters to the publisher, which lends them to readers, so no apply may overwrite them.

        Apply tasks are compiled without donation: each makes new arrays and does not change the old ones.
        """
        held = self._held[action.store]
        held.clock = held.clock if action.floor == RETIRED else action.floor
        values = host_view(held.values[: held.params], held.program.device) if action.value else ()
        copy, base, whole = self._public.get(action.store), WHOLE, ()
        if copy is not None and action.value:
            base, values = copy.advance(action.version, values)
            whole = copy.values
        message = wire.Published(
            plan_id=self._run.plan_id,
            run=self._run.number,
            cause=action.cause,
            store=action.store,
            version=action.version,
            floor=action.floor,
            specs=tuple(ArraySpec(a.shape, a.dtype.name) for a in values) if copy else held.spec.specs * action.value,
            base=base,
        )
        for worker in action.to:
            if self._publisher.publish(worker, message, values, whole) and copy is not None:
                copy.forget()
        if action.version and action.value:
            self._compare(action.store, action.version)

    def _compare(
        self, store: int, version: int, then: Callable[[], None] = lambda: None, *, last: bool = False
    ) -> None:
        held = self._held[store]
        arrays = held.values
        self._agreement.compare(store, version, max(held.clock - 1, 0), arrays, then, last=last)

    def _return(self, action: Return) -> None:
        held = self._held[action.store]
        message = wire.StoreValue(
            plan_id=self._run.plan_id,
            run=self._run.number,
            cause=action.cause,
            store=action.store,
            version=action.version,
            specs=(*held.spec.specs, *held.spec.state_specs) if action.value else (),
        )
        values = host_view(held.values[: len(message.specs)], held.program.device) if action.value else ()

        def tell() -> None:
            # Stages may have retired, and reported their traffic, before the last version was published.
            self._run.send(self._run.driver, self._run.traffic(action.cause))
            self._run.send(self._run.driver, message, values)

        self._compare(action.store, action.version, partial(self._publisher.after_all, tell), last=True)

    def _send_published(self, worker: str, message: wire.Published, arrays: Arrays, timeout_s: float | None) -> None:
        self._run.send(worker, message, arrays, timeout_s)
        self._run.count_publish(message.store, sum(s.nbytes for s in message.specs), worker)

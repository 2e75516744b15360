"""Real arithmetic at virtual time: the plan's tasks run on this machine whenever a simulated worker runs them.

The tasks, the sums and the applies are those of real workers, in the same order, so a fit has the losses and parameters
of a real one wherever the policy leaves no choice to timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from flowml.devices import worker_of
from flowml.plan import Plan, StoreSpec
from flowml.policy import Gossip
from flowml.policy.filters import Seat, Talk, compares
from flowml.training.pieces import Piece, pieces
from flowml_runtime import wire
from flowml_runtime.execution.kernels import Kernels
from flowml_runtime.execution.programs import Array, ExecutableCache, LoadedProgram, load_programs
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.execution.services import host_view
from flowml_runtime.execution.step_program import StepFault, StepProgram, prepare
from flowml_runtime.protocol import schedules
from flowml_runtime.protocol.training.actions import Couple, Start
from flowml_runtime.protocol.training.places import seats
from flowml_runtime.sim.couplings import Couplings
from flowml_runtime.sim.flying import Flying
from flowml_runtime.sim.program import At
from flowml_runtime.sim.stepping import Step
from flowml_runtime.sim.values import Contributed, Report, Value
from flowml_runtime.transport.buffers import BufferPool
from flowml_runtime.worker.training.applying import Given, applied, check_student, given_of
from flowml_runtime.worker.training.examples import Fed, beside_batch, of_batch, of_source
from flowml_runtime.worker.training.exchange.averaging import Averaging
from flowml_runtime.worker.training.exchange.copies import Copies
from flowml_runtime.worker.training.exchange.mirrors import Mirror, share_of
from flowml_runtime.worker.training.exchange.reductions import sum_of
from flowml_runtime.worker.training.exchange.relays import for_leader, site_sum
from flowml_runtime.worker.training.filtered import Decoder, Encoder, packed
from flowml_runtime.worker.training.finite import all_finite, counted, is_weight_at_fault
from flowml_runtime.worker.training.model_state import ModelState
from flowml_runtime.worker.training.own_values import OwnValues
from flowml_runtime.worker.training.published import PublicCopy
from flowml_runtime.worker.training.resident import Resident, loaded, of_home, of_stage

Arrays = Sequence[Array]
Named = Mapping[str, Array]


class Compiled:
    """The compiled programs of a plan. All simulated devices share those of one real device."""

    def __init__(self, plan: Plan, cache: ExecutableCache, variant: Callable[[str], Compiled]) -> None:
        """`variant` gives those of another plan, whose programs run on batches of another shape."""
        assert plan.training is not None
        self.plan = plan
        self.variant = variant
        self.training = plan.training
        device = jax.local_devices()[0]
        self.loaded: Mapping[str, LoadedProgram] = load_programs(
            plan, {p.device: device for p in plan.programs}, cache, python=True
        )
        self.programs: Mapping[str, StepProgram] = {name: prepare(p) for name, p in self.loaded.items()}

    def values(self, start: wire.StartTraining) -> Arithmetic:
        """The values of one fit."""
        return Arithmetic(self, start)


@dataclass
class _Held:
    """A store at one of its homes."""

    spec: StoreSpec
    program: LoadedProgram
    params: list[Array]
    state: list[Array]


class Arithmetic:
    """The values of one fit. It implements `Values`."""

    computes = True

    def __init__(self, compiled: Compiled, start: wire.StartTraining) -> None:
        self._compiled = compiled
        self._plan, self._training = compiled.plan, compiled.training
        self._start = start
        self._held: dict[tuple[str, int], _Held] = {}
        self._source: dict[str, dict[int, Array]] = {}
        """Worker -> the whole leaves of the data."""
        self._batches: Fed[tuple[str, dict[int, Array]]] = Fed(ahead=self._training.speculation is not None)
        """The variant and the leaves of each work item, if the driver feeds them."""
        self._states: dict[tuple[str, int], Arrays] = {}
        """(worker, store) -> the first optimizer state of parameters that replicas update themselves."""
        self._own: dict[tuple[At, int], OwnValues] = {}
        self._before: dict[tuple[At, int], Arrays] = {}
        """Such parameters before the update of the newest step."""
        self._averaging: dict[tuple[At, int], Averaging] = {}
        self._copies: dict[tuple[At, int], Copies] = {}
        self._mirrors: dict[tuple[At, int], Mirror] = {}
        self._encoders: dict[At, Encoder] = {}
        self._seats: dict[tuple[int, int], dict[int, Seat]] = {}
        """(store, part) -> those of replicas that exchange what filters encode."""
        self._couplings = Couplings(self._training)
        self._decoder = Decoder(
            self._training.stores, {i: self._kernels(s.home) for i, s in enumerate(self._training.stores)}
        )
        self._public: dict[tuple[str, int], PublicCopy] = {}
        """(worker, store) -> what its readers hold, where what is published is filtered."""
        self._compared: dict[tuple[At, int], Arrays] = {}
        """The parameters that a stage has taken last, where filters compare gradients with them."""
        self._models = {
            (r, s): ModelState(self._training, s, refuses=start.on_nonfinite == "refuse")
            for r, devices in enumerate(self._training.replicas)
            for s in range(len(devices))
        }
        self._recorder = Recorder()
        self._pool = BufferPool()
        self._zero = {
            (worker_of(device), i): device for i, store in enumerate(self._training.stores) for device in store.copies
        }

    def _kernels(self, device: str) -> Kernels:
        """What runs the filters of a device, as on real workers."""
        return Kernels(self._compiled.loaded[device].device)

    def begin(self, at: At, start: Start, leaves_out: Callable[[int], bool]) -> Step:
        device = self._device(at)
        variant, batch = self._batches.take(device, start.item.sequence) or ("", None)
        program = (self._compiled.variant(variant) if variant else self._compiled).programs[device]
        model, buffers = self._models[at], list(program.buffers)
        model.begin()
        return Step(at, start, program, buffers, batch, self._feed, self._read, model, leaves_out, self._recorder)

    def perform(self, state: Step, position: int, given: Any) -> Value:
        state.given = given
        operation = state.program.operations[position]
        try:
            operation(state.buffers, state.start.clock, state)
        except Exception as error:
            raise StepFault(state.program.nodes[position]) from error
        sent, state.given, state.sent = state.sent, None, ()
        return host_view(sent, self._compiled.loaded[state.program.device].device)

    def report(self, state: Step) -> Report | None:
        used = sum(1 for m in range(self._training.microbatches) if not (m and state.leaves_out(m)))
        state.model.end(used)
        if not state.fetched:
            return None
        return state.fetched.sums(used, () if self._training.code is None else self._pieces(state))

    def add(self, at: At, store: int, part: int, a: Value, b: Value) -> Value:
        task = self._training.stores[store].parts[part].accumulate
        assert task is not None
        return list(self._compiled.loaded[self._device(at)].tasks[task](*a, *b))

    def _read(self, step: Step, store: int) -> Arrays:
        return self.taken(step.at, step.start.clock, store, None if step.given is None else step.given[1])

    def taken(self, at: At, clock: int, store: int, given: Arrays | None) -> Arrays:
        """The parameters that a step computes with. `given` are those of the home, if the step takes them."""
        spec = self._training.stores[store]
        if given is not None and compares(spec.policy.home_filters):
            self._compared[at, store] = given
        if spec.local is None:
            assert given is not None
            return given
        own = self._own_of(at, store)
        own.begin(clock)
        if given is not None:
            own.take(clock, given)
        return own.params

    def _own_of(self, at: At, store: int) -> OwnValues:
        """Made for the first step, or for the buffers of a snapshot, in which case the state comes with these."""
        own = self._own.get((at, store))
        if own is None:
            device = self._device(at)
            compiled = self._compiled.loaded[device]
            own = self._own[at, store] = OwnValues(self._training.stores[store], compiled.plan, compiled.tasks, at[0])
            own.state = self._states.get((worker_of(device), store), ())
        return own

    def update(self, at: At, store: int, gradient: Value, *, refused: bool) -> None:
        own = self._own[at, store]
        self._before[at, store] = own.params
        own.weigh(() if refused else gradient)
        if not refused and len(gradient):
            own.update(gradient)

    def told(self, at: At, store: int, clock: int) -> tuple[Value, int | None]:
        own, loaded = self._own[at, store], self._compiled.loaded[self._device(at)]
        if own.spec.policy.tracked:
            sent = self._copies_of(at, store).changes(clock, host_view(own.params, loaded.device))
            return sent, sum(np.asarray(a).nbytes for a in sent)
        arrays, chain = host_view(self._averaging_of(at, store).sent(own), loaded.device), own.spec.policy.filters
        return arrays, sum(np.asarray(a).nbytes for a in packed(chain, arrays)) if chain else None

    def mix(self, at: At, store: int, weights: Mapping[int, float], theirs: Mapping[int, Value]) -> None:
        own, averaging, before = self._own[at, store], self._averaging_of(at, store), self._before[at, store]
        mine = averaging.sent(own) if averaging.outer else before
        if own.spec.policy.tracked:
            copies = self._copies_of(at, store)
            mine = before = copies.own
            theirs = copies.follow(theirs)
        averaging.mix(own, before, weights, dict.fromkeys(weights, mine) | dict(theirs))

    def _copies_of(self, at: At, store: int) -> Copies:
        found = self._copies.get((at, store))
        if found is None:
            own, loaded = self._own_of(at, store), self._compiled.loaded[self._device(at)]
            first, number = host_view(own.started, loaded.device), self._sender(own.spec, at)
            found = self._copies[at, store] = Copies(own.spec, number, self._start.seed, first)
        return found

    def _sender(self, spec: StoreSpec, at: At) -> int:
        """The number of a replica, or of its site, among those that take part in rounds."""
        return (spec.leaders or tuple(range(len(self._training.replicas)))).index(spec.leader_of(at[0]))

    def _averaging_of(self, at: At, store: int) -> Averaging:
        found = self._averaging.get((at, store))
        if found is None:
            own, loaded = self._own[at, store], self._compiled.loaded[self._device(at)]
            found = self._averaging[at, store] = Averaging(own.spec, loaded, own.dtype)
        return found

    def own(self, at: At, store: int, clock: int, mixed: Value) -> Value:
        own = self._own[at, store]
        sent = own.params if own.spec.policy.mirrored else own.sent()
        if mixed is not None:
            own.take(clock, mixed)
        return host_view(sent, self._compiled.loaded[self._device(at)].device)

    def params(self, at: At, store: int) -> Value:
        return host_view(self._own[at, store].params, self._compiled.loaded[self._device(at)].device)

    def follow(self, at: At, store: int, value: Value) -> None:
        self._own[at, store].params = value

    def changes(self, at: At, store: int, clock: int, *, sends: bool, last: bool) -> tuple[Value, int]:
        own, mirror = self._own[at, store], self._mirror_of(at, store)
        mirror.join(own, self._before[at, store], ())
        sent = mirror.changes(clock, own, last=last) if sends else ()
        return sent, sum(np.asarray(a).nbytes for a in sent)

    def join(self, at: At, store: int, theirs: Sequence[tuple[int, Value, bool]]) -> None:
        own, mirror = self._own[at, store], self._mirror_of(at, store)
        mirror.join(own, own.params, [mirror.filtered.decode(who, value, last=last) for who, value, last in theirs])

    def _mirror_of(self, at: At, store: int) -> Mirror:
        found = self._mirrors.get((at, store))
        if found is None:
            own, loaded = self._own_of(at, store), self._compiled.loaded[self._device(at)]
            number, share = self._sender(own.spec, at), share_of(own.spec, at[0], len(self._training.replicas))
            found = self._mirrors[at, store] = Mirror(own.spec, number, share, loaded, own.dtype, self._start.seed)
        return found

    def own_state(self, at: At, store: int) -> Value:
        return host_view(self._own[at, store].state, self._compiled.loaded[self._device(at)].device)

    def model_state(self, at: At) -> Value:
        return host_view(self._models[at].values, self._compiled.loaded[self._device(at)].device)

    def is_finite(self, store: int, part: int, value: Value) -> bool:
        spec = self._training.stores[store].parts[part]
        return all_finite(counted([np.asarray(a) for a in value], spec, self._training.microbatches))

    def blames_weight(self, store: int, part: int, value: Value) -> bool:
        spec = self._training.stores[store]
        count, weighted = self._training.microbatches, spec.applies.weighted
        return is_weight_at_fault([np.asarray(a) for a in value], spec.parts[part], count, weighted=weighted)

    def filtered(self, at: At, message: wire.Contribution, value: Value, parameters: Value = None) -> tuple[Value, int]:
        encoder = self._encoder_of(at)
        compared = self._compared.get((at, message.store)) if parameters is None else parameters
        sent, arrays = encoder.encode(message, value, compared)
        return self._decoder.decode(sent, arrays), sum(spec.nbytes for spec in sent.specs)

    def _encoder_of(self, at: At) -> Encoder:
        found = self._encoders.get(at)
        if found is None:
            kernels = self._kernels(self._device(at))
            found = self._encoders[at] = Encoder(self._training.stores, at[0], self._start.seed, kernels)
        return found

    def settle(self, at: At, clock: int, stores: Sequence[int], counts: bool) -> None:
        if at in self._encoders:
            self._encoders[at].settle(clock, stores, counts=counts)

    def kept(self, at: At) -> Mapping[int, float]:
        return self._encoders[at].kept() if at in self._encoders else {}

    def talk(self, at: At, store: int, part: int, clock: int, value: Value) -> Talk | None:
        refuses, key = self._start.on_nonfinite != "apply", (store, part)
        if key not in self._seats:
            spec = self._training.stores[store]
            self._seats[key] = seats(self._training, spec, spec.parts[part])
        return self._encoder_of(at).talk(store, part, clock, value, refuses=refuses, seat=self._seats[key].get(at[0]))

    def flight(self, schedule: schedules.Schedule, rank: int, values: Sequence[Value]) -> Flying:
        return Flying(schedule, rank, self.total(values), self._pool)

    def total(self, values: Sequence[Value]) -> Arrays:
        """The sum over the replicas of one worker."""
        if len(values) == 1:
            return values[0]
        return [sum_of([np.asarray(v[i]) for v in values]) for i in range(len(values[0]))]

    def weighted(self, store: int, part: int, given: Sequence[tuple[Value, float]], share: float | None) -> Arrays:
        return site_sum(self._training.stores[store], part, given, share)

    def of_site(self, message: wire.Gossip, given: Sequence[tuple[Value, float]], share: float | None) -> Arrays:
        return for_leader(self._training, message, given, share)

    def load(self, worker: str, store: int, value: Value) -> None:
        spec = self._training.stores[store]
        split = len(spec.specs)
        program = self._compiled.loaded[self._zero[worker, store]]
        self._held[worker, store] = _Held(spec, program, list(value[:split]), list(value[split:]))

    def apply(
        self,
        worker: str,
        store: int,
        version: int,
        given: Sequence[tuple[Sequence[Value], float]],
        staleness: Sequence[int],
        full: float = 1.0,
        decays: Sequence[float] = (),
    ) -> None:
        held = self._held[worker, store]
        taken = self._given(held.spec, given, staleness, full, decays)
        results = applied(held.program, held.spec, [*held.params, *held.state], taken)
        if self._start.on_nonfinite != "apply":
            check_student(held.spec, results)
        split = len(held.spec.specs)
        held.params, held.state = list(results[:split]), list(results[split:])

    def _given(
        self, spec: StoreSpec, sent: Contributed, staleness: Sequence[int], full: float, decays: Sequence[float]
    ) -> list[Given]:
        contributions = [([a for part in parts for a in part], coefficient) for parts, coefficient in sent]
        return given_of(spec, contributions, staleness, full, decays)

    def couple(
        self, worker: str, action: Couple, sent: Mapping[int, Contributed], heard: Sequence[tuple[Sequence[int], Value]]
    ) -> Arrays:
        held = {store: self._held[worker, store] for store in action.stores}
        given = {
            a.store: self._given(held[a.store].spec, sent[a.store], a.staleness, a.full, a.decays)
            for a in action.applies
        }
        values = {store: [*h.params, *h.state] for store, h in held.items()}
        program = held[action.stores[0]].program
        shared, made = self._couplings.run(worker, action, program, values, given, heard)
        for store, buffers in made.items():
            split = len(held[store].params)
            held[store].params, held[store].state = buffers[:split], buffers[split:]
        return shared

    def uncouple(self, worker: str) -> None:
        self._couplings.clear(worker)

    def current(self, worker: str, store: int, version: int) -> tuple[Value, int | None]:
        spec, values = self._training.stores[store], self.newest(worker, store)
        if not spec.policy.pull_filters:
            return values, None
        copy = self._public_of(worker, store)
        _, sent = copy.advance(version, values)
        return copy.values or values, sum(np.asarray(a).nbytes for a in sent)

    def _public_of(self, worker: str, store: int) -> PublicCopy:
        spec = self._training.stores[store]
        if (worker, store) not in self._public:
            self._public[worker, store] = PublicCopy(spec, (self._start.seed, store), self._kernels(spec.home))
        return self._public[worker, store]

    def newest(self, worker: str, store: int) -> Arrays:
        """The parameters of a store at one of its homes."""
        held = self._held[worker, store]
        return host_view(held.params, held.program.device)

    def forget(self, worker: str, store: int) -> None:
        if (worker, store) in self._public:
            self._public[worker, store].forget()

    def final(self, worker: str, store: int) -> Value:
        held = self._held[worker, store]
        return host_view([*held.params, *held.state], held.program.device)

    def hand(self, worker: str, message: wire.TrainingMessage, value: Value) -> None:
        leaves = () if value is None else value
        if isinstance(message, wire.Source):
            self._source.setdefault(worker, {}).update(zip(message.slots, leaves, strict=True))
        elif isinstance(message, wire.OwnState):
            self._states[worker, message.store] = leaves
        elif isinstance(message, wire.ModelState):
            self._models[message.replica, message.stage].begin(leaves)
        elif isinstance(message, wire.Batch):
            fed = message.variant, dict(zip(message.slots, leaves, strict=True))
            self._batches.give(message.device, message.sequence, fed)

    def residents(self, worker: str) -> Iterable[Resident]:
        for at, model in self._models.items():
            if worker_of(self._device(at)) == worker:
                yield from self._of_stage(at)
                if model.specs:
                    yield Resident(of_stage(*at, "model", "state"), model.export, partial(model.restore, adopt=list))
        for store, spec in enumerate(self._training.stores):
            if worker_of(spec.copies[0]) == worker:
                yield Resident(of_home(spec.name, "values"), partial(self._values, worker, store), loaded)
                if spec.policy.home_filters:
                    both = partial(self._decoder.export, store), partial(self._decoder.restore, store)
                    yield Resident(of_home(spec.name, "decoder"), *both)
                if spec.policy.pull_filters:
                    copy = self._public_of(worker, store)
                    restore = copy.restore if spec.policy.clocked else copy.restart
                    yield Resident(of_home(spec.name, "public"), copy.export, restore)

    def _of_stage(self, at: At) -> Iterable[Resident]:
        """What a stage keeps of each store."""
        for store, spec in enumerate(self._training.stores):
            owner, mine = partial(of_stage, *at, spec.name), any(part.stage == at[1] for part in spec.parts)
            if mine and (spec.policy.home_filters or spec.policy.summed_filters):  # of a site, its leader's
                encoder = self._encoder_of(at)
                yield Resident(owner("filters"), partial(encoder.export, store), partial(encoder.restore, store))
            if spec.local is None or spec.parts[0].stage != at[1]:
                continue
            both = partial(self._export_own, at, store), partial(self._restore_own, at, store)
            yield Resident(owner("own"), *both)
            if isinstance(spec.policy.remote, Gossip) and at[0] in (
                spec.leaders or range(len(self._training.replicas))
            ):
                both = partial(self._export_mirror, at, store), partial(self._restore_mirror, at, store)
                yield Resident(owner("mirror"), *both)

    def _values(self, worker: str, store: int) -> Named:
        names = (buffer.name for buffer in self._training.stores[store].buffers)
        return dict(zip(names, self.final(worker, store) or (), strict=True))

    def _export_own(self, at: At, store: int) -> Named:
        return self._own[at, store].export() if (at, store) in self._own else {}

    def _restore_own(self, at: At, store: int, arrays: Named) -> None:
        if arrays:
            self._own_of(at, store).restore(arrays, adopt=list)

    def _export_mirror(self, at: At, store: int) -> Named:
        if (at, store) in self._mirrors:
            return self._mirrors[at, store].filtered.export()
        return self._copies[at, store].export() if (at, store) in self._copies else {}

    def _restore_mirror(self, at: At, store: int, arrays: Named) -> None:
        if self._training.stores[store].policy.mirrored:
            self._mirror_of(at, store).filtered.restore(arrays)
        elif arrays:
            self._copies_of(at, store).restore(arrays)

    def _device(self, at: At) -> str:
        return self._training.replicas[at[0]][at[1]]

    def _feed(self, step: Step, slots: Sequence[int], microbatch: int) -> Arrays:
        item, device, piece = step.start.item, step.program.device, self._pieces(step)[microbatch]
        leaves = [s for s in slots if s < self._training.batch_leaves]
        found = step.model.feed(slots) | beside_batch(self._plan, slots, self._start.seed, piece)
        if leaves and step.batch is not None:
            found |= of_batch(step.batch, leaves, microbatch, piece)
        elif leaves:
            found |= of_source(self._start, self._source[worker_of(device)], leaves, item.epoch, piece)
        return [found[s] for s in slots]

    def _pieces(self, step: Step) -> tuple[Piece, ...]:
        item = step.start.item
        return pieces(self._training, step.start.replica, item.sequence, item.start, item.size)

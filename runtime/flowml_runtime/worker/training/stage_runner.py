"""Runs one stage of one replica on one device: the steps that its replica machine starts.

The executor's thread gets everything that a training step needs from the stage runner: its share of the batch, the
parameters (as soon as the gate lets this clock read them), and a place to push gradients. When the machine decides that
a step is no longer needed, the step ends at the next task boundary or in the middle of a wait.

Fed batches may differ in shape. Each names the *variant* that runs on it: a loaded plan whose programs are for another
shape, and whose stores are those of the fit's own plan. All stages of a replica hear of it with their batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from flowml.errors import FlowmlError, WorkerLostError
from flowml.plan import ArraySpec
from flowml.policy import Gossip
from flowml.training.pieces import Piece, pieces
from flowml_runtime import service, wire
from flowml_runtime.execution.kernels import Kernels
from flowml_runtime.execution.lane import LARGE_BYTES
from flowml_runtime.execution.mailbox import Cancelled
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.services import EdgeServices, host_view
from flowml_runtime.execution.step_program import StepFault, StepProgram, run_step
from flowml_runtime.protocol.training.accumulator import Sum
from flowml_runtime.protocol.training.actions import Computed, Send, Start, StepFinished, Updated
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.weak import weakly
from flowml_runtime.worker.training.batches import Batches, Variants
from flowml_runtime.worker.training.examples import Fetched, beside_batch
from flowml_runtime.worker.training.exchange.mirrors import Mirrors
from flowml_runtime.worker.training.exchange.neighbours import Neighbours
from flowml_runtime.worker.training.exchange.reductions import Given, Reductions
from flowml_runtime.worker.training.exchange.sites import Member
from flowml_runtime.worker.training.filtered import Encoder
from flowml_runtime.worker.training.finite import all_finite, counted
from flowml_runtime.worker.training.model_state import HostedModel
from flowml_runtime.worker.training.own_values import OwnValues
from flowml_runtime.worker.training.pace import Pace
from flowml_runtime.worker.training.resident import Arrays, Resident, number, of_stage, row, row_of
from flowml_runtime.worker.training.run import Run
from flowml_runtime.worker.training.sums import Gradients, Sums, known

if TYPE_CHECKING:
    from flowml_runtime.worker.training.host import TrainingHost


class StageRunner(EdgeServices):
    """The services of a training step, and the thread that runs the steps."""

    def __init__(
        self, run: Run, host: TrainingHost, at: tuple[int, int], loaded: LoadedProgram, reductions: Reductions
    ) -> None:
        super().__init__(run.plan_id, loaded, host.worker.mailbox, run.sender, run.deadline_s, run.recorder)
        self.replica, self.stage = at
        self.run = run
        stage, adopt = at[1], weakly(self.adopt)
        self.machine = host.machine.stage(at)
        self._worker = host.machine
        self._reductions = reductions
        self._on_event = host.on_event
        self._on_fault = host.fail
        find = partial(host.worker.variant, device=loaded.name, driver=run.driver)
        self._variants = Variants(loaded, find, weakly(self.bind))
        self._starts: queue.SimpleQueue[Start | None] = queue.SimpleQueue()
        self._batches = Batches(run, self.device, weakly(self._in_vain))
        self._sums = Sums(run.training.stores, stage, loaded, run.number)
        self._own = {
            s: OwnValues(store, run.plan, loaded.tasks, self.replica)
            for s, store in enumerate(run.training.stores)
            if store.local is not None and store.parts[0].stage == stage
        }
        """By store the values that this replica updates itself."""
        self.model = HostedModel(run, at, adopt, loaded.device)
        self._shared = frozenset(s for s, store in enumerate(run.training.stores) if store.policy.shared)
        self._members = {
            s: Member(run, s, stage, self.replica, site)
            for s, store in enumerate(run.training.stores)
            if (site := store.sums_in(self.replica)) is not None
        }
        """By store the place of this replica in its site, if others are there, or if it updates own values. Then those
        that are alone exchange layers in the order of all: after their pushes. No two wait for each other."""
        self._neighbours = {
            s: (Mirrors if own.spec.policy.mirrored else Neighbours)(run, s, at[0], loaded, adopt, own.dtype)
            for s, own in self._own.items()
            if isinstance(own.spec.policy.remote, Gossip) and (s not in self._members or self._members[s].exchanges)
        }
        self._inside: list[tuple[int, int, int]] = []  # (store, part, steps) of the sums that this step waits for
        self.encoder = Encoder(run.training.stores, self.replica, run.start.seed, Kernels(loaded.device))
        run.encoders.append(self.encoder)
        places = Places.of(run.training)
        self._reads = {s for s, homes in enumerate(places.readers) if any(run.me in told for told in homes.values())}
        """The stores that are published here."""
        self._restored = run.restored
        self._compared: dict[int, Sequence[Array]] = {}
        """By store the parameters of this step, where filters compare gradients with them."""
        self._now = Start(run.number, *at, -1, wire.Item(sequence=0, epoch=0, start=0, size=0), 0)
        """The current step, or the last one."""
        self._pieces: tuple[Piece, ...] = ()  # its examples, by microbatch
        self._read_versions: dict[int, int] = {}
        self._held: dict[int, Sequence[Array]] = {}
        """By store the parameters that were taken last, if the next steps compute with them too."""
        self._fetched = Fetched()
        self._register()
        self._pace = Pace(dict(run.start.delays).get(run.me, ()), loaded.program.instructions)
        service.start(f"{loaded.name} run {run.number}", self._work, self._end)

    def _register(self) -> None:
        """Tell the run what lives here between steps."""
        for store, spec in enumerate(self.run.training.stores):
            owner, add = partial(of_stage, self.replica, self.stage, spec.name), self.run.residents.add
            if store in self._own:
                own = self._own[store]
                add(Resident(owner("own"), own.export, partial(own.restore, adopt=self.adopt)))
            found = self._neighbours.get(store)
            if found is not None and self._leads(store):
                add(Resident(owner("mirror"), found.export, found.restore))
            if any(part.stage == self.stage for part in spec.parts):
                add(Resident(owner("sums"), partial(self._sums.export, store), partial(self._sums.restore, store)))
                encoder = partial(self.encoder.export, store), partial(self.encoder.restore, store)
                add(Resident(owner("filters"), *encoder))
            if store in self._reads:
                add(Resident(owner("read"), partial(self._export, store), partial(self._restore, store)))

    def _export(self, store: int) -> Arrays:
        """What it has read of a store, and computes with in the next steps too."""
        version = self._read_versions.get(store)
        return {} if version is None else {"version": number(version), **row("held", self._held.get(store, ()))}

    def _restore(self, store: int, arrays: Arrays) -> None:
        if arrays:
            self._read_versions[store] = int(arrays["version"])
        if "held/0" in arrays:
            self._held[store] = row_of(arrays, "held")

    # Called by the machine thread, which holds the run's lock.

    def start(self, start: Start) -> None:
        self._starts.put(start)

    def abandon(self, clock: int) -> None:
        """Wake the step up wherever it waits, and refuse values that still arrive for it."""
        self._mailbox.cancel((self.plan_id, self.run.step_of(clock), self.device))
        self.run.changed.notify_all()

    def settle(self, clock: int, stores: Sequence[int], *, counts: bool) -> None:
        self._sums.settle(clock, stores, counts=counts)
        self.encoder.settle(clock, stores, counts=counts)

    def give(self, batch: wire.Batch, arrays: Sequence[Array]) -> None:
        self._batches.give(batch, arrays)

    def stop(self) -> None:
        """End the thread after the current task. The caller has marked the run as stopped."""
        self._mailbox.skip_to(self.plan_id, self.device, self.run.end)
        self._starts.put(None)
        self.outbox.close()
        self._sums.close()

    # The executor's thread.

    def _end(self, reason: str) -> None:
        self._on_fault(self.run.step_of(max(self._now.clock, 0)), "training", FlowmlError(reason))

    def _work(self) -> None:
        # no deadline: the thread sleeps until it has work or is closed
        while (start := self._starts.get()) is not None:
            self._now = start
            item = start.item
            self._pieces = pieces(self.run.training, self.replica, item.sequence, item.start, item.size)
            if not self.run.stopped:
                self._step(start.clock)
                self._mailbox.finish((self.plan_id, self.run.step_of(start.clock), self.device))
            self._on_event(StepFinished(self.run.number, start.replica, start.stage, start.clock, start.cause))

    def _step(self, clock: int) -> None:
        began, me = time.perf_counter(), threading.get_ident()
        self.run.waited[me] = 0
        self._fetched, self._inside = Fetched(), []
        self._pace.begin(clock)
        try:
            self._wait_until_restored(clock)
            self.model.start(self.run.step_of(clock), self._in_vain)
            run_step(self._choose(), self.run.step_of(clock), self)
            self._end_sums(self.run.step_of(clock))
            self.model.end(self.machine.cut.used)
            self._return_states(clock)
            self.outbox.flush()  # the report tells the bytes of all that this step has sent
            self._report(clock, time.perf_counter() - began - self.run.waited[me])
        except Cancelled:
            return
        except StepFault as fault:
            self._on_fault(self.run.step_of(clock), fault.node, fault.__cause__ or fault)
        except BaseException as error:
            self._on_fault(self.run.step_of(clock), "report", error)
        finally:
            self.outbox.flush()  # a home must get a stage's last contribution before it learns that the stage retired

    def _wait_until_restored(self, clock: int) -> None:
        """In a run that goes on, wait for the buffers of the snapshot: those here, and those of the homes."""
        run = self.run
        if run.restored and self._restored:
            return
        what = "the buffers of the snapshot from which the fit goes on"
        with run.changed:
            run.wait_for(
                lambda: run.restored and self._reads <= run.stores.keys(), self._in_vain, what, run.step_of(clock)
            )
        self._restored = True

    def _choose(self) -> StepProgram:
        """The program for the batch of this step. A fed batch is waited for here."""
        variant, item = "", self._now.item
        if self._batches.fed(item):
            try:
                variant = self._batches.wait(item, self.run.step_of(self._now.clock))
            except FlowmlError as error:
                raise StepFault("feed") from error
        self._variants.use(variant)
        return self._variants.program

    def _return_states(self, clock: int) -> None:
        """After the last step, send the driver the own optimizer state. That of the first replica stands for all."""
        if self.replica != self.run.training.live[0] or not self.machine.ends(clock):
            return
        ids: dict[str, Any] = {"plan_id": self.plan_id, "run": self.run.number, "cause": self._now.cause}
        for store, own in self._own.items():
            assert own.spec.local is not None
            message = wire.OwnState(**ids, store=store, replica=self.replica, specs=own.spec.local.state_specs)
            self.run.send(self.run.driver, message, host_view(own.state, self.loaded.device))

    def _report(self, clock: int, seconds: float) -> None:
        pushed, crossed = self.run.take_counts()
        if not pushed and not crossed and not self._fetched:
            return
        coded = self._pieces if self.run.training.code is not None else ()
        slots, values = self._fetched.sums(self.machine.cut.used, coded)
        now = self._now
        ids: dict[str, Any] = {"plan_id": self.plan_id, "run": self.run.number, "cause": now.cause, "item": now.item}
        message = wire.Report(
            **ids,
            replica=self.replica,
            clock=clock,
            slots=slots,
            seconds=seconds,
            pushed=pushed,
            crossed=crossed,
            specs=tuple(ArraySpec(v.shape, v.dtype.name) for v in values),
        )
        self.run.send(self.run.driver, message, values)

    # Services: called by the step on the executor's thread.

    def should_abandon(self, step: int) -> bool:
        self._pace.task()
        return self.run.stopped or self.machine.should_abandon(self._now.clock)

    def leaves_out(self, microbatch: int) -> bool:
        return self.machine.cut.leaves_out(microbatch, self._pace.computed_s())

    def computed(self) -> None:
        if self.machine.cut.finish():
            self._on_event(Computed(self.run.number, self.replica, self._now.stage))

    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]:
        arrays = super().receive(step, message, microbatch)
        if not arrays:
            self.machine.cut.lacks(microbatch)
        return arrays

    def send_failed(self, step: int, node: str, error: BaseException) -> None:
        if not isinstance(error, WorkerLostError):  # the driver already knows of a lost worker
            self._on_fault(step, node, error)

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Sequence[Array]:
        leaves = [s for s in slots if s < self.run.training.batch_leaves]
        found = self.model.feed(slots)
        found |= beside_batch(self.run.plan, slots, self.run.start.seed, self._pieces[microbatch])
        if leaves:
            found |= self._batches.examples(self._now.item, leaves, microbatch, self._pieces[microbatch], step)
        return [found[s] for s in slots]

    def _in_vain(self) -> bool:
        return self.machine.should_abandon(self._now.clock)

    def read(self, step: int, store: int, leaves: Sequence[int]) -> Sequence[Array]:
        own, member, clock = self._own.get(store), self._members.get(store), self._now.clock
        if store in self._shared:
            self._published(step, store)  # waits until its first value is here
            held = self.run.shared[store]
            self._read_versions[store] = held.version
            values = host_view(held.values[: held.params], held.program.device)
        elif own is None:
            values = self._published(step, store)
        elif member is not None and member.served and not member.leads:
            values = own.params = self.adopt(member.hear(clock, self._in_vain))
        else:
            if own.begin(clock):
                self._take(step, store, own)
            values = own.params
            if member is not None and member.served:
                member.tell(clock, host_view(values, self.loaded.device), self._now.cause)
            if store in self._neighbours:
                self._neighbours[store].begin(clock, own, self._now.cause)
        return self.adopt([values[i] for i in leaves])

    def _published(self, step: int, store: int, after: int = 0) -> Sequence[Array]:
        """The newest published parameters, once they are fresh enough for this step. A site gets them by its leader, of
        whom it hears once for each clock: those at the end of a step are the ones `after` it."""
        spec, heard = self.run.training.stores[store], self._now.clock + after
        member = None if spec.collective else self._members.get(store)  # else the leader's home publishes to its site
        if member is not None and not member.leads:
            return member.hear(heard, self._in_vain)
        with self.run.changed:
            if self.machine.takes(store, self._now.clock):
                fresh = partial(self.machine.may_read, store, self._now.clock)
                self.run.wait_for(fresh, self._in_vain, f"parameters of {spec.name!r} to be published", step)
                view = self.run.stores[store]
                self._read_versions[store], values = view.version, view.values
                if self.machine.took(store, self._now.clock):
                    self._held[store] = values
            else:
                values = self._held[store]
        if self.encoder.compares(store):
            self._compared[store] = values
        if member is not None and not member.served:
            member.tell(heard, values, self._now.cause, self._read_versions[store])
        return values

    def _take(self, step: int, store: int, own: OwnValues) -> None:
        values = self.adopt(self._published(step, store))
        with self.run.changed:
            what = f"optimizer state of {own.spec.name!r} from the driver"
            self.run.wait_for(lambda: store in self.run.states, self._in_vain, what, step)
            if not own.params:
                own.state = self.adopt(self.run.states[store])
        own.take(self._now.clock, values)

    def push(self, step: int, store: int, part: int, arrays: Sequence[Array]) -> None:
        own, inside = self._own.get(store), store in self._members
        given = Sum(known(arrays), self.machine.cut.weight(store))
        if own is None:
            with self.run.changed:
                pushes = self.machine.pushes(store, self._now.clock)
                total = self._sums.add(store, part, self._now.clock, given, pushes)
        else:
            total = given if inside else self._update(step, store, own, arrays)
        if total is None:
            return
        if inside:
            self._add_inside(step, store, part, total)
        else:
            self._leave(step, store, part, total)

    def _leads(self, store: int) -> bool:
        """Whether this replica stands for its site, or for itself."""
        return store not in self._members or self._members[store].leads

    def _add_inside(self, step: int, store: int, part: int, total: Sum[Gradients]) -> None:
        """Add up what the replicas of the site push. `_end_sums` waits for the sum."""
        spec, now = self.run.training.stores[store], self._now
        if not spec.sites_decide or (store in self._own and self._leads(store)):
            self._inside.append((store, part, total.weight))
        if spec.sites_decide:
            specs, weight = spec.parts[part].payload, total.weight
            told = self._worker.contribution(now, store, part, base_version=0, weight=weight, specs=specs, inside=True)
            send = partial(self._contribute, told, total.value, None)
        elif self._members[store].alone:
            self._members[store].give(part, now.clock, total.value.result(self.deadline_s))
            return
        else:
            given = Given(store, part, self.replica, now.clock, total.weight, now.cause)
            send = partial(self._reduce, self._reductions.push_inside, given, total.value)
        self._by_size(step, store, part, send)

    def _end_sums(self, step: int) -> None:
        """Do what needs the sums of the gradients of sites: updates of own parameters, and the pushes of leaders.

        Every replica waits for them, also one that needs none, because its next sum may begin only after this one.
        """
        for store, part, weight in self._inside:
            member, own, clock = self._members[store], self._own.get(store), self._now.clock
            summed = member.total(part, clock, self._in_vain, self.machine.given_up)
            if not member.leads and (own is None or member.served):
                continue
            found = self.adopt(summed)
            total = Sum(known(found), weight) if own is None else self._update(step, store, own, found)
            if total is not None and member.leads:
                self._leave(step, store, part, total)

    def _leave(self, step: int, store: int, part: int, total: Sum[Gradients]) -> None:
        """Send what this replica, or its site, contributes."""
        spec = self.run.training.stores[store]
        if store in self._shared:
            self._share(store, part, total.weight, total.value)
            return
        if spec.collective:
            self.run.count_push(store, part, spec.part_bytes(spec.parts[part]), self.run.me)
            given = Given(store, part, self.replica, self._now.clock, total.weight, self._now.cause)
            send = partial(self._reduce, partial(self._reductions.push, self.encoder), given, total.value)
        else:
            contribution = self._worker.contribution(
                self._now,
                store,
                part,
                base_version=self._read_versions.get(store, 0),
                weight=total.weight * (self._members[store].weight if store in self._members else 1),
                specs=spec.parts[part].payload,
            )
            send = partial(self._contribute, contribution, total.value, self._compared.get(store))
        self._by_size(step, store, part, send)

    def _by_size(self, step: int, store: int, part: int, send: Callable[[], None]) -> None:
        spec = self.run.training.stores[store]
        if spec.parts[part].nbytes < LARGE_BYTES:
            send()
        else:  # the backward pass continues meanwhile, also while filters encode
            self.outbox.put(send, lambda error: self.send_failed(step, f"store {spec.name}", error))

    def _share(self, store: int, part: int, weight: int, gradients: Gradients) -> None:
        """Update a store that the replicas here share, and tell the machine, which counts."""
        run, training, clock = self.run, self.run.training, self._now.clock
        arrays = host_view(gradients.result(self.deadline_s), self.loaded.device)
        counts = counted(arrays, training.stores[store].parts[part], training.microbatches)
        finite = run.start.on_nonfinite == "apply" or all_finite(counts)
        if finite:
            with self.recorder.record(
                self.device, "update", f"store {training.stores[store].name}", run.step_of(clock)
            ):
                run.shared[store].update(arrays, weight, training.microbatches, self._read_versions[store])
        else:
            run.refuse(store, part, clock, {self.replica: arrays}, "computes")
        run.count_push(store, part, 0, run.me)
        self._on_event(Updated(run.number, self.replica, store, clock, finite))

    def _update(self, step: int, store: int, own: OwnValues, gradients: Sequence[Array]) -> Sum[Gradients] | None:
        """Update the own parameters of a store. Returns what this step pushes of them; None if it pushes nothing."""
        clock, before = self._now.clock, own.params
        own.steps += 1
        finite = self.run.start.on_nonfinite == "apply" or all_finite(host_view(gradients, self.loaded.device))
        own.weigh(gradients if finite else ())
        if gradients and finite:  # there are none if none of the site could be applied
            with self.recorder.record(self.device, "update", f"store {own.spec.name}", step):
                own.update(gradients)
        elif gradients and self._leads(store):
            self.run.refuse(store, 0, clock, {self.replica: gradients}, "computes")
        self._exchange(store, own, before)
        with self.run.changed:
            if not self.machine.pushes(store, clock):
                return None
        value = known(own.params if own.spec.policy.mirrored else own.sent())
        sent = Sum(value, own.pushed() * self.run.training.microbatches)
        if own.mixes:
            own.take(clock, self.adopt(self._published(step, store, after=1)))
        return sent

    def _exchange(self, store: int, own: OwnValues, before: Sequence[Array]) -> None:
        """Exchange own parameters with neighbours, if the topology is a gossip. A site gets them by its leader."""
        clock, cause = self._now.clock, self._now.cause
        if store in self._neighbours:
            self._neighbours[store].end(clock, own, before, cause, self._in_vain)
        if store in self._members:
            self._members[store].pass_on(clock, own, self.adopt, cause, self._in_vain)

    def _contribute(self, contribution: Send, gradients: Gradients, parameters: Sequence[Array] | None) -> None:
        message: Any = contribution.message
        arrays = host_view(gradients.result(self.deadline_s), self.loaded.device)
        training = self.run.training
        terms, replica = self.run.terms.stores[message.store], message.replica
        inside = terms.keeps_inside(replica, summed=message.of_site)
        added = terms.tree is not None and terms.tree.adder_of(replica, summed=False) is not None
        counts = counted(arrays, training.stores[message.store].parts[message.part], training.microbatches)
        if self.run.start.on_nonfinite != "apply" and not all_finite(counts):
            self.run.refuse(message.store, message.part, message.clock, {self.replica: arrays}, "sends")
            message, arrays = msgspec.structs.replace(message, weight=0, empty=True, specs=()), ()
        elif self.encoder.filters(message.store) and not inside and not added:
            message, arrays = self.encoder.encode(message, arrays, parameters)
        nbytes = sum(spec.nbytes for spec in message.specs)
        for to in contribution.to:
            if not inside:
                self.run.count_push(message.store, message.part, nbytes, to)
            elif to != self.run.me:  # the push of the sum is counted
                self.run.count_crossing(message.store, nbytes)
            self.run.send(to, message, arrays)

    def _reduce(self, push: Callable[..., None], given: Given, gradients: Gradients) -> None:
        push(given, host_view(gradients.result(self.deadline_s), self.loaded.device))

    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Sequence[Array]) -> None:
        for slot, array in zip(slots, arrays, strict=True):
            if not self.model.fetch(slot, microbatch, array):
                self._fetched.add(slot, microbatch, array)

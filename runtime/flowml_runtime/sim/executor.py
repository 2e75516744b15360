"""Runs the steps of one stage of one replica in virtual time, as a `StageRunner` does with a thread.

It walks the instructions of the plan. A task takes its share of the compute time of the step; all else takes no time
here. The step waits where a value is missing, and goes on when something has happened on its worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from flowml.instructions import Feed, Fetch, Free, Instruction, Push, Read, Recv, Run, Send
from flowml_runtime import wire
from flowml_runtime.execution.step_program import StepFault
from flowml_runtime.protocol.rendezvous import Cancelled
from flowml_runtime.protocol.training.accounts import NO_ENTRIES
from flowml_runtime.protocol.training.accumulator import Accumulator, Sum
from flowml_runtime.protocol.training.actions import Computed, Start, StepFinished
from flowml_runtime.sim.kept import UNREAD, Kept
from flowml_runtime.sim.network import DRIVER, KINDS
from flowml_runtime.sim.program import At, StageProgram
from flowml_runtime.sim.sites import members, neighbours
from flowml_runtime.sim.values import Value
from flowml_runtime.worker.training.own_values import OwnRhythm

if TYPE_CHECKING:
    from flowml_runtime.sim.node import Node
    from flowml_runtime.sim.world import World

_TASK = 2
"""The kind of the event that a task is done; see `network.KINDS`."""


class Executor:
    """The steps of one stage. Its node calls `walk` when something has happened that the step may wait for."""

    # There are more attributes than the small table of an instance without slots holds.
    _OF_STAGE = "at waits receives _node _world _clock _arithmetic _counts _program _machine _bound _machine_number"
    _KEPT = "_gathered _taken _own _members _neighbours _exchanged"
    _OF_STEP = "_step _next _position _state _seconds _began _waited _stalled _computes_since _computes _given _inside"
    __slots__ = (*_OF_STAGE.split(), *_KEPT.split(), *_OF_STEP.split(), "_updated", "_abandoned", "_awaits")

    def __init__(self, node: Node, at: At, program: StageProgram) -> None:
        self.at = at
        self.waits = False  # whether a step waits for something on its worker
        self._node, self._world, self._clock = node, node.world, node.world.clock
        self._arithmetic = node.world.values.computes
        self._counts = node.counts  # those of its run, which a step may outlive
        self._program = program
        self._machine = node.machine.stage(at)
        self._bound = self._world.bound(program)
        self.receives = self._bound.receives  # whether it waits for values of other stages
        self._machine_number = self._world.machine(node.number, program.device)
        self._gathered: dict[tuple[int, int], Accumulator[Value]] = {}
        self._step: Start | None = None
        self._next = self._position = 0  # of the steps of `_bound`, and of instructions in the program
        self._state: Any = None
        self._seconds = self._began = self._waited = 0.0  # `_waited` is for other replicas and homes
        self._stalled = math.inf  # since when it waits for them; infinite if it does not
        self._computes_since = math.inf  # when the first task of the step began; infinite before
        self._computes = self._abandoned = False
        self._awaits = False  # whether the step waits for what the driver gives it
        self._given: list[Value] | None = None  # what the Recv at this position waits for: empty until it is here
        self._taken = [UNREAD] * len(self._world.terms.stores)  # what each store was read with last
        own = {
            store: OwnRhythm(self._world.terms.stores[store].policy)
            for store in self._world.layout.local
            if self._world.terms.stores[store].stages[0] == at[1]
        }
        self._own: Mapping[int, OwnRhythm] = own or NO_ENTRIES  # the stores whose parameters it updates itself
        self._members = members(node, at, own)
        self._neighbours = neighbours(node, at, own, self._members)
        self._exchanged = (-1, -1)  # (store, clock) of the newest round of gossip that is over
        self._inside: list[tuple[int, int, int]] = []  # (store, part, weight) of the sums that this step waits for
        self._updated = -1  # the own store that this step has updated last

    def kept(self) -> Kept:
        """What it keeps between steps, for a snapshot."""
        return Kept(self._node, self.at, self._gathered, self._taken, self._own, self._neighbours)

    def start(self, step: Start) -> None:
        """Begin a step. The next `walk` runs it."""
        world = self._world
        if self.receives:
            self._node.mailbox.advance(self.at, self._number(step))
        self._step, self._next, self._given, self._abandoned, self._updated, self._inside = step, 0, None, False, -1, []
        self._seconds = world.seconds(self._machine_number, step)
        self._awaits = self._node.given or (self._arithmetic and world.is_short(step.item))
        if not self._awaits:
            self._begin(step)
        self._began, self._waited, self._stalled, self._computes_since = world.clock.now, 0.0, math.inf, math.inf
        self.waits = True

    def _begin(self, step: Start) -> None:
        """What the driver gives the step is here. A batch says which programs run on it."""
        world, self._awaits = self._world, False
        variant = self._node.batches.take(self._program.device, step.item.sequence) or ""
        if self._arithmetic and (program := world.program(self.at, variant)) is not self._program:
            self._program, self._bound = program, world.bound(program)
        self._state = world.values.begin(self.at, step, self._leaves_out)

    def abandon(self, clock: int) -> None:
        """Leave the step of `clock` at the next task boundary, and drop values that still arrive for it."""
        if self.receives:
            self._node.mailbox.cancel_step(self.at, self._node.start.run + clock)
        self._abandoned = True

    def stop(self) -> None:
        """The run is over. A step that only reads and pushes goes on until it has to wait: what it sends is late."""
        self._step = self._step if self._world.outlives else None

    def settle(self, clock: int, stores: Sequence[int], *, counts: bool) -> None:
        for gathered in (g for (store, _), g in self._gathered.items() if store in stores):
            (gathered.adopt if counts else gathered.discard)(clock)
        pushed = [s for s in stores if not self._world.terms.stores[s].forwarded]
        self._world.values.settle(self.at, clock, pushed, counts)

    def walk(self) -> None:
        """Go on until the step is over, a task takes time, or something is missing."""
        step, node = self._step, self._node
        if step is None or self._computes:
            return
        if self._stalled < math.inf:
            self._waited += self._clock.now - self._stalled
            self._stalled = math.inf
        if self._awaits and not (self._abandoned and self._machine.should_abandon(step.clock)):
            if node.lacks(self.at, step.item):
                self._stalled = self._clock.now
                return
            self._begin(step)
        steps = self._bound.steps
        while node.lives:
            over = self._abandoned and self._machine.should_abandon(step.clock)
            if over or self._next == len(steps):
                if over or not self._inside or self._end_sums(step):
                    self._finish(step)
                else:
                    self._stalled = self._clock.now
                return
            self._position, do, instruction = steps[self._next]
            if not do(self, step, instruction):
                if not self._computes and type(instruction) is not Recv:
                    self._stalled = self._clock.now
                return
            self._next += 1

    def _leaves_out(self, microbatch: int) -> bool:
        return self._machine.cut.leaves_out(microbatch, self._world.clock.now - self._computes_since)

    def _number(self, step: Start) -> int:
        """The number of a step in the mailbox. It is unique over all fits of the plan."""
        return step.run + step.clock

    def _finish(self, step: Start) -> None:
        self._step, self.waits = None, False
        if self._next == len(self._bound.steps):
            if self._own:
                self._return_states(step)
            self._report(step)
        self._node.tell(StepFinished(step.run, step.replica, step.stage, step.clock, step.cause))

    def _return_states(self, step: Start) -> None:
        """After the last step, send the driver the own optimizer state. That of the first replica stands for all."""
        if step.replica != self._world.places.first or not self._machine.ends(step.clock):
            return
        for store in self._own:
            message = wire.OwnState(**self._node.ids, cause=step.cause, store=store, replica=step.replica)
            self._node.send(DRIVER, message, self._world.values.own_state(self.at, store))

    def _report(self, step: Start) -> None:
        world = self._world
        pushed, crossed = self._node.counts.take()
        slots, arrays = world.values.report(self._state) or ((), None)
        if not slots and not pushed and not crossed:
            return
        message = wire.Report(
            plan_id=self._node.start.plan_id,
            run=self._node.start.run,
            cause=step.cause,
            replica=step.replica,
            clock=step.clock,
            item=step.item,
            slots=slots,
            seconds=world.clock.now - self._began - self._waited,
            pushed=pushed,
            crossed=crossed,
        )
        self._node.send(DRIVER, message, arrays)

    # The instructions. Each returns whether it is done; if not, it is tried again when something has happened.

    @staticmethod
    def action(world: World, instruction: Instruction) -> Callable[[Executor, Start, Any], bool]:
        """What carries out an instruction."""
        if isinstance(instruction, Read | Push) and world.is_plain(instruction.store):
            return Executor._read_plain if isinstance(instruction, Read) else Executor._push_plain
        return Executor._DO[type(instruction)]

    def _read_plain(self, step: Start, read: Read) -> bool:
        store, machine = read.store, self._machine
        if machine.takes(store, step.clock):
            if not machine.may_read(store, step.clock):
                return False
            self._taken[store] = self._node.shown[store]
            machine.took(store, step.clock)
        return self._perform(step, self._taken[store])

    def _push_plain(self, step: Start, push: Push) -> bool:
        total = self._gather(step, push.store, push.part, self._value(step))
        if total is not None:
            self._leave(step, push.store, push.part, total)
        return True

    def _read(self, step: Start, read: Read) -> bool:
        if self._world.terms.stores[read.store].shared:
            return self._read_shared(step, read.store)
        own = self._own.get(read.store)
        if own is None:
            shown = self._shown(step, read.store)
            return shown is not None and self._perform(step, shown)
        shown, member = None, self._members.get(read.store)
        followed = member is not None and member.served and not member.leads and own.began
        if own.begin(step.clock) or followed:
            shown = self._shown(step, read.store)
            if shown is None or read.store not in self._node.states:
                return False
            own.took(step.clock)
        if followed and shown is not None:
            self._world.values.follow(self.at, read.store, shown[1])
            shown = None
        self._perform(step, shown)
        if member is not None and member.served and member.leads:
            member.tell(step, step.clock, self._world.values.params(self.at, read.store))
        if read.store in self._neighbours:
            self._neighbours[read.store].begin(step)
        return True

    def _read_shared(self, step: Start, store: int) -> bool:
        """Read the newest value of a store that the replicas here share, once its first one is there."""
        if self._shown(step, store) is None:
            return False
        v = self._node.shared.get(store, 0)
        self._taken[store] = v, self._world.values.current(self._node.name, store, v)[0]
        return self._perform(step, self._taken[store])

    def _shown(self, step: Start, store: int, after: int = 0) -> tuple[int, Value] | None:
        """The newest version of a store that is fresh enough for this step. A site gets it by its leader, each clock's
        once: at the end of a step it is that of the clock `after`."""
        member = self._members.get(store)
        if member is not None and not member.leads and not member.collective:
            value = member.hear(step.clock + after)
            return None if value is None else (0, value)
        if self._machine.takes(store, step.clock):
            if not self._machine.may_read(store, step.clock):
                return None
            self._taken[store] = self._node.shown[store]
            self._machine.took(store, step.clock)
        shown = self._taken[store]
        if member is not None and not member.collective and not member.served:
            member.tell(step, step.clock + after, shown[1], shown[0])
        return shown

    def _recv(self, step: Start, recv: Recv) -> bool:
        given = self._given
        if given is None and recv.microbatch and self._leaves_out(recv.microbatch):
            return True
        if given is None:
            self._given = given = []
            key = (self.at, self._number(step), recv.message, recv.microbatch)
            try:
                there = self._node.mailbox.claim(key, given)
            except Cancelled:
                return False
            if there is not None:
                given.extend(there)
        if not given:
            return False
        self._given = None
        if given[0] is None:
            self._machine.cut.lacks(recv.microbatch)
            return True
        return self._perform(step, given[0])

    def _run(self, step: Start, run: Run) -> bool:
        world = self._world
        share, clock = self._program.shares[self._position], self._clock
        if run.microbatch and self._leaves_out(run.microbatch):
            return self._perform(step)
        delayed = world.delays and self._position in self._bound.paced
        if not share and not delayed:
            return self._perform(step) and self._end_task(step)
        if clock.now < self._computes_since:
            self._computes_since = clock.now
        seconds = self._seconds * share
        if delayed:
            seconds += world.delay(self._node.name, step.clock) / len(self._bound.paced)
        self._computes, self.waits = True, False
        clock.put(clock.now + seconds, self._node.number * KINDS + _TASK, self._computed, ())
        return False

    def _computed(self) -> None:
        self._computes = False
        step = self._step
        if step is None or not self._node.lives:
            return
        self.waits = True
        if not (self._abandoned and self._machine.should_abandon(step.clock)):
            if self._arithmetic:
                self._value(step)
            self._end_task(step)
            self._next += 1
        self.walk()

    def _end_task(self, step: Start) -> bool:
        """Tell the machine if a microbatch is computed, and it wants to know."""
        if self._position in self._bound.ends and self._machine.cut.finish():
            self._node.note(Computed(step.run, step.replica, step.stage))
        return True

    def _send(self, step: Start, send: Send) -> bool:
        edge = self._program.edges[send.message]
        key = (edge.to, self._number(step), send.message, send.microbatch)
        left_out = send.microbatch and self._leaves_out(send.microbatch)
        self._world.send_edge(self._node.name, edge, key, None if left_out else self._value(step))
        return True

    def _push(self, step: Start, push: Push) -> bool:
        store, part, own = push.store, push.part, self._own.get(push.store)
        if store in self._members:
            value = self._value(step)
            whole = Sum(value, self._world.terms.microbatches)
            total = self._gather(step, store, part, value) if own is None else whole
            if total is not None:
                self._add_inside(step, store, part, total)
            return True
        if own is None:
            total = self._gather(step, store, part, self._value(step))
        elif self._lacks_centre(step, store, own):
            return False
        else:
            if self._updated != store:  # once, although the push may be tried again
                self._update(step, store, own, self._value(step))
            if not self._exchange(step, store):
                return False
            total = self._pushed(step, store, own)
        if total is not None and self._world.terms.stores[store].shared:
            return self._update_shared(step, store, part, total)
        if total is not None:
            self._leave(step, store, part, total)
        return True

    def _update_shared(self, step: Start, store: int, part: int, total: Sum[Value]) -> bool:
        """Update a store that the replicas here share. The step waits for its lock, and until the update is made."""
        world, node = self._world, self._node
        seconds = world.homes.seconds(sum(world.sizes.parts[store]), self._node.number)
        if not seconds:
            self._leave(step, store, part, total)
            return True
        node.locked = {**node.locked, store: (until := max(node.locked.get(store, 0.0), world.clock.now) + seconds)}
        self._computes, self.waits = True, False
        world.clock.put(until, node.number * KINDS + _TASK, self._has_updated, (step, store, part, total))
        return False

    def _has_updated(self, step: Start, store: int, part: int, total: Sum[Value]) -> None:
        self._computes = False
        if self._step is not step or not self._node.lives:
            return
        self.waits = True
        self._leave(step, store, part, total)
        self._next += 1
        self.walk()

    def _leads(self, store: int) -> bool:
        return store not in self._members or self._members[store].leads

    def _add_inside(self, step: Start, store: int, part: int, total: Sum[Value]) -> None:
        """Add up what the replicas of the site push. `_end_sums` waits for the sum where it is needed."""
        if self._members[store].decides:
            self._send_inside(step, store, part, total)
            return
        self._inside.append((store, part, total.weight))
        self._members[store].add(step, part, total)

    def _send_inside(self, step: Start, store: int, part: int, total: Sum[Value]) -> None:
        """Send what this replica has for the sum of a site that decides what is in it, for which its leader waits."""
        if store in self._own and self._leads(store):
            self._inside.append((store, part, total.weight))
        node = self._node
        sent = node.machine.contribution(step, store, part, base_version=0, weight=total.weight, inside=True)
        node.contribute(self.at, sent, total.value, self._counts)

    def _end_sums(self, step: Start) -> bool:
        """Do what needs the sums of sites, as a stage runner does. Returns whether all of it is done."""
        while self._inside:
            store, part, weight = self._inside[0]
            member, own = self._members[store], self._own.get(store)
            found = [] if self._updated == store else member.total(part, step.clock, self._machine.given_up)
            if not found and self._updated != store:
                return False
            if member.leads or (own is not None and not member.served):  # others need no sum, but may relay it
                if own is None:
                    self._leave(step, store, part, Sum(found[0], weight))
                elif found:
                    self._update(step, store, own, found[0])
                if own is not None and (not self._exchange(step, store) or self._lacks_centre(step, store, own)):
                    return False
                total = None if own is None else self._pushed(step, store, own)
                if total is not None and member.leads:
                    self._leave(step, store, part, total)
            self._inside.pop(0)
        return True

    def _exchange(self, step: Start, store: int) -> bool:
        """Exchange own parameters with neighbours, in a gossip. Returns whether that is over."""
        if store in self._neighbours and self._exchanged != (store, step.clock):
            if not self._neighbours[store].end(step):
                return False
            self._exchanged = (store, step.clock)
        return store not in self._members or self._members[store].pass_on(step)

    def _lacks_centre(self, step: Start, store: int, own: OwnRhythm) -> bool:
        """Whether the step ends with a pull to global parameters that are not here yet."""
        return own.mixes and self._machine.pushes(store, step.clock) and self._shown(step, store, after=1) is None

    def _pushed(self, step: Start, store: int, own: OwnRhythm) -> Sum[Value] | None:
        """What the step pushes of own parameters, which are up to date; None if it pushes nothing."""
        if not self._machine.pushes(store, step.clock):
            return None
        mixed = self._shown(step, store, after=1) if own.mixes else None
        value = self._world.values.own(self.at, store, step.clock, None if mixed is None else mixed[1])
        return Sum(value, own.pushed() * self._world.terms.microbatches)

    def _leave(self, step: Start, store: int, part: int, total: Sum[Value]) -> None:
        """Send what this replica, or its site, contributes."""
        world, node = self._world, self._node
        weight, terms = total.weight, world.terms.stores[store]
        if terms.collective:
            world.collectives.push(node.name, step, store, part, weight, total.value)
            return
        if store in self._members:
            weight *= self._members[store].weight
        base = self._taken[store][0]
        sent = node.machine.contribution(step, store, part, base_version=base, weight=weight)
        if not terms.shared:
            node.contribute(self.at, sent, total.value, self._counts)
            return
        self._counts.push(store, part, 0, crosses=False)
        world.share(node, step, sent.message, total.value)

    def _update(self, step: Start, store: int, own: OwnRhythm, gradient: Value) -> None:
        """Update the own parameters of a store."""
        world, node = self._world, self._node
        own.steps += 1
        refused = node.start.on_nonfinite != "apply" and not world.values.is_finite(store, 0, gradient)
        world.values.update(self.at, store, gradient, refused=refused)
        if refused and self._leads(store):
            world.refuse(node, store, 0, step.clock, {step.replica: gradient}, "computes")
        self._updated = store
        if store in self._neighbours:
            self._neighbours[store].updated(step)

    def _gather(self, step: Start, store: int, part: int, own: Value) -> Sum[Value] | None:
        """What the step pushes; None if it does not push, and leaves its gradient here."""
        pushes, weight = self._machine.pushes(store, step.clock), self._machine.cut.weight(store)
        if self._world.terms.stores[store].every == 1:
            return Sum(own, weight) if pushes else None
        gathered = self._gathered.get((store, part))
        if gathered is None:
            gathered = self._gathered[store, part] = Accumulator(partial(self._world.values.add, self.at, store, part))
        if pushes:
            return gathered.push(step.clock, own, weight)
        gathered.gather(step.clock, own, weight)
        return None

    def _perform(self, step: Start, given: Any = None) -> bool:
        if self._arithmetic:
            self._value(step, given)
        return True

    def _value(self, step: Start, given: Any = None) -> Value:
        """Carry out the arithmetic of the instruction."""
        try:
            return self._world.values.perform(self._state, self._position, given)
        except StepFault as fault:
            self._world.fail(self._node, self._number(step), fault.__cause__ or fault, fault.node)
            return None

    def _keep(self, step: Start, instruction: Feed | Fetch | Free) -> bool:
        return self._perform(step)

    _DO: ClassVar[dict[type, Callable[[Executor, Start, Any], bool]]] = {
        **dict.fromkeys((Feed, Fetch, Free), _keep),
        Read: _read,
        Recv: _recv,
        Run: _run,
        Send: _send,
        Push: _push,
    }

"""The driver's side of a simulated cluster. A fit uses it like that of real workers: its messages go to a `World`.

The clock stands still while the driver works. `next` lets events happen until one of them is a message to the driver.
"""

from __future__ import annotations

import gc
import math
import queue
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, TypeVar

from flowml.callers import warn
from flowml.devices import Device, worker_of
from flowml.errors import FlowmlError, PlacementError, SimulationError, WorkerLostError
from flowml.instructions import Fetch
from flowml.placement.links import SAME_PROCESS
from flowml.plan import Plan
from flowml.sim import AT_ONCE, Churn, ComputeModel, ComputeTimes, Crash, Fault, Homes, NetworkModel
from flowml_runtime import wire
from flowml_runtime.driver.loaded_plan import LoadedPlan, loaded
from flowml_runtime.driver.session import PlanHandler
from flowml_runtime.driver.training.training_session import Simulated
from flowml_runtime.execution.programs import ExecutableCache
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.membership.advice import LEAVE_OUT
from flowml_runtime.protocol.training.driver import TrainingDriver
from flowml_runtime.sim.arithmetic import Compiled
from flowml_runtime.sim.copies import SimulatedCopies
from flowml_runtime.sim.faults import NetworkFaults
from flowml_runtime.sim.heap import Clock
from flowml_runtime.sim.members import Absence, SimulatedMembers, absences
from flowml_runtime.sim.native.kit import USUAL, compiled
from flowml_runtime.sim.network import DRIVER, KINDS
from flowml_runtime.sim.pages import HugePages
from flowml_runtime.sim.parallel import Team
from flowml_runtime.sim.partition import firsts, lookahead, processes, why_not
from flowml_runtime.sim.post import Here
from flowml_runtime.sim.values import NO_ARRAYS, Nothing, Values
from flowml_runtime.sim.world import Layout, World

T = TypeVar("T")
_CRASH = 4
"""The kind of the event that a worker stops; see `network.KINDS`."""
_BETWEEN = 0x9E3779B97F4A7C15F39CC0605CEDC835
"""An odd number, so that the order of runs matters to their hash."""
_TIMER = -1
"""The label of the event that the driver has waited long enough."""
_ANSWERED = frozenset[type]({wire.Ask, wire.Settled})
"""Messages that the driver answers, or must know for its answers. They may overtake those of `_PATIENT`."""
_PATIENT = frozenset[type]({wire.Report, wire.Forwarded, wire.Commit, wire.Staleness, wire.NonFinite, wire.Traffic})
"""Messages that say what has happened, and of which no more events come."""
_MOST_LATER = 50_000
"""So many of them wait at most. They take about 25 MB."""


@dataclass(frozen=True)
class Models:
    """What a simulated cluster consists of."""

    workers: int
    compute: ComputeModel
    network: NetworkModel
    seed: int
    faults: tuple[Fault, ...] = ()
    homes: Homes = AT_ONCE
    devices: int = 1
    """The devices of each worker."""
    jobs: int | None = None
    """How many processes simulate; None lets `partition` decide."""
    compiled: bool = False
    """Whether the simulator runs as machine code."""
    given: tuple[Fault | Churn, ...] = ()
    """The faults as they were given: in a fit that goes on workers also come back."""

    @cached_property
    def all_devices(self) -> tuple[Device, ...]:
        """The devices, in the order of workers."""
        each = range(self.devices)
        return tuple(Device(f"worker:{i}/cpu:{d}") for i in range(self.workers) for d in each)

    @property
    def pause_s(self) -> float:
        """How long a fit stands still when its workers change."""
        return max((fault.pause_s for fault in self.given if isinstance(fault, Churn)), default=0.0)


@dataclass(frozen=True)
class _Loaded:
    """A plan that simulated workers have loaded. `values` makes the values of one fit."""

    handle: LoadedPlan
    layout: Layout
    values: Callable[[wire.StartTraining], Values]
    compiled: Compiled | None = None
    """What it computes with, if it does."""


class SimulatedSession:
    """Runs training plans in virtual time. Not thread-safe; one fit at a time."""

    def __init__(self, models: Models, *, arithmetic: bool) -> None:
        self.name = DRIVER
        self.remedy = LEAVE_OUT
        self.recorder = Recorder()
        self.arithmetic = arithmetic
        self.deadline_s = wire.DEADLINE_S
        self._models = models
        self._kit = compiled() if models.compiled else USUAL
        self._numbers = {worker_of(f"worker:{i}"): i for i in range(models.workers)}
        self._plans: dict[str, _Loaded] = {}
        self._handlers: dict[str, PlanHandler] = {}
        self._ids = count()
        self._paused = False
        """Whether the collector of cyclic garbage is off until the end of the fit."""
        self._cache = ExecutableCache()
        self._begun: tuple[str, int] | None = None
        """The plan and the run of `_world`. The workers of a run get one StartTraining each."""
        self._passed = 0.0
        """The seconds of the runs of the fit before that of `_world`, and between them."""
        self._members: SimulatedMembers | None = None
        """The members during a fit that goes on without workers that are lost; None: all workers are there."""
        self._copies: SimulatedCopies | None = None
        """What workers keep of each other's state in the newest fit with `replicate=`."""
        self._until = math.inf
        """The newest time until which a fit waits for messages."""
        self._team: Team | None = None
        """The processes of a run that goes on, if there are several."""
        self._later: deque[Any] = deque()
        """Messages that wait until there is time for them, because other processes are not as far."""
        self._due = 0
        """How many of them come before any more events."""
        self._world: World | None = None
        """The run of a fit that goes on."""
        self._simulated: Simulated | None = None
        """What the runs of the fit took until now."""

    @property
    def driver(self) -> type[TrainingDriver]:
        return self._kit.driver

    @property
    def models(self) -> Models:
        return self._models

    @property
    def time(self) -> SimulatedSession:
        return self

    @property
    def endpoint(self) -> SimulatedSession:
        return self

    def check_owner(self) -> None:
        """A simulation has no processes between fits, so a fork may go on with its copy."""

    def check_workers(self, so: str) -> None:
        """Called before values are put on workers that keep them."""
        raise SimulationError(
            f"simulated workers keep no values, so {so}; give the arrays to fit() of an fm.Trainer, or use "
            "fm.Cluster.local()"
        )

    def keeper(self, fit: str) -> SimulatedCopies:
        """What workers keep of each other's state during a fit. Raises SimulationError without arithmetic."""
        if not self.arithmetic:
            raise SimulationError(
                "replicate= copies values, and without arithmetic simulated workers have none, so it is not known how "
                "long copies take; give fm.SimulatedCluster(..., arithmetic=True), or leave replicate out"
            )
        self._copies = SimulatedCopies(fit, self.now, self._was_there)
        return self._copies

    def _was_there(self, worker: str, since_s: float) -> bool:
        return self._members is None or self._members.was_there(worker, since_s, self.now())

    def begin_fit(self, *, goes_on: bool) -> None:
        """A fit begins, and the times of faults count from here. `goes_on`: workers may go and come in it."""
        self._passed, self._simulated = 0.0, None
        models = self._models
        away = absences(models.given, models.workers)
        self._members = SimulatedMembers(models.all_devices, away) if goes_on else None

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the workers that are there."""
        members = self._heard_of()
        return self._models.all_devices if members is None else members.devices

    @property
    def leaving(self) -> frozenset[str]:
        """The workers that have given notice."""
        members = self._heard_of()
        return frozenset() if members is None else members.leaving

    def _heard_of(self) -> SimulatedMembers | None:
        """The members as they are now."""
        members = self._members
        if members is not None:
            members.go_on(self.now())
        return members

    def pass_until_there(self, workers: Sequence[str]) -> None:
        """Let the time pass until workers are there and do not leave. Raises WorkerLostError if one does not return."""
        members = self._heard_of()
        while members is not None and (missing := self._missing(members, workers)):
            if members.next_s == math.inf:
                raise WorkerLostError(
                    f"{', '.join(sorted(missing))} does not return in this simulation; give on_loss='shrink' or "
                    "replicas='elastic', or an fm.sim.Churn in which it does",
                    worker=min(missing),
                )
            self._passed = members.next_s
            members.go_on(members.next_s)

    @staticmethod
    def _missing(members: SimulatedMembers, workers: Sequence[str]) -> set[str]:
        return set(workers) - ({device.worker for device in members.devices} - members.leaving)

    @staticmethod
    def beside(name: str, act: Callable[[], None], failed: Callable[[str], None]) -> None:
        """Do something beside a run, which takes no virtual time."""
        act()

    def load(
        self, plan: Plan, meanwhile: Callable[[], None] = lambda: None, rehearsing: Collection[str] = ()
    ) -> LoadedPlan:
        """Load a plan on the simulated workers."""
        if plan.training is None:
            raise SimulationError(
                f"{plan.name!r} is a call, and a SimulatedCluster runs only fits of fm.Trainer; call it on "
                "fm.Cluster.local(), or look at the estimate of its plan, as in fm.compile(fn, *args, devices=...)"
            )
        workers = tuple(dict.fromkeys(worker_of(p.device) for p in plan.programs))
        meanwhile()
        handle = loaded(f"simulated-{next(self._ids)}", plan, workers, 1, None, {})
        compiled = Compiled(plan, self._cache, self._compiled) if self.arithmetic else None
        values = self._nothing(plan) if compiled is None else compiled.values
        self._plans[handle.plan_id] = _Loaded(handle, self._kit.layout.of(plan), values, compiled)
        return handle

    def _compiled(self, plan_id: str) -> Compiled:
        found = self._plans[plan_id].compiled
        assert found is not None
        return found

    def reload(self, handle: LoadedPlan) -> LoadedPlan:
        return handle

    def release(self, handle: LoadedPlan) -> None:
        self._plans.pop(handle.plan_id, None)
        self._handlers.pop(handle.plan_id, None)

    def explained(self, error: PlacementError, what: str) -> FlowmlError:
        return error

    def unregister(self, plan_id: str) -> None:
        self._handlers.pop(plan_id, None)

    def register(self, plan_id: str, handler: PlanHandler) -> None:
        """Pass every later message of this plan to `handler`. A fit does so before it begins, and another after it."""
        self._handlers[plan_id] = handler
        self._later.clear()
        self._due = 0
        if self._team is not None:
            team, self._team = self._team, None
            team.end()
        self._end()
        if self._paused:
            self._paused = False
            gc.enable()

    def _end(self) -> None:
        """Keep of the newest run what is known of it."""
        if self._world is not None:
            clock, self._world, world = self._world.clock, None, self._world
            self._passed += clock.now
            before = self._simulated
            if before is None:
                self._simulated = Simulated(clock.now, clock.trace_hash, clock.events)
            else:
                trace_hash, events = _both(before.trace_hash, clock.trace_hash), before.events + clock.events
                self._simulated = Simulated(self._passed, trace_hash, events)
            world.clear()

    def tell(self, worker: str, message: wire.Wire) -> None:
        """Messages about steps that are overdue are not needed here."""

    # The endpoint.

    def send(self, peer: str, message: wire.Wire, arrays: Sequence[Any] = ()) -> None:
        """Send a message of the driver. A StartTraining begins a run, with a clock at 0."""
        if not isinstance(message, wire.TrainingMessage):
            raise SimulationError(f"a simulated worker has no use for {type(message).__name__}")
        if isinstance(message, wire.StopTraining):  # the run is over, and nothing happens in it any more (`register`)
            return
        if isinstance(message, wire.StartTraining) and (message.plan_id, message.run) != self._begun:
            self._begin(message)
        if self._world is not None:
            full = isinstance(message, wire.Contribution) and not message.empty
            self._world.deliver(peer, message, arrays or (NO_ARRAYS if message.specs or full else None))

    def way(self, peer: str) -> str:
        return SAME_PROCESS

    def _begin(self, start: wire.StartTraining) -> None:
        own, models = self._plans[start.plan_id], self._models
        self._begun = (start.plan_id, start.run)
        if self._simulated is not None:  # this is not the first run of the fit
            self._passed += models.pause_s
        if gc.isenabled() and not self.arithmetic:  # it would look at the state of all workers again and again
            self._paused = True
            gc.disable()
        driver, layout = self._handlers[start.plan_id].on_message, own.layout.lasting(start.total_clocks)
        network = [f for f in models.faults if not isinstance(f, Crash)]

        def make(clock: Clock, here: Here | None, to_driver: Callable[..., None]) -> World:
            own_workers = range(models.workers) if here is None else here.workers(models.workers)
            first, count = own_workers.start * models.devices, len(own_workers) * models.devices
            return self._kit.world(
                clock=clock,
                tamper=NetworkFaults(clock, network, models.seed) if network else None,
                layout=layout,
                values=own.values(start),
                times=ComputeTimes(models.compute, models.seed, count, first=first),
                devices=models.devices,
                network=models.network,
                homes=models.homes,
                to_driver=to_driver,
                numbers=self._numbers,
                run=start.run,
                here=here,
                delays=dict(start.delays),
                copies=self._copies,
                variants=lambda variant: self._plans[variant].layout.programs,
            )

        firsts = self._firsts(layout)
        if len(firsts) > 1:
            latency = lookahead(models.network)
            assert latency is not None
            self._team = self._kit.team(make, driver, firsts, self._numbers, latency)
            self._world = self._team.world
            return
        self._world = make(self._kit.clock(), None, driver)
        clock = self._world.clock
        clock.tidy = HugePages().tidy
        on_lost, began = self._handlers[start.plan_id].on_lost, self._passed
        for away in self._absences(self._world.nodes, began):
            label = away.worker * KINDS + _CRASH
            clock.at(max(away.down_s - began, 0.0), label, self._world.silence, away.name)
            clock.at(max(away.noticed_s - began, 0.0), label, on_lost, away.name, away.reason)

    def _absences(self, workers: Iterable[str], began: float) -> Sequence[Absence]:
        """The next absence of each of these workers, from a time of the fit on."""
        if self._members is None:
            return [a for a in absences(self._models.faults, self._models.workers) if a.name in workers]
        return [away for w in workers if (away := self._members.absence(w, began)) is not None]

    def _firsts(self, layout: Layout) -> list[int]:
        """The first workers of the processes that simulate a run."""
        asked = self._models.jobs
        count = processes(layout) if asked is None else asked
        why = None
        if count > 1:
            why = why_not(layout, self._models.network, self._models.faults, arithmetic=self.arithmetic)
        if why is not None and asked is not None:
            warn(f"jobs={asked}: the simulation runs in one process, because {why}")
        return [0] if why is not None or count == 1 else firsts(layout, self._numbers, count)

    def _nothing(self, plan: Plan) -> Callable[[wire.StartTraining], Values]:
        """Values without arithmetic."""
        training = plan.training
        assert training is not None
        programs = {p.device: p for p in plan.programs}
        fetched = [
            tuple(s for i in programs[device].instructions if isinstance(i, Fetch) for s in i.slots)
            for device in training.replicas[training.live[0]]
        ]
        slots = [tuple(sorted(set(found))) for found in fetched]
        return lambda start: Nothing(slots)

    # The clock.

    def now(self) -> float:
        """Seconds since the fit began. The clock of each run begins at 0."""
        return self._passed + (self._world.clock.now if self._world else 0.0)

    def next(self, inbox: queue.SimpleQueue[T], until: float, *, patient: bool) -> T:
        """The next message of a fit. Lets events happen until there is one, or until the time `until`."""
        world = self._world
        if world is None:
            raise SimulationError("no fit has begun on this simulated cluster")
        if patient and self._team is not None:
            found = self._next_of(inbox, self._team, world.clock)
            if found is not None:
                return found
        idle = inbox.empty
        if until < math.inf:
            idle = self._idle_until(until, world.clock, inbox)
        if not world.clock.go_on(idle):
            raise SimulationError(
                f"the simulation has come to rest at {world.clock.now:g} s before the end of the fit: nothing is "
                "under way that could complete a clock; see whether faults lose what a policy waits for"
            )
        return inbox.get_nowait()

    def _next_of(self, inbox: queue.SimpleQueue[Any], team: Team, clock: Clock) -> Any:
        """The next message if several processes simulate; None if no more events happen. Messages that want no answer
        wait for a time in which other processes are not as far as this one, so that these wait less for it."""
        later = self._later
        while not self._due:
            team.waits = not later
            going_on = clock.go_on(inbox.empty)
            if not inbox.empty():
                entry = inbox.get_nowait()
                kind = type(entry.message)
                if kind in _ANSWERED:
                    return entry
                later.append(entry)
                self._due = len(later) if kind not in _PATIENT else len(later) > _MOST_LATER
            elif later:
                self._due = 1
            elif not going_on:
                return None
        self._due -= 1
        return later.popleft()

    def _idle_until(self, until: float, clock: Clock, inbox: queue.SimpleQueue[Any]) -> Callable[[], bool]:
        """Whether a fit has no message and the time `until` has not come, which is an event of its own."""
        end = since(self._passed, until)
        if self._until != until:
            self._until = until
            clock.at(max(end, clock.now), _TIMER, lambda: None)
        return lambda: inbox.empty() and clock.now < end

    def simulated(self) -> Simulated | None:
        return self._simulated


def since(passed: float, until: float) -> float:
    """How long after `passed` seconds the time `until` has come. A sum of this and `passed` is not less, as the rounded
    difference may be: a fit would wait for ever for the last bit."""
    rest = until - passed
    return rest if passed + rest >= until else rest + math.ulp(until)


def _both(first: str, second: str) -> str:
    """The hash of two runs, one after the other, from the hash of each."""
    return f"{(int(first, 16) * _BETWEEN + int(second, 16)) % 2**128:032x}"

"""The arithmetic of runs whose replicas do more than add up gradients: a coordinate of a parameter for each work item.

The gradient of work item q is 1 at coordinate q, once for each of its microbatches that is computed, and an optimizer
step takes its mean away from the parameters. So parameters say how much of each item is in them, whatever has been
mixed, averaged, coded or filtered on the way. Everything that both clocks share is real: the rhythm of own parameters,
their averages and mirrors, the filters and the schedules of sums. Only what a home does with a sum is written here, and
the tasks of plans are the functions that they are compiled from, called with NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from flowml.instructions import Push, Read, Recv, Send
from flowml.plan import StoreSpec, Training
from flowml.policy import Consensus, Gossip, Mix, Outer, Policy, Weights
from flowml.policy.apply import base_of
from flowml.policy.filters import RESIDUAL, Talk
from flowml.training.local import anchor, drawn, fold, join, mix, outer_mix, report, sending, taking
from flowml.training.pieces import pieces
from flowml_runtime import wire
from flowml_runtime.protocol.errors import InvariantError, ensure
from flowml_runtime.protocol.training import actions
from flowml_runtime.sim.arithmetic import Arithmetic, Arrays, Compiled
from flowml_runtime.sim.node import NEVER
from flowml_runtime.sim.program import At, StageProgram
from flowml_runtime.sim.values import Value
from flowml_tools.faults.history import Encoded, Gave, History, Holds, Kept, Made, Matrix, Shown
from flowml_tools.faults.history import Read as HasRead

DTYPE = "float64"
Task = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class _Step:
    at: At
    start: actions.Start
    leaves_out: Callable[[int], bool]


class _Tasks(Compiled):
    """The tasks of a plan as NumPy functions, on all devices."""

    def __init__(self, training: Training) -> None:
        self.plan: Any = None
        self.training = training
        tasks = {number: task for store in training.stores for number, task in _tasks(store).items()}
        inputs = SimpleNamespace(inputs=(SimpleNamespace(dtype=DTYPE),) * 4)
        plan = SimpleNamespace(training=training, tasks=dict.fromkeys(tasks, inputs))
        one: Any = SimpleNamespace(plan=plan, tasks=tasks, device=SimpleNamespace(platform="cpu"))
        self.loaded = {device: one for devices in training.replicas for device in devices}
        self.programs = {}


def _tasks(store: StoreSpec) -> dict[int, Task]:
    """The tasks that the runtime calls for a store."""
    policy, local = store.policy, store.local
    found: dict[int, Task] = {p.accumulate: _add for p in store.parts if p.accumulate is not None}
    if local is None:
        return found
    base = base_of(policy.apply)
    dual = isinstance(base, Consensus)
    found[local.update] = partial(_update, base.rho if dual else 0.0)
    send, take = (report, anchor) if dual else (sending(policy), taking(policy))
    found |= {n: f for n, f in ((local.send, send), (local.take, take)) if n is not None and f is not None}
    if local.fold is not None and local.mix is not None and isinstance(policy.remote, Gossip):
        outer = partial(outer_mix, lambda gradient, params: (params - gradient,), 1, policy.remote.pull)
        found[local.fold] = fold
        followed = partial(drawn, policy.remote.pull)
        plain = followed if policy.tracked else outer if isinstance(policy.apply, Outer) else mix
        found[local.mix] = join if policy.mirrored else plain
    return found


def _add(a: Any, b: Any) -> Sequence[Any]:
    return (a + b,)


def _update(rho: float, params: Any, coefficients: Any, gradient: Any, *started: Any) -> Sequence[Any]:
    """A step of stochastic gradient descent of rate 1, pulled to where it started by a consensus."""
    pull = rho * (params - started[0]) if started else 0.0
    return (params - coefficients[0, 0] * gradient - pull,)


class Matrices(Arithmetic):
    """The values of a world. What is read, sent and made goes to the history of the fit."""

    def __init__(
        self,
        programs: Mapping[At, StageProgram],
        training: Training,
        histories: Mapping[int, History],
        run_of: Callable[[str], int],
    ) -> None:
        """`histories` are those of the fits, and `run_of` says which fit a worker is in."""
        super().__init__(_Tasks(training), NEVER)
        self._steps = programs
        self._histories = histories
        self._run_of = run_of
        self._stored: dict[tuple[str, int], Matrix] = {}
        self._reports: dict[tuple[str, int], Matrix] = {}
        """The mean of the last reports of all replicas, where a home keeps it."""

    @property
    def first(self) -> Callable[[int], Arrays]:
        """The first value of each store."""
        return lambda store: [np.zeros(self._training.stores[store].specs[0].shape)]

    def begin(self, at: At, start: actions.Start, leaves_out: Callable[[int], bool]) -> Any:
        return _Step(at, start, leaves_out)

    def perform(self, state: Any, position: int, given: Any) -> Value:
        at, start = state.at, state.start
        match self._steps[at].instructions[position]:
            case Read(store):
                if given is not None:
                    place = self._histories[start.run].terms.place(at[0], start.clock, start.item.sequence)
                    self._note(start.run, HasRead(store, *place, given[0], given[1][0]))
                held = self.taken(at, start.clock, store, None if given is None else given[1])
                spec = self._training.stores[store]
                if spec.sites and spec.local is not None:
                    self._note(start.run, Holds(store, at[0], start.clock, np.asarray(held[0])))
            case Push(store):
                return [self._gradient(state, self._training.stores[store].specs[0].shape)]
            case Send():
                return at[0], start.clock
            case Recv():
                ensure(given == (at[0], start.clock), f"clock {start.clock} receives {given}")
            case _:
                pass
        return None

    def _gradient(self, step: _Step, shape: tuple[int, ...]) -> Matrix:
        """The sum of the gradients of the microbatches that the step computes."""
        found = np.zeros(shape)
        item = step.start.item
        for m, piece in enumerate(pieces(self._training, step.at[0], item.sequence, item.start, item.size)):
            if not (m and step.leaves_out(m)):
                found.flat[piece.sequence] += piece.coefficient
        return found

    def report(self, state: Any) -> None:
        return None

    def is_finite(self, store: int, part: int, value: Value) -> bool:
        return True

    def own(self, at: At, store: int, clock: int, mixed: Value) -> Value:
        own = self._own[at, store]
        content, run = np.asarray(own.started[0]) - np.asarray(own.params[0]), self._run_at(at)
        sent = super().own(at, store, clock, mixed)
        self._note(run, Gave(store, at[0], clock, content))
        return sent

    def filtered(self, at: At, message: wire.Contribution, value: Value, parameters: Value = None) -> tuple[Value, int]:
        found, nbytes = super().filtered(at, message, value, parameters)
        place = message.store, message.part, message.replica, message.clock
        self._note(message.run, Encoded(*place, value[0], found[0]))
        return found, nbytes

    def talk(self, at: At, store: int, part: int, clock: int, value: Value) -> Talk | None:
        if part == 0 and self._training.stores[store].local is None:
            self._note(self._run_at(at), Gave(store, at[0], clock, value[0]))
        return super().talk(at, store, part, clock, value)

    def kept(self, at: At) -> Mapping[int, float]:
        if at in self._encoders:
            for (store, part, _), state in self._encoders[at].buffers.items():
                if RESIDUAL in state:
                    self._note(self._run_at(at), Kept(store, part, at[0], state[RESIDUAL]))
        return super().kept(at)

    def load(self, worker: str, store: int, value: Value) -> None:
        if np.any(value[0]):
            raise InvariantError(f"store {store} begins with {value}")
        self._stored[worker, store] = self._reports[worker, store] = value[0]

    def apply(
        self,
        worker: str,
        store: int,
        version: int,
        given: Sequence[tuple[Sequence[Value], float]],
        staleness: Sequence[int] = (),
        full: float = 1.0,
        decays: Sequence[float] = (),
    ) -> None:
        spec = self._training.stores[store]
        scales = map(spec.policy.apply.scale, staleness) if staleness else [1.0] * len(given)
        payloads: list[Matrix] = []
        for parts, _ in given:
            agree = all(np.array_equal(part[0], parts[0][0]) for part in parts[1:])
            if not agree and not spec.policy.filters:  # the text of arrays takes a while
                raise InvariantError(f"the stages of one contribution do not agree: {parts}")
            payloads.append(parts[0][0])
        total = sum(f * s * p for (_, f), s, p in zip(given, scales, payloads, strict=True))
        value = self._stored[worker, store] = self._applied(worker, store, spec.policy, np.asarray(total))
        contributions = tuple((-1, -1, p) for p in payloads)
        self._note(self._run_of(worker), Made(worker, store, version, contributions, value))

    def _applied(self, worker: str, store: int, policy: Policy, total: Matrix) -> Matrix:
        """The new value of a store, from the sum of contributions and coefficients."""
        key, kind = (worker, store), base_of(policy.apply)
        before, senders = self._stored[key], len(self._training.stores[store].sites) or len(self._training.replicas)
        if isinstance(kind, Mix):
            return before + (total - before) * kind.pull * (senders if policy.clocked else 1)
        if isinstance(policy.payload, Weights) or isinstance(policy.remote, Gossip):
            return total
        if isinstance(kind, Consensus):
            self._reports[key] = self._reports[key] - total / len(self._training.replicas)
            return self._reports[key]
        return before - total

    def current(self, worker: str, store: int, version: int) -> tuple[Value, int | None]:
        value, nbytes = super().current(worker, store, version)
        if self._training.stores[store].policy.pull_filters:
            self._note(self._run_of(worker), Shown(store, version, value[0]))
        return value, nbytes

    def newest(self, worker: str, store: int) -> Arrays:
        return [self._stored[worker, store]]

    def final(self, worker: str, store: int) -> Value:
        return self.newest(worker, store)

    def hand(self, worker: str, message: wire.TrainingMessage, value: Value) -> None:
        if isinstance(message, wire.OwnState):
            super().hand(worker, message, value)

    def _run_at(self, at: At) -> int:
        return self._run_of(self._device(at).partition("/")[0])

    def _note(self, run: int, fact: Any) -> None:
        self._histories[run].facts.append(fact)

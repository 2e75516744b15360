"""Arithmetic with integers, which shows what is in a version: the gradient of work item q is 16**q.

So each digit of a sum in base 16 says how often that item is in it. A value is (replica, clock, sum of gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowml.instructions import Push, Read, Recv, Send
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ensure
from flowml_runtime.protocol.training import actions
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.sim.program import At, StageProgram
from flowml_runtime.sim.values import Nothing
from flowml_tools.faults import history

Value = tuple[int, int, int]
"""(replica, clock, sum of gradients)"""
FIRST: Value = (-1, -1, 0)


class Digits(Nothing):
    """The values of a world. What is read and made goes to the history of the fit."""

    def __init__(
        self,
        programs: Mapping[At, StageProgram],
        places: Places,
        histories: Mapping[int, history.History],
        run_of: Callable[[str], int],
    ) -> None:
        """`histories` are those of the fits, and `run_of` says which fit a worker is in."""
        super().__init__(())
        self._programs = programs
        self._places = places
        self._histories = histories
        self._run_of = run_of
        self.applied: dict[int, list[list[tuple[int, int, int, float]]]] = {i: [] for i in range(len(places.homes))}
        """Store -> what each of its versions in the newest fit is made of: (replica, clock, sum, coefficient)."""
        self._versions: dict[tuple[str, int], int] = {}

    @property
    def first(self) -> Callable[[int], Value]:
        """The first value of each store."""
        return lambda store: FIRST

    def begin(self, at: At, start: actions.Start, leaves_out: Callable[[int], bool]) -> actions.Start:
        return start

    def perform(self, state: actions.Start, position: int, given: Any) -> Value | None:
        match self._programs[state.replica, state.stage].instructions[position]:
            case Read(store):
                version, value = given
                ensure(value == (-1, version, 0), f"version {version} of store {store} has the value {value}")
                told = self._histories[state.run]
                told.facts.append(history.Read(store, *self._place(told, state), version))
            case Push():
                return *self._place(self._histories[state.run], state), 16**state.item.sequence
            case Send():
                return state.replica, state.clock, 0
            case Recv():
                ensure(given == (state.replica, state.clock, 0), f"clock {state.clock} receives {given}")
            case _:
                pass
        return None

    def report(self, state: actions.Start) -> None:
        return None

    def _place(self, told: history.History, step: actions.Start) -> tuple[int, int]:
        return told.terms.place(step.replica, step.clock, step.item.sequence)

    def add(self, at: At, store: int, part: int, a: Value, b: Value) -> Value:
        ensure(a[0] == b[0] == at[0], f"replica {at[0]} adds up gradients of {a[0]} and {b[0]}")
        return a[0], max(a[1], b[1]), a[2] + b[2]

    def total(self, values: Sequence[Value]) -> Value:
        ensure(len({clock for _, clock, _ in values}) == 1, f"one sum has gradients of several clocks: {values}")
        whose = sorted(who for who, *_ in values)
        ensure(whose == list(range(len(self._places.stages))), f"a sum over all replicas is of {whose}")
        return 0, values[0][1], sum(value for *_, value in values)

    def load(self, worker: str, store: int, value: Value) -> None:
        ensure(value == FIRST, f"store {store} begins with {value}")
        self._versions[worker, store] = 0
        if worker == self._places.homes[store][0]:
            self.applied[store] = []

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
        made: list[tuple[int, int, int, float]] = []
        for parts, factor in given:
            ensure(len(set(parts)) == 1, f"the stages of one contribution do not agree on its steps: {parts}")
            made.append((*parts[0], factor))
        self._versions[worker, store] = version
        fact = history.Made(worker, store, version, tuple(m[:3] for m in made))
        self._histories[self._run_of(worker)].facts.append(fact)
        if worker == self._places.homes[store][0]:
            self.applied[store].append(made)

    def current(self, worker: str, store: int, version: int) -> tuple[Value, None]:
        return self.final(worker, store), None

    def final(self, worker: str, store: int) -> Value:
        return -1, self._versions[worker, store], 0

    def hand(self, worker: str, message: wire.TrainingMessage, value: Any) -> None:
        ensure(isinstance(message, wire.Batch), f"{worker} is handed {message}")

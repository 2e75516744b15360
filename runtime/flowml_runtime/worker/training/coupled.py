"""Computes the rounds of a coupling at the homes on one device. Both clocks use it.

Between the rounds of a clock it keeps the gradients of the stores, and the common values so far; between clocks
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowml.home import Share
from flowml.plan import Training
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.worker.training.applying import Given, applied

Values = Mapping[int, Sequence[Array]]
"""Store -> its buffers."""

Heard = Sequence[tuple[Sequence[int], Sequence[Array]]]
"""Stores, and what they share in a round, in order."""


@dataclass
class CoupledHomes:
    """The homes of coupling `number` on the device of `program`."""

    training: Training
    number: int
    program: LoadedProgram
    gradients: dict[int, Sequence[Array]] = field(default_factory=dict[int, Sequence[Array]])
    commons: list[Array] = field(default_factory=list[Array])

    def begin(self, values: Values, given: Mapping[int, Sequence[Given]]) -> list[Array]:
        """Make the gradients of stores from what is given, and return what they share in round 0."""
        self.clear()
        for store, contributions in given.items():
            spec = self.training.stores[store]
            params = values[store][: len(spec.specs)]
            self.gradients[store] = applied(self.program, spec, params, contributions)
        return self._share(0, values)

    def go_on(self, round: int, values: Values, heard: Heard) -> list[Array]:
        """Combine what all have shared in the round before, and return what these stores share in this one."""
        self._combine(round - 1, values, heard)
        return self._share(round, values)

    def end(self, values: Values, heard: Heard) -> dict[int, list[Array]]:
        """Combine what all have shared in the last round, and return the new buffers."""
        self._combine(len(self.training.couplings[self.number].rounds) - 1, values, heard)
        made: dict[int, list[Array]] = {}
        for store in values:
            coupled = self.training.stores[store].coupled
            assert coupled is not None
            made[store] = list(self._run(coupled.update, store, values))
        self.clear()
        return made

    def shared_bytes(self, store: int, round: int) -> int:
        """The bytes that a store shares in a round."""
        coupled = self.training.stores[store].coupled
        assert coupled is not None
        return coupled.shares[round].nbytes

    def clear(self) -> None:
        self.gradients, self.commons = {}, []

    def _combine(self, round: int, values: Values, heard: Heard) -> None:
        coupling, tasks = self.training.couplings[self.number], self.program.tasks
        rows: dict[int, Sequence[Array]] = {}
        for stores, arrays in heard:
            first = 0
            for store in stores:
                width = self._width(store, round)
                rows[store] = arrays[first : first + width]
                first += width
        one = next(iter(values))
        state = [
            array
            for leaf in coupling.state
            for buffer, array in zip(self.training.stores[one].buffers, values[one], strict=True)
            if buffer.kind == "state" and buffer.index == leaf
        ]
        taken = [self.commons[i] for i in coupling.rounds[round].takes]
        shared = [array for store in coupling.stores for array in rows[store]]
        self.commons += tasks[coupling.rounds[round].task](*state, *taken, *shared)

    def _width(self, store: int, round: int) -> int:
        """How many arrays a store shares in a round."""
        coupled = self.training.stores[store].coupled
        assert coupled is not None
        task = coupled.shares[round].task
        return 0 if task is None else len(self.program.plan.tasks[task].outputs)

    def _share(self, round: int, values: Values) -> list[Array]:
        found: list[Array] = []
        for store in values:
            coupled = self.training.stores[store].coupled
            assert coupled is not None
            found += self._run(coupled.shares[round], store, values)
        return found

    def _run(self, share: Share, store: int, values: Values) -> Sequence[Array]:
        if share.task is None:
            return ()
        taken = [self.commons[i] for i in share.takes]
        return self.program.tasks[share.task](*self.gradients[store], *values[store], *taken)

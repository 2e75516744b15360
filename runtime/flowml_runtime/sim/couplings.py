"""The rounds of couplings at the homes of simulated workers, with values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowml.plan import Training
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.services import host_view
from flowml_runtime.protocol.training.actions import Couple
from flowml_runtime.worker.training.applying import Given
from flowml_runtime.worker.training.coupled import CoupledHomes, Heard, Values


class Couplings:
    """What the homes of all workers keep between the rounds of a clock."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._found: dict[tuple[str, int], CoupledHomes] = {}
        """(worker, coupling) -> its homes there."""

    def run(
        self,
        worker: str,
        action: Couple,
        program: LoadedProgram,
        values: Values,
        given: Mapping[int, Sequence[Given]],
        heard: Heard,
    ) -> tuple[Sequence[Array], Mapping[int, list[Array]]]:
        """What these homes share in a round, and after the last one the new buffers of their stores."""
        key = worker, action.coupling
        homes = self._found.get(key)
        if homes is None:
            homes = self._found[key] = CoupledHomes(self._training, action.coupling, program)
        if not action.to:
            return (), homes.end(values, heard)
        shared = homes.go_on(action.round, values, heard) if action.round else homes.begin(values, given)
        return host_view(shared, program.device), {}

    def clear(self, worker: str) -> None:
        for (where, _), homes in self._found.items():
            if where == worker:
                homes.clear()

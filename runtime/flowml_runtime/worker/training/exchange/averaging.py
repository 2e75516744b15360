"""The arithmetic of a round of gossip, for one store on one stage of a replica. Both clocks use it.

With an outer optimizer a replica sends its parameters at the beginning of the round, y, and at its end, x. With their
averages Y and X the gradient of the optimizer, which updates y, is Y - X + pull (y - Y) (Kolehmainen et al., NoLoCo,
2025). With filters that lose something it sends at the end of its step too, and moves by what public copies say
(`copies`). Else it sends those before its step, and adds what the step has added to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flowml.plan import StoreSpec
from flowml.policy import Outer
from flowml_runtime.execution.programs import Array, LoadedProgram, aligned_copy, buffer_struct
from flowml_runtime.worker.training.own_values import OwnValues


class Averaging:
    """Makes what a replica sends in a round, and the round's result."""

    def __init__(self, spec: StoreSpec, loaded: LoadedProgram, dtype: str) -> None:
        """`dtype` is that of the weights."""
        assert spec.local is not None
        self.outer = isinstance(spec.policy.apply, Outer)
        """Whether the average goes to an outer optimizer."""
        self._local = spec.local
        self._fold = loaded.tasks[_known(spec.local.fold)]
        self._mix = loaded.tasks[_known(spec.local.mix)]
        self._dtype = dtype

    def sent(self, own: OwnValues) -> Sequence[Array]:
        """What the neighbours get: before the step, or after it if there is an outer optimizer."""
        return (*own.started, *own.params) if self.outer else own.params

    def mix(
        self, own: OwnValues, before: Sequence[Array], weights: Mapping[int, float], sent: Mapping[int, Sequence[Array]]
    ) -> None:
        """End a round. `before` are the own parameters before the step, or the own public copy; `sent` is by replica,
        and has the own one."""
        before = own.started if self.outer else before
        total: Sequence[Array] = [
            aligned_copy(np.zeros(struct.shape, struct.dtype)) for struct in map(buffer_struct, self._local.accumulator)
        ]
        for replica, weight in weights.items():  # in the order of replicas, so that two runs agree to the bit
            total = self._fold(*total, *sent[replica], aligned_copy(np.array(weight, self._dtype)))
        kept = len(own.state) - self._local.outer
        results = self._mix(*total, *own.params, *before, *own.state[kept:])
        own.params = results[: len(before)]
        if self.outer:
            own.started, own.state = own.params, (*own.state[:kept], *results[len(before) :])


def _known(task: int | None) -> int:
    assert task is not None
    return task

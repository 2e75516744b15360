"""Applies contributions to a store with the tasks of its home. Both clocks use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from flowml.errors import FlowmlError
from flowml.plan import ArraySpec, StoreSpec
from flowml.policy import Distill
from flowml.policy.apply import base_of, scales
from flowml_runtime.execution.programs import Array, LoadedProgram, aligned_copy, buffer_struct
from flowml_runtime.transport.arrays import aligned_empty
from flowml_runtime.worker.training.finite import all_finite


@dataclass(frozen=True)
class Given:
    """One contribution to an apply: the payloads of its parts, its coefficient, and what its gradient is scaled by."""

    arrays: list[Array]
    coefficient: float
    scale: float


@dataclass
class Held:
    """A store's value on device `home`. `values` are its buffers, of which the first `params` are the parameters.

    After it is loaded, only the lane of its device accesses it, unless replicas share it: then each updates it, under
    the lock, and reads it without.
    """

    spec: StoreSpec
    home: str
    program: LoadedProgram
    values: list[Array]
    params: int
    clock: int = 0
    """The floor of the newest publication. If all replicas share one clock, the next contribution has this clock."""
    version: int = 0
    """The number of updates, if replicas share it."""
    lock: Lock = field(default_factory=Lock)

    def update(self, arrays: Sequence[Array], weight: int, microbatches: int, base_version: int) -> None:
        """Apply the gradients of one replica, and replace the values by the new ones."""
        with self.lock:
            given = alone(self.spec, arrays, weight, microbatches, self.version - base_version)
            self.values = list(applied(self.program, self.spec, self.values, given))
            self.version += 1


def alone(spec: StoreSpec, arrays: Sequence[Array], weight: int, microbatches: int, staleness: int) -> Sequence[Given]:
    """The contribution of one replica, which is applied alone."""
    (coefficient,) = spec.policy.coefficients([weight], microbatches)
    return given_of(spec, [(list(arrays), coefficient)], [staleness] if scales(spec.policy.apply) else ())


def given_of(
    spec: StoreSpec,
    contributions: Sequence[tuple[list[Array], float]],
    staleness: Sequence[int],
    full: float = 1.0,
    decays: Sequence[float] = (),
) -> list[Given]:
    """The contributions of an apply from their arrays and coefficients. The others are as in `home.Apply`.

    What is not here of a mean of weighted gradients is taken to have the mean weight of what is. The decay of a late
    one multiplies its gradient, and not the weight that it has in the mean.
    """
    scales = list(map(spec.policy.apply.scale, staleness)) if staleness else [1.0] * len(contributions)
    if not spec.applies.weighted:
        return [Given(arrays, c, scale) for (arrays, c), scale in zip(contributions, scales, strict=True)]
    triples = zip(contributions, scales, decays or [1.0] * len(contributions), strict=True)
    return [Given(arrays, c / decay, scale * full * decay) for (arrays, c), scale, decay in triples]


def applied(
    program: LoadedProgram, spec: StoreSpec, values: Sequence[Array], given: Sequence[Given]
) -> Sequence[Array]:
    """The new values of the store's buffers, or its gradients if it is coupled. Contributions are added in the given
    order."""
    applies, tasks = spec.applies, program.tasks
    dtype = program.plan.tasks[applies.apply].inputs[len(values)].dtype
    if len(given) <= applies.width:
        return tasks[applies.apply](*values, *_arguments(spec, given, dtype, given[0]))
    if applies.fold is None or applies.finish is None:
        raise FlowmlError(f"{len(given)} contributions at once, but the plan has no task that folds more than one")
    total: Sequence[Array] = [_zeros(s) for s in applies.accumulator]
    for first in range(0, len(given), applies.width):
        total = tasks[applies.fold](*total, *_arguments(spec, given[first : first + applies.width], dtype, given[0]))
    return tasks[applies.finish](*values, *total)


def check_student(spec: StoreSpec, values: Sequence[Array]) -> None:
    """Raise FlowmlError if a home has distilled models into one that is not finite. Its training is in the home, so no
    loss of a replica shows it, and after the last step nothing else would."""
    if isinstance(base_of(spec.policy.apply), Distill) and not all_finite(values):
        raise FlowmlError(
            f"the student of layer {spec.name!r} holds NaN or infinity: its training diverged, or predict returned "
            "such values; give Distill another optimizer or fewer steps, or Trainer(on_nonfinite='apply') to have it"
        )


def _arguments(spec: StoreSpec, given: Sequence[Given], dtype: str, first: Given) -> list[Array]:
    """The coefficients, and the contributions. The first one fills the places of those that are missing.

    Where gradients carry weights, only the ratios of coefficients count: those to the `first` of the apply.
    """
    applies = spec.applies
    rows = np.zeros((2, applies.width), dtype)
    unit = first.coefficient if applies.weighted else 1.0
    for i, one in enumerate(given):
        share = one.coefficient / unit
        rows[:, i] = share * one.scale, share
    filled = [*given, *[given[0]] * (applies.width - len(given))]
    return [aligned_copy(rows), *(array for one in filled for array in one.arrays)]


def _zeros(spec: ArraySpec) -> Array:
    struct = buffer_struct(spec)
    zeros = aligned_empty(spec.nbytes).view(struct.dtype).reshape(struct.shape)
    zeros[...] = 0
    return zeros

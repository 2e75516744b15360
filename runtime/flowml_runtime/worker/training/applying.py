"""Applies contributions to a store with the tasks of its home. Both clocks use it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowml.errors import FlowmlError
from flowml.plan import ArraySpec, StoreSpec
from flowml_runtime.execution.programs import Array, LoadedProgram, aligned_copy, buffer_struct
from flowml_runtime.transport.arrays import aligned_empty

Given = tuple[list[Array], float]
"""The payloads of a contribution's parts, and its coefficient."""


def applied(
    program: LoadedProgram, spec: StoreSpec, params: Sequence[Array], state: Sequence[Array], given: Sequence[Given]
) -> Sequence[Array]:
    """The new parameters and state. Contributions are added in the given order."""
    applies, tasks = spec.applies, program.tasks
    dtype = program.plan.tasks[applies.apply].inputs[len(spec.specs) + len(spec.state_specs)].dtype
    if len(given) <= applies.width:
        return tasks[applies.apply](*params, *state, *_arguments(spec, given, dtype))
    if applies.fold is None or applies.finish is None:
        raise FlowmlError(f"{len(given)} contributions at once, but the plan has no task that folds more than one")
    total: Sequence[Array] = [_zeros(s) for s in applies.accumulator]
    for first in range(0, len(given), applies.width):
        total = tasks[applies.fold](*total, *_arguments(spec, given[first : first + applies.width], dtype))
    return tasks[applies.finish](*params, *state, *total)


def _arguments(spec: StoreSpec, given: Sequence[Given], dtype: str) -> list[Array]:
    """The coefficients, and the contributions. The first one fills the places of those that are missing.

    Where gradients carry weights, only the ratios of coefficients count.
    """
    applies = spec.applies
    rows = np.zeros((2, applies.width), dtype)
    unit = given[0][1] if applies.weighted else 1
    for i, (_, coefficient) in enumerate(given):
        rows[:, i] = coefficient / unit
    payloads = [arrays for arrays, _ in given] + [given[0][0]] * (applies.width - len(given))
    return [aligned_copy(rows), *(array for arrays in payloads for array in arrays)]


def _zeros(spec: ArraySpec) -> Array:
    struct = buffer_struct(spec)
    zeros = aligned_empty(spec.nbytes).view(struct.dtype).reshape(struct.shape)
    zeros[...] = 0
    return zeros

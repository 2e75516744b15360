"""Applies contributions to a store with the tasks of its home. Both clocks use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowml.errors import FlowmlError
from flowml.plan import ArraySpec, StoreSpec
from flowml_runtime.execution.programs import Array, LoadedProgram, aligned_copy, buffer_struct
from flowml_runtime.transport.arrays import aligned_empty


@dataclass(frozen=True)
class Given:
    """One contribution to an apply: the payloads of its parts, its coefficient, and what its gradient is scaled by."""

    arrays: list[Array]
    coefficient: float
    scale: float


def given_of(
    spec: StoreSpec, contributions: Sequence[tuple[list[Array], float]], staleness: Sequence[int]
) -> list[Given]:
    """The contributions of an apply from their arrays and coefficients. `staleness` is as in `home.Apply`."""
    scales = map(spec.policy.apply.scale, staleness) if staleness else [1.0] * len(contributions)
    return [Given(arrays, c, scale) for (arrays, c), scale in zip(contributions, scales, strict=True)]


def applied(
    program: LoadedProgram, spec: StoreSpec, values: Sequence[Array], given: Sequence[Given]
) -> Sequence[Array]:
    """The new values of the store's buffers. Contributions are added in the given order."""
    applies, tasks = spec.applies, program.tasks
    dtype = program.plan.tasks[applies.apply].inputs[len(spec.buffers)].dtype
    if len(given) <= applies.width:
        return tasks[applies.apply](*values, *_arguments(spec, given, dtype))
    if applies.fold is None or applies.finish is None:
        raise FlowmlError(f"{len(given)} contributions at once, but the plan has no task that folds more than one")
    total: Sequence[Array] = [_zeros(s) for s in applies.accumulator]
    for first in range(0, len(given), applies.width):
        total = tasks[applies.fold](*total, *_arguments(spec, given[first : first + applies.width], dtype))
    return tasks[applies.finish](*values, *total)


def _arguments(spec: StoreSpec, given: Sequence[Given], dtype: str) -> list[Array]:
    """The coefficients, and the contributions. The first one fills the places of those that are missing.

    Where gradients carry weights, only the ratios of coefficients count.
    """
    applies = spec.applies
    rows = np.zeros((2, applies.width), dtype)
    unit = given[0].coefficient if applies.weighted else 1.0
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

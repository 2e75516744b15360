"""L-BFGS written with the vector operations of `Vectors`, so its history stays on the homes of the parameters.

The direction is that of the two loops of Nocedal, *Updating Quasi-Newton Matrices with Limited Storage*, 1980. Step
lengths are halved until the loss falls enough (Armijo's condition).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowml.numbers import whole_number
from flowml_runtime.cluster import Cluster
from flowml_runtime.methods.given import losses_told
from flowml_runtime.methods.portions import Portions
from flowml_runtime.methods.vectors import Vector, Vectors

ENOUGH, HALVINGS = 1e-4, 20


@dataclass(frozen=True)
class Minimum:
    """What `lbfgs` has found: the parameters, the loss before each step and at the end, and the copies of portions."""

    params: Any
    losses: tuple[float, ...]
    duplicates: int


def lbfgs(
    loss: Callable[..., Any],
    params: Any,
    source: Any,
    cluster: Cluster,
    *,
    steps: int,
    memory: int = 10,
    portions: int = 4,
    copies: bool = True,
) -> Minimum:
    """Minimise the mean of `loss(params, batch)` over all examples of `source` (Sandblaster L-BFGS).

    Args:
        loss: the mean loss of a batch; JAX differentiates it.
        params: a pytree of floating arrays, whose leaves are spread over the workers of `cluster`.
        source: a pytree of arrays with one row for each example. Each worker holds all of it.
        steps: how many steps to take at most; it ends before if no step lowers the loss.
        memory: how many pairs of vectors the history has.
        portions: portions of the source for each worker; the number of examples is a multiple of all of them.
        copies: whether idle workers compute copies of portions that others have begun.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: for numbers out of range, a source that does not divide, or a start without a finite loss.
    """
    for name, number in (("steps", steps), ("memory", memory), ("portions", portions)):
        whole_number(name, number, least=1)
    losses = list[float]()
    with losses_told(
        lambda: (
            f"lbfgs had taken {max(len(losses) - 1, 0)} of {steps} steps, and its vectors were on the workers; call it "
            "again, on the workers that are left or on another cluster"
        )
    ):
        vectors = Vectors(params, cluster)
        evaluate = Portions(loss, source, vectors, cluster, portions, copies)
        found = _descend(vectors, evaluate, vectors.put(params), steps, memory, losses)
        return Minimum(vectors.get(found), tuple(losses), evaluate.duplicates)


def _descend(vectors: Vectors, evaluate: Portions, x: Vector, steps: int, memory: int, losses: list[float]) -> Vector:
    """The parameters after at most so many steps. `losses` gets the loss before each step and at the end."""
    value, gradient = evaluate(x)
    if not math.isfinite(value):
        raise ValueError(f"the loss of the start is {value}; give parameters and examples for which it is finite")
    losses.append(value)
    history = list[tuple[Vector, Vector, float]]()
    for _ in range(steps):
        direction = _direction(vectors, gradient, history)
        slope = vectors.dot(direction, gradient)
        length = 1.0 if history else min(1.0, 1 / (-slope) ** 0.5) if slope < 0 else 0.0
        for _ in range(HALVINGS):
            ahead = vectors.combine(1.0, x, length, direction)
            next_value, next_gradient = evaluate(ahead)
            if next_value <= value + ENOUGH * length * slope:
                break
            length /= 2
        else:
            break
        moved, turned = vectors.scale(length, direction), vectors.combine(1.0, next_gradient, -1.0, gradient)
        curvature = vectors.dot(moved, turned)
        if curvature > 0:
            history = [*history, (moved, turned, curvature)][-memory:]
        x, value, gradient = ahead, next_value, next_gradient
        losses.append(value)
    return x


def _direction(vectors: Vectors, gradient: Vector, history: list[tuple[Vector, Vector, float]]) -> Vector:
    """Minus the inverse Hessian of the history times the gradient."""
    found, shares = vectors.scale(-1.0, gradient), list[float]()
    for moved, turned, curvature in reversed(history):
        share = vectors.dot(moved, found) / curvature
        found = vectors.combine(1.0, found, -share, turned)
        shares.append(share)
    if history:
        moved, turned, curvature = history[-1]
        found = vectors.scale(curvature / vectors.dot(turned, turned), found)
    for (moved, turned, curvature), share in zip(history, reversed(shares), strict=True):
        found = vectors.combine(1.0, found, share - vectors.dot(turned, found) / curvature, moved)
    return found

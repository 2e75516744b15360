"""Computes what the kind of apply adds to the update of a home, and checks that layers are large enough for a vote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowml.errors import PolicyError
from flowml.policy.apply import Apply, Prox, Vote


def proximal(prox: Prox, update: Callable[..., tuple[Any, ...]], leaves: int) -> Callable[..., tuple[Any, ...]]:
    """The update, followed by the proximal step of its first `leaves` results, which are the parameters."""

    def updated(*arrays: Any) -> tuple[Any, ...]:
        results = update(*arrays)
        return (*(proximal_step(prox, p) for p in results[:leaves]), *results[leaves:])

    return updated


def changed(kind: Apply, update: Callable[..., tuple[Any, ...]], leaves: int) -> Callable[..., tuple[Any, ...]]:
    """The update, of what the kind makes of its first `leaves` arguments, the means. The parameters come after them."""

    def updated(*arrays: Any) -> tuple[Any, ...]:
        pairs = zip(arrays[:leaves], arrays[leaves : 2 * leaves], strict=True)
        given = [jnp.asarray(kind.gradient(mean, p, jnp)).astype(mean.dtype) for mean, p in pairs]
        for made, mean in zip(given, arrays, strict=False):
            if made.shape != mean.shape:
                raise PolicyError(f"{kind!r} makes an array of {made.shape} of one of {mean.shape}; keep the shape")
        return update(*given, *arrays[leaves:])

    return updated if type(kind).gradient is not Apply.gradient else update


def proximal_step(prox: Prox, x: Any) -> Any:
    """The number z in the box that minimises ½ (z - x)² + l1 · |z| + l2 / 2 · z², for each number of an array.

    The function is convex, so its minimum in the box is the nearest point to its minimum without the box.
    """
    if prox.l1:
        x = jnp.sign(x) * jnp.maximum(jnp.abs(x) - prox.l1, 0)
    return jnp.clip(x / (1 + prox.l2) if prox.l2 else x, prox.low, prox.high)


def check_prox(name: str, apply: Apply, dtype: np.dtype[Any]) -> None:
    """Raise PolicyError if the apply compares numbers of a parameter that have no order."""
    if isinstance(apply, Prox) and dtype.kind == "c":
        raise PolicyError(
            f"{name!r} has elements of {dtype}, and {apply!r} compares numbers, which have no order if they are "
            "complex; give this parameter a policy without a proximal step"
        )


def check_vote(layer: str, vote: Vote, shapes: Iterable[tuple[int, ...]]) -> tuple[str, ...]:
    """A warning if the vote has no effect on parameters of these shapes, because so many rows win that all do.

    Raises:
        PolicyError: for a vote for more rows than any parameter has.
    """
    shapes = tuple(shapes)
    most = max((shape[0] for shape in shapes if shape), default=0)
    if most > 2 * vote.rows:
        return ()
    none = f"it has only {'arrays without rows' if any(shapes) else 'scalars'}"
    has = f"its largest parameter has {most} row{'' if most == 1 else 's'}" if most else none
    told = f"{layer!r}: {vote} with 2 · {vote.rows} winners has no effect, because {has}, so each of them wins"
    fix = f"give rows of at most {(most - 1) // 2}, or apply='mean'" if most > 2 else "use apply='mean'"
    if vote.rows > most:
        raise PolicyError(f"{told}; {fix}")
    return (told,)


def ballot(leaf: Any, rows: int) -> Any:
    """The vote of one contribution: 1 for each of its `rows` largest rows, 0 for the others."""
    return _largest(_sizes(leaf), rows).astype(jnp.float32)


def elected(total: Any, votes: Any, rows: int) -> Any:
    """The sum, with 0 in all rows but the 2 · `rows` that have the most votes. Equal votes: the larger sum wins."""
    order = jnp.lexsort((-_sizes(total), -votes))
    won = jnp.zeros(votes.shape, bool).at[order[: 2 * rows]].set(True)
    return jnp.where(won.reshape(-1, *[1] * (total.ndim - 1)), total, jnp.zeros_like(total))


def _sizes(leaf: Any) -> Any:
    return jnp.sum(jnp.square(jnp.abs(leaf)), axis=tuple(range(1, leaf.ndim)))


def _largest(sizes: Any, rows: int) -> Any:
    return jnp.zeros(sizes.shape, bool).at[jnp.argsort(-sizes, stable=True)[:rows]].set(True)

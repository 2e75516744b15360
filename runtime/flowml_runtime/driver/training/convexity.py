"""Says before a fit whether a loss is not convex, for the methods whose result is the optimum of convex losses only.

A loss is convex if its Hessian has no negative eigenvalue anywhere. The extreme eigenvalues at one point follow from a
few products of the Hessian with vectors (Lanczos, *An iteration method for the solution of the eigenvalue problem*,
1950). They are taken at the first parameters and near them, on a few examples. A negative one is a proof; none is not,
so no more than a warning follows. There is no look if that would take long, if the loss cannot be differentiated
twice, or if its vectors would take much memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from flowml.data import Source
from flowml.errors import named
from flowml.ir.host import has_calls
from flowml.plan import Plan
from flowml.policy import Consensus, Gossip, Once, Policy, Weights
from flowml.policy.apply import Mean, base_of
from flowml.training.spec import TrainingSpec
from flowml.training.step import loss_takes_rng, name_of

PRODUCTS = 16
"""Products of the Hessian with vectors at one point."""
MOST_EXAMPLES = 32
MOST_SECONDS = 1.0
"""The longest look, as estimated by the cost model."""
MOST_BYTES = 2**28
"""The most memory for the vectors. The cost model does not know of them."""
COST = 4.0
"""A product of the Hessian with a vector takes about so many times as long as a gradient."""
NEGATIVE = 1e-2
"""An eigenvalue below minus this share of the largest is no rounding error."""


def promised(policy: Policy) -> str | None:
    """What a policy promises of a convex loss, and not of others; None if its proof does not need that."""
    if isinstance(base_of(policy.apply), Consensus):
        return "consensus ADMM finds the optimum of convex losses, and nothing promises that it converges for others"
    alone = policy.payload == Weights() and policy.every == Once() and not isinstance(policy.remote, Gossip)
    if alone and isinstance(policy.apply, Mean):
        return (
            "the mean of parameters that were trained alone is at least as good as they are if the loss is convex, and "
            "may be worse than each of them if not"
        )
    return None


def convex_warning(
    spec: TrainingSpec, plan: Plan, params: Any, source: Source, order: np.ndarray, batch: int
) -> str | None:
    """A warning if a method needs a convex loss and this one is not, else None. `order` starts with the first batch."""
    training = plan.training
    assert training is not None
    needing = {s.name: why for s in training.stores if (why := promised(s.policy)) is not None}
    examples = min(batch // spec.replicas, MOST_EXAMPLES)
    seconds = plan.estimate.single_device_seconds / batch * examples
    if not needing or spec.replicas == 1 or 2 * PRODUCTS * COST * seconds > MOST_SECONDS:
        return None
    if 8 * PRODUCTS * sum(np.size(leaf) for leaf in jax.tree_util.tree_leaves(params)) > MOST_BYTES:
        return None
    part = jax.tree_util.tree_unflatten(source.tree, source.take(order[:examples]))
    try:
        lowest, highest = _curvature(spec, params, part)
    except Exception:  # the user's function may have no second derivative, or accept only other shapes
        return None
    if not lowest < -NEGATIVE * highest:
        return None
    why = next(iter(needing.values()))
    return (
        f"{name_of(spec.loss)} is not convex: on the first examples its curvature is between {lowest:.3g} and "
        f"{highest:.3g}; {why} ({named(list(needing))}); give fm.policies.local_sgd(8), or another method without this "
        "condition"
    )


def _curvature(spec: TrainingSpec, params: Any, batch: Any) -> tuple[float, float]:
    """The smallest and the largest eigenvalue that were found at the first parameters and at a point near them."""
    flat, tree = ravel_pytree(params)
    rng = (jax.random.key(0),) if loss_takes_rng(spec.loss) else ()

    def value(x: Any) -> Any:
        found = spec.loss(tree(x), batch, *rng)
        return found[0] if isinstance(found, tuple) else found

    @jax.jit
    def product(x: Any, v: Any) -> Any:
        return jax.jvp(jax.grad(value), (x,), (v,))[1]

    if any(map(has_calls, product.trace(flat, flat).jaxpr.jaxpr.eqns)):
        return 0.0, 0.0
    draw, first = np.random.default_rng(0), np.asarray(flat)
    size = max(float(np.sqrt(np.mean(first**2))), 0.1)
    near = first + size * draw.standard_normal(first.size).astype(first.dtype)
    found = [
        _extremes(lambda v, x=x: np.asarray(product(x, v), np.float64), first.size, first.dtype, draw)
        for x in (first, near)
    ]
    return min((low for low, _ in found)), max(high for _, high in found)


def _extremes(
    product: Callable[[np.ndarray], np.ndarray], size: int, dtype: Any, draw: np.random.Generator
) -> tuple[float, float]:
    """The extreme eigenvalues of a symmetric matrix within the vectors that `PRODUCTS` products reach."""
    start = draw.standard_normal(size)
    basis = [start / np.linalg.norm(start)]
    projected = np.zeros((PRODUCTS, PRODUCTS))
    for k in range(min(PRODUCTS, size)):
        image = product(basis[k].astype(dtype))
        for i, v in enumerate(basis):
            projected[i, k] = projected[k, i] = v @ image
        for v in (*basis, *basis):  # twice, so that the basis stays orthogonal
            image = image - (v @ image) * v
        length = float(np.linalg.norm(image))
        if k + 1 == min(PRODUCTS, size) or length <= 1e-6 * max(abs(projected).max(), 1e-30):
            values = np.linalg.eigvalsh(projected[: k + 1, : k + 1])
            return float(values[0]), float(values[-1])
        basis.append(image / length)
    return 0.0, 0.0

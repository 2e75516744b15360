"""Makes of a user's training the one that is compiled: what is trained alone, and an optimizer of gradients alone.

Each of these is a wrapper of the optimizer, and of the loss where that takes other parameters:

    "examples"  the optimizer takes the gradient of each example (`private`)
    pair        `optax.LookaheadParams`: the loss takes the fast parameters, and the optimizer their gradients
    untrained   leaves of the parameters that are not trained (`untrained`)
    "state"     an update leaves a state of another form than `init` does, such as the measures of `optax.monitor`
    "value"     the optimizer takes the value of the loss (`valued`)
    "loss"      it takes the loss of the batch, as a function of the parameters (`evaluated`)

Tracing the update shows whether those in quotes are wanted, so the compiler raises `WantedError`, and is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flowml.errors import UnsupportedError
from flowml.training.evaluated import with_evaluations
from flowml.training.private import with_examples
from flowml.training.untrained import parted
from flowml.training.valued import with_value

if TYPE_CHECKING:
    from flowml.training.spec import TrainingSpec


class WantedError(UnsupportedError):
    """The optimizer wants `what`: "examples", "state", "value" or "loss"."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the optimizer wants another {what}")
        self.what = what


def adapted(
    spec: TrainingSpec, params: Any, own: Callable[[Any], jax.Array], wants: Collection[str], batch: Any
) -> tuple[TrainingSpec, Any]:
    """The training that is compiled for a global batch, and its parameters. `own` makes an array that no caller can
    change."""
    if "examples" in wants:
        spec = with_examples(spec, params, batch)
    if is_pair(params):
        spec = replace(spec, loss=_of_fast(spec.loss), optimizer=FastOptimizer(spec.optimizer))
    spec, params = parted(spec, params, own)
    if "state" in wants:
        spec = replace(spec, optimizer=GrownOptimizer(spec.optimizer))
    if "loss" in wants:
        return with_evaluations(spec, params, batch)
    return with_value(spec, params) if "value" in wants else (spec, params)


def has_inside(optimizer: Any, kind: type) -> bool:
    """Whether an optimizer, or one that it wraps, is of a kind."""
    while optimizer is not None and not isinstance(optimizer, kind):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer is not None


def is_pair(params: Any) -> bool:
    """Whether these are fast and slow parameters of `optax.lookahead`."""
    import optax

    return isinstance(params, optax.LookaheadParams)


def fast_of(params: Any) -> Any:
    """The parameters that a loss takes."""
    return params.fast if is_pair(params) else params


def _of_fast(loss: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(loss)
    def of_fast(params: Any, *rest: Any) -> Any:
        return loss(params.fast, *rest)

    return of_fast


@dataclass(frozen=True)
class FastOptimizer:
    """An optimizer of fast and slow parameters, which takes the gradients of the fast ones."""

    optimizer: Any

    def init(self, params: Any) -> Any:
        return self.optimizer.init(params)

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        return self.optimizer.update(updates.fast, state, params, **extra)


@dataclass(frozen=True)
class GrownOptimizer:
    """An optimizer whose state begins in the form that updates leave. What `init` does not make is zero."""

    optimizer: Any

    def init(self, params: Any) -> Any:
        state = self.optimizer.init(params)
        known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        after, tree = jax.tree_util.tree_flatten_with_path(self._after(params, state))
        found = [_begun(known.get(jax.tree_util.keystr(path)), leaf) for path, leaf in after]
        return jax.tree_util.tree_unflatten(tree, found)

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        return self.optimizer.update(updates, state, params, **extra)

    def _after(self, params: Any, state: Any) -> Any:
        """The shapes of the state after an update, which may want the value of the loss."""

        def update(params: Any, state: Any, **extra: Any) -> Any:
            return self.optimizer.update(params, state, params, **extra)[1]

        try:
            return jax.eval_shape(update, params, state)
        except Exception:  # it is the user's function, and raises what it likes
            return jax.eval_shape(update, params, state, value=jnp.zeros(()))


def _begun(leaf: Any, after: jax.ShapeDtypeStruct) -> Any:
    """A leaf of the first state with the type that updates give it."""
    if leaf is None:
        return jnp.zeros(after.shape, after.dtype)
    return leaf if leaf.dtype == after.dtype else jnp.asarray(leaf).astype(after.dtype)

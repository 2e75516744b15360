"""Trains with the gradient of each example clipped, as `optax.contrib.dpsgd` wants it (DP-SGD, Abadi et al., 2016).

The optimizer clips the gradient of each example by its norm over all layers, adds them up, adds noise and divides by
the examples of the batch. The first part is done where the gradients are: the loss gets a derivative that is the mean
of the clipped ones, which microbatches and replicas average as any gradient. The rest is done at the homes, for each
layer alone: they add the noise, divided by the examples of the global batch. So a step equals that of a plain loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec

from flowml.errors import UnsupportedError
from flowml.ir import _jax
from flowml.policy import ParameterServer, Policy
from flowml.training.step import loss_takes_rng

if TYPE_CHECKING:
    from flowml.training.spec import TrainingSpec

_AGGREGATE = "differentially_private_aggregate.<locals>.update_fn"
_CHAIN = "chain.<locals>.update_fn"
_EXTRA = "with_extra_args_support.<locals>.update"

LOOP = "write the loop with fm.dataflow, with jax.vmap(jax.grad(loss), (None, 0))"

Update = Callable[..., tuple[Any, Any]]


class _Parts(NamedTuple):
    """An update of the gradients of examples, in two: the norm to clip at, and what a mean of clipped ones takes."""

    clip: Any
    update: Update


def wants_examples(state: Any) -> bool:
    """Whether an optimizer with this state takes the gradient of each example."""
    from optax import contrib

    private = contrib.DifferentiallyPrivateAggregateState
    nodes = jax.tree_util.tree_leaves(state, is_leaf=lambda node: isinstance(node, private))
    return any(isinstance(node, private) for node in nodes)


@dataclass(frozen=True)
class PrivateOptimizer:
    """An optimizer of the gradients of examples that takes the mean of clipped ones."""

    optimizer: Any
    update: Update

    def init(self, params: Any) -> Any:
        return self.optimizer.init(params)


def with_examples(spec: TrainingSpec, params: Any, batch: Any) -> TrainingSpec:
    """The training of an optimizer that takes the gradient of each example. Raises UnsupportedError where the noise
    would not be that of the whole batch."""
    examples = next((leaf.shape[0] for leaf in jax.tree_util.tree_leaves(batch) if leaf.shape), 1)
    parts = _parts(spec.optimizer.update, examples)
    what = "contrib.differentially_private_aggregate, which takes the gradient of each example,"
    if parts is None:
        raise UnsupportedError(f"{what} is not the first of an optax.chain; put it there, or {LOOP}")
    check_whole(spec, params, what, "adds noise for the whole batch of each step", LOOP)
    return replace(spec, loss=_clipped(spec.loss, parts.clip), optimizer=PrivateOptimizer(spec.optimizer, parts.update))


def check_whole(spec: TrainingSpec, params: Any, what: str, does: str, loop: str) -> None:
    """Raise UnsupportedError unless each update is of the plain gradients of one whole batch. `what` needs that: it
    `does` something for the whole batch. `loop` says what else to write."""
    if spec.has_state or spec.weight is not None:
        about = "a loss with state" if spec.has_state else "weights or a shorter last batch"
        raise UnsupportedError(f"{what} has no meaning in a Trainer with {about}; leave them out, or {loop}")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    policies = spec.resolve({_jax.path_name(path) or "params": jnp.shape(leaf) for path, leaf in leaves})
    for path, policy in policies.items():
        if not _is_whole(policy):
            raise UnsupportedError(
                f"{what} {does}, and {path!r} has the policy {policy.describe()}, which takes others together; give "
                f"fm.policies.synchronous() or all_reduce(), or {loop}"
            )


def _is_whole(policy: Policy) -> bool:
    """Whether each update is of the gradients of one whole batch."""
    plain = msgspec.structs.replace(policy, topology=ParameterServer()) == Policy()
    return plain and (policy.collective or isinstance(policy.topology, ParameterServer))


def _parts(update: Any, examples: int) -> _Parts | None:
    """The parts of an update, if it clips the gradients of examples before all else."""
    if not inspect.isfunction(update):
        return None
    own: Any = inspect.getclosurevars(update).nonlocals
    match update.__qualname__:
        case name if name == _AGGREGATE and {"l2_norm_clip", "noise_std"} <= own.keys():
            return _Parts(own["l2_norm_clip"], _noise(own["noise_std"] / examples))
        case name if name == _EXTRA:
            return _parts(own["tx"].update, examples)
        case name if name == _CHAIN:
            first, *rest = own["update_fns"]
            found = _parts(first, examples)
            return None if found is None else _Parts(found.clip, _chained((found.update, *rest)))
        case _:
            return None


def _noise(deviation: Any) -> Update:
    """Adds noise as optax does, with the same keys."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        leaves, tree = jax.tree_util.tree_flatten(updates)
        new, *keys = jax.random.split(state.rng_key, len(leaves) + 1)
        noised = [g + deviation * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(leaves, keys, strict=True)]
        return jax.tree_util.tree_unflatten(tree, noised), type(state)(rng_key=new)

    return update


def _chained(updates: tuple[Update, ...]) -> Update:
    def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        after: list[Any] = []
        for function, mine in zip(updates, state, strict=True):
            gradients, new = function(gradients, mine, params, **extra)
            after.append(new)
        return gradients, tuple(after)

    return update


def _clipped(loss: Callable[..., Any], clip: Any) -> Callable[..., Any]:
    """The loss of a batch, as the mean over its examples, whose derivative is the mean of the clipped ones of each.

    With keys each example has its own, `jax.random.split(rng, examples)`.
    """
    import optax

    takes_rng = loss_takes_rng(loss)

    def of_examples(function: Callable[..., Any], params: Any, batch: Any, keys: tuple[Any, ...]) -> Any:
        rows = jax.tree_util.tree_leaves(batch)[0].shape[0]
        alone = jax.tree_util.tree_map(lambda x: x[:, None], batch)  # a batch of one example each
        mine: tuple[Any, ...] = tuple(jax.random.split(key, rows) for key in keys)
        return jax.vmap(function, (None, 0, *(0 for _ in mine)))(params, alone, *mine)

    def mean(params: Any, batch: Any, *keys: Any) -> Any:
        return _joined(of_examples(loss, params, batch, keys))

    def forward(params: Any, batch: Any, *keys: Any) -> tuple[Any, Any]:
        has_aux = isinstance(jax.eval_shape(loss, params, batch, *keys), tuple)
        gradient: Any = jax.value_and_grad(loss, has_aux=has_aux)
        found, gradients = of_examples(gradient, params, batch, keys)
        leaves, tree = jax.tree_util.tree_flatten(gradients)
        sums: Any = optax.per_example_global_norm_clip(leaves, clip)[0]
        rows = leaves[0].shape[0]
        return _joined(found), (jax.tree_util.tree_unflatten(tree, [x / rows for x in sums]), len(keys))

    def backward(kept: Any, change: Any) -> tuple[Any, ...]:
        gradient, keys = kept
        of_loss = change[0] if isinstance(change, tuple) else change
        return (jax.tree_util.tree_map(lambda g: (g * of_loss).astype(g.dtype), gradient), *(None,) * (1 + keys))

    clipped = jax.custom_vjp(mean)
    clipped.defvjp(forward, backward)

    if takes_rng:

        @wraps(loss)
        def with_key(params: Any, batch: Any, rng: Any) -> Any:
            return clipped(params, batch, rng)

        return with_key

    @wraps(loss)
    def without_key(params: Any, batch: Any) -> Any:
        return clipped(params, batch)

    return without_key


def _joined(found: Any) -> Any:
    """What the losses of single examples return, as that of the batch: means of floats, sums of integers."""

    def joined(x: Any) -> Any:
        return jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.sum(x, 0, dtype=x.dtype)

    return jax.tree_util.tree_map(joined, found)

"""Leaves of the parameters that are not trained: integers, booleans and keys, and in equinox modules functions and
Python's numbers. They ride along with a fit, untouched.

The compiler sees the tree of the trained leaves, with None in place of the others, whose values are constants of the
loss. An optimizer gets what `jax.grad(..., allow_int=True)` gives, gradients of float0, if it takes them, as one with
masks for the whole tree does; what is no array is there as it is, or None, as `equinox.filter` makes it. Else it gets
the tree of the trained leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from flowml.arrays import ArraySpec
from flowml.ir import _jax
from flowml.ir.objects import leaves_of_modules

if TYPE_CHECKING:
    from flowml.training.spec import TrainingSpec


def is_trained(leaf: Any) -> bool:
    """Whether a leaf is one that can be trained. What is no array is refused elsewhere, with the trained ones."""
    try:
        dtype = jax.dtypes.result_type(leaf)
    except TypeError:
        return True
    other = (jnp.integer, jnp.bool_, jax.dtypes.extended)
    return dtype != jax.dtypes.float0 and not any(jnp.issubdtype(dtype, kind) for kind in other)


def trained_leaves(params: Any) -> list[int]:
    """The places of those that are trained, among all leaves."""
    fixed = leaves_of_modules(params)
    return [i for i, leaf in enumerate(jax.tree_util.tree_leaves(params)) if i not in fixed and is_trained(leaf)]


@dataclass(frozen=True, eq=False)
class Untrained:
    """The leaves that are not trained, by their places among all leaves of `tree`. Equal ones have equal values.

    `fixed` are the leaves that are no arrays.
    """

    tree: Any
    places: tuple[int, ...]
    paths: tuple[tuple[Any, ...], ...]
    leaves: tuple[jax.Array, ...]
    fixed: tuple[tuple[int, Hashable], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(_jax.path_name(path) or "params" for path in self.paths)

    @property
    def specs(self) -> tuple[tuple[str, ArraySpec], ...]:
        """The name and the type of each."""
        return tuple(zip(self.names, map(_jax.spec_of, self.leaves), strict=True))

    def whole(self, trained: Any, others: Sequence[Any] | None = None) -> Any:
        """The tree with `others`, or the values of the leaves, in the places of those that are not trained."""
        rest = iter(jax.tree_util.tree_leaves(trained))
        own: dict[int, Any] = dict(self.fixed)
        own |= zip(self.places, self.leaves if others is None else others, strict=True)
        found = [own[i] if i in own else next(rest) for i in range(self.tree.num_leaves)]
        return jax.tree_util.tree_unflatten(self.tree, found)

    def trained(self, whole: Any) -> Any:
        """The tree with None in the places of leaves that are not trained."""
        found = self.tree.flatten_up_to(whole)
        for place in (*self.places, *(place for place, _ in self.fixed)):
            found[place] = None
        return jax.tree_util.tree_unflatten(self.tree, found)

    @property
    def zeros(self) -> list[np.ndarray[Any, Any]]:
        """The gradients of these leaves in JAX."""
        return [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in self.leaves]

    @cached_property
    def digest(self) -> str:
        """A name of the values."""
        digest = xxhash.xxh3_128()
        for leaf in self.leaves:
            key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            digest.update(f"{leaf.dtype}{leaf.shape}{_jax.spec_of(leaf).weak_type}".encode())
            digest.update(np.ascontiguousarray(jax.random.key_data(leaf) if key else leaf).tobytes())
        return digest.hexdigest()

    @property
    def arrays(self) -> Untrained:
        """These leaves with None in place of those that are no arrays."""
        return replace(self, fixed=tuple((place, None) for place, _ in self.fixed))

    @property
    def _key(self) -> Any:
        return self.tree, self.places, self.digest, tuple((place, type(leaf), leaf) for place, leaf in self.fixed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Untrained) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@dataclass(frozen=True)
class WholeOptimizer:
    """An optimizer of whole trees, for the trained leaves. The others have gradients of float0."""

    optimizer: Any
    untrained: Untrained

    def init(self, params: Any) -> Any:
        return self.optimizer.init(self.untrained.whole(params))

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        whole = self.untrained.whole(updates, self.untrained.zeros), state, self.untrained.whole(params)
        found, state = self.optimizer.update(*whole, **extra)
        return self.untrained.trained(found), state


def parted(spec: TrainingSpec, params: Any, own: Callable[[Any], jax.Array]) -> tuple[TrainingSpec, Any]:
    """The training of the trained leaves alone, and these. `own` makes an array that no caller can change.

    Raises TypeError for a leaf that is not trained and has no value, or that is no array and cannot be hashed.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    fixed = leaves_of_modules(params)
    places = tuple(i for i, (_, leaf) in enumerate(paths) if i not in fixed and not is_trained(leaf))
    if not places and not fixed:
        return spec, params
    for i, leaf in fixed.items():
        _check_hashable(_jax.path_name(paths[i][0]), leaf)
    for path, leaf in (paths[i] for i in places):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"parameter {_jax.path_name(path)!r} is {leaf.dtype}, so it is not trained, and its value is a "
                "constant of the plan; give an array"
            )
    values = tuple(_owned(*paths[i], own) for i in places)
    untrained = Untrained(tree, places, tuple(paths[i][0] for i in places), values, tuple(fixed.items()))
    trained = untrained.trained(params)
    optimizer = _optimizer(spec.optimizer, untrained, trained)
    return replace(spec, loss=_loss(spec.loss, untrained), optimizer=optimizer, untrained=untrained), trained


def _check_hashable(path: str, leaf: Any) -> None:
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"parameter {path!r} is of type {type(leaf).__name__}, which is no array and cannot be hashed; programs "
            "are compiled for such leaves, so give an array, or a value that can be hashed"
        ) from None


def _owned(path: tuple[Any, ...], leaf: Any, own: Callable[[Any], jax.Array]) -> jax.Array:
    try:
        return own(leaf)
    except OverflowError as error:
        raise ValueError(f"parameter {_jax.path_name(path)!r} is out of range: {error}; give a smaller one") from None


def _loss(loss: Callable[..., Any], untrained: Untrained) -> Callable[..., Any]:
    @wraps(loss)
    def whole(params: Any, *rest: Any) -> Any:
        return loss(untrained.whole(params), *rest)

    return whole


def _optimizer(optimizer: Any, untrained: Untrained, trained: Any) -> Any:
    """The optimizer of the trained leaves: of whole trees, if it takes them."""
    kinds = [untrained, *([untrained.arrays] if untrained.fixed and untrained.places else [])]
    wholes = (WholeOptimizer(optimizer, kind) for kind in kinds)
    return next((whole for whole in wholes if _takes(whole, trained)), optimizer)


def _takes(optimizer: Any, params: Any) -> bool:
    """Whether an optimizer works with these parameters, perhaps with the value of the loss."""

    def run(params: Any, **extra: Any) -> Any:
        return optimizer.update(params, optimizer.init(params), params, **extra)

    for extra in ({}, {"value": jnp.zeros(())}):
        try:
            jax.eval_shape(run, params, **extra)
        except Exception:  # it is the user's function, and raises what it likes
            continue
        return True
    return False

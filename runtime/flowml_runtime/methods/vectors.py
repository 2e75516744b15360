"""Vectors in the form of a model's parameters, whose pieces stay on their homes: Sandblaster's vector operations.

An optimizer of whole batches, such as L-BFGS, is written with a few operations of vectors. Each runs where the pieces
are, on all homes at once. The coordinator, which is the caller, sends the name of an operation and some numbers, and
gets a number back: parameters and histories of the optimizer are never in one place (Dean et al., *Large Scale
Distributed Deep Networks*, NeurIPS 2012, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowml.ir.scopes import device
from flowml_runtime.cluster import Cluster
from flowml_runtime.dataflow import dataflow
from flowml_runtime.methods.given import check_cluster, check_params
from flowml_runtime.put import put

Vector = list[Any]
"""A handle for each piece, in the order of the leaves of the parameters."""


class Vectors:
    """The space of vectors like `params`. Each leaf is a piece, and large pieces are spread evenly over the workers.

    Raises:
        TypeError: for a leaf that is no floating array, or what is no cluster of real workers.
        ValueError: for parameters without leaves.
    """

    def __init__(self, params: Any, cluster: Cluster) -> None:
        check_cluster(cluster)
        check_params(params)
        leaves, self._tree = jax.tree_util.tree_flatten(params)
        self._shapes = [jnp.shape(leaf) for leaf in leaves]
        self._cluster = cluster
        self.homes = _spread([leaf.nbytes for leaf in map(jnp.asarray, leaves)], _workers(cluster))
        self._dot = dataflow(self._dots, cluster=cluster)
        self._combine = dataflow(self._combined, cluster=cluster, keep=0)

    def put(self, tree: Any) -> Vector:
        """Bring a pytree like the parameters to its homes. Raises ValueError for one of another structure or shape."""
        check_params(tree)
        leaves, structure = jax.tree_util.tree_flatten(tree)
        if structure != self._tree or [jnp.shape(leaf) for leaf in leaves] != self._shapes:
            raise ValueError("the pytree has another structure or other shapes than the parameters; give one like them")
        placed = zip(leaves, self.homes, strict=True)
        return [put(jnp.asarray(leaf), self._cluster, home) for leaf, home in placed]

    def get(self, vector: Vector) -> Any:
        """The pytree of a vector."""
        return jax.tree_util.tree_unflatten(self._tree, [piece.fetch() for piece in vector])

    def tree(self, pieces: Sequence[Any]) -> Any:
        """Pieces in the structure of the parameters."""
        return jax.tree_util.tree_unflatten(self._tree, list(pieces))

    def dot(self, x: Vector, y: Vector) -> float:
        """The scalar product of two vectors."""
        return float(self._dot(x, y))

    def combine(self, a: float, x: Vector, b: float, y: Vector) -> Vector:
        """a · x + b · y."""
        return self._combine(a, x, b, y)[0]

    def axpy(self, a: float, x: Vector, y: Vector) -> Vector:
        """a · x + y."""
        return self.combine(a, x, 1.0, y)

    def scale(self, a: float, x: Vector) -> Vector:
        """a · x."""
        return self.combine(a, x, 0.0, x)

    def _dots(self, x: Vector, y: Vector) -> jax.Array:
        parts: list[jax.Array] = []
        for home, p, q in zip(self.homes, x, y, strict=True):
            with device(home):
                parts.append(jnp.vdot(p, q))
        with device(self.homes[0]):
            return sum(parts[1:], parts[0])

    def _combined(self, a: Any, x: Vector, b: Any, y: Vector) -> tuple[Vector]:
        found: Vector = []
        for home, p, q in zip(self.homes, x, y, strict=True):
            with device(home):
                found.append((a * p + b * q).astype(p.dtype))
        return (found,)


def _workers(cluster: Cluster) -> list[str]:
    return list(dict.fromkeys(d.worker for d in cluster.devices))


def _spread(sizes: Sequence[int], workers: Sequence[str]) -> list[str]:
    """A worker for each piece: the largest first, each to the worker that has least."""
    held = dict.fromkeys(workers, 0)
    homes: dict[int, str] = {}
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        home = min(held, key=held.__getitem__)
        homes[piece] = home
        held[home] += sizes[piece]
    return [homes[piece] for piece in range(len(sizes))]

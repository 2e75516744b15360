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
import numpy as np

from flowml.errors import ClusterError, WorkerLostError
from flowml.ir._jax import path_name
from flowml.ir.scopes import device
from flowml.numbers import real
from flowml_runtime.cluster import Cluster
from flowml_runtime.dataflow import dataflow
from flowml_runtime.driver.remote import Remote
from flowml_runtime.driver.training.differing import bounded
from flowml_runtime.driver.training.structs import structs
from flowml_runtime.methods.given import check_cluster, check_params, losses_told, titled
from flowml_runtime.put import put

Vector = list[Any]
"""A handle for each piece, in the order of the leaves of the parameters."""


Kind = tuple[str, tuple[int, ...]]
Kinds = dict[str, Kind]

_AGAIN = "its pieces of vectors are gone; make new Vectors on the workers that are left, and put() the vectors again"


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
        self._kinds = _kinds(params)
        self.cluster = cluster
        self.homes = _spread([leaf.nbytes for leaf in map(jnp.asarray, leaves)], _workers(cluster))
        self._dot = dataflow(titled("Vectors.dot", self._dots), cluster=cluster)
        self._combine = dataflow(titled("Vectors.combine", self._combined), cluster=cluster, keep=0)

    def put(self, tree: Any) -> Vector:
        """Bring a pytree like the parameters to its homes. Raises ValueError for one of another structure, or with
        other shapes or dtypes: it says which leaves differ."""
        check_params(tree)
        leaves, structure = jax.tree_util.tree_flatten(tree)
        differs = _differences(_kinds(tree), self._kinds)
        if not differs and structure != self._tree:
            differs = [f"its structure is {structure}, and that of the parameters {self._tree}"]
        if differs:
            raise ValueError(f"put: the pytree is not like the parameters: {bounded(differs)}; give one like them")
        placed = zip(leaves, self.homes, strict=True)
        with losses_told(lambda: _AGAIN):
            return [put(jnp.asarray(leaf), self.cluster, home) for leaf, home in placed]

    def get(self, vector: Vector) -> Any:
        """The pytree of a vector."""
        self.check("get", vector=vector)
        with losses_told(lambda: _AGAIN):
            return jax.tree_util.tree_unflatten(self._tree, [_value(piece) for piece in vector])

    def tree(self, pieces: Sequence[Any]) -> Any:
        """Pieces in the structure of the parameters. Raises ValueError for another number of pieces."""
        if len(pieces) != len(self._kinds):
            raise ValueError(
                f"tree: {len(pieces)} pieces; give one for each of the {len(self._kinds)} leaves of params"
            )
        return jax.tree_util.tree_unflatten(self._tree, list(pieces))

    def dot(self, x: Vector, y: Vector) -> float:
        """The scalar product of two vectors."""
        self.check("dot", x=x, y=y)
        with losses_told(lambda: _AGAIN):
            return float(self._dot(x, y))

    def combine(self, a: float, x: Vector, b: float, y: Vector) -> Vector:
        """a · x + b · y."""
        return self._sum("combine", a, x, b, y)

    def axpy(self, a: float, x: Vector, y: Vector) -> Vector:
        """a · x + y."""
        return self._sum("axpy", a, x, 1.0, y)

    def scale(self, a: float, x: Vector) -> Vector:
        """a · x."""
        return self._sum("scale", a, x, 0.0, x)

    def check(self, operation: str, **vectors: Any) -> None:
        """Check the vectors of an operation, each by its name.

        Raises:
            TypeError: for what is no list of pieces.
            ValueError: for a vector of another space. It says which leaves differ.
            ClusterError: for a vector of another cluster, of a closed one, or with a deleted piece.
            WorkerLostError: for a piece that was on a lost worker.
        """
        for name, vector in vectors.items():
            if not isinstance(vector, list | tuple):
                raise TypeError(
                    f"{operation}: {name} is of type {type(vector).__name__}; give a vector, which put() makes of a "
                    "pytree"
                )
            differs = _differences(_pieces(vector, self._kinds), self._kinds)  # pyright: ignore[reportUnknownArgumentType]
            if differs:
                raise ValueError(
                    f"{operation}: {name} is no vector of this space: {bounded(differs)}; give one that put() and the "
                    "operations of these Vectors have made"
                )
            for path, piece in zip(self._kinds, vector, strict=True):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
                self._check_piece(f"{operation}: leaf {path!r} of {name}", piece)

    def _check_piece(self, what: str, piece: Any) -> None:
        if not isinstance(piece, Remote):
            return
        try:
            piece.check(self.cluster.session.held)
        except (ClusterError, WorkerLostError) as error:
            reason, _, fix = str(error).partition("; ")
            fix = _AGAIN if piece.is_lost() else fix or "put() its pytree again"
            raise type(error)(f"{what}: {reason}; {fix}", worker=error.worker) from error

    def _sum(self, operation: str, a: Any, x: Vector, b: Any, y: Vector) -> Vector:
        for name, value in (("a", a), ("b", b)):
            if real(value) is None:
                raise TypeError(f"{operation}: {name}={value!r} is of type {type(value).__name__}; give a real number")
        self.check(operation, x=x, y=y)
        with losses_told(lambda: _AGAIN):
            return self._combine(float(a), x, float(b), y)[0]

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


def _kinds(tree: Any) -> Kinds:
    """The dtype and shape of each leaf, by its path, as JAX takes it."""
    found = jax.tree_util.tree_leaves_with_path(structs(tree, "parameter"))
    return {path_name(path): (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in found}


def _pieces(vector: Sequence[Any], kinds: Kinds) -> Kinds:
    """The same of the pieces of a vector, which have the paths of the space."""
    paths = [*kinds, *(f"piece {i}" for i in range(len(kinds), len(vector)))]
    return {path: _kind(piece) for path, piece in zip(paths, vector, strict=False)}


def _kind(piece: Any) -> Kind:
    if not isinstance(piece, jax.Array | np.ndarray):
        return f"of type {type(piece).__name__}, and no array", ()
    return str(jax.dtypes.canonicalize_dtype(piece.dtype)), tuple(piece.shape)


def _value(piece: Any) -> jax.Array:
    return piece.fetch() if isinstance(piece, Remote) else jnp.asarray(piece)


def _differences(found: Kinds, kinds: Kinds) -> list[str]:
    """What differs leaf by leaf."""
    differs = [f"leaf {path!r}, {_shown(kind)}, is missing" for path, kind in kinds.items() if path not in found]
    differs += [f"leaf {path!r}, {_shown(kind)}, is too much" for path, kind in found.items() if path not in kinds]
    both = ((path, kind, found[path]) for path, kind in kinds.items() if path in found)
    return differs + [
        f"leaf {p!r} is {_shown(got)}, and {_shown(want)} in params" for p, want, got in both if got != want
    ]


def _shown(kind: Kind) -> str:
    dtype, shape = kind
    return dtype if " " in dtype else f"{dtype}{list(shape)}"


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

"""Evaluates a loss and its gradient on a whole data set in portions, which idle workers take one by one.

When no portion is left, an idle worker computes a copy of one that another worker has begun, and the first result
counts. So a slow worker delays an evaluation by little. What it still computes then is ignored, and it takes part again
when it is done (Dean et al., *Large Scale Distributed Deep Networks*, NeurIPS 2012, section 4.2).
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowml.arguments import flag
from flowml.ir.scopes import device
from flowml.numbers import whole_number
from flowml_runtime.cluster import Cluster
from flowml_runtime.dataflow import dataflow
from flowml_runtime.methods.given import check_cluster, check_function, check_loss, count_examples, losses_told, titled
from flowml_runtime.methods.vectors import Vector, Vectors
from flowml_runtime.put import put

_AGAIN = "the examples that it held are gone; make Vectors and Portions again, on the workers that are left"


class Portions:
    """The mean of `loss(params, batch)` over all examples of `source`, as a function of a vector of `vectors`.

    Each worker holds the whole source, and is told which rows to use. The number of examples is a multiple of
    `portions` times the number of workers.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: for a number of portions below 1, or examples that do not divide into them.
    """

    def __init__(
        self, loss: Callable[..., Any], source: Any, vectors: Vectors, cluster: Cluster, portions: int, copies: bool
    ) -> None:
        check_cluster(cluster)
        check_function("loss", loss, "loss(params, batch) -> scalar")
        if not isinstance(vectors, Vectors):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"vectors={vectors!r} is of type {type(vectors).__name__}; give Vectors(params, cluster)")
        if vectors.cluster is not cluster:
            raise ValueError("Portions: vectors are on another cluster; give the cluster of Vectors(params, cluster)")
        self._loss, self._vectors = loss, vectors
        self.workers = list(dict.fromkeys(d.worker for d in cluster.devices))
        self.count = whole_number("portions", portions, least=1) * len(self.workers)
        examples = count_examples(source)
        if examples % self.count:
            raise ValueError(
                f"{examples} examples do not divide into {portions} portions for each of {len(self.workers)} workers; "
                f"give a multiple of {self.count}"
            )
        self._size, self._copies = examples // self.count, flag("copies", copies)
        self._sources = {w: put(source, cluster, w) for w in self.workers}
        self._compute = {w: dataflow(titled("Portions", self._on(w)), cluster=cluster, keep=1) for w in self.workers}
        self._add = {w: dataflow(titled("Portions", self._added), cluster=cluster, keep=0) for w in self.workers}
        self._done: queue.SimpleQueue[tuple[str, int, int, Any]] = queue.SimpleQueue()
        self._busy: set[str] = set()
        self._round = 0
        self.duplicates = 0
        """How many copies have been begun."""

    def __call__(self, params: Vector) -> tuple[float, Vector]:
        """The loss and its gradient, on the homes of the vector."""
        self._vectors.check("Portions", params=params)
        self._round += 1
        with losses_told(lambda: _AGAIN):
            return self._evaluated(params)

    def _evaluated(self, params: Vector) -> tuple[float, Vector]:
        left, begun, counted = deque(range(self.count)), deque[int](), set[int]()
        value, total = 0.0, self._vectors.scale(0.0, params)

        def begin(worker: str) -> None:
            """Give an idle worker the next portion, or a copy of the one that was begun first."""
            if left:
                portion = left.popleft()
                begun.append(portion)
            else:
                waiting = [p for p in begun if p not in counted] if self._copies else []
                if not waiting:
                    return
                portion = waiting[0]
                begun.remove(portion)
                begun.append(portion)
                self.duplicates += 1
            self._busy.add(worker)
            future = self._compute[worker].submit(params, self._sources[worker], portion * self._size)
            now = self._round
            future.add_done_callback(lambda done: self._done.put((worker, now, portion, done)))

        for worker in self.workers:
            if worker not in self._busy:
                begin(worker)
        while len(counted) < self.count:
            worker, now, portion, done = self._done.get()  # no deadline: each portion is a call, which has one
            self._busy.discard(worker)
            part, gradient = done.result()
            if now == self._round and portion not in counted:
                counted.add(portion)
                value += float(part) / self.count
                total = self._add[worker](total, gradient)[0]
            if len(counted) < self.count:
                begin(worker)
        return value, self._vectors.scale(1 / self.count, total)

    def _on(self, worker: str) -> Callable[..., Any]:
        def portion(params: Vector, source: Any, first: Any) -> tuple[Any, Vector]:
            with device(worker):
                rows = jax.tree_util.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, self._size), source)

                def of(pieces: Vector) -> Any:
                    return check_loss(self._loss(self._vectors.tree(pieces), rows))

                return jax.value_and_grad(of)(list(params))

        return portion

    def _added(self, total: Vector, gradient: Vector) -> tuple[Vector]:
        found: Vector = []
        for home, t, g in zip(self._vectors.homes, total, gradient, strict=True):
            with device(home):
                found.append(t + jnp.asarray(g, t.dtype))
        return (found,)

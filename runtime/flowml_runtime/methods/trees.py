"""Grows gradient-boosted trees on a cluster, from histograms of features, with data split by rows or by features.

A tree grows level by level. At each level the sums of gradients and curvatures are needed for each node, feature and
bin, and the best split of a node follows from them.

* Split by rows, each worker has some examples. Without a vote, workers send all their histograms to the first, which
  adds them up. With `vote=a` a worker names for each node its `a` best features, the 2 a features with most votes win,
  and only the winners' histograms are sent (Meng et al., *A Communication-Efficient Parallel Algorithm for Decision
  Tree*, PV-tree, NeurIPS 2016).
* Split by features, each worker has all examples of some features. It sends its best split, and the owner of the best
  of all says in one bit an example on which side it is.

A tree is one dataflow program with a part for each worker, so the bytes between workers are those of its plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from flowml.arguments import choice, number
from flowml.ir.scopes import device
from flowml.numbers import whole_number
from flowml_runtime.cluster import Cluster
from flowml_runtime.dataflow import dataflow
from flowml_runtime.methods.given import check_cluster, losses_told, titled

Floats = NDArray[np.float64]
Split = Literal["rows", "features"]


@dataclass(frozen=True)
class Settings:
    """What all trees of a model share."""

    depth: int
    bins: int
    rate: float
    l2: float
    vote: int | None
    loss: Literal["logistic", "squared"]
    workers: tuple[str, ...]

    def on(self, place: int) -> Any:
        """Where the worker at this place computes."""
        return device(self.workers[place])

    def slopes(self, margin: jax.Array, y: jax.Array) -> jax.Array:
        """Gradient and curvature of the loss of each example, in columns."""
        if self.loss == "squared":
            return jnp.stack([margin - y, jnp.ones_like(y)], axis=-1)
        p = jax.nn.sigmoid(margin)
        return jnp.stack([p - y, p * (1 - p)], axis=-1)


@dataclass(frozen=True)
class Tree:
    """A full tree: at level l, node i goes left if the bin of `features[l][i]` is at most `cuts[l][i]`."""

    features: tuple[NDArray[np.int32], ...]
    cuts: tuple[NDArray[np.int32], ...]
    values: NDArray[np.float32]

    def __call__(self, binned: NDArray[np.int32]) -> NDArray[np.float32]:
        """The value of each example, from its bins."""
        node, rows = np.zeros(len(binned), np.int32), np.arange(len(binned))
        for features, cuts in zip(self.features, self.cuts, strict=True):
            node = 2 * node + (binned[rows, features[node]] > cuts[node])
        return self.values[node]


@dataclass(frozen=True)
class Boosted:
    """The trees, the edges of the bins of each feature, and the bytes that workers sent each other for one tree."""

    trees: tuple[Tree, ...]
    edges: Floats
    tree_bytes: int
    base: float = 0.0
    """What the first tree begins from: the mean of the labels for the squared loss."""

    def margin(self, x: Any) -> Floats:
        """The base and the sum of the trees for each row of `x`: a prediction, or the logit of class 1.

        Raises ValueError for rows of another number of features, or what is no number.
        """
        table, features = _numbers("x", x), self.edges.shape[1]
        if table.ndim != 2 or table.shape[1] != features:
            raise ValueError(f"x has the shape {table.shape}; give rows of the {features} features of the fit")
        binned = _binned(table, self.edges)
        return np.asarray([tree(binned) for tree in self.trees], np.float64).sum(axis=0) + self.base


def boost(
    x: Any,
    y: Any,
    cluster: Cluster,
    *,
    trees: int = 20,
    depth: int = 3,
    bins: int = 32,
    rate: float = 0.3,
    l2: float = 1.0,
    split: Split = "rows",
    vote: int | None = None,
    loss: Literal["logistic", "squared"] = "logistic",
) -> Boosted:
    """Fit gradient-boosted trees to rows `x` and labels `y` on all workers of `cluster`.

    Args:
        x: an array of examples and features; y: their labels, 0 or 1 for the logistic loss.
        trees: how many trees to grow.
        depth: levels of each tree, which has 2 ** depth leaves; at most 16.
        bins: how many equally frequent values a feature is rounded to.
        rate: what each tree's values are multiplied by, above 0.
        l2: the penalty of values, above 0: without one, a node without examples has no value.
        split: `"rows"` or `"features"`: what each worker has a part of.
        vote: with rows, how many features of each node a worker votes for; None sends all histograms.
        loss: the first tree begins from 0 for `"logistic"`, and from the mean of the labels for `"squared"`.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: for numbers out of range, rows and labels that do not fit together, labels that the loss does not
            have, or fewer rows or features than workers.
    """
    check_cluster(cluster)
    choice("loss", loss, ("logistic", "squared"))
    table, labels = _examples(x, y, loss)
    names = tuple(dict.fromkeys(d.worker for d in cluster.devices))
    workers = len(names)
    whole_number("trees", trees, least=1)
    whole_number("depth", depth, least=1, most=16)
    rate, l2 = number("rate", rate, above=True), number("l2", l2, above=True)
    whole_number("bins", bins, least=2, most=256)
    choice("split", split, ("rows", "features"))
    if vote is not None:
        whole_number("vote", vote, least=1, most=table.shape[1])
        if split == "features":
            raise ValueError(f"vote={vote} with split='features': each worker has whole features, so leave vote out")
    length = table.shape[0 if split == "rows" else 1]
    if length < workers:
        raise ValueError(f"{length} {split} cannot be divided among {workers} workers; give fewer workers")
    settings = Settings(depth, bins, rate, l2, vote, loss, names)
    edges = np.quantile(table, np.linspace(0, 1, bins + 1)[1:-1], axis=0)
    parts = np.array_split(np.arange(length), workers)
    base = float(np.float32(labels.mean())) if loss == "squared" else 0.0
    binned = _binned(table, edges)
    if split == "rows":
        held = [(binned[p], labels[p], np.full(len(p), base, np.float32)) for p in parts]
        grow: Callable[..., Any] = partial(_by_rows, settings)
    else:
        held = [(binned[:, p], labels, np.full(len(labels), base, np.float32)) for p in parts]
        grow = partial(_by_features, settings, [int(p[0]) for p in parts])
    program = dataflow(titled("boost", grow), cluster=cluster, keep=0)
    tree_bytes = sum(t.nbytes for t in program.plan(held).transfers if _between_workers(t))
    found: list[Tree] = []
    with losses_told(
        lambda: f"boost had grown {len(found)} of {trees} trees; call it again, on the workers that are left"
    ):
        state: Any = held
        for _ in range(trees):
            state, (features, cuts, values) = program(state)
            found.append(Tree(_arrays(features), _arrays(cuts), np.asarray(values)))
    return Boosted(tuple(found), edges, tree_bytes, base)


def _examples(x: Any, y: Any, loss: str) -> tuple[Floats, NDArray[np.float32]]:
    """Rows and labels as arrays. Raises ValueError if they make no sense together."""
    table, labels = _numbers("x", x), _numbers("y", y)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"x has the shape {table.shape}; give a row for each example and a column for each feature")
    if labels.shape != table.shape[:1]:
        raise ValueError(f"y has the shape {labels.shape}; give one label for each of the {len(table)} rows of x")
    other = labels[(labels != 0) & (labels != 1)]
    if loss == "logistic" and other.size:
        raise ValueError(
            f"y has the label {other[0]:g}, and loss='logistic' has 0 and 1; give those, or loss='squared'"
        )
    return table, labels.astype(np.float32)


def _numbers(name: str, values: Any) -> Floats:
    try:
        found = np.asarray(values)
        found = found.astype(np.float64, casting="same_kind" if found.dtype.kind == "c" else "unsafe")
    except (TypeError, ValueError):
        raise ValueError(f"{name} holds what is no number, or rows of unequal lengths; give an array") from None
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinity, which have no bin; leave out or fill in those examples")
    return found


def _between_workers(transfer: Any) -> bool:
    ends = (transfer.source, transfer.destination)
    return all(end.startswith("worker:") for end in ends) and ends[0] != ends[1]


def _arrays(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(np.asarray(leaf) for leaf in leaves)


def _binned(x: Floats, edges: Floats) -> NDArray[np.int32]:
    return np.stack([np.searchsorted(edges[:, f], x[:, f]) for f in range(x.shape[1])], axis=1).astype(np.int32)


State = list[tuple[jax.Array, jax.Array, jax.Array]]
"""For each worker its bins, labels and margins."""


def _root(settings: Settings, state: State) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each worker the node of each of its examples, which is the root, and the slopes of their losses."""
    nodes, slopes = [], []
    for w, (binned, y, margin) in enumerate(state):
        with settings.on(w):
            nodes.append(jnp.zeros(len(binned), jnp.int32))
            slopes.append(settings.slopes(margin, y))
    return nodes, slopes


def _by_rows(settings: Settings, state: State) -> Any:
    """One tree on examples that are divided among workers."""
    nodes, slopes = _root(settings, state)
    features, cuts = [], []
    for level in range(settings.depth):
        count, sums = 2**level, []
        for w, (binned, _, _) in enumerate(state):
            with settings.on(w):
                sums.append(_histogram(settings, binned, nodes[w], slopes[w], count))
        chosen = None if settings.vote is None else _elected(settings, sums)
        sent = []
        for w, histogram in enumerate(sums):
            with settings.on(w):
                sent.append(histogram if chosen is None else histogram[jnp.arange(count)[:, None], chosen])
        with settings.on(0):
            _, place, cut = _best(settings, sum(sent[1:], sent[0]))
            feature = place if chosen is None else jnp.take_along_axis(chosen, place[:, None], 1)[:, 0]
        features.append(feature)
        cuts.append(cut)
        for w, (binned, _, _) in enumerate(state):
            with settings.on(w):
                own = jnp.take_along_axis(binned, feature[nodes[w]][:, None], 1)[:, 0]
                nodes[w] = 2 * nodes[w] + (own > cut[nodes[w]])
    totals = []
    for w in range(len(state)):
        with settings.on(w):
            totals.append(_sums(slopes[w], nodes[w], 2**settings.depth))
    with settings.on(0):
        values = _values(settings, sum(totals[1:], totals[0]))
    return _grown(settings, state, nodes, values), (features, cuts, values)


def _by_features(settings: Settings, first: Sequence[int], state: State) -> Any:
    """One tree on features that are divided among workers. `first` is the first feature of each."""
    nodes, slopes = _root(settings, state)
    features, cuts = [], []
    for level in range(settings.depth):
        offers = []
        for w, (binned, _, _) in enumerate(state):
            with settings.on(w):
                offers.append(_best(settings, _histogram(settings, binned, nodes[w], slopes[w], 2**level)))
        with settings.on(0):
            owner = jnp.argmax(jnp.stack([gain for gain, _, _ in offers]), axis=0)
            each = jnp.arange(2**level)
            features.append(jnp.stack([place + f for (_, place, _), f in zip(offers, first, strict=True)])[owner, each])
            cuts.append(jnp.stack([cut for _, _, cut in offers])[owner, each])
        sides = []
        for w, (binned, _, _) in enumerate(state):
            with settings.on(w):
                _, place, cut = offers[w]
                own = jnp.take_along_axis(binned, place[nodes[w]][:, None], 1)[:, 0]
                sides.append(jnp.packbits((own > cut[nodes[w]]) & (owner[nodes[w]] == w)))
        with settings.on(0):
            right = sum(sides[1:], sides[0])  # of each example one worker says something, so no bit is added twice
        for w, (binned, _, _) in enumerate(state):
            with settings.on(w):
                nodes[w] = 2 * nodes[w] + jnp.unpackbits(right, count=len(binned)).astype(jnp.int32)
    with settings.on(0):
        values = _values(settings, _sums(slopes[0], nodes[0], 2**settings.depth))
    return _grown(settings, state, nodes, values), (features, cuts, values)


def _grown(settings: Settings, state: State, nodes: Sequence[jax.Array], values: jax.Array) -> State:
    """The state with margins to which the tree is added."""
    found: State = []
    for w, (binned, y, margin) in enumerate(state):
        with settings.on(w):
            found.append((binned, y, margin + values[nodes[w]]))
    return found


def _histogram(settings: Settings, binned: Any, nodes: Any, slopes: Any, count: int) -> jax.Array:
    """Sums of gradient and curvature, of shape (nodes, features, bins, 2)."""
    width = binned.shape[1]
    index = (nodes[:, None] * width + jnp.arange(width)) * settings.bins + binned
    flat = jnp.zeros((count * width * settings.bins, 2)).at[index].add(slopes[:, None, :])
    return flat.reshape(count, width, settings.bins, 2)


def _best(settings: Settings, histogram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gain, feature and cut of the best split of each node."""
    gains = _gains(settings, histogram)
    flat = gains.reshape(len(gains), -1)
    best = jnp.argmax(flat, axis=1)
    return jnp.max(flat, axis=1), best // settings.bins, best % settings.bins


def _gains(settings: Settings, histogram: jax.Array) -> jax.Array:
    """How much each cut of a feature lowers the loss, of shape (nodes, features, bins)."""
    left = jnp.cumsum(histogram, axis=2)
    whole = left[:, :, -1:, :]

    def score(sums: jax.Array) -> jax.Array:
        return sums[..., 0] ** 2 / (sums[..., 1] + settings.l2)

    return score(left) + score(whole - left) - score(whole)


def _elected(settings: Settings, sums: Sequence[jax.Array]) -> jax.Array:
    """The features of each node with most votes. Equal votes are decided by the gains that came with them."""
    assert settings.vote is not None
    ballots = []
    for w, histogram in enumerate(sums):
        with settings.on(w):
            ballots.append(jax.lax.top_k(_gains(settings, histogram).max(axis=2), settings.vote))
    with settings.on(0):
        count, width = sums[0].shape[:2]
        votes = jnp.zeros((count, width))
        weight = jnp.zeros((count, width))
        rows = jnp.arange(count)[:, None]
        for gains, names in ballots:
            votes = votes.at[rows, names].add(1.0)
            weight = weight.at[rows, names].add(gains)
        ties = weight / (1 + weight.sum(axis=1, keepdims=True))  # below 1, so no gain outweighs a vote
        return jax.lax.top_k(votes + ties, min(2 * settings.vote, width))[1]


def _sums(slopes: jax.Array, nodes: jax.Array, count: int) -> jax.Array:
    return jnp.zeros((count, 2)).at[nodes].add(slopes)


def _values(settings: Settings, sums: jax.Array) -> jax.Array:
    return -settings.rate * sums[:, 0] / (sums[:, 1] + settings.l2)

"""Defines mixing graphs: with what weights the replicas of a gossip topology average their parameters.

After a round of gossip replica i holds the sum over j of W[i, j] x[j]. W is doubly stochastic: its entries are not
negative, and each row and column adds up to 1. So the mean over replicas does not change, and if the graph is
connected, all replicas approach it. How fast they do is the *spectral gap*: a round multiplies the distance to the mean
by at most 1 - gap (Lian et al., D-PSGD, NeurIPS 2017).

A replica computes its own row from the graph, so nothing of size n² exists. When replicas are lost, `renormalised`
gives the rows of the others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowml.errors import PolicyError
from flowml.numbers import MOST
from flowml.policy.kinds import check, register
from flowml.policy.routes import Graph, Weights
from flowml.policy.wording import Value

Matrix = NDArray[np.float64]

_TOLERANCE = 1e-6
"""How far sums of a user's W may be from 1. Larger differences change the mean over replicas noticeably."""

MAX_OWN = 4096
"""A bound on the replicas of a user's W, which is kept whole."""

_Seed = Annotated[int, msgspec.Meta(ge=0, le=MOST)]


class _Symmetric(Graph):
    __slots__ = ()

    @property
    def symmetric(self) -> bool:
        return True


@register
class RingGraph(_Symmetric, Value, frozen=True, tag="ring"):
    """Each replica averages with the one before and the one after it, all with equal weights."""

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        return _equal(replica, members, (-1, 1))


@register
class TorusGraph(_Symmetric, Value, frozen=True, tag="torus"):
    """Replicas are on a grid with joined borders, as square as possible. Each averages with its four neighbours."""

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        height, width = grid(members)
        y, x = divmod(replica, width)
        near = [((y + 1) % height, x), ((y - 1) % height, x), (y, (x + 1) % width), (y, (x - 1) % width)]
        return _shared(replica, [v * width + u for v, u in near])


@register
class ExponentialGraph(Graph, Value, frozen=True, tag="exponential"):
    """Replica r averages with r + 1, r + 2, r + 4, …, all with equal weights.

    Edges are directed: W is not symmetric. A few neighbours give a large gap (Assran et al., ICML 2019; Ying et al.,
    NeurIPS 2021).
    """

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        return _equal(replica, members, [1 << k for k in range((members - 1).bit_length())])


@register
class CompleteGraph(_Symmetric, Value, frozen=True, tag="complete"):
    """Each replica averages with all others, which then hold the mean after one round."""

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        return dict.fromkeys(range(members), 1 / members)


@register
class RandomPairs(_Symmetric, Value, frozen=True, tag="pairs"):
    """In each round every replica averages with one other, drawn from the seed and the round (as NoLoCo does).

    If their number is odd, one replica has no partner in the round.
    """

    seed: _Seed = 0

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        return _shared(replica, [partner(self.seed, turn, replica, members)], keep=0.5)

    @property
    def changes(self) -> bool:
        return True

    def describe(self) -> str:
        return "random pairs"


@register
class OwnMatrix(Graph, Value, frozen=True, tag="matrix"):
    """The user's W, one tuple for each row. `own_matrix` checks it."""

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _check(np.asarray(self.rows, np.float64) if _is_square(self.rows) else None)

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        return {j: w for j, w in enumerate(self.rows[replica]) if w}

    def describe(self) -> str:
        return f"{len(self.rows)}x{len(self.rows)} matrix"


@register
class NestedGraph(Graph, Value, frozen=True, tag="nested"):
    """A graph inside each site, and one of sites, in which the first replica of each site takes part.

    Each `often`-th round is between sites, and all others are inside them. In either W is doubly stochastic, and so is
    the product of such rounds. `sites` are their number, or the replicas of each.
    """

    local: Graph
    remote: Graph
    sites: int | tuple[tuple[int, ...], ...]
    often: int

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        graph, among, turn = self.at(replica, members, turn)
        return {among[j]: w for j, w in graph.row(among.index(replica), len(among), turn).items()}

    def at(self, replica: int, members: int, turn: int) -> tuple[Graph, tuple[int, ...], int]:
        """The graph in which a replica takes part in a round, the replicas that it joins, and the number of the round
        there. One that does not lead its site is alone while sites exchange."""
        site_of, leaders = _among_sites(self.sites, members)
        if (turn + 1) % self.often:
            return self.local, site_of[replica], turn
        if replica != site_of[replica][0]:
            return CompleteGraph(), (replica,), turn
        return self.remote, leaders, turn // self.often

    @property
    def changes(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{self.local.describe()} in sites, {self.remote.describe()} between"


Name = Literal["ring", "torus", "exponential", "complete", "random_pairs"]

_OURS = (RingGraph, TorusGraph, ExponentialGraph, CompleteGraph, RandomPairs, OwnMatrix, NestedGraph)

_NAMED: Mapping[str, Graph] = {
    "ring": RingGraph(),
    "torus": TorusGraph(),
    "exponential": ExponentialGraph(),
    "complete": CompleteGraph(),
    "random_pairs": RandomPairs(),
}


def as_graph(value: object) -> Graph:
    """A graph from its name, from a square matrix, or from a graph. Raises PolicyError for anything else."""
    if isinstance(value, Graph):
        check(Graph, value)
        return value
    if isinstance(value, str):
        if value not in _NAMED:
            known = ", ".join(map(repr, _NAMED))
            raise PolicyError(f"graph={value!r} is not one; give {known}, or a doubly stochastic matrix")
        return _NAMED[value]
    return own_matrix(value)


def name_of(graph: Graph) -> str | None:
    """The name that `as_graph` takes for it; None if it has none."""
    return next((name for name, known in _NAMED.items() if known == graph), None)


def own_matrix(value: object) -> OwnMatrix:
    """A user's mixing matrix. Raises PolicyError if it is not square, doubly stochastic and mixing."""
    try:
        found = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        found = np.zeros(())
    if found.ndim != 2:
        raise PolicyError(
            f"graph={value!r} is neither the name of a graph nor a matrix of numbers; give 'ring', or a square "
            "doubly stochastic matrix"
        )
    return OwnMatrix(tuple(tuple(map(float, row)) for row in found))


def sites_of(sites: int | tuple[tuple[int, ...], ...], members: int) -> tuple[tuple[int, ...], ...]:
    """The replicas of each site: as given, or neighbours in sites as equal as possible.

    Raises:
        PolicyError: if so many replicas cannot form the sites.
    """
    if isinstance(sites, int):
        if sites > members:
            raise PolicyError(
                f"Hierarchy(sites={sites}) with {members} replicas: each site needs one replica at least; give "
                f"sites={members} or less, or more replicas"
            )
        return tuple(tuple(range(a, b)) for a, b in pairwise(members * n // sites for n in range(sites + 1)))
    if sorted(r for site in sites for r in site) != list(range(members)):
        raise PolicyError(
            f"Hierarchy(sites={sites}) with {members} replicas: each of the replicas 0 to {members - 1} belongs to one "
            "site; give their numbers, or the number of sites"
        )
    return sites


@lru_cache(maxsize=8)
def _among_sites(
    sites: int | tuple[tuple[int, ...], ...], members: int
) -> tuple[Mapping[int, tuple[int, ...]], tuple[int, ...]]:
    """The site of each replica, and the first replica of each site."""
    found = sites_of(sites, members)
    return {r: site for site in found for r in site}, tuple(site[0] for site in found)


def check_members(graph: Graph, members: int, what: str = "replicas") -> None:
    """Raises PolicyError if `graph` is for another number of replicas, or sites."""
    if isinstance(graph, NestedGraph):
        sites = sites_of(graph.sites, members)
        check_members(graph.remote, len(sites), "sites")
        for site in sites:
            check_members(graph.local, len(site), f"replicas of the site {site}")
    if isinstance(graph, OwnMatrix) and len(graph.rows) != members:
        raise PolicyError(
            f"the mixing matrix has {len(graph.rows)} rows, but there are {members} {what}; give one row and column "
            f"for each of the {what}"
        )
    if type(graph) not in _OURS and members <= MAX_OWN:
        _check_own(graph, members)


def _check_own(graph: Graph, members: int) -> None:
    """Raise PolicyError if the first round of a graph that is not flowml's does not average, or is not as it says."""
    found = matrix(graph, members)
    _check_sums(found)
    if not graph.changes:
        _check_mixing(found)
    if graph.symmetric and (found != found.T).any():
        raise PolicyError(f"graph={graph!r} says that it is symmetric, and its rows for {members} replicas are not")


def matrix(graph: Graph, members: int, turn: int = 0) -> Matrix:
    """The whole W of a round."""
    found = np.zeros((members, members))
    for i in range(members):
        for j, weight in graph.row(i, members, turn).items():
            found[i, j] = weight
    return found


def readers(graph: Graph, replica: int, members: int, turn: int = 0) -> tuple[int, ...]:
    """The other replicas that average with this one in a round: those whose rows have it."""
    if isinstance(graph, NestedGraph):
        inner, among, turn = graph.at(replica, members, turn)
        return tuple(sorted(among[i] for i in readers(inner, among.index(replica), len(among), turn)))
    if isinstance(graph, ExponentialGraph):
        found = {(replica - (1 << k)) % members for k in range((members - 1).bit_length())}
    elif isinstance(graph, OwnMatrix):
        found = {i for i, row in enumerate(graph.rows) if row[replica]}
    elif graph.symmetric:
        found = set(graph.row(replica, members, turn))
    else:
        found = {i for i in range(members) if replica in graph.row(i, members, turn)}
    return tuple(sorted(found - {replica}))


def spectral_gap(weights: Matrix) -> float:
    """1 - ‖W - 11ᵀ/n‖₂: a round multiplies the distance to the mean by at most 1 minus this.

    For a symmetric W the norm is the largest modulus of an eigenvalue but the first.
    """
    members = len(weights)
    if members == 1:
        return 1.0
    return float(max(0.0, 1 - np.linalg.norm(weights - 1 / members, 2)))


def gap(graph: Graph, members: int) -> float:
    """The spectral gap of a graph, for random pairs that of the mean over rounds, and for sites the geometric mean over
    the rounds between two exchanges of theirs. O(n log n) but for a user's W and for sites."""
    if members == 1 or isinstance(graph, CompleteGraph):
        return 1.0
    if isinstance(graph, OwnMatrix):
        return spectral_gap(np.asarray(graph.rows))
    if isinstance(graph, NestedGraph):
        rounds = (matrix(graph, members, turn) for turn in range(graph.often))
        together = reduce(lambda before, after: after @ before, rounds, np.eye(members))
        return 1 - (1 - spectral_gap(together)) ** (1 / graph.often)
    if isinstance(graph, RandomPairs):
        # W is a projection, so the mean of WᵀW is the mean of W. A replica meets each other one with equal probability.
        met = (members - members % 2) / members / (members - 1)
        return 1 - math.sqrt(1 - met * members / 2)
    first = np.zeros(members)
    for j, weight in graph.row(0, members).items():
        first[j] = weight
    # W commutes with the shifts of its group, so its eigenvalues are the Fourier transform of its first row.
    shape = grid(members) if isinstance(graph, TorusGraph) else (members,)
    values = np.abs(np.fft.fftn(first.reshape(shape))).ravel()
    return float(max(0.0, 1 - values[1:].max()))


def renormalised(graph: Graph, replica: int, members: int, gone: Collection[int], turn: int = 0) -> Weights:
    """The row of a living replica when those in `gone` are lost. The rows of the living are doubly stochastic again.

    A path through lost replicas becomes an edge, with the weight with which a walk by W takes it (the stochastic
    complement). So a ring closes around its gap, a symmetric W stays symmetric, and a connected graph stays connected.
    """
    start = graph.row(replica, members, turn)
    found: Weights = {j: w for j, w in start.items() if j not in gone}
    inner = _reached(graph, members, [j for j in start if j in gone], gone, turn)
    if not inner:
        return found
    rows = [graph.row(j, members, turn) for j in inner]
    place = {j: i for i, j in enumerate(inner)}
    through = np.eye(len(inner))
    for i, row in enumerate(rows):
        for j, weight in row.items():
            if j in place:
                through[i, place[j]] -= weight
    entered = np.array([start.get(j, 0.0) for j in inner])
    visits = np.linalg.solve(through.T, entered)
    for visited, row in zip(visits, rows, strict=True):
        for j, weight in row.items():
            if j not in gone:
                found[j] = found.get(j, 0.0) + float(visited) * weight
    return dict(sorted(found.items()))


def among(graph: Graph, members: int, gone: Collection[int]) -> Graph:
    """The graph of those of `members` replicas that are left, which have new numbers in the same order.

    The rows of a user's W are `renormalised`. Sites stay, without those of which no replica is left.
    """
    here = [r for r in range(members) if r not in gone]
    if isinstance(graph, OwnMatrix):
        rows = [renormalised(graph, r, members, gone) for r in here]
        found = np.array([[row.get(j, 0.0) for j in here] for row in rows])
        if _period(found) != 1:  # those left would pass their parameters around
            found = (found + np.eye(len(here))) / 2
        return own_matrix(found)
    if isinstance(graph, NestedGraph):
        sites, number = sites_of(graph.sites, members), {r: i for i, r in enumerate(here)}
        left = [tuple(number[r] for r in site if r in number) for site in sites]
        remote = among(graph.remote, len(sites), {i for i, site in enumerate(left) if not site})
        assert not isinstance(remote, NestedGraph)
        return msgspec.structs.replace(graph, remote=remote, sites=tuple(site for site in left if site))
    return graph


def partner(seed: int, turn: int, replica: int, members: int) -> int:
    """The replica that `replica` averages with in round `turn`; itself if it has no partner."""
    return int(_pairs(seed, turn, members)[replica])


@lru_cache(maxsize=8)
def _pairs(seed: int, turn: int, members: int) -> NDArray[np.int64]:
    # RandomState has the same numbers in all versions of NumPy, so that all workers draw the same pairs.
    words = [seed % 2**32, seed >> 32, turn % 2**32, turn >> 32]
    order = np.random.RandomState(np.array(words, np.uint32)).permutation(members)
    found = np.arange(members)
    half = members // 2
    found[order[:half]], found[order[half : 2 * half]] = order[half : 2 * half], order[:half]
    return found


def grid(members: int) -> tuple[int, int]:
    """Height and width of the squarest grid of this many replicas."""
    height = next(h for h in range(math.isqrt(members), 0, -1) if members % h == 0)
    return height, members // height


def _equal(replica: int, members: int, steps: Sequence[int]) -> Weights:
    return _shared(replica, [(replica + step) % members for step in steps])


def _shared(replica: int, others: Sequence[int], keep: float | None = None) -> Weights:
    """Equal weights for the replica and the others. Entries for the same replica are added up."""
    own = 1 / (len(others) + 1) if keep is None else keep
    found: Weights = {replica: own}
    for other in others:
        found[other] = found.get(other, 0.0) + (1 - own) / len(others)
    return dict(sorted(found.items()))


def _reached(graph: Graph, members: int, first: Sequence[int], gone: Collection[int], turn: int) -> list[int]:
    """The lost replicas that a walk reaches from `first` without a living one between."""
    found, ahead = dict.fromkeys(first), list(first)
    while ahead:
        near = graph.row(ahead.pop(), members, turn)
        fresh = [j for j in near if j in gone and j not in found]
        found.update(dict.fromkeys(fresh))
        ahead += fresh
    return sorted(found)


def _is_square(rows: Sequence[Sequence[float]]) -> bool:
    return 0 < len(rows) <= MAX_OWN and all(len(row) == len(rows) for row in rows)


def _check(weights: Matrix | None) -> None:
    """Raise PolicyError unless W is a square, doubly stochastic matrix with a spectral gap."""
    if weights is None:
        raise PolicyError(
            f"a mixing matrix is square, with a row and a column for each of 1 to {MAX_OWN} replicas, and this is not; "
            "give such a matrix, or the name of a graph such as 'ring'"
        )
    _check_sums(weights)
    _check_mixing(weights)


def _check_sums(weights: Matrix) -> None:
    """Raise PolicyError unless W is doubly stochastic."""
    if not np.isfinite(weights).all() or weights.min() < 0:
        i, j = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))[0]
        raise PolicyError(
            f"the entries of a mixing matrix are numbers from 0, and W[{i}, {j}] is {weights[i, j]:g}; give 0 where "
            "two replicas exchange nothing, and a share from 0 to 1 elsewhere"
        )
    for axis, what in ((1, "row"), (0, "column")):
        sums = weights.sum(axis)
        worst = int(np.argmax(np.abs(sums - 1)))
        if abs(sums[worst] - 1) > _TOLERANCE:
            raise PolicyError(
                f"a mixing matrix is doubly stochastic, and {what} {worst} of W adds up to {sums[worst]:g} instead of "
                "1, so gossip would change the mean over replicas; for a symmetric graph give each edge "
                "1 / (1 + the larger degree of its ends) and each diagonal entry the rest"
            )


def _check_mixing(weights: Matrix) -> None:
    """Raise PolicyError unless replicas that average with these weights in each round approach their mean."""
    if len(weights) > 1 and not (weights - np.diag(np.diag(weights))).any():
        raise PolicyError(
            "this mixing matrix has no entry beside its diagonal, so each replica would average with itself alone and "
            "nothing be exchanged; give an entry above 0 to each pair of neighbours, or a graph's name such as 'ring'"
        )
    levels = _levels(weights)
    if levels.min() < 0:
        raise PolicyError(
            f"the graph of a mixing matrix is connected, and no path leads from replica 0 to replica "
            f"{int(np.argmin(levels))}, so they would never agree; add edges"
        )
    if _period(weights) != 1:
        raise PolicyError(
            "this mixing matrix passes parameters around groups of replicas in turn, so they would never agree; give "
            "the replicas diagonal entries above 0"
        )


def _period(weights: Matrix) -> int:
    """The greatest common divisor of the lengths of cycles in the graph of W, which is connected."""
    levels, (here, there) = _levels(weights), np.nonzero(weights)
    return int(np.gcd.reduce(levels[here] + 1 - levels[there]))


def _levels(weights: Matrix) -> NDArray[np.int64]:
    """The number of edges from replica 0 to each replica; -1 without a path.

    In a graph of a doubly stochastic W there is also a path back.
    """
    found = np.full(len(weights), -1)
    ahead, level = np.array([0]), 0
    while ahead.size:
        found[ahead] = level
        level += 1
        ahead = np.nonzero((weights[ahead] > 0).any(0) & (found < 0))[0]
    return found

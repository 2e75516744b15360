"""Defines gradient codes: who computes which parts of a batch, and how the gradient is decoded without the slowest.

A batch is cut into *partitions*. Replica r computes the gradients of several partitions and sends one combination of
them, the sum over j of B[r, j] g[j]. A code is the matrix B. It is chosen so that any large enough set of replicas can
be *decoded*: there are coefficients a with aᵀB = 1, so that the sum over r of a[r] times what r has sent is the sum of
all g[j], the gradient of the whole batch. No work is lost when a replica is late, because others have computed it too.

* `FractionalRepetition` and `CyclicRepetition` (Tandon, Lei, Dimakis, Karampatziakis, Gradient Coding, ICML 2017)
  survive any s late replicas of n. Each replica computes s + 1 of n partitions.
* `TreeCode` (Reisizadeh, Prakash, Pedarsani, Avestimehr, CodedReduce, 2019) has such a code at each parent of a tree,
  and survives s late children of each parent. The coefficients are multiplied on the way down. Each replica computes a
  far smaller share than with one code that survives as many late replicas, if not every such set of them.

Codes are small values that travel in plans. Their matrices are computed where they are needed, and kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowml.errors import PolicyError
from flowml.policy.wording import Value

TOLERANCE = 1e-9
"""The largest error of an entry of aᵀB. A set of replicas whose best coefficients have a larger one is not decoded."""

MAX_WORKERS = 4096
"""A bound on the replicas of a code, because its matrix is kept."""

Matrix = NDArray[np.float64]
Row = tuple[tuple[int, float], ...]
"""(partition, coefficient) of each partition that a replica computes, in the order of partitions."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_WORKERS)]


class _Repetition(Value, frozen=True):
    """What the two codes have in common in which each share of the batch goes to s + 1 replicas."""

    workers: _Count
    stragglers: _Count

    @property
    def partitions(self) -> int:
        return self.workers

    @property
    def load(self) -> Fraction:
        """The share of the batch that each replica computes."""
        return Fraction(self.stragglers + 1, self.workers)

    @property
    def tolerates(self) -> int:
        """The number of late replicas that it survives, whichever they are."""
        return self.stragglers


class FractionalRepetition(_Repetition, frozen=True, tag="fractional"):
    """s + 1 replicas compute each share of the batch, and one of them is enough. All coefficients are 0 or 1.

    The result has the same bits, whichever replicas are late. s + 1 must divide n.
    """

    def __post_init__(self) -> None:
        _check_counts("fractional", self.workers, self.stragglers)
        if self.workers % (self.stragglers + 1):
            raise PolicyError(
                f"the fractional code for {self.stragglers} stragglers gives each share of a batch to "
                f"{self.stragglers + 1} replicas, which does not divide {self.workers} replicas; use a multiple of "
                f"{self.stragglers + 1} replicas, or code='cyclic'"
            )

    def row(self, worker: int) -> Row:
        first = worker - worker % (self.stragglers + 1)
        return tuple((first + i, 1.0) for i in range(self.stragglers + 1))

    def decode(self, arrived: Collection[int]) -> Mapping[int, float] | None:
        """The coefficient of each replica whose combination is used; None if these replicas are not enough."""
        chosen: dict[int, int] = {}
        for worker in sorted(arrived):
            chosen.setdefault(worker // (self.stragglers + 1), worker)
        enough = len(chosen) == self.workers // (self.stragglers + 1)
        return dict.fromkeys(chosen.values(), 1.0) if enough else None


class CyclicRepetition(_Repetition, frozen=True, tag="cyclic"):
    """Replica r computes partitions r … r + s, modulo n, with coefficients for which any n - s replicas are enough.

    Rounding errors grow with n and s: with 12 replicas by a factor of 10 to 100, and with 84 replicas and 20 stragglers
    by 10⁴. If coefficients with an error below `TOLERANCE` do not exist, more replicas are waited for.
    """

    def __post_init__(self) -> None:
        _check_counts("cyclic", self.workers, self.stragglers)

    def row(self, worker: int) -> Row:
        whole = _cyclic_matrix(self.workers, self.stragglers)[worker]
        support = sorted((worker + i) % self.workers for i in range(self.stragglers + 1))
        return tuple((j, float(whole[j])) for j in support)

    def decode(self, arrived: Collection[int]) -> Mapping[int, float] | None:
        """The coefficient of each replica whose combination is used; None if these replicas are not enough."""
        if len(arrived) < self.workers - self.stragglers:
            return None
        return _cyclic_decoding(self, frozenset(arrived))


class TreeCode(Value, frozen=True, tag="tree"):
    """A tree of replicas below the home, in which each parent has n children, with a code at each parent.

    The replicas of the first level are 0 … n - 1, and the children of replica v are n (v + 1) … n (v + 1) + n - 1. The
    tree is decoded if each parent hears of n - s of its children. A child is heard if it has sent its combination and,
    unless it is a leaf, n - s of its own children are heard.
    """

    children: _Count
    levels: _Count
    stragglers: _Count

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise PolicyError(f"a tree of {self.levels} levels has no replicas; give levels=1 or more")
        _check_counts("tree", self.children, self.stragglers, "children of each parent")
        if max(self.levels, self.children) > MAX_WORKERS or self.workers > MAX_WORKERS:
            raise PolicyError(
                f"a tree of {self.levels} levels with {self.children} children of each parent is too large; at most "
                f"{MAX_WORKERS} replicas can share a code"
            )

    @property
    def workers(self) -> int:
        return sum(self.children**level for level in range(1, self.levels + 1))

    @property
    def partitions(self) -> int:
        """The least number of equal pieces of a batch of which each replica computes a whole number."""
        found = [self.load, *self._subtrees()]
        passed = [(share - self.load) / self.children for share in found[1:-1]]
        return lcm(self.children, *(x.denominator for x in (*found, *passed)))

    @property
    def load(self) -> Fraction:
        """The share of the batch that each replica computes: 1 / (n/(s+1) + (n/(s+1))² + … + (n/(s+1))ᴸ)."""
        ratio = Fraction(self.children, self.stragglers + 1)
        return 1 / sum((ratio**level for level in range(1, self.levels + 1)), Fraction(0))

    @property
    def tolerates(self) -> int:
        """The number of late replicas that it survives if s are children of each parent: s (nᴸ - 1) / (n - 1)."""
        return self.stragglers * sum(self.children**level for level in range(self.levels))

    @property
    def parents(self) -> int:
        """The number of replicas that have children. Theirs are the lowest numbers."""
        return self.workers - self.children**self.levels

    def children_of(self, parent: int) -> range:
        """The children of a replica; those of the home are the children of -1."""
        return range(self.children * (parent + 1), self.children * (parent + 2))

    def adder_of(self, worker: int, *, summed: bool) -> int | None:
        """The replica that adds up what `worker` sends: itself if it is a parent and this is its own gradient, else its
        parent. None if it goes to the home. `summed`: it is the sum of a parent."""
        if worker < self.parents and not summed:
            return worker
        return worker // self.children - 1 if worker >= self.children else None

    def row(self, worker: int) -> Row:
        return _tree_rows(self)[worker]

    def decode(self, arrived: Collection[int]) -> Mapping[int, float] | None:
        """The coefficient of each replica whose combination is used; None if these replicas are not enough."""
        there = frozenset(arrived)
        below: dict[int, Mapping[int, float]] = {}
        """Parent -> the coefficients of its children, for parents that hear of enough. The home is parent -1."""
        inner, leaves = self.code, self.workers - self.children**self.levels
        for parent in range(leaves - 1, -2, -1):
            first = self.children * (parent + 1)
            heard = [i for i in range(self.children) if self._heard(first + i, leaves, there, below)]
            found = inner.decode(heard)
            if found is not None:
                below[parent] = {first + i: a for i, a in found.items()}
        if -1 not in below:
            return None
        taken = dict(below[-1])
        for worker, coefficient in taken.copy().items():
            self._descend(worker, coefficient, below, taken)
        return taken

    @property
    def code(self) -> FractionalRepetition | CyclicRepetition:
        """The code at each parent."""
        return repetition(self.children, self.stragglers)

    def _heard(self, child: int, leaves: int, there: Collection[int], below: Collection[int]) -> bool:
        return child in there and (child >= leaves or child in below)

    def _descend(
        self, parent: int, coefficient: float, below: Mapping[int, Mapping[int, float]], taken: dict[int, float]
    ) -> None:
        for child, own in below.get(parent, {}).items():
            taken[child] = coefficient * own
            self._descend(child, coefficient * own, below, taken)

    def _subtrees(self) -> list[Fraction]:
        """The share of the batch that a subtree computes, by the level of its root. The leaves come last."""
        shares, passed = list[Fraction](), Fraction(1)
        for _ in range(self.levels):
            shares.append(passed * Fraction(self.stragglers + 1, self.children))
            passed = shares[-1] - self.load
        return shares


Code = FractionalRepetition | CyclicRepetition | TreeCode


def repetition(workers: int, stragglers: int) -> FractionalRepetition | CyclicRepetition:
    """The fractional code where s + 1 divides n, because its coefficients are exact; else the cyclic code."""
    if workers % (stragglers + 1):
        return CyclicRepetition(workers, stragglers)
    return FractionalRepetition(workers, stragglers)


def matrix(code: Code) -> Matrix:
    """B: a row for each replica, a column for each partition."""
    whole = np.zeros((code.workers, code.partitions))
    for worker in range(code.workers):
        for partition, coefficient in code.row(worker):
            whole[worker, partition] = coefficient
    return whole


def _check_counts(name: str, members: int, stragglers: int, what: str = "replicas") -> None:
    if members < 1 or stragglers < 0 or members > MAX_WORKERS:
        raise PolicyError(
            f"the {name} code of {members} {what} for {stragglers} stragglers does not exist; give 1 to {MAX_WORKERS} "
            f"{what} and 0 or more stragglers"
        )
    if stragglers >= members:
        raise PolicyError(
            f"the {name} code for {stragglers} stragglers needs at least {stragglers + 1} {what}, there are {members}; "
            "use fewer stragglers or more replicas"
        )


@lru_cache(maxsize=64)
def _cyclic_matrix(workers: int, stragglers: int) -> Matrix:
    """B of the cyclic code, whose rows are shifts of one row.

    The row holds the coefficients of the real polynomial whose s roots are neighbours on the unit circle, around -1
    and 2π/n apart. Any n - s shifts span the same space, as in a Reed-Solomon code (Raviv et al., Gradient coding from
    cyclic MDS codes and expander graphs, ICML 2018). Decoding then changes rounding errors far less than with the
    random rows of Tandon et al.

    The vector of ones must lie in the space of the rows. If n - s is odd, the roots are n-th roots of 1, a shift moves
    the last entry to the front, and it does. If n - s is even, they are n-th roots of -1, and that entry changes its
    sign. Then columns are divided by the entries of a vector of the space that is near to the vector of ones.
    """
    angles = np.pi + 2 * np.pi / workers * (np.arange(stragglers) - (stragglers - 1) / 2)
    row = np.zeros(workers)
    row[: stragglers + 1] = np.real(np.poly(np.exp(1j * angles)))
    row /= row.sum()
    odd = (workers - stragglers) % 2 == 1
    whole = np.zeros((workers, workers))
    for shift in range(workers):
        moved = row[workers - shift :]
        whole[shift] = np.concatenate([moved if odd else -moved, row[: workers - shift]])
    if not odd:
        whole /= _near_ones(whole)
    whole.flags.writeable = False
    return whole


def _near_ones(rows: Matrix) -> NDArray[np.float64]:
    """A vector near to the vector of ones that small multiples of the rows add up to."""
    products = rows @ rows.T
    scale = np.linalg.norm(rows, 2) ** 2
    return np.linalg.solve(products + 1e-3 * scale * np.eye(len(rows)), rows.sum(axis=1)) @ rows


@lru_cache(maxsize=4096)
def _cyclic_decoding(code: CyclicRepetition, arrived: frozenset[int]) -> Mapping[int, float] | None:
    """The coefficients of least norm, which change the rounding errors of gradients least."""
    order = sorted(arrived)
    rows = _cyclic_matrix(code.workers, code.stragglers)[order]
    found = np.linalg.lstsq(rows.T, np.ones(code.partitions), rcond=None)[0]
    if np.max(np.abs(found @ rows - 1)) > TOLERANCE:
        return None
    return {worker: float(a) for worker, a in zip(order, found, strict=True)}


@lru_cache(maxsize=16)
def _tree_rows(code: TreeCode) -> tuple[Row, ...]:
    """The row of each replica. A parent keeps the first units that it is given, and codes the rest for its children."""
    units = int(code.load * code.partitions)
    inner = [code.code.row(i) for i in range(code.children)]
    given: dict[int, Row] = {-1: tuple((j, 1.0) for j in range(code.partitions))}
    rows: list[Row] = []
    for worker in range(-1, code.workers):
        share = given.pop(worker)
        kept = 0 if worker < 0 else units
        rows += [share[:kept]] if worker >= 0 else []
        rest = share[kept:]
        size = len(rest) // code.children
        for child, row in enumerate(inner) if rest else ():
            pieces = ((b, rest[j * size : (j + 1) * size]) for j, b in row)
            found = tuple((unit, b * a) for b, piece in pieces for unit, a in piece)
            given[code.children * (worker + 1) + child] = found
    return tuple(tuple(sorted(row)) for row in rows)

"""Defines what completes a clock: a quorum, a deadline or a code, and what happens to later contributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.answers import WAIT, Answer, Decide, Never, Wait
from flowml.policy.arrivals import Arrivals, Completion, Of
from flowml.policy.codes import Code, CyclicRepetition, FractionalRepetition, TreeCode
from flowml.policy.kinds import register
from flowml.policy.late import Drop, Late, LateName, late_of, number
from flowml.policy.wording import Value, brief, is_one_of

ROUNDING = 1e-9  # 1 - 1/3 of three members has to be two of them, although binary fractions are not exact

Over = Literal["step", "epoch"]


@register
class Quorum(Completion, Value, frozen=True, tag=True):
    """How many contributions complete a clock, and what happens to later ones.

    Args:
        count_or_fraction: a float in (0, 1] is a share of what `of` names, rounded up; an int ≥ 1 is a number of it.
        of: `"replicas"`; `"samples"`: the examples in the contributions; or `"microbatches"`: when so many of those of
            all replicas are computed, replicas that still compute stop before their next one, and contribute those that
            they have, at least one. All replicas contribute to every clock.
        late: `"drop"`, `"fold"` or `"requeue"`, or one of `Drop()`, `Fold(decay)`, `Requeue()`. With a staleness above
            0, `"fold"` has no clocks: contributions are applied as soon as there are `count_or_fraction` of them.
        limit_s: a clock waits for its quorum at most so many seconds after the one before; then the fit ends with
            DeadlineError. `Deadline(limit_s=)` goes on with what has arrived instead.
        over: `"step"`, or `"epoch"`: the epoch ends when this share of its examples is done (Project Adam). Replicas
            take the next work item when they are free, and each contribution is applied on arrival, so it needs a
            staleness above 0. `late` is then about the items that are left: they are dropped, or done first in the
            next epoch.

    Raises:
        PolicyError: for a value that is out of range.
    """

    count_or_fraction: int | float = 1.0
    of: Of = "replicas"
    late: Late = Drop()
    limit_s: float = math.inf
    over: Over = "step"
    counted: bool = False
    """Makes Quorum(1), one replica, differ from Quorum(1.0), all. Set by `count_or_fraction`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            count_or_fraction: float = 1.0,
            of: Of = "replicas",
            late: Late | LateName = ...,
            limit_s: float = ...,
            over: Over = "step",
        ) -> None: ...

    def __post_init__(self) -> None:
        value = number(self.count_or_fraction, "Quorum({!r}): give a fraction like 0.75 or a count like 3")
        msgspec.structs.force_setattr(self, "count_or_fraction", value)
        msgspec.structs.force_setattr(self, "counted", isinstance(value, int))
        msgspec.structs.force_setattr(self, "late", late_of(self.late, "Quorum"))
        if isinstance(value, int) and value < 1:
            raise PolicyError(f"Quorum({value}): a count of {self.of} is at least 1")
        if isinstance(value, float) and not 0 < value <= 1:
            raise PolicyError(f"Quorum({value}): a fraction lies in (0, 1]; for a number of {self.of} give an int")
        _check_of(self.of)
        if self.cuts:
            _check_cut(f"Quorum({value}, of='microbatches')", self.late)
        msgspec.structs.force_setattr(self, "limit_s", _limit(self.limit_s, "Quorum"))
        if not is_one_of(self.over, ("step", "epoch")):
            raise PolicyError(f"Quorum(over={self.over!r}) is not known; give over='step' or over='epoch'")
        if self.ends_epoch and (self.of != "samples" or self.counted):
            raise PolicyError(
                f"Quorum({value}, of={self.of!r}, over='epoch'): an epoch ends at a share of its examples; give a "
                "fraction such as 0.75 and of='samples'"
            )
        if self.ends_epoch and (self.late.folds or self.limit_s < math.inf):
            raise PolicyError(
                "Quorum(over='epoch') has no late contributions that could be folded in, and no clock that could wait "
                "too long; give late='drop' or late='requeue', and no limit_s"
            )

    @property
    def ends_epoch(self) -> bool:
        """Whether it says when an epoch ends, and not when a clock is complete."""
        return self.over == "epoch"

    @property
    def cuts(self) -> bool:
        """Whether replicas stop between two microbatches and contribute what they have."""
        return self.of == "microbatches"

    def stops(self, seconds: float) -> bool:
        """Whether a replica stops by itself when its step has computed so long."""
        return False

    def need(self, members: int) -> int:
        """How many of `members` complete a clock: the count, or the share rounded up; one if there are no clocks."""
        if self.ends_epoch:
            return 1
        if self.counted:
            return min(int(self.count_or_fraction), members)
        return max(1, math.ceil(self.count_or_fraction * members - ROUNDING))

    def never_drops(self, members: int) -> bool:
        """Whether every one of `members` replicas is needed, so that none can come too late."""
        return self.cuts or (self.of == "replicas" and self.need(members) >= members)

    @property
    def waits_for_all(self) -> bool:
        """Whether it needs every replica whatever their number, as the default does."""
        return (self.cuts or (not self.counted and self.count_or_fraction == 1)) and self.limit_s == math.inf

    def decide(self, arrivals: Arrivals, now: float) -> Answer:
        """Decide when there is enough. A share is one of the replicas that are left, but a number stays a number."""
        if self.cuts:
            return Quorum(limit_s=self.limit_s).decide(arrivals, now)
        here = len(arrivals.times)
        if self.of == "replicas" and self.limit_s == math.inf:  # nearly always; it is asked at each arrival
            need = self.need(arrivals.members)
            if here < need <= here + arrivals.hopeful:
                return WAIT
        if here and self._reached(arrivals):
            return Decide()
        if not arrivals.hopeful and not self.counted:
            return Decide() if arrivals.count else Wait()
        if self.counted and self.of == "replicas" and arrivals.count + arrivals.hopeful < self.need(arrivals.members):
            left = arrivals.count + arrivals.hopeful
            return Never(f"needs {self.need(arrivals.members)} replicas, and {left} of {arrivals.members} are left")
        if self.counted and not arrivals.hopeful:
            return Never(f"needs {self.count_or_fraction} {self.of}, which those that are left do not have")
        until = arrivals.began + self.limit_s
        if now < until:
            return Wait(until)
        return Never(
            f"is not there {self.limit_s:g} s after the clock before: replicas {arrivals.missing()} are missing"
        )

    def _reached(self, arrivals: Arrivals) -> bool:
        if self.of == "replicas":
            return arrivals.count >= self.need(arrivals.members)
        samples = round(arrivals.members * arrivals.full * arrivals.rows)
        return arrivals.weight * arrivals.rows >= self.need(samples) - ROUNDING

    def describe(self) -> str:
        limit = f" limit {self.limit_s:g} s" if self.limit_s < math.inf else ""
        of = "" if self.of == "replicas" else f" of {self.of}"
        late = "" if self.cuts else f" {self.late.describe()}"
        return f"quorum {self.count_or_fraction}{of}{limit}{late}"

    def __repr__(self) -> str:
        return _counting(self)

    def __str__(self) -> str:
        of = ", of='microbatches'" if self.cuts else ""
        return f"Quorum({self.count_or_fraction}{of})"


@register
class Deadline(Completion, Value, frozen=True, tag=True):
    """A quorum that waits some more for the others: until a grace window has passed, or until a time limit.

    Args:
        share: the quorum, as in `Quorum`.
        grace: seconds to wait for the others after the quorum, or `"adaptive"`: the wait is learnt from how far apart
            the arrivals of the quorum were at earlier clocks (see `Spread`).
        limit_s: the clock is decided at the latest so many seconds after the one before, with what has arrived.
        late: as in `Quorum`.
        of: with `"microbatches"`, `limit_s` limits the computing of each replica's step. A replica that has computed so
            long stops before its next microbatch and contributes those that it has, at least one (Giladi et al.,
            *DropCompute*, NeurIPS 2023). All replicas contribute to every clock.

    Raises:
        PolicyError: for a value that is out of range.
    """

    share: int | float = 1.0
    grace: float | Literal["adaptive"] = "adaptive"
    limit_s: float = math.inf
    late: Late = Drop()
    of: Of = "replicas"
    counted: bool = False
    """Makes Deadline(1), one replica, differ from Deadline(1.0), all. Set by `share`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            share: float = 1.0,
            grace: float | Literal["adaptive"] = "adaptive",
            limit_s: float = ...,
            late: Late | LateName = ...,
            of: Literal["replicas", "microbatches"] = "replicas",
        ) -> None: ...

    def __post_init__(self) -> None:
        quorum = Quorum(self.share, late=self.late)  # checks both
        msgspec.structs.force_setattr(self, "share", quorum.count_or_fraction)
        msgspec.structs.force_setattr(self, "counted", quorum.counted)
        msgspec.structs.force_setattr(self, "late", quorum.late)
        if not (isinstance(self.grace, str) and self.grace == "adaptive"):
            value = number(self.grace, "Deadline(grace={!r}): give seconds, or 'adaptive'")
            if not 0 <= value < math.inf:
                raise PolicyError(f"Deadline(grace={value}): the wait is a number of seconds from 0, or 'adaptive'")
            msgspec.structs.force_setattr(self, "grace", float(value))
            if self.quorum.waits_for_all and not self.cuts:
                raise PolicyError(
                    f"Deadline({self.share}, grace={self.grace:g}): all replicas are waited for, so there is no other "
                    "to which a grace could be given; give a share below 1 or a count, or leave grace out"
                )
        msgspec.structs.force_setattr(self, "limit_s", _limit(self.limit_s, "Deadline"))
        if not is_one_of(self.of, ("replicas", "microbatches")):
            limit = (
                "; a share of the examples with a limit is Quorum(0.75, of='samples', limit_s=2.0)"
                if is_one_of(self.of, ("samples",))
                else ""
            )
            raise PolicyError(f"Deadline(of={self.of!r}) is not known; give of='replicas' or of='microbatches'{limit}")
        if self.cuts:
            self._check_cut()

    def _check_cut(self) -> None:
        where = "Deadline(of='microbatches')"
        _check_cut(where, self.late)
        if self.limit_s == math.inf:
            raise PolicyError(f"{where}: give limit_s=, the seconds after which a replica stops between microbatches")
        if self.quorum != Quorum() or self.grace != "adaptive":
            raise PolicyError(
                f"Deadline({self.share}, grace={self.grace!r}, of='microbatches'): each replica stops by its own "
                "clock and contributes, so there is no quorum of replicas and no grace; leave share and grace out"
            )

    @property
    def cuts(self) -> bool:
        """Whether replicas stop between two microbatches and contribute what they have."""
        return self.of == "microbatches"

    def stops(self, seconds: float) -> bool:
        """Whether a replica stops by itself when its step has computed so long."""
        return self.cuts and seconds >= self.limit_s

    @property
    def quorum(self) -> Quorum:
        return Quorum(self.share)

    def need(self, members: int) -> int:
        """How many of `members` replicas are always waited for, except at the time limit."""
        return self.quorum.need(members)

    def never_drops(self, members: int) -> bool:
        """Whether no replica can come too late."""
        return (self.cuts or self.limit_s == math.inf) and self.need(members) >= members

    @property
    def waits_for_all(self) -> bool:
        return self.quorum.waits_for_all and (self.cuts or self.limit_s == math.inf)

    def decide(self, arrivals: Arrivals, now: float) -> Answer:
        """Decide when all have arrived that can, or when the grace window or the time limit is over."""
        if self.cuts:
            return self.quorum.decide(arrivals, now)
        if not arrivals.hopeful:
            enough = arrivals.count and (self.limit_s < math.inf or not self.quorum.counted)
            return Decide() if enough else self.quorum.decide(arrivals, now)
        until = arrivals.began + self.limit_s
        need = self.need(arrivals.members)
        if arrivals.count >= need:
            reached = list(arrivals.times.values())[need - 1]
            until = min(until, reached + self._grace_s(arrivals, need))
        if now < until:
            return Wait(until)
        return Decide() if arrivals.count else Wait()

    def _grace_s(self, arrivals: Arrivals, need: int) -> float:
        if not (isinstance(self.grace, str) and self.grace == "adaptive"):
            return self.grace
        return arrivals.spread_s(need) if arrivals.window_s is None else arrivals.window_s

    def goes_on(self) -> bool:
        return self.limit_s < math.inf

    def describe(self) -> str:
        if self.cuts:
            return f"microbatches cut after {self.limit_s:g} s"
        limit = f" limit {self.limit_s:g} s" if self.limit_s < math.inf else ""
        return f"deadline {self.share} {self.grace}{limit} {self.late.describe()}"

    def __repr__(self) -> str:
        return _counting(self)

    def __str__(self) -> str:
        return f"Deadline(limit_s={self.limit_s:g}, of='microbatches')" if self.cuts else f"Deadline({self.share})"


@register
class Coded(Completion, Value, frozen=True, tag=True):
    """The gradient of the whole batch, from any large enough set of replicas, because each computes several shares.

    See `flowml.policy.codes` for the methods. No work is dropped when a replica is late.

    Args:
        stragglers: how many replicas may be late, whichever they are; of a tree, how many children of each parent.
        code: `"fractional"`, whose result has the same bits whoever is late and whose `stragglers + 1` must divide the
            number of replicas; `"cyclic"`, which works for any number of replicas; or `"tree"`.
        children, levels: the form of the tree.

    Raises:
        PolicyError: for a code that does not exist.
    """

    stragglers: int
    code: Literal["fractional", "cyclic", "tree"] = "fractional"
    children: int = 0
    levels: int = 0

    def __post_init__(self) -> None:
        for name in ("stragglers", "children", "levels"):
            value = whole(getattr(self, name))
            if value is None or value < 0:
                raise PolicyError(f"Coded({name}={getattr(self, name)!r}): give a whole number of at least 0")
            msgspec.structs.force_setattr(self, name, value)
        if not is_one_of(self.code, ("fractional", "cyclic", "tree")):
            raise PolicyError(f"Coded(code={self.code!r}) is not known; give 'fractional', 'cyclic' or 'tree'")
        if self.code == "tree":
            TreeCode(self.children, self.levels, self.stragglers)
        elif self.children or self.levels:
            raise PolicyError(
                f"Coded(code={self.code!r}) has no tree; leave children and levels out, or give code='tree'"
            )

    @property
    def by_replica(self) -> bool:
        return True

    @property
    def tree(self) -> TreeCode | None:
        """The tree whose parents add up what their children send; None if all replicas send to the home."""
        if self.code != "tree" or self.levels == 1:
            return None
        return TreeCode(self.children, self.levels, self.stragglers)

    def among(self, members: int) -> Code:
        """The code for so many replicas. Raises PolicyError if there is none."""
        if self.code == "tree":
            tree = TreeCode(self.children, self.levels, self.stragglers)
            if tree.workers != members:
                raise PolicyError(
                    f"a tree of {self.levels} levels with {self.children} children of each parent has {tree.workers} "
                    f"replicas, there are {members}; give replicas={tree.workers}, or another tree"
                )
            return tree
        kind = FractionalRepetition if self.code == "fractional" else CyclicRepetition
        return kind(members, self.stragglers)

    def need(self, members: int) -> int:
        """How many replicas are enough if the late ones are spread as the code allows. With a tree it is about what a
        parent adds up."""
        return members - (self.among(members).tolerates if self.tree is None else self.stragglers)

    def never_drops(self, members: int) -> bool:
        return self.stragglers == 0

    def decide(self, arrivals: Arrivals, now: float) -> Answer:
        """Decide as soon as the replicas that have arrived can be decoded."""
        if self.tree is not None:
            return self._add_up(self.tree, arrivals)
        code = self.among(arrivals.members)
        found = code.decode(arrivals.times)
        if found is None:
            return Wait()
        each = float(code.load) / arrivals.full  # 1 / the number of microbatches in the batch
        return Decide(tuple(sorted((replica, a * each) for replica, a in found.items())))

    def _add_up(self, tree: TreeCode, arrivals: Arrivals) -> Answer:
        """Decide at the home as soon as its children can be decoded, and at a parent once it has its own gradient too.

        The members are the children, after the parent itself. The home divides by the size of the batch."""
        members = range(arrivals.members) if arrivals.among is None else arrivals.among
        own, children = members[: -tree.children], members[-tree.children :]
        found = tree.code.decode([i for i, child in enumerate(children) if child in arrivals.times])
        if found is None or any(replica not in arrivals.times for replica in own):
            return Wait()
        each = 1.0 if own else float(tree.load) / arrivals.full
        return Decide((*((r, 1.0) for r in own), *sorted((children[i], a * each) for i, a in found.items())))

    def describe(self) -> str:
        form = f" {self.children}x{self.levels}" if self.code == "tree" else ""
        return f"coded {self.stragglers} {self.code}{form}"

    def __str__(self) -> str:
        form = f", children={self.children}, levels={self.levels}" if self.code == "tree" else ""
        return f"Coded({self.stragglers}, {self.code!r}{form})"


def _counting(value: Quorum | Deadline) -> str:
    """A count of 1 equals the default, which is all, so it is shown."""
    return brief(value, hidden=("counted",), shown=("count_or_fraction", "share") if value.counted else ())


def _check_cut(where: str, late: Late) -> None:
    if late != Drop():
        raise PolicyError(
            f"{where} with late={late.describe()!r} is not sound: every replica contributes in time what it has, and "
            "microbatches that were not computed have no gradient to keep; leave late out"
        )


def _limit(limit_s: object, where: str) -> float:
    value = number(limit_s, f"{where}(limit_s={{!r}}): give seconds")
    if value <= 0:
        raise PolicyError(f"{where}(limit_s={value}): the limit is a number of seconds above 0")
    return float(value)


def _check_of(of: object) -> None:
    if not is_one_of(of, ("replicas", "samples", "microbatches")):
        raise PolicyError(f"Quorum(of={of!r}) is not known; give of='replicas', 'samples' or 'microbatches'")

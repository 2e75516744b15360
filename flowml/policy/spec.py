"""Defines `Policy` and the values that it is made of, and rejects unsound compositions.

Each knob is a frozen value that checks itself; `Policy` checks that its knobs are sound together. A value that a knob
does not have is never ignored: it raises an error that names those it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import MOST
from flowml.policy.apply import Apply, Consensus, Distill, Mean, Mix, Outer, as_apply, base_of, travelling, unsound
from flowml.policy.arrivals import Completion
from flowml.policy.completing import check_arriving, check_clocked, check_speculating
from flowml.policy.completion import COMPLETIONS, Speculate, cutting
from flowml.policy.cuts import check_cut
from flowml.policy.filtering import check_filters
from flowml.policy.filters import AnyFilter, Filter, check_chain, is_lossless
from flowml.policy.kinds import check
from flowml.policy.late import Fold, Late, number
from flowml.policy.mathematics import coefficients, shares
from flowml.policy.payload import PAYLOADS, Delta, Factors, Gradient, LocalPayload, Payload, Weights
from flowml.policy.quorum import Quorum
from flowml.policy.replicas import check_replicas
from flowml.policy.rhythm import Every, Once
from flowml.policy.topology import (
    TOPOLOGIES,
    Gossip,
    Hierarchy,
    ParameterServer,
    SharedMemory,
    Topology,
    as_gossip,
    is_sited,
    remote_of,
)
from flowml.policy.wording import Value, wrong_kind

UNBOUNDED = math.inf
"""A staleness without bound: a read never waits."""


class Policy(Value, frozen=True):
    """How the replicas of one layer are kept in step. `Policy()` is synchronous data parallelism.

    Attributes:
        topology: how contributions travel. With `ParameterServer()` replicas send them to the layer's home. With
            `AllReduce()`, `Ring()`, `Tree()` or `Hierarchy()` all replicas add up each gradient together.
            `Hierarchy(local, remote)` keeps sites in step inside by one topology, and between each other by another.
        staleness: how many clocks a read may be behind (0: synchronous, n: bounded, `UNBOUNDED`: no bound).
        quorum: what completes a clock. By default all replicas do if the staleness is 0; else each contribution is
            applied on arrival (Dean et al., Downpour; Ho et al., stale synchronous).
        every: steps between pushes: a number, or `Every`.
        payload: what is sent.
        filters: what makes the payload smaller before it is sent (`flowml.filters`), applied in order.
        pull_filters: the same for the parameters that the home publishes: they act on the difference to what readers
            have, so that what they leave out is part of the next one.
        apply: `"mean"` divides by the number of microbatch gradients that took part, `"sum"` only by the
            microbatches of a replica's step; `Outer(optimizer)` gives the mean to an optimizer of the home; others
            are in `flowml.policy.apply`.

    Raises:
        PolicyError: for a composition that is not sound, or a value that a knob does not have.
    """

    topology: Topology = ParameterServer()
    staleness: int | float = 0
    quorum: Completion = None  # pyright: ignore[reportAssignmentType]  the default depends on the staleness
    every: Every = Every()
    payload: Payload = Gradient()
    filters: tuple[AnyFilter, ...] = ()
    apply: Apply = Mean()
    pull_filters: tuple[AnyFilter, ...] = ()

    if TYPE_CHECKING:  # a policy normalises its values when it is made, so more is accepted than kept

        def __init__(
            self,
            topology: Topology = ...,
            staleness: float = 0,
            quorum: Completion | None = None,
            every: Every | int = 1,
            payload: Payload = ...,
            filters: Sequence[object] = (),
            apply: Apply | Literal["mean", "sum"] = ...,
            pull_filters: Sequence[object] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        bound = _staleness(self.staleness)
        if self.quorum is None:  # pyright: ignore[reportUnnecessaryComparison]
            self._set("quorum", Quorum() if bound == 0 or self.collective else Quorum(1, late=Fold()))
        self._set("staleness", bound)
        if not isinstance(self.every, Every):  # pyright: ignore[reportUnnecessaryIsInstance]
            self._set("every", Every(self.every))
        self._set("filters", _filters("filters", self.filters))
        self._set("pull_filters", _filters("pull_filters", self.pull_filters))
        self._set("apply", as_apply(self.apply))
        _check_parts(self)
        self._set("topology", as_gossip(self.topology))
        if self.shared:
            self._share()
        if isinstance(self.remote, Gossip):
            self._gossip(self.remote)
        _check_sound(self)

    def _share(self) -> None:
        """Replicas see each update at once, so none is late and no read waits."""
        if self.quorum == Quorum():
            self._set("quorum", Quorum(1, late=Fold()))
        if self.staleness == 0:
            self._set("staleness", UNBOUNDED)

    def _gossip(self, topology: Gossip) -> None:
        """Replicas exchange their parameters every k steps, and the home gets them once, at the end of the run."""
        if self.payload == Gradient():
            self._set("payload", Weights())
        if self.every == Every(self.every.push) and self.every != Once():
            if topology.every > 1 and self.every.push > 1:
                raise PolicyError(
                    f"topology={topology!r} with every={self.every.push} says twice how often replicas average; give "
                    "one of them"
                )
            often = Gossip(topology.graph, topology.every * self.every.push, topology.pull)
            nested = self.topology
            sited = isinstance(nested, Hierarchy)
            self._set("topology", msgspec.structs.replace(nested, remote=often) if sited else often)
            self._set("every", Once())
        if self.quorum == Quorum(1, late=Fold()):  # the home gets the parameters once, from all
            self._set("quorum", Quorum())

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    @property
    def clocked(self) -> bool:
        """Whether the layer commits clock by clock. If False, each contribution is applied on arrival."""
        return not (self.quorum.late.folds and self.staleness > 0) and self.epoch_share is None

    @property
    def epoch_share(self) -> float | None:
        """The share of its examples at which an epoch ends."""
        return self.quorum.count_or_fraction if isinstance(self.quorum, Quorum) and self.quorum.ends_epoch else None

    def members(self, replicas: int) -> int:
        """How many contributions a clock may have: one of each replica, or of each portion of the batch."""
        return replicas * (self.quorum.portions if isinstance(self.quorum, Speculate) else 1)

    @property
    def aligns(self) -> bool:
        """Whether each replica runs every clock, with its own share of the batch, as ADMM needs."""
        return self.clocked or isinstance(base_of(self.apply), Consensus)

    @property
    def local(self) -> bool:
        """Whether each replica updates parameters of its own."""
        return isinstance(self.payload, LocalPayload)

    @property
    def shared(self) -> bool:
        """Whether the replicas, all on one worker, update one copy of the parameters themselves."""
        return isinstance(self.topology, SharedMemory)

    @property
    def holds(self) -> bool:
        """Whether steps compute with the version that an earlier one has taken, until the rhythm takes another. With
        staleness 0 every step between two takes reads the same version anyway."""
        return self.staleness > 0 and self.every.pull != 1 and not self.local and not self.shared

    @property
    def owes(self) -> bool:
        """Whether a replica takes global parameters between two pushes. The steps since the last stay to be sent."""
        return self.every.pull != self.every.push

    def coefficients(
        self, weights: Sequence[int], microbatches: int, absent: int = 0, summed: int = 1
    ) -> tuple[float, ...]:
        """The coefficient of each contribution, by their weights; see `mathematics.coefficients` and `shares`. Each is
        the sum of what so many replicas send."""
        apply = Mean() if isinstance(self.remote, Gossip) else self.apply  # the home gets parameters, once
        if self.local:
            return shares(apply, weights, absent, summed)
        return coefficients(apply, weights, microbatches, absent)

    @property
    def travelling(self) -> Policy:
        """The policy without its outer optimizer, which is compiled and does not travel in a plan."""
        return msgspec.structs.replace(self, apply=travelling(self.apply))

    @property
    def remote(self) -> Topology:
        """The topology between sites, or between replicas if there are none."""
        return remote_of(self.topology)

    @property
    def sited(self) -> bool:
        """Whether one replica of each site stands for the others."""
        return is_sited(self.topology)

    @property
    def site_quorum(self) -> Completion | None:
        """What completes the sum of a site, where its leader gathers it and passes on values and decisions.

        None if there are no sites, or if the replicas of a site need each other at every step.
        """
        topology = self.topology
        if not isinstance(topology, Hierarchy) or not isinstance(topology.local, ParameterServer):
            return None
        if topology.quorum is not None:
            return topology.quorum
        drops = not (self.quorum.waits_for_all or self.quorum.late.folds)
        return Quorum() if drops and isinstance(topology.remote, ParameterServer) else None

    @property
    def sites_decide(self) -> bool:
        """Whether the leader of a site alone decides which gradients of its replicas are in a step: because the site
        has parameters of its own, or because each site is in the sums of leaders. If sites have parameters of their
        own, decisions about sites say which of them are in the global parameters."""
        return self.site_quorum is not None and (self.local or self.collective)

    @property
    def late(self) -> Late:
        """What becomes of late contributions, at each level that may leave some out."""
        inside, waits = self.site_quorum, self.quorum.waits_for_all or not self.clocked
        return inside.late if inside is not None and waits else self.quorum.late

    @property
    def collective(self) -> bool:
        """Whether replicas, or sites, add up their gradients among themselves."""
        return not isinstance(self.remote, ParameterServer | Gossip | SharedMemory)

    @property
    def adds_up(self) -> bool:
        """Whether gradients of different replicas are added up before they reach a home."""
        return self.collective or self.sited

    @property
    def mirrored(self) -> bool:
        """Whether each site, or replica, sends all others the changes of its parameters, and adds theirs to its own."""
        return isinstance(self.remote, Gossip) and isinstance(self.payload, Delta)

    @property
    def tracked(self) -> bool:
        """Whether neighbours keep public copies of each other's parameters, because what is sent loses something."""
        return isinstance(self.remote, Gossip) and not self.mirrored and not is_lossless(self.filters)

    @property
    def home_filters(self) -> tuple[AnyFilter, ...]:
        """The filters on the way to the home. A gossip has none there, and homes get sums whole."""
        return () if isinstance(self.remote, Gossip) or self.collective else self.filters

    @property
    def summed_filters(self) -> tuple[AnyFilter, ...]:
        """The filters of what replicas, or sites, add up among themselves."""
        return self.filters if self.collective else ()

    def describe(self) -> str:
        """A short text for tables: `"sync"`, `"every 4"`, `"async ≤3, factors"`, `"sync, ring"`."""
        bound = "" if self.staleness == UNBOUNDED else f" ≤{self.staleness}"
        words: list[str] = []
        if not self.clocked:
            words.append(f"async{bound}")
        elif self.staleness:
            words.append(f"stale{bound}")
        if self.every.describe() and not isinstance(self.remote, Gossip):
            words.append(self.every.describe())
        if self.clocked and self.quorum != Quorum():
            words.append(self.quorum.describe())
        elif self.epoch_share is not None:
            words.append(f"epoch {self.epoch_share} {self.quorum.late.describe()}")
        elif not self.clocked and isinstance(self.quorum, Quorum) and self.quorum != Quorum(1, late=Fold()):
            words.append(f"by {self.quorum.count_or_fraction}")
        if isinstance(self.remote, Gossip):
            if self.mirrored:
                words += ["deltas", *map(str, self.filters)]
            if self.tracked:
                words += [*map(str, self.filters), f"pull {self.remote.pull:g}"]
            outer = ["outer"] if isinstance(self.apply, Outer) else []
            return ", ".join([*words, self.topology.describe(), *outer])
        words = [w for w in words if w != "async" or not self.shared] or ([] if self.shared else ["sync"])
        if self.adds_up or self.shared:
            words.append(self.topology.describe())
        if not isinstance(self.payload, Gradient):
            words.append(type(self.payload).__name__.lower())
        if isinstance(self.payload, LocalPayload) and self.payload.alpha:
            words.append(f"keep {self.payload.alpha:g}")
        if self.apply.describe():
            words.append(self.apply.describe())
        words += map(str, self.filters)
        words += (f"pull {f}" for f in self.pull_filters)
        return ", ".join(words)


def _staleness(staleness: object) -> float:
    """The bound as an int, or UNBOUNDED."""
    value = number(staleness, "staleness={!r}: give a number of clocks, or fm.UNBOUNDED")
    if value < 0:
        raise PolicyError(f"staleness={value}: a read cannot be newer than now; 0 is synchronous")
    if value == UNBOUNDED:
        return UNBOUNDED
    if value != int(value):
        raise PolicyError(f"staleness={value}: clocks are whole, so the bound is an int or fm.UNBOUNDED")
    if value > MOST:
        raise PolicyError(f"staleness={value}: give less than 2**53 clocks, or fm.UNBOUNDED")
    return int(value)


def _filters(name: str, filters: Sequence[object]) -> tuple[Filter, ...]:
    if isinstance(filters, str) or not isinstance(filters, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PolicyError(f"{name}={filters}: give a tuple of filters, such as (fm.filters.top_k(0.01),)")
    return check_chain(tuple(filters))


def _check_parts(policy: Policy) -> None:
    """Check that each knob has an available value."""
    if not isinstance(policy.topology, Topology):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise wrong_kind("topology", policy.topology, TOPOLOGIES)
    if not isinstance(policy.quorum, Completion):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise wrong_kind("quorum", policy.quorum, COMPLETIONS)
    if type(policy.payload) not in PAYLOADS:
        raise wrong_kind("payload", policy.payload, PAYLOADS)
    check(Topology, policy.topology)
    check(Completion, policy.quorum)
    check(Late, policy.quorum.late)


def _check_sound(policy: Policy) -> None:
    """Check that the knobs are sound together."""
    if isinstance(policy.quorum, Speculate):
        check_speculating(policy)
    check_replicas(policy)
    if policy.shared:
        _check_shared(policy)
    reason = unsound(policy.apply, type(policy.payload).__name__, collective=policy.collective)
    if reason is not None and not isinstance(policy.remote, Gossip):  # whose averages are no applies of a home
        raise PolicyError(f"apply={policy.apply!r} with payload={policy.payload!r} is not sound: {reason}")
    check_cut(policy)
    if policy.collective:
        _check_collective(policy)
    elif isinstance(policy.remote, Gossip):
        pass  # `check_replicas` has checked it
    elif policy.clocked:
        check_clocked(policy)
    else:
        check_arriving(policy)
    if isinstance(policy.payload, Factors) and policy.every.push > 1:
        raise PolicyError(
            f"payload=Factors() with every={policy.every.push} is not sound: the factors of several steps cannot be "
            f"added up without forming the product they stand for; use every=1, or payload=Gradient()"
        )
    check_filters(policy)


def _check_shared(policy: Policy) -> None:
    """Check that the other knobs are sound with replicas that update one copy of the parameters themselves."""
    if policy.quorum != Quorum(1, late=Fold()) or policy.staleness != UNBOUNDED:
        raise PolicyError(
            f"topology=SharedMemory() with quorum={policy.quorum} and staleness={policy.staleness} is not sound: each "
            "update is made at once and seen by the next read, so no replica waits for another and none is late; leave "
            "quorum and staleness out, or use topology=fm.ParameterServer()"
        )
    if not isinstance(policy.payload, Gradient):
        raise PolicyError(
            f"topology=SharedMemory() with payload={policy.payload!r} is not sound: replicas share the parameters, and "
            "send nothing; use payload=Gradient(), or topology=fm.ParameterServer()"
        )
    if isinstance(base_of(policy.apply), Mix | Consensus | Distill):
        raise PolicyError(
            f"topology=SharedMemory() with apply={policy.apply!r} is not sound: it is about parameters that each "
            "replica has of its own, and these replicas share them; use apply='mean', or topology=fm.ParameterServer()"
        )
    if policy.every.pull != policy.every.push:
        raise PolicyError(
            f"topology=SharedMemory() with every={policy.every!r} is not sound: each step reads the shared parameters; "
            "leave pull out"
        )


def _check_collective(policy: Policy) -> None:
    """Check that the other knobs are sound and available with a sum over all replicas."""
    topology = f"topology={policy.topology!r}"
    if policy.staleness == UNBOUNDED:
        raise PolicyError(
            f"{topology} with staleness=UNBOUNDED is not sound: each sum waits for all replicas, and the gradients of "
            "those that run ahead would pile up without bound; give a finite staleness, such as 1, with which replicas "
            "compute while they add up, or use topology=fm.ParameterServer()"
        )
    if policy.quorum != Quorum(1.0) and not cutting(policy.quorum):
        raise PolicyError(
            f"{topology} with quorum={policy.quorum} is not sound: a sum over all replicas takes the gradient of each, "
            "so none can be left out; leave quorum out, or use topology=fm.ParameterServer()"
        )
    if isinstance(policy.payload, Factors):
        raise PolicyError(
            f"{topology} with payload=Factors() is not sound: the factors of different replicas cannot be added up "
            "without forming the products they stand for; use payload=Gradient(), or topology=fm.ParameterServer()"
        )

"""Defines what a training plan says about a store's home: the buffers that stay there, the tasks that use them, and how
replicas add up what they send there."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from flowml.arrays import ArraySpec, Dimension, Index
from flowml.policy.routes import Topology


class Applies(msgspec.Struct, frozen=True):
    """The tasks with which a home applies contributions, as indices into Plan.tasks.

    `apply` takes the parameters, the state, the coefficients and up to `width` contributions, each with the payloads of
    all parts in order, and returns the new parameters and the new state. The coefficients are an array (2, width): the
    first row multiplies the payloads, the second their weights if they are `weighted`. The places of missing
    contributions are filled with any contribution, and have coefficient 0.

    If a store may get more contributions at once, `fold` takes the accumulator, the coefficients and up to `width`
    contributions, and returns the accumulator, which starts as zeros of the specs `accumulator`. `finish` takes the
    parameters, the state and the accumulator.
    """

    width: Annotated[int, msgspec.Meta(ge=1)]
    apply: Index
    fold: Index | None = None
    finish: Index | None = None
    accumulator: tuple[ArraySpec, ...] = ()
    weighted: bool = False

    @property
    def tasks(self) -> tuple[int, ...]:
        return tuple(t for t in (self.apply, self.fold, self.finish) if t is not None)


class Share(msgspec.Struct, frozen=True):
    """One task of a home in a coupling, an index into Plan.tasks. It takes the gradients, the parameters, the state,
    and of the common values those at `takes`. `task` is None if the home has nothing to share in the round. What it
    returns has `nbytes`."""

    task: Index | None
    takes: tuple[Index, ...] = ()
    nbytes: Dimension = 0


class Coupled(msgspec.Struct, frozen=True):
    """How a home updates parameters that the optimizer couples to those of other homes.

    The tasks of `Applies` then only return the gradients, from the parameters and the contributions. In each round of
    the coupling, a task of `shares` returns what the other homes need. In the end `update` returns the new parameters
    and the new state.
    """

    coupling: Index
    shares: tuple[Share, ...]
    update: Share

    @property
    def tasks(self) -> tuple[int, ...]:
        return tuple(share.task for share in (*self.shares, self.update) if share.task is not None)


class Combine(msgspec.Struct, frozen=True):
    """The task, an index into Plan.tasks, that returns more common values after a round: from the state that they
    depend on, the common values at `takes`, and what all homes have shared in the round, in the order of stores."""

    task: Index
    takes: tuple[Index, ...] = ()


class Coupling(msgspec.Struct, frozen=True):
    """Stores whose homes exchange a few values at each clock, because the optimizer couples their parameters.

    `state` are positions in the flattened optimizer state; every one of these stores keeps these leaves, and they are
    equal everywhere.
    """

    stores: tuple[Index, ...]
    rounds: tuple[Combine, ...]
    state: tuple[Index, ...] = ()


class Buffer(msgspec.Struct, frozen=True):
    """An array that stays at a home between steps. Its name is unique among the buffers of its store.

    Its first value is leaf `index` of the flattened parameters, or of the flattened state of all optimizers: the
    trainer's first, then those of the homes.
    """

    name: str
    spec: ArraySpec
    kind: Literal["parameter", "state"]
    index: Index


class Local(msgspec.Struct, frozen=True):
    """The tasks with which a replica updates parameters of its own, and the optimizer state that it keeps for them.

    `update`, `send` and `take` are indices into Plan.tasks; `flowml.training.local` describes them. Without `send` the
    parameters are sent, and without `take` the global parameters are taken as they are. `state` are positions in the
    flattened optimizer state. With a gossip topology, `fold` adds what a neighbour sends to an `accumulator`, and `mix`
    ends a round, or adds what the others have sent. With `dual` the replica also keeps dual variables and its last
    report. The last `outer` leaves of the state are those of an outer optimizer.
    """

    update: Index
    send: Index | None
    take: Index | None
    state: tuple[Index, ...]
    state_specs: tuple[ArraySpec, ...]
    fold: Index | None = None
    mix: Index | None = None
    accumulator: tuple[ArraySpec, ...] = ()
    outer: Index = 0
    dual: bool = False


class Reduction(msgspec.Struct, frozen=True):
    """How the workers of a stage add up a part among themselves. Each worker is one rank.

    `schedule` is "doubling", "direct", "ring", "hierarchical", "tree" (with `fanout`), "gather", "spread", "around",
    or "own" with the topology that is the `route`.
    `workers` are in the order of ranks; `hosts` holds the number of each worker's machine.
    """

    schedule: Annotated[str, msgspec.Meta(max_length=32)]
    workers: tuple[str, ...]
    hosts: tuple[Index, ...]
    fanout: Index = 0
    route: Topology | None = None


class Site(msgspec.Struct, frozen=True):
    """Replicas of which the first, their leader, stands for all where sites exchange what they have.

    They add up each part by one of `reductions`, as many as the store has parts. With the schedule "gather" only the
    leader gets the sum. One replica alone has none.
    """

    replicas: tuple[Index, ...]
    reductions: tuple[Reduction, ...] = ()

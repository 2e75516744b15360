"""Draws random policies: every knob, with every kind of value that it has.

A *kind* fixes the knobs that make a composition what it is, such as a code or a gossip, and the others are drawn from
the rows here. A composition that `Policy` or `check_composition` refuses is drawn again, and counted. So what is drawn
is sound, and a new value of a knob is tested as soon as its row has it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowml import filters
from flowml.errors import PolicyError
from flowml.policy import (
    UNBOUNDED,
    AllReduce,
    Coded,
    Completion,
    Consensus,
    Deadline,
    Delta,
    Every,
    Factors,
    Fold,
    Gossip,
    Gradient,
    Hierarchy,
    Mix,
    Once,
    Outer,
    ParameterServer,
    Policy,
    Prox,
    Quorum,
    Ring,
    SharedMemory,
    Speculate,
    StalenessScaled,
    Tree,
    Vote,
    Weights,
    check_composition,
    cutting,
)
from flowml.policy.compose import check_sites
from flowml.policy.graphs import check_members

Knobs = Mapping[str, Any]
LATE = ("drop", "drop", "fold", "requeue")
GRAPHS = ("ring", "torus", "exponential", "complete", "random_pairs")
REDUCTIONS = (AllReduce(), Ring(), Tree(2), Tree(4))
PROX = (Prox(l1=1e-4), Prox(l2=0.1), Prox(low=-1, high=1))

refused = 0
"""The unsound compositions that were drawn in this process."""


def _sound(make: Callable[[], Any]) -> Any:
    """What `make` draws, once it is sound."""
    global refused
    while True:
        try:
            return make()
        except PolicyError:
            refused += 1


def _quorum(rng: random.Random) -> Completion | None:
    kinds: tuple[Callable[[], Completion | None], ...] = (
        lambda: None,
        lambda: None,
        lambda: Quorum(rng.choice([0.3, 0.5, 0.75, 1.0]), late=rng.choice(LATE)),
        lambda: Quorum(rng.choice([0.3, 0.5, 0.75]), late=rng.choice(LATE)),
        lambda: Quorum(rng.randint(1, 3), late=rng.choice(LATE)),
        lambda: Quorum(rng.choice([0.5, 0.75]), late=Fold(0.5)),
        lambda: Quorum(rng.choice([0.3, 0.6]), of="samples", late=rng.choice(LATE)),
        lambda: Deadline(rng.choice([0.5, 0.75]), rng.choice(["adaptive", 0.3]), late=rng.choice(LATE)),
        lambda: Deadline(1.0, limit_s=rng.choice([0.5, 2.0]), late=rng.choice(LATE)),
    )
    return rng.choice(kinds)()


def _rhythm(rng: random.Random) -> Every | int:
    return rng.choice([1, 1, 1, 2, 3, 5, Every(3, offset=1), Every(4, offset=2), Every(2, pull=1), Every(2, pull=4)])


def _chain(rng: random.Random) -> tuple[object, ...]:
    """A chain of filters, with and without error feedback."""
    first = rng.choice(
        [
            filters.top_k(rng.choice([0.3, 2])),
            filters.random_k(0.5),
            filters.random_skip(0.5),
            filters.significance(0.1, decay=rng.choice(["sqrt", None])),
            filters.kkt(0.1),
            filters.low_rank(1),
            filters.quantise(rng.choice([8, 4, 2, 1])),
            filters.compress(),
            filters.top_k(0.5),
        ]
    )
    if rng.random() < 0.6 and not first.lossless:
        first = first.with_error_feedback(rng.choice([1.0, 1.0, 0.5]))
    rest = [filters.quantise(8), filters.key_cache(), filters.compress()]
    return (first, *(f for f in rest if rng.random() < 0.3 and (f.takes != "keys" or "keys" in first.gives)))


def _pull_chain(rng: random.Random) -> tuple[object, ...]:
    """Filters of what the home publishes."""
    lossy = [filters.top_k(0.3), filters.random_k(0.5), filters.significance(0.1), filters.quantise(8)]
    return (rng.choice([*lossy, filters.low_rank(1), filters.quantise(4)]), *rng.choice([(), (filters.compress(),)]))


def _apply(rng: random.Random) -> object:
    return rng.choice(["mean", "mean", "mean", "sum", StalenessScaled(), Outer(), Vote(1), rng.choice(PROX)])


def _plain(rng: random.Random, replicas: int) -> Knobs:
    return {
        "topology": rng.choice(REDUCTIONS) if rng.random() < 0.25 else ParameterServer(),
        "staleness": rng.choice([0, 0, 0, 1, 2, 4, UNBOUNDED]),
        "quorum": _quorum(rng),
        "every": _rhythm(rng),
        "payload": Factors() if rng.random() < 0.1 else Gradient(),
        "apply": _apply(rng),
    }


def _filtered(rng: random.Random, replicas: int) -> Knobs:
    knobs = {**_plain(rng, replicas), "topology": ParameterServer(), "payload": Gradient(), "filters": _chain(rng)}
    if rng.random() < 0.5:  # pushes that are dropped return to what error feedback keeps
        knobs |= {"quorum": Quorum(rng.choice([1, 0.5])), "staleness": rng.choice([0, 1])}
    return knobs


def _local(rng: random.Random, replicas: int) -> Knobs:
    """Local SGD and its relatives: each replica updates parameters of its own."""
    alpha = rng.choice([0.0, 0.0, 0.5])
    return {
        "staleness": rng.choice([0, 0, 1, 4, UNBOUNDED]),
        "quorum": rng.choice([None, _quorum(rng)]),
        "every": rng.choice([_rhythm(rng), _rhythm(rng), 3, 4, Every(3, delay=1), Every(4, offset=1, delay=2), Once()]),
        "payload": rng.choice([Delta, Delta, Weights])(alpha),
        "filters": rng.choice([(), (), _chain(rng)]),
        "apply": rng.choice(["mean", "mean", "sum", Outer(), StalenessScaled(), *PROX, Mix(0.2), Consensus(0.1)]),
    }


def _published(rng: random.Random, replicas: int) -> Knobs:
    """The home filters what it publishes."""
    knobs = rng.choice([_plain, _plain, _filtered, _local])(rng, replicas)
    return {**knobs, "topology": ParameterServer(), "pull_filters": _pull_chain(rng)}


def _graph(rng: random.Random, replicas: int) -> object:
    """A graph by its name, or a doubly stochastic matrix."""
    if rng.random() < 0.2:
        return [[(i == j) / 2 + 0.5 / replicas for j in range(replicas)] for i in range(replicas)]
    return rng.choice(GRAPHS)


def _gossip(rng: random.Random, replicas: int) -> Knobs:
    graph = _graph(rng, replicas)
    topology = Gossip(graph, every=rng.choice([1, 1, 2, 3]), pull=rng.choice([1.0, 0.5]))
    return {"topology": topology, "apply": rng.choice(["mean", Outer()]), "filters": rng.choice([(), (), _chain(rng)])}


def _mirrored(rng: random.Random, replicas: int) -> Knobs:
    """Gossip of changes, as in Gaia."""
    return {
        "topology": Gossip("complete", every=rng.choice([1, 1, 2, 3])),
        "payload": Delta(),
        "staleness": rng.choice([0, 0, 1, 2]),
        "filters": rng.choice(
            [(), _chain(rng), (filters.significance(0.3),), (filters.top_k(2).with_error_feedback(),)]
        ),
        "apply": rng.choice(["mean", "sum"]),
    }


def _sites(rng: random.Random, replicas: int) -> tuple[int, Any]:
    """How many sites, and which."""
    count = rng.randint(1, replicas)
    odd = tuple(range(0, replicas, 2)), tuple(range(1, replicas, 2))
    sites = rng.choice([count, count, odd])
    return (sites if isinstance(sites, int) else 2), sites


def _sited(rng: random.Random, replicas: int) -> Knobs:
    number, sites = _sites(rng, replicas)
    local = rng.choice([ParameterServer(), *REDUCTIONS])
    draw = rng.choice([_gossip, _mirrored, _local, _filtered, _published, _plain, _plain])
    knobs = draw(rng, number)
    remote = knobs.get("topology", ParameterServer())
    return {**knobs, "topology": Hierarchy(local, remote, sites)}


def _site_quorum(rng: random.Random, late: Any) -> Quorum | Deadline:
    share = rng.choice([1, 0.5, 0.75])
    return Quorum(share, late=late) if rng.random() < 0.7 else Deadline(0.5, 0.3, late=late)


def _gathered(rng: random.Random, replicas: int) -> Knobs:
    """The leader of each site decides which of its replicas are in the sum of the site."""
    (number, sites), late = _sites(rng, replicas), rng.choice([*LATE, Fold(0.5)])
    inside, between = (rng.choice([None, _site_quorum(rng, late), _site_quorum(rng, late)]) for _ in range(2))
    knobs = rng.choice([_plain, _plain, _filtered])(rng, number)
    topology = Hierarchy(ParameterServer(), ParameterServer(), sites, quorum=inside)
    always = {"payload": Gradient(), "quorum": between or Quorum(), "staleness": rng.choice([0, 0, 1, 2])}
    return {**knobs, **always, "topology": topology}


def _deciding(rng: random.Random, replicas: int) -> Knobs:
    """Each site decides alone: it has parameters of its own, or its leader adds gradients up with other leaders."""
    (number, sites), late = _sites(rng, replicas), rng.choice([*LATE, Fold(0.5)])
    knobs = dict(rng.choice([_local, _local, _gossip, _mirrored, _plain])(rng, number))
    remote = knobs.get("topology", ParameterServer())
    if isinstance(knobs.get("payload"), Gradient | Factors):
        knobs, remote = {**knobs, "payload": Gradient(), "quorum": None}, rng.choice(REDUCTIONS)
    elif rng.random() < 0.5 and "quorum" in knobs:
        knobs["quorum"] = _site_quorum(rng, late)
    topology = Hierarchy(ParameterServer(), remote, sites, quorum=_site_quorum(rng, late))
    return {**knobs, "topology": topology}


def _shared(rng: random.Random, replicas: int) -> Knobs:
    return {"topology": SharedMemory(), "every": rng.choice([1, 1, 2, 3]), "apply": _apply(rng)}


KINDS: dict[str, Callable[[random.Random, int], Knobs]] = {
    "plain": _plain,
    "filtered": _filtered,
    "local": _local,
    "published": _published,
    "gossip": _gossip,
    "mirrored": _mirrored,
    "sited": _sited,
    "gathered": _gathered,
    "deciding": _deciding,
    "shared": _shared,
}
"""The kinds of one layer's policy, which get the number of replicas."""
SHARES = {
    "plain": 12,
    "filtered": 5,
    "local": 4,
    "published": 3,
    "gossip": 2,
    "mirrored": 1,
    "sited": 3,
    "gathered": 1,
    "deciding": 2,
    "shared": 1,
}
"""How often each kind is drawn."""


def policy(rng: random.Random, replicas: int, kind: str | None = None) -> Policy:
    """A random sound policy of a kind."""
    chosen = kind or rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    return _sound(lambda: Policy(**KINDS[chosen](rng, replicas)))


def _code(rng: random.Random, replicas: int) -> Coded:
    trees = {2: (2, 1), 3: (3, 1), 6: (2, 2)}
    found = [Coded(rng.randint(1, replicas - 1), "cyclic"), Coded(1, "fractional")]
    if replicas in trees:
        children, levels = trees[replicas]
        found.append(Coded(1, "tree", children=children, levels=levels))
    return rng.choice(found)


WHOLES: dict[str, Callable[[random.Random, int], Completion]] = {
    "copies": lambda rng, replicas: Speculate(
        rng.randint(1, 3), after=rng.choice([0.0, 0.5, 2.0]), copies=rng.randint(0, 2)
    ),
    "epoch": lambda rng, replicas: Quorum(
        rng.choice([0.5, 0.75]), of="samples", over="epoch", late=rng.choice(["drop", "requeue"])
    ),
    "cut": lambda rng, replicas: rng.choice(
        [
            Deadline(limit_s=rng.choice([0.05, 0.2, 0.5]), of="microbatches"),
            Quorum(rng.choice([0.5, 0.75, replicas + 1]), of="microbatches"),
        ]
    ),
    "code": _code,
}
"""What completes the clocks of all layers, where these have to agree."""


def policies(rng: random.Random, replicas: int, stores: int, kind: str | None = None) -> tuple[Policy, ...]:
    """A sound policy for each store, of one of KINDS or WHOLES. Some are equal, so that groups have several stores."""

    def model() -> tuple[Policy, ...]:
        agreed = kind or (rng.choice(tuple(WHOLES)) if rng.random() < 0.2 else None)
        whole = WHOLES[agreed](rng, replicas) if agreed in WHOLES else None
        pool = [_like(rng, replicas, whole) if whole else policy(rng, replicas, kind) for _ in range(rng.randint(1, 3))]
        chosen = tuple(rng.choice(pool) for _ in range(stores))
        check_drawn(chosen, replicas)
        return chosen

    return _sound(model)


def check_drawn(chosen: Sequence[Policy], replicas: int) -> None:
    """Check that so many replicas, and the sites that they form, can do what policies say. Raises PolicyError."""
    check_composition({str(i): p for i, p in enumerate(chosen)}, replicas)
    for p in chosen:
        if isinstance(p.topology, Hierarchy) and p.sited:
            sites = p.topology.split(range(replicas))
            check_sites("a layer", p, sites)
            if isinstance(p.remote, Gossip):
                check_members(p.remote.graph, len(sites), "sites")


def apart(rng: random.Random, replicas: int) -> tuple[Policy, ...]:
    """Two sound policies: a quorum that late replicas skip clocks for, and own parameters that are not applied at its
    clocks."""

    def model() -> tuple[Policy, ...]:
        quorum = Quorum(rng.randint(1, replicas - 1), late=rng.choice(("drop", "requeue")))
        own = {**_local(rng, replicas), "quorum": None, "staleness": rng.choice([1, 4, UNBOUNDED, UNBOUNDED])}
        chosen = Policy(quorum=quorum, every=rng.choice([1, 1, 2])), Policy(**own)
        check_composition({str(i): p for i, p in enumerate(chosen)}, replicas)
        return chosen

    return _sound(model)


def quorums(rng: random.Random, replicas: int) -> tuple[Policy, ...]:
    """Sound policies by which others go on without a late replica, and keep nothing of it but what counts."""

    def one() -> Policy:
        late, share = rng.choice(LATE), rng.choice([0.3, 0.5, 0.75])
        quorum = rng.choice([Quorum(share, late=late), Deadline(share, 0.3, late=late)])
        own = rng.random() < 0.4
        knobs: dict[str, Any] = {"payload": Delta(), "apply": "mean"} if own else {"staleness": rng.choice([0, 0, 1])}
        knobs |= {"filters": _chain(rng)} if rng.random() < 0.3 else {}
        knobs |= {"pull_filters": _pull_chain(rng)} if rng.random() < 0.2 else {}
        return Policy(quorum=quorum, every=rng.choice([1, 2, 3] if not own else [2, 3, 4]), **knobs)

    def apart() -> Policy:
        chain = {"filters": _chain(rng)} if rng.random() < 0.3 else {}
        own: Any = {"payload": Delta(), "apply": rng.choice(["sum", "mean"])} if rng.random() < 0.4 else {}
        own = {"payload": Weights(), "apply": Mix(0.3)} if rng.random() < 0.2 else own
        every = rng.choice([1, 2, 3] if "payload" in own and own["apply"] != "sum" else [1, 2, 3, Every(2, pull=4)])
        return Policy(staleness=UNBOUNDED, every=every, **own, **chain)

    def sited() -> Policy:
        return Policy(**_gathered(rng, replicas))

    def model() -> tuple[Policy, ...]:
        kind = rng.choice([*[one] * 6, apart, apart, sited, sited, None])
        codes = Coded(1, "cyclic"), Coded(1, "fractional"), Speculate(rng.choice([1, 2, 4]))
        same = Policy(quorum=rng.choice(codes))  # for all layers
        chosen = tuple(kind() if kind else same for _ in range(rng.choice([1, 1, 2, 3])))
        check_drawn(chosen, replicas)
        return chosen

    return _sound(model)


def _like(rng: random.Random, replicas: int, quorum: Completion) -> Policy:
    """A sound policy with this quorum."""
    kinds = [_plain, _plain, _filtered, _local] if cutting(quorum) else [_plain]

    def one() -> Policy:
        knobs: dict[str, Any] = {**rng.choice(kinds)(rng, replicas), "quorum": quorum}
        return Policy(**knobs)

    return _sound(one)

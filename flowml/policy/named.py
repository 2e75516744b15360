"""Named policies: each function makes the `flowml.Policy` of a method, from one field of it to most of them.

Most take other fields too, as `asynchronous(staleness=3, every=4)`. A policy prints what it is made of. `adam_auto`
makes a rule, which chooses a policy for each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

from flowml import policy as algebra
from flowml.arguments import flag
from flowml.errors import PolicyError
from flowml.numbers import MOST, real, whole
from flowml.policy import filters
from flowml.policy.late import LateName, late_of, number
from flowml.policy.published import (
    adam_auto,
    adam_convolution,
    adam_epoch,
    deep_compression,
    ensemble_compression,
    one_bit,
    parameter_server,
    power_sgd,
    qsgd,
    ring,
    skeleton,
    ssp,
    vote,
)
from flowml.signatures import worded


class _Common(TypedDict, total=False):
    topology: algebra.Topology
    filters: Sequence[object]
    apply: algebra.Apply | Literal["mean", "sum"]


class _Pushing(_Common, total=False):
    every: algebra.Every | int
    payload: algebra.Payload


class _Rhythm(_Common, total=False):
    staleness: float
    quorum: algebra.Completion | None
    payload: algebra.Payload


class _Sending(_Common, total=False):
    staleness: float
    quorum: algebra.Completion | None
    every: algebra.Every | int


class _Waiting(_Pushing, total=False):
    staleness: float


class _Summing(TypedDict, total=False):
    every: algebra.Every | int
    apply: algebra.Apply | Literal["mean", "sum"]


class _Coded(TypedDict, total=False):
    topology: algebra.Topology
    filters: Sequence[object]


class _Reading(_Pushing, total=False):
    quorum: algebra.Completion | None


class _Stale(TypedDict, total=False):
    topology: algebra.Topology
    staleness: float
    quorum: algebra.Completion | None


class _Decoupled(TypedDict, total=False):
    staleness: float
    filters: Sequence[object]


class _Dense(TypedDict, total=False):
    staleness: float
    quorum: algebra.Completion | None


class _Averaging(_Stale, total=False):
    apply: algebra.Apply


class _Elastic(TypedDict, total=False):
    staleness: float
    quorum: algebra.Completion | None


def synchronous(**overrides: Unpack[_Pushing]) -> algebra.Policy:
    """All replicas contribute to every clock, and reads are never stale: equal to one large batch."""
    return algebra.Policy(**overrides)


def all_reduce(**overrides: Unpack[_Summing]) -> algebra.Policy:
    """Like `synchronous`, but each replica keeps a copy, and replicas add up their gradients among themselves."""
    return algebra.Policy(topology=algebra.AllReduce(), **overrides)


def every(k: int, **overrides: Unpack[_Rhythm]) -> algebra.Policy:
    """Each replica adds up its gradients and sends them every `k` steps (Project Adam, local accumulation)."""
    return algebra.Policy(every=k, **overrides)


def asynchronous(staleness: float = algebra.UNBOUNDED, **overrides: Unpack[_Reading]) -> algebra.Policy:
    """Each contribution is applied on arrival; reads are at most `staleness` clocks old (0: synchronous)."""
    return algebra.Policy(staleness=staleness, **overrides)


def factors(**overrides: Unpack[_Sending]) -> algebra.Policy:
    """Replicas send the operands of a dense layer's gradient, and the home multiplies them (Project Adam)."""
    return algebra.Policy(payload=algebra.Factors(), **overrides)


def quorum(
    share_or_count: float,
    of: Literal["replicas", "samples", "microbatches"] = "replicas",
    late: algebra.Late | LateName = "drop",
    **overrides: Unpack[_Waiting],
) -> algebra.Policy:
    """A share (0.75) or a number (3) of the replicas completes a clock; by default later contributions are dropped.

    With `of="samples"` it is one of the examples, with `of="microbatches"` one of the microbatches (see `Quorum`).
    """
    return algebra.Policy(quorum=algebra.Quorum(share_or_count, of, late_of(late, "quorum")), **overrides)


def backup_workers(n: int, **overrides: Unpack[_Waiting]) -> algebra.Policy:
    """The first `n` replicas complete a clock, the others are spares (Chen et al., Revisiting Distributed Synchronous
    SGD, 2016)."""
    count = whole(n)
    if count is None or count < 1:
        raise PolicyError(
            f"backup_workers({n!r}): give the number of replicas that complete a step, at least 1; a share of them is "
            "quorum(0.75)"
        )
    return algebra.Policy(quorum=algebra.Quorum(count), **overrides)


def deadline(
    share: float, grace: float | Literal["adaptive"] = "adaptive", **overrides: Unpack[_Waiting]
) -> algebra.Policy:
    """A share of the replicas completes a clock, after a grace time for the others: seconds, or learnt."""
    _some("deadline", share, "Policy(quorum=fm.Deadline(limit_s=2.0)), which waits for all so long at most")
    return algebra.Policy(quorum=algebra.Deadline(share, grace), **overrides)


def _some(name: str, share: object, otherwise: str) -> None:
    """Raise PolicyError for the share 1.0: no replica could be late."""
    found = None if whole(share) is not None else real(share)
    if found == 1:
        raise PolicyError(f"{name}(1.0): all replicas are waited for, so none is late; give less, or {otherwise}")


def drop_compute(seconds: float, **overrides: Unpack[_Waiting]) -> algebra.Policy:
    """A replica that has computed a step for so many seconds stops before its next microbatch and contributes those
    that it has (Giladi et al., *DropCompute*, NeurIPS 2023). It needs `Trainer(microbatches=)` of at least 2.

    All layers need the same rule, because a replica leaves out whole microbatches.
    """
    return algebra.Policy(quorum=algebra.Deadline(limit_s=seconds, of="microbatches"), **overrides)


def compensate(share: float = 0.75, **overrides: Unpack[_Pushing]) -> algebra.Policy:
    """Late gradients join a later clock (Xu et al., Live Gradient Compensation, 2020). A `share` of the replicas (or
    their number, from 2) completes a clock, and all replicas count alike."""
    _some("compensate", share, "policies.synchronous()")
    if whole(share) == 1:
        raise PolicyError(
            "compensate(1): a clock would be complete with one replica; give a share below 1, such as 0.75, or a "
            "number of at least 2"
        )
    return algebra.Policy(quorum=algebra.Quorum(share, late="fold"), **overrides)


def softsync(n: float, scale: bool = True, **overrides: Unpack[_Sending]) -> algebra.Policy:
    """A home applies 1/n of the replicas' gradients at a time, so their staleness is about `n`; `scale` divides each by
    its staleness (Gupta et al., Rudra, 2016). An `n` of the number of replicas applies each as it arrives. Of k =
    ⌈replicas / n⌉ gradients applied together each counts 1 / k, divided by the versions made since its parameters
    were read, if more than one. After a push a replica reads the newest one. Raises PolicyError for an `n` below 1."""
    scaled = flag("scale", scale)
    if not 1 <= number(n, "softsync({!r}): give a number of at least 1") <= MOST:
        raise PolicyError(
            f"softsync({n}): give a number from 1, which applies the gradients of all replicas at once, to that of the "
            "replicas, which applies each as it arrives"
        )
    overrides.setdefault("staleness", algebra.UNBOUNDED)
    overrides.setdefault("quorum", algebra.Quorum(1 / n, late="fold"))
    overrides.setdefault("apply", algebra.StalenessScaled() if scaled else "mean")
    return algebra.Policy(**overrides)


def double_buffer(**overrides: Unpack[_Pushing]) -> algebra.Policy:
    """A step computes while the gradients before it are exchanged, with parameters that are at most one clock old; no
    work is lost. A step that begins after the exchange reads the newest, so real runs differ in the last digits."""
    return algebra.Policy(staleness=1, quorum=algebra.Quorum(), **overrides)


def local_sgd(every: int, **overrides: Unpack[_Averaging]) -> algebra.Policy:
    """Each replica updates parameters of its own, and every `every` steps all take the mean (Stich, *Local SGD
    Converges Fast and Communicates Little*, ICLR 2019)."""
    return algebra.Policy(every=every, payload=algebra.Delta(), **overrides)


def diloco(
    every: int, outer: Any = None, fragments: int = 1, delay: int = 0, alpha: float = 0.0, **overrides: Unpack[_Stale]
) -> algebra.Policy:
    """Local SGD whose mean change is the gradient of an outer optimizer at the home (Douillard et al., *DiLoCo*, 2023).

    `fragments` groups of layers are synchronised in turn, their new values are taken `delay` steps later, and a replica
    keeps the share `alpha` of its own values (Douillard et al., *Streaming DiLoCo*, 2025).

    Args:
        every: the number of steps between two synchronisations of a layer.
        outer: an optax.GradientTransformation; by default SGD at rate 0.7 with Nesterov momentum 0.9.
        fragments: fragment i of n takes its first value after `(i + 1) / n * every` steps.
        delay: what a replica sends is computed so many steps before.
        alpha: 0 takes the global values, 1 keeps a replica's own. With 1 replicas never take the global values, so they
            train alone, and the home only gathers their changes; give less, such as 0.5, to have them work together.
    """
    steps, late = whole(every) or 1, whole(delay) or 0
    rhythm = algebra.Every(every, fragments=fragments, delay=delay, offset=-late % steps if 0 <= late < steps else 0)
    return algebra.Policy(every=rhythm, payload=algebra.Delta(alpha), apply=algebra.Outer(outer), **overrides)


def decoupled_diloco(
    every: int,
    quorum: float,
    grace: float | Literal["adaptive"] = "adaptive",
    outer: Any = None,
    fragments: int = 1,
    late: algebra.Late | LateName = "fold",
    **overrides: Unpack[_Decoupled],
) -> algebra.Policy:
    """DiLoCo that does not wait for slow replicas: a share or number of them completes a round, after a grace time for
    the others, and each counts by the examples that it has seen, or by the tokens that `Trainer(weight=)` gives
    (Douillard et al., *Decoupled DiLoCo*, 2026).

    With `late="fold"`, as in the paper, a late replica goes on, and its push counts in the round that is open when it
    comes. With `"drop"` it takes the new global parameters, its steps are lost, and the ledger says so.

    Args:
        every: the number of local steps between two pushes of a layer.
        quorum: the least share (0.75) or number (3) of replicas. 1.0 waits for all, which still count by examples.
        grace: seconds to wait for the others, or learnt from how far apart the quorum arrives.
        outer: an optax.GradientTransformation; by default SGD at rate 0.7 with Nesterov momentum 0.9.
        fragments: groups of layers that are synchronised in turn, each with its own quorum.
    """
    return algebra.Policy(
        every=algebra.Every(every, fragments=fragments),
        quorum=algebra.Deadline(quorum, grace, late=late_of(late, "decoupled_diloco")),
        payload=algebra.Delta(),
        apply=algebra.Outer(outer),
        **overrides,
    )


def sparse_loco(
    every: int,
    keep: float = 1 / 32,
    bits: int = 2,
    outer: Any = None,
    decay: float = 0.95,
    **overrides: Unpack[_Dense],
) -> algebra.Policy:
    """Local SGD that sends `keep` of each change, its largest elements, in `bits` bits; what it leaves out is kept,
    multiplied by `decay`, and added to the next change (Sarfi et al., *SparseLoCo*, 2025).

    Args:
        every: the number of local steps between two pushes.
        keep: a share of each array, or a number of elements.
        bits: 8, 4, 2 or 1 for each element that is sent.
        outer: an optax.GradientTransformation that gets the mean change; by default SGD at rate 1 without momentum, for
            which the feedback stands in.
        decay: the share of what was left out that is added to the next change.
    """
    chain = (filters.top_k(keep).with_error_feedback(decay), filters.quantise(bits))
    apply: algebra.Apply = algebra.Mean() if outer is None else algebra.Outer(outer)
    return algebra.Policy(every=every, payload=algebra.Delta(), filters=chain, apply=apply, **overrides)


def elastic_averaging(every: int, pull: float, **overrides: Unpack[_Elastic]) -> algebra.Policy:
    """Each replica updates parameters of its own. Every `every` steps it and the home's centre move towards each other
    by the share `pull` of their distance (Zhang, Choromanska & LeCun, *Deep learning with Elastic Averaging SGD*,
    NeurIPS 2015). Replicas do not wait for each other; with `staleness=0` they do."""
    settings: _Elastic = {"staleness": algebra.UNBOUNDED, **overrides}
    return algebra.Policy(every=every, payload=algebra.Weights(), apply=algebra.Mix(pull), **settings)


def average_once() -> algebra.Policy:
    """Replicas train alone, and the result is the mean of their parameters (Zinkevich et al., *Parallelized Stochastic
    Gradient Descent*, NeurIPS 2010)."""
    return algebra.Policy(every=algebra.Once(), payload=algebra.Weights())


def downpour(push: int, pull: int, optimizer: Any = None, **overrides: Unpack[_Stale]) -> algebra.Policy:
    """Each replica updates parameters of its own, sends its change every `push` steps, and takes the home's parameters
    every `pull` steps, without waiting (Dean et al., *Large Scale Distributed Deep Networks*, NeurIPS 2012).

    The home applies each change as it is, or with `optimizer` (the paper uses Adagrad). A `pull` of None is `push`.
    """
    settings: _Stale = {"staleness": algebra.UNBOUNDED, **overrides}
    apply: algebra.Apply = algebra.Sum() if optimizer is None else algebra.Outer(optimizer)
    return algebra.Policy(every=algebra.Every(push, pull), payload=algebra.Delta(), apply=apply, **settings)


def admm(
    rho: float,
    share: float = 1.0,
    staleness: float = 0,
    every: int = 1,
    l1: float = 0.0,
    l2: float = 0.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> algebra.Policy:
    """Consensus ADMM: the mean loss of the replicas' own examples plus l1 · |z| + l2 / 2 · z² in a box (Boyd et al.,
    2011). With a `staleness` above 0 it is asynchronous (Zhang and Kwok, *Asynchronous Distributed ADMM*, ICML 2014).

    For each replica to have the same examples in every step, train with a batch of all examples and `shuffle=False`.

    Args:
        rho: the weight of a replica's distance from the consensus.
        share: the share (0.5) or number (2) of reports at which the consensus is updated; below all of them it needs a
            staleness.
        staleness: how many steps a replica may be ahead of the slowest.
        every: the number of optimizer steps with which a replica minimises, between two reports.
        l1, l2, low, high: the penalties and the box of the global parameters.
    """
    apply: algebra.Apply = algebra.Consensus(rho)
    given = {"l1": l1, "l2": l2, "low": low, "high": high, "staleness": staleness}
    l1, l2, low, high, staleness = (number(x, f"admm({name}={{!r}}): give a number") for name, x in given.items())
    if l1 or l2 or low > -math.inf or high < math.inf:
        apply = algebra.Prox(float(l1) / rho, float(l2) / rho, low, high, apply)
    completion = algebra.Quorum(share, late="fold") if staleness else algebra.Quorum(share)
    return algebra.Policy(every=every, staleness=staleness, quorum=completion, payload=algebra.Delta(), apply=apply)


def gossip(graph: object = "ring", every: int = 1) -> algebra.Policy:
    """Each replica updates parameters of its own. Every `every` steps it averages them with those of its neighbours in
    `graph` (Lian et al., *Can Decentralized Algorithms Outperform Centralized Algorithms?*, NeurIPS 2017).

    `graph` is a name, such as `"ring"`, or a doubly stochastic matrix; see `flowml.Gossip`. The result is the mean over
    replicas.
    """
    return algebra.Policy(topology=algebra.Gossip(graph, every))


def no_loco(every: int, outer: Any = None, pull: float = 1.0, graph: object = "random_pairs") -> algebra.Policy:
    """Each replica updates parameters of its own. Every `every` steps it takes the mean change of itself and one other,
    drawn at random, plus `pull` times its distance from their mean, as the gradient of an outer optimizer (Kolehmainen
    et al., *NoLoCo*, 2025).

    `outer` is an optax.GradientTransformation; by default SGD at rate 0.7 with Nesterov momentum 0.9. The result is the
    mean over replicas.
    """
    return algebra.Policy(topology=algebra.Gossip(graph, every, pull), apply=algebra.Outer(outer))


def choco(filters: Sequence[object], pull: float = 0.5, graph: object = "ring", every: int = 1) -> algebra.Policy:
    """Gossip of what filters leave of parameters: CHOCO-SGD (Koloskova, Stich and Jaggi, *Decentralized stochastic
    optimization and gossip algorithms with compressed communication*, ICML 2019).

    Replicas keep public copies of their own parameters and of those of their neighbours in `graph`, and send what
    `filters` make of the difference between the parameters and the copy. After each round a replica moves by `pull` of
    the distance between its neighbours' copies and its own. The more filters leave out, the smaller `pull` has to be.
    """
    if isinstance(filters, tuple | list) and not filters:
        raise PolicyError(
            "choco(()): it has no filters; give some, such as (fm.filters.top_k(0.01),); without any it is gossip()"
        )
    return algebra.Policy(topology=algebra.Gossip(graph, every, pull), filters=filters)


def hogwild(every: algebra.Every | int = 1, apply: algebra.Apply | Literal["mean", "sum"] = "sum") -> algebra.Policy:
    """The replicas are devices of one worker, and update the parameters that they share at once, without waiting (Recht
    et al., *Hogwild*, NeurIPS 2011). With `every` an update holds the gradients of several steps, as in Viebke et al.,
    *CHAOS*, 2017, where each layer is published later."""
    return algebra.Policy(topology=algebra.SharedMemory(), every=every, apply=apply)


def gaia(
    threshold: float,
    local: algebra.Topology | None = None,
    sites: object = None,
    staleness: int = 1,
    every: int = 1,
    apply: algebra.Apply | Literal["mean", "sum"] = "mean",
) -> algebra.Policy:
    """Replicas of a site keep in step by `local`, an all-reduce by default. Sites send each other the elements whose
    accumulated change is larger than `threshold` / √t of the parameter at step t, and keep the rest for later (Hsieh et
    al., *Gaia: Geo-Distributed Machine Learning Approaching LAN Speeds*, NSDI 2017).

    A site may be `staleness` clocks ahead of the changes of the slowest one. `sites` is as in `flowml.Hierarchy`. Gaia
    adds up the steps of all sites, which is `apply="sum"`; by default each site counts with its share of the replicas.

    With a `threshold` of 0 every change is sent at once and nothing is kept for later: no bytes are saved, and with
    `staleness=0` all sites stay in step, as with one all-reduce of all replicas.
    """
    inside = algebra.AllReduce() if local is None else local
    topology = algebra.Hierarchy(inside, algebra.Gossip("complete", every), sites)
    if topology.sites == 1 or (isinstance(topology.sites, tuple) and len(topology.sites) == 1):
        raise PolicyError(
            f"gaia(sites={sites!r}): sites send each other what changes, and one has no other to send to; give 2 sites "
            "or more, or fm.policies.all_reduce() for the replicas of one site"
        )
    significant = (filters.significance(threshold),)
    return algebra.Policy(topology, staleness, payload=algebra.Delta(), filters=significant, apply=apply)


def coded(
    stragglers: int, code: Literal["fractional", "cyclic"] = "fractional", **overrides: Unpack[_Coded]
) -> algebra.Policy:
    """Each replica computes `stragglers + 1` shares of the batch, and the gradient of the whole batch is decoded
    without the slowest `stragglers` replicas (Tandon et al., *Gradient Coding*, ICML 2017). With 0 stragglers no share
    is computed twice, and all replicas are needed."""
    return algebra.Policy(quorum=algebra.Coded(stragglers, code), **overrides)


def coded_reduce(children: int, levels: int, stragglers: int, **overrides: Unpack[_Coded]) -> algebra.Policy:
    """A tree of replicas in which each parent has `children`, of which it needs all but `stragglers` (Reisizadeh et
    al., *CodedReduce*, 2019). Replicas compute less than with `coded` for as many stragglers in all.

    A parent adds up its own gradient and those of enough children, and sends one message on. So the layer's home gets
    no more messages than a parent has children. With 0 stragglers all replicas are needed; with one level it is `coded`
    with a cyclic code.
    """
    return algebra.Policy(quorum=algebra.Coded(stragglers, "tree", children, levels), **overrides)


def speculate(portions: int = 4, *, after: float = 1.0, copies: int = 1, **overrides: Unpack[_Coded]) -> algebra.Policy:
    """The batch is cut into `portions` for each replica, an idle replica takes the next, and near the end copies of
    those that take long; the first result counts (Dean et al., *Large Scale Distributed Deep Networks*, NeurIPS 2012,
    Sandblaster). With 0 `copies` portions are only shared out. See `flowml.Speculate`."""
    return algebra.Policy(quorum=algebra.Speculate(portions, after, copies), **overrides)


__all__ = [
    "synchronous",
    "all_reduce",
    "every",
    "asynchronous",
    "factors",
    "quorum",
    "backup_workers",
    "deadline",
    "drop_compute",
    "compensate",
    "softsync",
    "double_buffer",
    "local_sgd",
    "diloco",
    "decoupled_diloco",
    "sparse_loco",
    "elastic_averaging",
    "average_once",
    "downpour",
    "admm",
    "gossip",
    "no_loco",
    "choco",
    "hogwild",
    "gaia",
    "coded",
    "coded_reduce",
    "speculate",
    "ring",
    "ssp",
    "parameter_server",
    "adam_convolution",
    "adam_epoch",
    "adam_auto",
    "ensemble_compression",
    "vote",
    "power_sgd",
    "one_bit",
    "qsgd",
    "deep_compression",
    "skeleton",
]

worded(globals(), __all__, PolicyError, "flowml.policies")


def __dir__() -> list[str]:
    return __all__

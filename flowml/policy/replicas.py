"""Checks which compositions are sound for replicas that have parameters of their own.

With `Delta` or `Weights` each replica keeps a copy of the layer's parameters and of the optimizer's state, and updates
it at every step with its own gradient. The home keeps the global parameters, which it computes from what replicas send.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flowml.errors import PolicyError
from flowml.policy.apply import Consensus, Distill, Mean, Mix, Outer, Sum, base_of, most_at_once
from flowml.policy.arrivals import Completion
from flowml.policy.graphs import CompleteGraph
from flowml.policy.payload import Delta, Factors, LocalPayload, Weights
from flowml.policy.quorum import Coded, Quorum
from flowml.policy.rhythm import ONCE
from flowml.policy.topology import Gossip, Hierarchy

if TYPE_CHECKING:
    from flowml.policy.spec import Policy


def weighs(policy: Policy, replicas: int) -> bool:
    """Whether what replicas with parameters of their own send counts by the weights of the batches in it.

    That is so where a home takes the mean of several. One that is applied alone, or added as it is, has nothing to be
    weighed against.
    """
    if not policy.local or replicas < 2 or weighs_otherwise(policy) or not policy.apply.averages:
        return False
    return policy.collective or most_at_once(policy, replicas) > 1


def weighs_otherwise(policy: Policy) -> str | None:
    """What decides how much each replica counts, if it is not what its batches weigh: then a weight has no meaning
    between replicas with parameters of their own."""
    kind = base_of(policy.apply)
    if policy.mirrored:
        return "each site counts with its share of the replicas, or alike"
    if isinstance(policy.remote, Gossip):
        return "the weights of the graph say how much each counts, and are doubly stochastic"
    if isinstance(kind, Mix):
        return "each pulls the centre by the same share of its distance"
    if isinstance(kind, Consensus):
        return "the consensus is the mean of all reports, each with its dual variables"
    return None


def check_pull(name: str, policy: Policy, replicas: int, what: str = "replicas") -> None:
    """Check that this number of replicas, or sites, do not pull a centre too far together."""
    if isinstance(policy.apply, Mix) and policy.clocked and policy.apply.pull * replicas > 1:
        raise PolicyError(
            f"{name!r}: {policy.apply!r} of {replicas} {what} at once is not sound: together they pull the centre "
            f"beyond their mean; give pull={1 / replicas:.2g} or less, or staleness=1 or more"
        )


def check_replicas(policy: Policy) -> None:
    """Check that the other knobs of a policy are sound with its payload, its apply and its rhythm."""
    if policy.sited:
        _check_sited(policy)
    if isinstance(policy.remote, Gossip):
        _check_gossip(policy)
    elif isinstance(policy.payload, LocalPayload):
        _check_local(policy)
    elif policy.every.delay:
        raise PolicyError(
            f"delay={policy.every.delay} with payload={policy.payload!r} is not sound: a replica computes on while it "
            "waits only if it updates its own parameters; leave delay out, or use payload=Delta()"
        )
    pull = policy.every.pull or policy.every.push
    if pull > policy.every.push and policy.staleness < pull - 1:
        raise PolicyError(
            f"every={policy.every!r} with staleness={policy.staleness} is not sound: a value that is taken every "
            f"{pull} steps is up to {pull - 1} clocks old; give staleness={pull - 1} or more, or leave pull out"
        )


def _check_gossip(policy: Policy) -> None:
    """Check that replicas can average their parameters with their neighbours in rounds that all take part in."""
    topology, remote = f"topology={policy.topology!r}", policy.remote
    assert isinstance(remote, Gossip)
    if remote.pull != 1 and not (policy.tracked or (isinstance(policy.apply, Outer) and not policy.mirrored)):
        raise PolicyError(
            f"{topology} with payload={policy.payload!r}: pull={remote.pull:g} would have no effect, because the "
            "graph alone says how far a replica moves; leave pull out, or give apply=Outer(optimizer), or filters that "
            "lose something with a pull in (0, 1]"
        )
    if policy.mirrored and policy.quorum == Quorum():
        _check_mirrored(policy)
        return
    if policy.quorum != Quorum() or policy.staleness:
        raise PolicyError(
            f"{topology} with quorum={policy.quorum} and staleness={policy.staleness} is not sound: the weights of a "
            "replica's average add up to 1 only with all of its neighbours, and a late one that some leave out of a "
            "round and others do not would change the mean over replicas; leave quorum and staleness out, and give "
            "on_loss='shrink', with which all leave a lost one out of the graph"
        )
    if policy.payload != Weights() or not isinstance(policy.apply, Mean | Outer):
        raise PolicyError(
            f"{topology} with payload={policy.payload!r} and apply={policy.apply!r} is not sound: replicas average "
            "parameters with the weights of the graph; leave payload and apply out, or give apply=Outer(optimizer)"
        )
    if policy.every.push != ONCE:
        raise PolicyError(
            f"{topology} with every={policy.every!r} is not sound: the home gets the parameters once, at the end; give "
            "the steps between two rounds as every=k"
        )


def _check_mirrored(policy: Policy) -> None:
    """Check that sites which send each other the changes of their parameters end with equal ones."""
    topology, remote = f"topology={policy.topology!r} with payload={policy.payload!r}", policy.remote
    assert isinstance(remote, Gossip)
    if not isinstance(remote.graph, CompleteGraph):
        raise PolicyError(
            f"{topology} is not sound: a change reaches only the neighbours of its sender, and those it does not reach "
            "would never have it; give graph='complete', or payload=fm.Weights()"
        )
    if policy.payload != Delta() or not isinstance(policy.apply, Mean | Sum):
        raise PolicyError(
            f"{topology} and apply={policy.apply!r} is not sound: the changes of others are added to the own "
            "parameters; leave alpha out, and give apply='mean' or 'sum'"
        )
    lost = [f for f in policy.filters if not f.lossless]
    if lost and lost[0].feedback != 1:
        raise PolicyError(
            f"{topology} and filters=({', '.join(map(str, policy.filters))},) is not sound: what {lost[0]} leaves out "
            "would never reach the others, so that their parameters drift apart; give "
            f"{lost[0].with_error_feedback()}"
        )
    if policy.staleness == math.inf:
        raise PolicyError(
            f"{topology} with staleness=UNBOUNDED is not sound: what a fast sender sends would pile up without bound "
            "at the others; give the number of clocks by which one may be ahead"
        )
    if policy.every.push != ONCE:
        raise PolicyError(
            f"{topology} with every={policy.every!r} is not sound: the home gets the parameters once, at the end; give "
            "the steps between two exchanges as every=k"
        )


def _check_sited(policy: Policy) -> None:
    """Check that a site can take part as one replica. Its replicas need each other's gradients at every step."""
    topology = f"topology={policy.topology!r}"
    quorum, inside = policy.quorum, policy.site_quorum
    if quorum.by_replica:
        raise PolicyError(
            f"{topology} with quorum={quorum} is not sound: the contribution of a site is a sum over its replicas, and "
            "a code and copies of portions are about what each replica has computed; give a Quorum of sites, or use "
            "topology=fm.ParameterServer()"
        )
    if quorum.cuts and inside is None:
        raise PolicyError(
            f"{topology} with quorum={quorum} is not sound: the contribution of a site is a sum over its replicas, "
            "which does not say how many microbatches each has computed; give Hierarchy(local=fm."
            "ParameterServer(), quorum=fm.Quorum()), with which the leader counts them"
        )
    if inside is not None:
        _check_site_quorum(policy, inside, topology)
    elif not (quorum.waits_for_all or quorum.late.folds):
        raise PolicyError(
            f"{topology} with quorum={quorum} is not sound: a replica whose site is left out would stop its step, for "
            "which the others of its site wait; give local=fm.ParameterServer(), with which the leader decides for "
            "its site, or late='fold', or leave quorum out"
        )
    if isinstance(policy.payload, Factors):
        raise PolicyError(
            f"{topology} with payload=Factors() is not sound: the factors of different replicas cannot be added up "
            "without forming the products they stand for; use payload=Gradient()"
        )


def _check_site_quorum(policy: Policy, inside: Completion, topology: str) -> None:
    """Check that the leader of a site can decide which of its replicas take part in the sum of a step."""
    quorum = policy.quorum
    if policy.clocked and not quorum.waits_for_all and quorum.late != inside.late and not inside.waits_for_all:
        raise PolicyError(
            f"{topology} with quorum={quorum} is not sound: late={inside.late.describe()!r} of the replicas of a site "
            f"and late={quorum.late.describe()!r} of sites are two rules for the same step of a replica; give both "
            "quorums the same late rule"
        )
    if policy.sites_decide:
        return
    if not policy.clocked:
        raise PolicyError(
            f"{topology} with staleness={policy.staleness} is not sound: a replica learns with the decision about the "
            "sites whether its step counts, and contributions that are applied as they arrive have none; give "
            "quorum=fm.Quorum() too, which waits for all sites"
        )


def _check_local(policy: Policy) -> None:
    payload = f"payload={policy.payload!r}"
    if policy.collective:
        _check_summed(policy, payload)
    if policy.clocked and not policy.quorum.waits_for_all:
        _check_dropping(policy, payload)
    if isinstance(base_of(policy.apply), Consensus):
        _check_consensus(policy, payload)
    if isinstance(policy.payload, Weights):
        _check_weights(policy, payload)


def _check_summed(policy: Policy, payload: str) -> None:
    """Check that what replicas add up among themselves is all that the global parameters need. Each holds a copy."""
    topology, kind = f"topology={policy.topology!r}", base_of(policy.apply)
    if isinstance(policy.topology, Hierarchy):
        raise PolicyError(
            f"{topology} with {payload} is not sound: what sites add up has to count by the replicas of each, and a "
            "sum of changes does not know them; use a Hierarchy with remote=fm.ParameterServer() or "
            "fm.Gossip('complete'), or payload=Gradient(), or topology=fm.AllReduce(), with which each replica "
            "has parameters of its own"
        )
    if isinstance(kind, Consensus | Distill):
        raise PolicyError(
            f"{topology} with apply={policy.apply!r} is not sound: it needs what each replica sends, and a sum has "
            "only all of it together; use topology=fm.ParameterServer()"
        )
    if policy.quorum != Quorum():
        raise PolicyError(
            f"{topology} with {payload} and quorum={policy.quorum} is not sound: changes of unequal numbers of "
            "examples count alike in a sum; leave quorum out, or use topology=fm.ParameterServer()"
        )


def _check_consensus(policy: Policy, payload: str) -> None:
    """Check that the home's mean is that of each replica's last report."""
    apply = f"apply={policy.apply!r}"
    if policy.clocked and not policy.quorum.waits_for_all:
        raise PolicyError(
            f"{apply} with quorum={policy.quorum} is not sound: a report that is dropped would never be in the mean "
            "of the last reports; give Quorum(count, late='fold') with staleness=1 or more"
        )
    if policy.payload != Delta() or policy.every.delay or policy.every.pull != policy.every.push:
        raise PolicyError(
            f"{apply} with {payload} and every={policy.every!r} is not sound: a replica takes the global parameters as "
            "they are, after each of its reports; leave alpha, delay and pull out"
        )
    lossy = [f for f in policy.filters if not f.lossless]
    if lossy and lossy[0].feedback != 1:  # with error feedback the home has the last report, less what is kept
        raise PolicyError(
            f"{apply} with filters=({', '.join(map(str, policy.filters))},) is not sound: what {lossy[0]} loses would "
            f"be missing from the mean of the last reports for good; give {lossy[0].with_error_feedback()}"
        )


def _check_dropping(policy: Policy, payload: str) -> None:
    """Check that a replica's own steps have a fate if its push is late."""
    quorum = f"quorum={policy.quorum}"
    if isinstance(policy.quorum, Coded):
        raise PolicyError(
            f"{quorum} with {payload} is not sound: a code decodes sums of gradients of the same parameters, and each "
            "replica has its own; use payload=Gradient(), or quorum=Quorum(0.75)"
        )
    if isinstance(base_of(policy.apply), Mix):
        raise PolicyError(
            f"{quorum} with apply={policy.apply!r} is not sound: a late replica moves towards the centre, which does "
            "not move towards it; leave quorum out, or give staleness=1 or more, where each pull counts on arrival"
        )
    if policy.quorum.late.folds and isinstance(policy.payload, Weights):
        raise PolicyError(
            f"{quorum} with late={policy.quorum.late!r} and {payload} is not sound: parameters of an earlier round are "
            "no change that a later average could take in; use payload=Delta(), or late='drop'"
        )


def _check_weights(policy: Policy, payload: str) -> None:
    if isinstance(base_of(policy.apply), Mix):
        if policy.payload != Weights() or policy.every.delay or policy.every.pull != policy.every.push:
            raise PolicyError(
                f"apply={policy.apply!r} with {payload} and every={policy.every!r} is not sound: a replica is pulled "
                "to the centre when it pushes, and never takes a value; leave alpha, delay and pull out"
            )
        return
    if not policy.clocked:
        raise PolicyError(
            f"staleness={policy.staleness} with {payload} is not sound: without clocks each replica's parameters would "
            "replace the global ones; use apply=Mix(0.1), payload=Delta(), or staleness=0"
        )
    if policy.every.pull != policy.every.push:
        raise PolicyError(
            f"every={policy.every!r} with {payload} is not sound: what a replica takes between two pushes would "
            "replace its steps since the last one; leave pull out, or use payload=Delta()"
        )

"""Defines update policies: values that say how the replicas of a layer keep its parameters in step.

`update = Apply(Quorum(Topology(Payload(work^Every(parameters read under Consistency)))))`

A `Policy` is one choice for each of these. A published method (parameter server, local SGD, Downpour,
stale-synchronous, backup workers, factor exchange) is a composition of choices and needs no separate code. An
unsound composition cannot be constructed. Nothing here imports JAX.
"""

from __future__ import annotations

from flowml.policy.answers import Decide, Never, Wait
from flowml.policy.apply import Apply, Consensus, Distill, Mean, Mix, Outer, Prox, StalenessScaled, Sum, Vote
from flowml.policy.arrivals import Arrivals, Completion, Spread
from flowml.policy.codes import Code
from flowml.policy.completion import Speculate, cutting
from flowml.policy.compose import DEFAULT_PATTERN, check_batch, check_composition, coded_by, resolve, speculated_by
from flowml.policy.cuts import cut_by
from flowml.policy.kinds import register
from flowml.policy.late import Drop, Fold, Late, Requeue
from flowml.policy.mathematics import can_read, coefficients, due, newest_changes, window
from flowml.policy.payload import Delta, Factors, Gradient, Payload, Weights
from flowml.policy.quorum import Coded, Deadline, Quorum
from flowml.policy.rhythm import Every, Once
from flowml.policy.spec import UNBOUNDED, Policy
from flowml.policy.topology import AllReduce, Gossip, Hierarchy, ParameterServer, Ring, SharedMemory, Topology, Tree

__all__ = [
    "DEFAULT_PATTERN",
    "UNBOUNDED",
    "AllReduce",
    "Apply",
    "Arrivals",
    "Code",
    "Coded",
    "Completion",
    "Consensus",
    "Deadline",
    "Decide",
    "Delta",
    "Distill",
    "Drop",
    "Every",
    "Factors",
    "Fold",
    "Gossip",
    "Gradient",
    "Hierarchy",
    "Late",
    "Mean",
    "Mix",
    "Never",
    "Once",
    "Outer",
    "ParameterServer",
    "Payload",
    "Policy",
    "Prox",
    "Quorum",
    "Requeue",
    "Ring",
    "SharedMemory",
    "Speculate",
    "Spread",
    "StalenessScaled",
    "Sum",
    "Topology",
    "Tree",
    "Vote",
    "Wait",
    "Weights",
    "can_read",
    "check_batch",
    "check_composition",
    "coded_by",
    "coefficients",
    "cut_by",
    "cutting",
    "due",
    "newest_changes",
    "register",
    "resolve",
    "speculated_by",
    "window",
]

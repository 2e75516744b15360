"""Checks that what completes a clock is sound with the other knobs of a policy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flowml.errors import PolicyError
from flowml.policy.apply import Sum, Vote, base_of
from flowml.policy.late import Fold
from flowml.policy.payload import Factors
from flowml.policy.quorum import Coded, Quorum
from flowml.policy.rhythm import Every
from flowml.policy.topology import ParameterServer

if TYPE_CHECKING:
    from flowml.policy.spec import Policy


def check_clocked(policy: Policy) -> None:
    """Check that the other knobs are sound with clocks that a quorum completes."""
    quorum = policy.quorum
    if isinstance(quorum, Coded):
        _check_coded(policy)
    if policy.staleness == math.inf:
        raise PolicyError(
            f"quorum={quorum} with staleness=UNBOUNDED is not sound: replicas would run ahead of the clocks that "
            f"the quorum completes, and their contributions pile up without bound; give a finite staleness, or "
            f"leave quorum out"
        )


def _check_coded(policy: Policy) -> None:
    """Check that what replicas send stays a sum that a code can decode."""
    if policy.staleness:
        why = "the gradients that a code combines must be of the same parameters; leave staleness out"
    elif policy.every.push > 1:
        why = (
            "a replica that was late would add the gradients of a step that is decoded already to its next push; "
            "use every=1"
        )
    elif isinstance(policy.payload, Factors):
        why = (
            "the factors of a sum of gradients are not the sum of their factors, so they cannot be decoded; use "
            "payload=Gradient()"
        )
    elif any(not f.lossless for f in policy.filters):
        why = (
            "a filter that changes what each replica sends on its own breaks the sums that a code decodes; use "
            "lossless filters such as compress()"
        )
    elif isinstance(base_of(policy.apply), Sum | Vote):
        why = "a code decodes the gradient of the whole batch, not those of steps or replicas; use apply='mean'"
    else:
        return
    raise _unsound(policy, why)


def check_speculating(policy: Policy) -> None:
    """Check that the portions of a batch can be computed by any replica, and twice."""
    if not isinstance(policy.topology, ParameterServer):
        why = "a home takes the first result of each portion; use topology=fm.ParameterServer()"
    elif policy.staleness:
        why = "the portions of a batch must be of the same parameters, whoever computes them; leave staleness out"
    elif policy.every != Every():
        why = "a replica that keeps gradients for a later push keeps those of portions that others count; use every=1"
    elif policy.local:
        why = "a copy of a portion would start from other parameters than the portion; use payload=Gradient()"
    elif any(not f.lossless for f in policy.filters):
        why = (
            "what a filter leaves out depends on the replica, and which replica counts depends on who is first; use "
            "lossless filters such as compress()"
        )
    elif isinstance(base_of(policy.apply), Sum | Vote):
        why = "portions are parts of one batch, not steps or replicas; use apply='mean'"
    else:
        return
    raise _unsound(policy, why)


def _unsound(policy: Policy, why: str) -> PolicyError:
    """The error of a quorum that is not sound with the knobs that are changed."""
    names, plain = ("topology", "staleness", "every", "payload", "filters", "apply"), type(policy)()
    changed = {n: getattr(policy, n) for n in names if getattr(policy, n) != getattr(plain, n)}
    changed |= {"filters": f"({', '.join(map(str, policy.filters))},)"} if policy.filters else {}
    knobs = ", ".join(f"{n}={_short(value)}" for n, value in changed.items())
    return PolicyError(f"quorum={policy.quorum} with {knobs} is not sound: {why}")


def _short(value: object) -> str:
    return value if isinstance(value, str) else repr(value.push if isinstance(value, Every) else value)


def check_arriving(policy: Policy) -> None:
    """Check that the other knobs are sound with contributions that are applied as they arrive."""
    quorum = policy.quorum
    if policy.epoch_share is not None:
        if not policy.staleness:
            why = "replicas that take work when they are free do not run the same steps"
            raise PolicyError(f"{quorum} of an epoch with staleness=0 is not sound: {why}; give staleness=fm.UNBOUNDED")
        return
    if not isinstance(quorum, Quorum) or quorum.of != "replicas" or quorum.limit_s < math.inf:
        raise PolicyError(
            f"quorum={quorum} with late='fold' and staleness={policy.staleness} is not sound: contributions are "
            "applied as they arrive, without clocks that a deadline or a limit could end; give "
            "quorum=Quorum(k, late='fold'), which applies each k of them, or late='drop'"
        )
    if quorum.late != Fold():
        raise PolicyError(
            f"late={quorum.late!r} with staleness={policy.staleness} is not sound: without clocks no contribution is "
            "late; give late=Fold(), or staleness=0"
        )

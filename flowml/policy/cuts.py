"""Checks policies under which replicas stop between two microbatches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flowml.errors import PolicyError
from flowml.policy.completion import cutting
from flowml.policy.payload import Factors
from flowml.policy.quorum import Deadline, Quorum

if TYPE_CHECKING:
    from flowml.policy.spec import Policy


def check_cut(policy: Policy) -> None:
    """Check that replicas can leave out microbatches, if they may. Raises PolicyError."""
    if cutting(policy.quorum) is None:
        return
    if isinstance(policy.payload, Factors):
        raise PolicyError(
            f"quorum={policy.quorum} with payload=Factors() is not sound: factors are sent for each microbatch, and "
            "those of a microbatch that was not computed do not exist; use payload=Gradient()"
        )


def cut_by(policies: Iterable[Policy], replicas: int, microbatches: int) -> Quorum | Deadline | None:
    """What says when a replica stops between two of its microbatches; None if the layers have no such rule.

    Raises:
        PolicyError: if some layers have such a rule and others another or none, or if it can never hold.
    """
    quorums = {p.quorum for p in policies}
    found = next(iter(sorted(filter(None, map(cutting, quorums)), key=str)), None)
    if found is None:
        return None
    if len(quorums) > 1:
        other = next(q for q in quorums if q != found)
        raise PolicyError(
            f"quorum={found} of one layer with quorum={other} of another is not sound: a replica that stops between "
            "microbatches leaves out the gradients of all layers; give all layers the same quorum"
        )
    if microbatches < 2:
        raise PolicyError(
            f"quorum={found} with microbatches={microbatches} leaves nothing out: a replica stops between two of its "
            "microbatches, and computes at least one; give Trainer(microbatches=4) or so"
        )
    if isinstance(found, Quorum) and found.counted and found.count_or_fraction > replicas * microbatches:
        raise PolicyError(
            f"quorum={found} asks for more microbatches than a step of {replicas} replicas has "
            f"({replicas * microbatches}), so no replica would ever stop; give a count of at most "
            f"{replicas * microbatches - 1}, or a fraction such as 0.75"
        )
    return found

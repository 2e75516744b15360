"""Checks that what travels can be filtered: contributions to a home, and the parameters that it publishes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowml.errors import PolicyError
from flowml.policy.apply import Outer
from flowml.policy.filters import KKT, Filter, Quantise, RandomK, RandomSkip, check_differences
from flowml.policy.graphs import RandomPairs
from flowml.policy.replicas import Weights
from flowml.policy.topology import Gossip, ParameterServer

if TYPE_CHECKING:
    from flowml.policy.spec import Policy


def check_filters(policy: Policy) -> None:
    """Check the filters of a policy. Raises PolicyError."""
    if policy.filters:
        _check_pushed(policy)
    if policy.pull_filters:
        _check_published(policy)


def _check_pushed(policy: Policy) -> None:
    """Check that what travels can be filtered."""
    kind = type(policy.payload).__name__
    filtered = f"filters=({', '.join(map(str, policy.filters))},)"
    if policy.collective:
        raise PolicyError(
            f"topology={policy.topology!r} with {filtered} is not sound: replicas add up raw arrays among themselves, "
            "and the sum of filtered ones has no meaning; leave filters out, or use topology=flowml.ParameterServer()"
        )
    if policy.shared:
        raise PolicyError(
            f"topology=SharedMemory() with {filtered} is not sound: nothing is sent that a filter could make smaller; "
            "leave filters out, or use topology=flowml.ParameterServer()"
        )
    lossy = [f for f in policy.filters if not f.lossless]
    if policy.tracked:
        _check_tracked(policy, filtered)
        return
    if kind == "Factors":
        _check_factors(lossy, filtered)
    if isinstance(policy.payload, Weights) and lossy:
        raise PolicyError(
            f"payload={policy.payload!r} with {filtered} is not sound: a parameter that a filter leaves out would be "
            "averaged as 0; use payload=flowml.Delta(), or lossless filters such as compress()"
        )
    if kind != "Gradient" and any(isinstance(f, KKT) for f in lossy):
        raise PolicyError(
            f"payload={policy.payload!r} with {filtered} is not sound: the condition of kkt() is on gradients; use "
            "significance(), or payload=flowml.Gradient()"
        )


def _check_tracked(policy: Policy, filtered: str) -> None:
    """Check that neighbours can follow each other's parameters by filtered differences."""
    topology, remote = f"topology={policy.topology!r}", policy.remote
    assert isinstance(remote, Gossip)
    if isinstance(remote.graph, RandomPairs):
        raise PolicyError(
            f"{topology} with {filtered} is not sound: a replica follows its neighbours by the differences that they "
            "send in each round, and one that is drawn anew has missed those before; give graph='ring' or another that "
            "stays, or lossless filters such as compress()"
        )
    if isinstance(policy.apply, Outer):
        raise PolicyError(
            f"{topology} with {filtered} and apply={policy.apply!r} is not sound: the gradient of the outer optimizer "
            "is a difference of averages of whole parameters, and the public copies of a round lag behind them; leave "
            "apply out, or use lossless filters such as compress()"
        )
    if not 0 < remote.pull <= 1:
        raise PolicyError(
            f"{topology} with {filtered} is not sound: a replica moves by the share pull={remote.pull:g} of its "
            "distance from its neighbours; give a pull in (0, 1]"
        )
    check_differences(policy.filters, "filters")


def _check_factors(lossy: Sequence[Filter], filtered: str) -> None:
    """Check that the product of two filtered factors stands for that of the factors."""
    for one in lossy:
        if not isinstance(one, Quantise | RandomK | RandomSkip):
            why = (
                f"what {one} leaves out of a factor is missing from all of the product, and never comes later; use "
                "quantise(8), random_skip(0.5), whose expectation is the product, or compress()"
            )
        elif one.feedback:
            why = (
                "the rows of a factor are examples, and what is left out of them cannot be added to those of the next "
                "step, which are others; leave with_error_feedback() out"
            )
        else:
            continue
        raise PolicyError(f"payload=Factors() with {filtered} is not sound: {why}, or use payload=flowml.Gradient()")


def _check_published(policy: Policy) -> None:
    """Check that what a home publishes can be filtered."""
    if not isinstance(policy.remote, ParameterServer):
        raise PolicyError(
            f"topology={policy.topology!r} with pull_filters=({', '.join(map(str, policy.pull_filters))},) is not "
            "sound: no home publishes parameters to other workers; leave pull_filters out, or use "
            "topology=flowml.ParameterServer()"
        )
    check_differences(policy.pull_filters, "pull_filters")

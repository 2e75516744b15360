"""Checks that what travels can be filtered: contributions to a home, and the parameters that it publishes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from flowml.arrays import ArraySpec
from flowml.errors import PolicyError, named
from flowml.policy.apply import Outer
from flowml.policy.filters import (
    AnyFilter,
    Filter,
    Form,
    LowRank,
    check_differences,
    is_additive,
    is_exchanged,
    sent_size,
    slot_bytes,
    sum_sizes,
)
from flowml.policy.filters.dense import most_rank
from flowml.policy.payload import Weights
from flowml.policy.topology import Gossip, ParameterServer

if TYPE_CHECKING:
    from flowml.policy.spec import Policy


def check_filters(policy: Policy) -> None:
    """Check the filters of a policy. Raises PolicyError."""
    if policy.filters:
        _check_pushed(policy)
    if policy.pull_filters:
        _check_published(policy)


def pushed_size(policy: Policy, payload: Sequence[ArraySpec], filtered: Collection[int]) -> tuple[int, bool]:
    """The bytes of a push whose arrays at positions `filtered` are filtered, or the most possible, and whether it is
    exact."""
    if is_exchanged(policy.summed_filters):
        return slot_bytes(policy.summed_filters, payload, filtered), True
    if policy.summed_filters:
        return sum(sum_sizes(policy.summed_filters, payload, filtered)), True
    return sent_size(policy.home_filters, payload, filtered)


def _check_pushed(policy: Policy) -> None:
    """Check that what travels can be filtered."""
    kind = type(policy.payload).__name__
    filtered = f"filters=({', '.join(map(str, policy.filters))},)"
    if policy.collective and not (is_additive(policy.filters) or is_exchanged(policy.filters)):
        raise PolicyError(
            f"topology={policy.topology!r} with {filtered} is not sound: what replicas exchange among themselves has "
            f"the same size at each step, and {_why_not_exchanged(policy.filters)}; use filters with a size of their "
            "own, such as top_k(0.1) or quantise(8), or topology=fm.ParameterServer(), whose homes decode what "
            "each sends"
        )
    if policy.shared:
        raise PolicyError(
            f"topology=SharedMemory() with {filtered} is not sound: nothing is sent that a filter could make smaller; "
            "leave filters out, or use topology=fm.ParameterServer()"
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
            "averaged as 0; use payload=fm.Delta(), or lossless filters such as compress()"
        )
    if kind != "Gradient" and any(f.of_gradients for f in lossy):
        raise PolicyError(
            f"payload={policy.payload!r} with {filtered} is not sound: the condition of kkt() is on gradients; use "
            "significance(), or payload=fm.Gradient()"
        )


def check_ranks(policies: Mapping[str, Policy], forms: Mapping[str, Form]) -> None:
    """Raise PolicyError for a rank so large that no array under the policy is smaller as factors of it.

    Both map the names of arrays. An array for which its factors are not smaller passes unchanged, as vectors do, and if
    all matrices do, the filter would do nothing.
    """
    filtered: dict[LowRank, list[str]] = {}
    for name, policy in policies.items():
        for found in {f for f in (*policy.filters, *policy.pull_filters) if isinstance(f, LowRank)}:
            filtered.setdefault(found, []).append(name)
    for found, names in filtered.items():
        best = max(names, key=lambda name: most_rank(forms[name].shape))
        shape, most = " x ".join(map(str, forms[best].shape)), most_rank(forms[best].shape)
        if 0 < most < found.rank:
            raise PolicyError(
                f"{found} makes nothing smaller of {named(names)}: the factors of {best!r}, {shape}, are smaller than "
                f"it up to rank {most}; give a rank of at most {most}"
            )


def _why_not_exchanged(chain: Sequence[AnyFilter]) -> str:
    """Why replicas cannot exchange what these filters make of their arrays."""
    first = next((f for f in chain if f.remembers), None)
    if first is not None:
        return f"what {first} sends has a meaning only with what it has sent before"
    first = next((f for f in chain if not f.exact), None)
    if first is not None:
        return f"what {first} decodes may have other bits on another processor, where copies have to stay equal"
    first = next(f for f in chain if not is_exchanged((f,)) and not f.additive)
    return f"that of {first} depends on the values"


def _check_tracked(policy: Policy, filtered: str) -> None:
    """Check that neighbours can follow each other's parameters by filtered differences."""
    topology, remote = f"topology={policy.topology!r}", policy.remote
    assert isinstance(remote, Gossip)
    if remote.graph.changes:
        raise PolicyError(
            f"{topology} with {filtered} is not sound: a replica follows its neighbours by the differences that they "
            "send in each round, and one that is not a neighbour in all rounds has missed some; give graph='ring' or "
            "another that stays, or lossless filters such as compress()"
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
        if not one.of_factors:
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
        raise PolicyError(f"payload=Factors() with {filtered} is not sound: {why}, or use payload=fm.Gradient()")


def _check_published(policy: Policy) -> None:
    """Check that what a home publishes can be filtered."""
    if not isinstance(policy.remote, ParameterServer):
        raise PolicyError(
            f"topology={policy.topology!r} with pull_filters=({', '.join(map(str, policy.pull_filters))},) is not "
            "sound: no home publishes parameters to other workers; leave pull_filters out, or use "
            "topology=fm.ParameterServer()"
        )
    check_differences(policy.pull_filters, "pull_filters")

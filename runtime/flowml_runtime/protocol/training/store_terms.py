"""What the training machines know of one store; see `terms`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flowml.policy import Coded, Policy
from flowml.policy.codes import TreeCode
from flowml.policy.filters import feeds_back


@dataclass(frozen=True)
class StoreTerms:
    """One store: its synchronization policy, and for each part of a contribution the stage that sends it.

    `collective`: the store has several homes, and each contribution is the sum over all replicas. `sites`: the replicas
    of each site, of which the first sends the contribution; empty if every replica sends its own.
    """

    stages: tuple[int, ...]
    policy: Policy
    collective: bool = False
    sites: tuple[tuple[int, ...], ...] = ()

    def senders(self, members: int) -> Sequence[int]:
        """Which of so many replicas, or portions, are counted, in order."""
        return tuple(site[0] for site in self.sites) or range(members if self.tree is None else self.tree.children)

    @cached_property
    def tree(self) -> TreeCode | None:
        """The tree whose parents add up what their children send (see `branch`), if there is one."""
        return self.policy.quorum.tree if isinstance(self.policy.quorum, Coded) else None

    def keeps_inside(self, replica: int, *, summed: bool) -> bool:
        """Whether what a replica contributes is a part of what its site, or itself as a parent, pushes."""
        return (self.tree.adder_of(replica, summed=summed) == replica) if self.tree else self.relayed and not summed

    @cached_property
    def relayed(self) -> bool:
        """Whether the leader of each site gathers contributions, and passes on values and decisions (see `site`)."""
        return bool(self.sites) and self.policy.site_quorum is not None

    @cached_property
    def sites_decide(self) -> bool:
        return self.relayed and self.policy.sites_decide

    @cached_property
    def forwarded(self) -> bool:
        """Whether the homes get the sums of sites, whose fates what filters keep of them follows."""
        return self.relayed and not self.sites_decide

    @cached_property
    def feeds_back(self) -> bool:
        """Whether filters keep what they have not sent."""
        return feeds_back(self.policy.home_filters)

    @cached_property
    def clocked(self) -> bool:
        return self.policy.clocked

    @cached_property
    def shared(self) -> bool:
        """Whether replicas update the store themselves. Its home then only counts the updates."""
        return self.policy.shared

    @cached_property
    def every(self) -> int:
        return self.policy.every.push

    @cached_property
    def steps_alike(self) -> bool:
        """Whether each step takes a version and pushes, so that a read needs all but `staleness` of the clocks."""
        return self.every == 1 and self.policy.every.pull in (None, 1) and not self.policy.every.delay

    @cached_property
    def staleness(self) -> float:
        return self.policy.staleness

    @cached_property
    def keeps(self) -> bool:
        """Whether gradients of one step may wait for the push of a later one."""
        return self.every > 1 or self.feeds_back

    @cached_property
    def decided(self) -> bool:
        """Whether a decision determines for each clock what is applied. A sum over all replicas needs none."""
        return self.clocked and not self.collective

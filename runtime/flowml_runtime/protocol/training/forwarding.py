"""Says where the sums of sites, and of parents in a tree, go, as actions of the worker that adds them up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flowml_runtime import wire
from flowml_runtime.protocol.training import branch, decision, home, site
from flowml_runtime.protocol.training.actions import Action, CountSum, Forward, Release, Send, Wake
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.terms import Committed, Terms

Ids = Mapping[str, Any]
"""The common fields of every message of a worker."""


@dataclass(frozen=True)
class Forwarding:
    """For the machines of one run on one worker."""

    terms: Terms
    places: Places
    driver: tuple[str, ...]

    def of_site(
        self, at: tuple[int, int], machine: site.Site, wanted: Iterable[site.Action], leader: str, ids: Ids
    ) -> list[Action]:
        """What the site `at` (group, number) does. `leader` is the worker that leads the group."""
        actions: list[Action] = []
        for made in wanted:
            match made:
                case site.Forward():
                    actions.append(self._of_leader(machine.leader, made, ids))
                case site.SumSettled(clock, stores, counts):
                    actions.append(CountSum(machine.leader, clock, counts, stores))
                case Committed():
                    what: dict[str, Any] = {"clock": made.clock, "excluded": made.excluded, "folded": made.folded}
                    commit = wire.Commit(**ids, group=at[0], site=at[1], waits=made.waits, **what)
                    actions.append(Send((*self.places.site_workers(machine.members), *self.driver), commit))
                case home.Release(handle):
                    actions.append(Release(handle, ids["cause"]))
                case decision.Wake(when):
                    actions.append(Wake(ids["run"], when, ids["cause"]))
                case site.SiteLeft():
                    actions.append(Send((leader,), wire.Retired(**ids, replica=machine.leader, of_site=True)))
        return actions

    def of_branch(self, machine: branch.Branch, wanted: Iterable[branch.Action], ids: Ids) -> list[Action]:
        """What a parent in a tree does. Its sums go to the worker that adds up for its own parent, or to the home."""
        actions: list[Action] = []
        for made in wanted:
            if isinstance(made, home.Release):
                actions.append(Release(made.handle, ids["cause"]))
                continue
            above, found = machine.above, made.sum
            to = self.places.homes[found.store][:1] if above is None else self.places.stages[above][:1]
            actions.append(self._sum(machine.parent, found, made.terms, to, ids))
        return actions

    def _of_leader(self, leader: int, made: site.Forward, ids: Ids) -> Action:
        """The sum of a site on its way to the home, or to its leader."""
        store = self.terms.stores[made.store]
        if not store.sites_decide:
            return self._sum(leader, made, (), self.places.homes[made.store][:1], ids)
        to = tuple(self.places.stages[leader][stage] for stage in store.stages)
        told: dict[str, Any] = {**ids, "store": made.store, "clock": made.clock, "weight": made.weight}
        sums = (wire.Gossip(**told, replica=leader, source=leader, part=part) for part in range(len(to)))
        return Forward(to, tuple(sums), made.contributions, made.share)

    def _sum(
        self, sender: int, made: site.Forward, below: tuple[tuple[int, float], ...], to: tuple[str, ...], ids: Ids
    ) -> Action:
        """A sum as a contribution of `sender`. An empty one has no arrays."""
        count = len(self.terms.stores[made.store].stages)
        about: dict[str, Any] = {**ids, "store": made.store, "replica": sender, "incarnation": 0, "of_site": True}
        about |= {"clock": made.clock, "base_version": made.base_version, "weight": made.weight, "terms": below}
        messages = (wire.Contribution(**about, part=part, empty=not made.weight) for part in range(count))
        return Forward(to * count, tuple(messages), made.contributions, made.share)

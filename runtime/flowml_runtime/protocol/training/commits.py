"""Joins the decisions of all groups and sites of a run, as the driver hears of them."""

from __future__ import annotations

from flowml.policy.waits import Waits, side_by_side
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.terms import Terms


class Commits:
    """Joins the decisions of all groups, in the order of clocks."""

    def __init__(self, terms: Terms, first: int = 0) -> None:
        """`first` is the first clock of the run."""
        self._terms = terms
        self._decided = [first - 1] * len(terms.groups)
        self._without: dict[int, frozenset[int]] = {}
        """Clock -> the replicas that every decision about it so far leaves out."""
        self._of_sites: dict[tuple[int, int], dict[int | None, wire.Commit]] = {}
        """(group, clock) -> site -> what the decision means there; None -> the decision itself."""
        self._next = first

    def is_new(self, group: int, clock: int) -> bool:
        """Whether the decision is not known yet."""
        if not group < len(self._decided):
            raise ProtocolError(f"group {group} has a commit, but there are {len(self._decided)} groups")
        return clock > self._decided[group]

    def joined(self, commit: wire.Commit) -> tuple[Waits, tuple[int, ...]] | None:
        """What a decision waited for, and whom it leaves out. None until it is known what it means for all sites.

        The late replicas are those that were late in their sites.
        """
        group = self._terms.groups[commit.group]
        if not group.relayed:
            if group.number not in self._terms.above:
                return commit.waits, commit.excluded
            out = (r for site in group.sites if site[0] in commit.excluded for r in site)
            return commit.waits, tuple(sorted(out))
        known = self._of_sites.setdefault((group.number, commit.clock), {})
        known[commit.site] = commit
        if len(known) < len(group.sites) + (not group.final):
            return None
        del self._of_sites[group.number, commit.clock]
        whole = known.pop(None).waits if not group.final else None
        excluded = sorted(replica for commit in known.values() for replica in commit.excluded)
        return side_by_side([commit.waits for commit in known.values()], whole), tuple(excluded)

    def take(self, group: int, clock: int, excluded: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        """The clocks that all groups have decided now, and the replicas that each of these groups leaves out.

        Nothing if no decision may leave a replica out.
        """
        self._decided[group] = clock
        if not self._terms.drops:
            return []
        mine = frozenset(excluded)
        if group not in self._terms.above:  # else it is the sites that say who ends a step
            self._without[clock] = self._without.get(clock, mine) & mine
        found: list[tuple[int, tuple[int, ...]]] = []
        while self._next <= max(self._decided):
            due = self._terms.due_groups(self._next)
            if any(self._decided[g.number] < self._next for g in due):
                break
            without = self._without.pop(self._next, frozenset[int]())
            if due:
                found.append((self._next, () if self._terms.sums else tuple(sorted(without))))
            self._next += 1
        return found

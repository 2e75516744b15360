"""Disjoint sets of the numbers below a count, which are joined step by step (union-find)."""

from __future__ import annotations

from collections.abc import Iterable


class DisjointSets:
    """At first each number is a set of its own."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, number: int) -> int:
        """The least number of the set that `number` is in."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    def join(self, numbers: Iterable[int]) -> None:
        """Make one set of those that these numbers are in."""
        found = {self.find(number) for number in numbers}
        for number in found:
            self._parent[number] = min(found)

    def sets(self) -> list[list[int]]:
        """The sets, each sorted, in the order of their least numbers."""
        found: dict[int, list[int]] = {}
        for number in range(len(self._parent)):
            found.setdefault(self.find(number), []).append(number)
        return list(found.values())

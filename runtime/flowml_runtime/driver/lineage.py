"""Which saved values those on the workers come from, so that a loop that goes on after a loss gets its own back.

`fm.save` gives a `Mark` to the values of each call or `put` that it writes. What a call makes has the marks of its
arguments. Two trees of one structure, such as a model and its moving average, have different marks, or are made by
different functions, or are different outputs of one. Where an argument could be taken for another, its mark ends.

Values of a `put` that were saved in a tree of several elements are known by their element too: what goes on from one of
these alone has its mark.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

Types = frozenset[tuple[Any, Any]]
"""Shapes and dtypes of values."""


class Parent(Protocol):
    """What a call is given: values of one call or `put`, or saved ones in their place."""

    @property
    def maker(self) -> Hashable: ...
    @property
    def line(self) -> frozenset[Mark]: ...
    @property
    def types(self) -> Types: ...


@dataclass(frozen=True, eq=False)
class Mark:
    """Values of one call or `put` that were saved."""

    maker: Hashable
    types: Types
    of_element: bool = False
    """Whether it is that of an `Element`."""
    readers: dict[tuple[Hashable, int], None] = field(default_factory=dict[tuple[Hashable, int], None])
    """The functions that were called with these very values since, each with the number of the value, in their order.
    """

    @property
    def line(self) -> frozenset[Mark]:
        return frozenset((self,))


class Lineage:
    """Of the values of one call or `put`."""

    __slots__ = ("_kinds", "elements", "line", "maker", "mark")

    def __init__(self, kinds: Sequence[Any], maker: Hashable = None, line: frozenset[Mark] = frozenset()) -> None:
        self._kinds = kinds
        self.maker = maker
        """The function that made them; None for those that were sent or read."""
        self.line = line
        """The marks of the saved values that they come from, their own included."""
        self.mark: Mark | None = None
        self.elements: dict[int, Element] = {}
        """By the number of a value, the element of the newest tree in which values of a `put` were saved."""

    @property
    def types(self) -> Types:
        return frozenset(kind.signature[:2] for kind in self._kinds)

    def marked(self) -> Mark:
        """The mark of these values, which are saved now."""
        if self.mark is None:
            self.mark = Mark(self.maker, self.types)
            self.line |= {self.mark}
        return self.mark


@dataclass(frozen=True, eq=False)
class Element:
    """Values of one `put` that were saved in one of several elements of a tree. As a parent they could be taken for any
    others of this `put`."""

    lineage: Lineage
    mark: Mark

    @property
    def maker(self) -> Hashable:
        return self.lineage.maker

    @property
    def line(self) -> frozenset[Mark]:
        return self.lineage.line | {self.mark}

    @property
    def types(self) -> Types:
        return self.lineage.types


_REVIVED: ContextVar[Sequence[Parent]] = ContextVar("revived")


@contextmanager
def descending_from(parents: Sequence[Parent]) -> Generator[None]:
    """Calls of this thread get saved values, in place of those of these."""
    token = _REVIVED.set(parents)
    try:
        yield
    finally:
        _REVIVED.reset(token)


def inherited(given: Sequence[Parent], maker: Hashable, sent: Callable[[], Types]) -> frozenset[Mark]:
    """The marks of what `maker` makes of these. `sent` are the types of its other arguments.

    A mark ends where another argument could be what the result goes on from: values that the same function made, or
    that were sent, of a type that the marked ones have. That of an element ends beside what `maker` has made too.
    """
    revived = _REVIVED.get(())
    parents = (*given, *revived)
    if len(parents) == 1 and (not parents[0].line or parents[0].maker is not None):
        return parents[0].line
    line = frozenset[Mark]().union(*(parent.line for parent in parents))
    if not line:
        return line
    other = sent() if not revived and any(mark.maker is None for mark in line) else None

    def ends(mark: Mark) -> bool:
        if other is not None and mark.maker is None and mark.types <= other:
            return True
        makers = (mark.maker, maker) if mark.of_element else (mark.maker,)
        return any(mark not in p.line and p.maker in makers and mark.types & p.types for p in parents)

    return frozenset(mark for mark in line if not ends(mark))

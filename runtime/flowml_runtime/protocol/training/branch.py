"""A parent's state machine, in a tree with a gradient code at each parent, adds up what its children send.

The worker of the parent's first stage runs one for each group of stores. The parent and its children send it what they
have. It decides by the code, as the leader of the group does among the children of the home (see `decision`), and sends
one sum on: to the machine of its own parent, or to the home. So no worker gets more than one message of each child.

* A clock is complete with the gradient of the parent, and with as many children as the code needs. `Add` then has the
  sum, in which the gradient of the parent counts once, and a child by its coefficient.
* `Add` names the replicas below that were in time, with their coefficients in the sum: those of a child times that of
  the child. What was in time and is not needed has the coefficient 0.
* If a contribution that is needed is empty, nothing can be decoded, and the sum is empty.
* What comes after the sum of its clock is released. So is all of a clock that is committed: the others did without.

What the caller must do is the same as for `home`. A commit is given after the stages here have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flowml_runtime.protocol.errors import ProtocolError, ensure
from flowml_runtime.protocol.training.accounts import NO_ENTRIES
from flowml_runtime.protocol.training.decision import Action as Decided
from flowml_runtime.protocol.training.decision import Arrived, Decision
from flowml_runtime.protocol.training.home_events import Release, releases
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.site import Forward
from flowml_runtime.protocol.training.store import ContributionReceived, Gathering, Handle, parts
from flowml_runtime.protocol.training.terms import Committed, Group, Terms


@dataclass(frozen=True, slots=True)
class Add:
    """Send this sum on. `terms` are the replicas in it that were in time, and their coefficients."""

    sum: Forward
    terms: tuple[tuple[int, float], ...]


Event = ContributionReceived | Committed
Action = Add | Release


class Branch:
    """One parent, for one group of stores. `began` is the time in seconds at which the run begins."""

    def __init__(self, terms: Terms, group: Group, parent: int, began: float = 0.0, first: int = 0) -> None:
        tree = terms.stores[group.stores[0]].tree
        if tree is None or parent >= tree.parents:
            raise ProtocolError(f"replica {parent} adds up nothing for group {group.number}")
        self.parent = parent
        self.above = tree.adder_of(parent, summed=True)
        """The replica that adds up the sums of this one; None: the home takes them."""
        self._terms = terms
        members = (parent, *tree.children_of(parent))
        self._within = frozenset(members)
        below = replace(group, senders=members, what=f" of the children of replica {parent}")
        self._decision = Decision(terms, below, began, first)
        self._stores = group.stores
        self._rows: dict[int, dict[tuple[int, int], Gathering]] = {}
        """Clock -> (store, replica) -> its contribution."""

    def handles(self) -> list[Handle]:
        """The payloads that are kept and may still be added up."""
        return [h for row in self._rows.values() for gathering in row.values() for h in gathering.handles()]

    def step(self, event: Event, now: float = 0.0) -> list[Action]:
        """Process one event at time `now`, in seconds."""
        if isinstance(event, ContributionReceived):
            return self._receive(event, now)
        over = [self._rows.pop(clock) for clock in sorted(self._rows) if clock <= event.clock]
        dropped = releases(parts(gathering for row in over for gathering in row.values()))
        return [*dropped, *self._add(self._decision.pass_over(event.clock, now))]

    def _receive(self, part: ContributionReceived, now: float) -> list[Action]:
        whole = len(self._terms.stores[part.store].stages)
        if part.part >= whole or part.replica not in self._within:
            raise ProtocolError(f"part {part.part} of replica {part.replica} is not for its parent {self.parent}")
        if part.clock < self._decision.clock:
            return releases([part])
        row = self._rows.setdefault(part.clock, {})
        gathering = row.setdefault((part.store, part.replica), Gathering(part.incarnation))
        if part.part in gathering.parts:
            return releases([part])
        gathering.parts[part.part] = part
        if len(gathering.parts) < whole:
            return []
        told = Arrived(part.store, part.replica, part.clock, gathering.weight, part.copy, part.terms)
        return self._add(self._decision.step(told, now))

    def _add(self, decided: Iterable[Decided]) -> list[Action]:
        """Add up the clocks that are complete."""
        actions: list[Action] = []
        for made in decided:
            if isinstance(made, Committed):
                row = self._rows.pop(made.clock)
                for store in self._stores:
                    actions += self._sum(store, made, row)
                actions += releases(parts(row.values()))
        return actions

    def _sum(self, store: int, made: Committed, row: dict[tuple[int, int], Gathering]) -> list[Action]:
        """Add up one store. What is taken leaves the row."""
        given = dict(made.coefficients)
        terms = tuple((r, given.get(r, 0.0)) for r in range(self._terms.replicas) if not made.leaves_out(r))
        needed = [((store, replica), a) for replica, a in made.coefficients if replica in self._within]
        if not all(row[at].weight for at, _ in needed):
            return [Add(Forward(store, made.clock, 0, 0, ()), terms)]
        taken = [(row.pop(at), a) for at, a in needed]
        weight, base = sum(g.weight for g, _ in taken), min(g.base_version for g, _ in taken)
        found = tuple((gathering.handles(), a) for gathering, a in taken)
        return [Add(Forward(store, made.clock, weight, base, found), terms)]

    def validate(self) -> None:
        """Check that only what may still be added up is kept, once."""
        self._decision.validate()
        handles = self.handles()
        ensure(len(handles) == len(set(handles)), "a payload is kept twice")
        over = [clock for clock in self._rows if clock < self._decision.clock]
        ensure(not over, f"replica {self.parent} keeps contributions to clocks {over}, which are over")


def branches(me: str, terms: Terms, places: Places, began: float, first: int) -> Mapping[tuple[int, int], Branch]:
    """Those of a worker, by group and parent."""
    found: dict[tuple[int, int], Branch] = {}
    for group in terms.groups:
        tree = terms.stores[group.stores[0]].tree
        for parent in range(tree.parents if tree else 0):
            if places.stages[parent][:1] == (me,):
                found[group.number, parent] = Branch(terms, group, parent, began, first)
    return found or NO_ENTRIES

"""Divides an optimizer's update over the homes of several stores, whose parameters it couples.

The homes compute in rounds. In each they *share* a few small values with the others, such as the sum of the squares of
their gradients, and *combine* what all have shared to common values, such as the norm of all gradients. After the last
round each updates its own parameters and state. All homes combine the same values in the same order by the same task,
so they agree to the bit. The order of operations is that of the optimizer.

Leaves that do not take part count as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from flowml.arrays import ArraySpec
from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal, Node, Operand
from flowml.training.ownership import COMMON, FREE, Ownership, small

Function = Callable[..., tuple[Any, ...]]

EVERYONE = -1
"""Instead of a member: where common values are computed, which is at every home."""


@dataclass(frozen=True)
class Step:
    """A function of flat (gradients, parameters, state of one member, common values `takes`), and what it returns."""

    run: Function
    takes: tuple[int, ...]
    returns: tuple[ArraySpec, ...]


@dataclass(frozen=True)
class Combination:
    """A function of flat (common state, common values `takes`, what all members have shared in the round, in order) to
    more common values, and what it returns."""

    run: Function
    takes: tuple[int, ...]
    returns: tuple[ArraySpec, ...]


@dataclass(frozen=True)
class Member:
    """What the home of one store does: one `share` in each round, then the `update` to parameters and state. `state`
    are the leaves of the state that it keeps."""

    state: tuple[int, ...]
    shares: tuple[Step, ...]
    update: Step


@dataclass(frozen=True)
class Coupling:
    """The update of some stores. `state` are the leaves of the state that common values depend on, which every member
    keeps."""

    members: tuple[Member, ...]
    combinations: tuple[Combination, ...]
    state: tuple[int, ...]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a traced update: of `graph.inputs` the gradients, then the parameters, then the state, in which
    each leaf has an owner among the leaves of the parameters, or none. Its outputs are the parameters and the state."""

    graph: Graph
    count: int
    owners: Sequence[int]

    @property
    def states(self) -> tuple[int, ...]:
        return self.graph.inputs[2 * self.count :]

    def gradient(self, leaf: int) -> int:
        return self.graph.inputs[leaf]

    def parameter(self, leaf: int) -> int:
        return self.graph.inputs[self.count + leaf]

    def next_state(self, leaf: int) -> Operand:
        return self.graph.outputs[self.count + leaf]


def divide(
    inputs: Inputs, leaves: Sequence[Sequence[int]], owned: Callable[[Mapping[int, int]], Ownership]
) -> Coupling:
    """Divide an update over members with these `leaves`. `owned` gives the ownership for owners of the inputs."""
    member = {leaf: number for number, mine in enumerate(leaves) for leaf in mine}
    first: dict[int, int] = {}
    zeros: set[int] = set()
    for leaf in range(inputs.count):
        for value in (inputs.gradient(leaf), inputs.parameter(leaf)):
            _own(value, member.get(leaf), first, zeros)
    for value, leaf in zip(inputs.states, inputs.owners, strict=True):
        if leaf >= 0:
            _own(value, member.get(leaf), first, zeros)
    found = owned(first)
    demand = _Demand(inputs, found, len(leaves), frozenset(zeros))
    demand.want(leaves)
    return _Division(demand, [tuple(mine) for mine in leaves]).coupling()


def _own(value: int, member: int | None, first: dict[int, int], zeros: set[int]) -> None:
    if member is None:
        zeros.add(value)
    else:
        first[value] = member


@dataclass
class _Demand:
    """Which values are needed where, from the outputs backwards."""

    inputs: Inputs
    ownership: Ownership
    members: int
    zeros: frozenset[int]
    needed: dict[tuple[int, int], None] = field(default_factory=dict[tuple[int, int], None])
    """(value, member or EVERYONE)"""
    shared: dict[tuple[int, int], None] = field(default_factory=dict[tuple[int, int], None])
    """(member, value) that it computes and others need."""
    taken: dict[tuple[int, int], None] = field(default_factory=dict[tuple[int, int], None])
    """(member, value) that is common and that it needs."""
    held: list[dict[int, None]] = field(default_factory=list[dict[int, None]])
    """The leaves of the state that each member keeps."""
    todo: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def __post_init__(self) -> None:
        self.held = [{} for _ in range(self.members)]
        self._state_of = {value: leaf for leaf, value in enumerate(self.inputs.states)}

    def owner(self, value: int) -> int:
        return self.ownership.owner.get(value, FREE)

    def level(self, value: int) -> int:
        """The round after which every home has a common value."""
        return self.ownership.level.get(value, 0) + (self.owner(value) >= 0)

    def want(self, leaves: Sequence[Sequence[int]]) -> None:
        """Find all that the next values of these parameters, and of the state, need."""
        outputs = self.inputs.graph.outputs
        for member, mine in enumerate(leaves):
            for leaf in mine:
                self._add(outputs[leaf], member)
        for leaf, value in enumerate(self.inputs.states):
            if self.owner(value) >= 0:
                self._hold(leaf, self.owner(value))
        self._follow()
        read = set[int]().union(*self.held) | self._foreign()
        for value, leaf in self._state_of.items():
            if leaf not in read and value not in self.zeros:  # such as a count that is only shown to the user
                for member in range(self.members):
                    self._hold(leaf, member)
        self._follow()

    def _foreign(self) -> set[int]:
        """The leaves of the state that only parameters have a part in which take none here. Others keep them."""
        graph, inputs, mine, others = self.inputs.graph, self.inputs, 1, 2
        behind = {v: others if v in self.zeros else mine for v in graph.inputs[: 2 * inputs.count]}
        for value in inputs.states:
            behind[value] = others if value in self.zeros else mine if self.owner(value) >= 0 else 0
        changed = True
        while changed:
            for node in graph.nodes:
                found = 0
                for value in node.reads:
                    found |= behind.get(value, 0)
                behind.update(dict.fromkeys(node.outputs, found))
            changed = False
            for leaf, value in enumerate(inputs.states):
                after = inputs.next_state(leaf)
                found = 0 if isinstance(after, Literal) else behind.get(after, 0)
                changed = changed or bool(found & ~behind[value])
                behind[value] |= found
        return {leaf for leaf, value in enumerate(inputs.states) if behind[value] == others}

    def _add(self, operand: Operand, at: int) -> None:
        if not isinstance(operand, Literal):
            self.todo.append((operand, at))

    def _hold(self, leaf: int, member: int) -> None:
        if leaf not in self.held[member]:
            self.held[member][leaf] = None
            self._add(self.inputs.next_state(leaf), member)

    def _follow(self) -> None:
        while self.todo:
            value, at = self.todo.pop()
            if (value, at) in self.needed or value in self.zeros:
                continue
            self.needed[value, at] = None
            self._need(value, at)

    def _need(self, value: int, at: int) -> None:
        graph, owner = self.inputs.graph, self.owner(value)
        if owner >= 0 and owner != at:
            self.shared[owner, value] = None
            self._add(value, owner)
            self._take(value, at)
        elif value in self._state_of:
            for member in range(self.members) if at == EVERYONE else (at,):
                self._hold(self._state_of[value], member)
        elif owner == COMMON and at != EVERYONE and self.level(value) and small(graph.values[value]):
            self._take(value, at)
        elif value in graph.producer:
            for read in graph.producer[value].reads:
                self._add(read, at)

    def _take(self, value: int, at: int) -> None:
        if at != EVERYONE:
            self.taken[at, value] = None
            self._add(value, EVERYONE)


class _Division:
    """Makes the functions of a coupling from what is needed."""

    def __init__(self, demand: _Demand, leaves: Sequence[tuple[int, ...]]) -> None:
        self.demand = demand
        self.leaves = leaves
        self.graph = demand.inputs.graph
        self.held = [tuple(sorted(held)) for held in demand.held]
        states = demand.inputs.states
        self.state = tuple(s for s, value in enumerate(states) if (value, EVERYONE) in demand.needed)
        self.rounds = max((demand.level(value) for _, value in demand.taken), default=0)
        self.sent: list[list[list[int]]] = [[[] for _ in leaves] for _ in range(self.rounds)]
        """By round and member, the values that it shares, those of one dtype together."""
        for member, value in sorted(demand.shared, key=lambda m: (self.graph.values[m[1]].dtype, m[1])):
            self.sent[demand.level(value) - 1][member].append(value)
        self.read_by_members = {value for _, value in demand.taken}
        self.commons: list[int] = []
        """The common values so far."""
        self.index: dict[int, int] = {}

    def coupling(self) -> Coupling:
        combinations = tuple(map(self._combination, range(self.rounds)))
        members = tuple(self._member(member) for member in range(len(self.leaves)))
        return Coupling(members, combinations, self.state)

    def _rows(self, values: Iterable[int]) -> list[list[int]]:
        """The values of each dtype, which are sent as one row."""
        rows: dict[str, list[int]] = {}
        for value in values:
            rows.setdefault(self.graph.values[value].dtype, []).append(value)
        return list(rows.values())

    def _combination(self, round: int) -> Combination:
        demand, level = self.demand, round + 1
        rows = [row for sent in self.sent[round] for row in self._rows(sent)]
        received = [value for row in rows for value in row]
        mine = {v: None for v, at in demand.needed if at == EVERYONE and demand.level(v) == level}
        outputs = [v for v in mine if self._is_read_later(v, level)]
        known = [self.graph.inputs[2 * demand.inputs.count + s] for s in self.state]
        run, used = program(self.graph, [*known, *received], self.commons, outputs, demand.zeros)
        shapes = [[self.graph.values[v].shape for v in row] for row in rows]
        states = len(known)

        def combine(*arrays: Any) -> tuple[Any, ...]:
            first = states + len(used)
            apart = [a for row, s in zip(arrays[first:], shapes, strict=True) for a in _apart(row, s)]
            return run(*arrays[:states], *apart, *arrays[states:first])

        takes = tuple(self.index[v] for v in used)
        for value in outputs:
            self.index[value] = len(self.commons)
            self.commons.append(value)
        return Combination(combine, takes, tuple(strong(self.graph.values[v]) for v in outputs))

    def _is_read_later(self, value: int, level: int) -> bool:
        """Whether a member takes a common value, or a later round combines it."""
        demand = self.demand
        if value in self.read_by_members:
            return True
        readers = (v for node in self.graph.consumers.get(value, ()) for v in node.outputs)
        return any((v, EVERYONE) in demand.needed and demand.level(v) > level for v in readers)

    def _member(self, member: int) -> Member:
        shares = tuple(self._share(member, at) for at in range(self.rounds))
        leaves, held, graph = self.leaves[member], self.held[member], self.graph
        inputs = self.demand.inputs
        outputs = [*(graph.outputs[leaf] for leaf in leaves), *map(inputs.next_state, held)]
        run, used = self._at(member, outputs)
        specs = (
            *(graph.values[inputs.parameter(leaf)] for leaf in leaves),
            *(graph.values[inputs.states[s]] for s in held),
        )
        return Member(held, shares, Step(run, used, tuple(map(strong, specs))))

    def _share(self, member: int, round: int) -> Step:
        rows = self._rows(self.sent[round][member])
        run, used = self._at(member, [value for row in rows for value in row])

        def share(*arrays: Any) -> tuple[Any, ...]:
            found = iter(run(*arrays))
            return tuple(jnp.concatenate([jnp.ravel(next(found)) for _ in row]) for row in rows)

        sizes = [sum(size(self.graph.values[v]) for v in row) for row in rows]
        specs = (ArraySpec((n,), self.graph.values[row[0]].dtype) for n, row in zip(sizes, rows, strict=True))
        return Step(share, used, tuple(specs))

    def _at(self, member: int, outputs: Sequence[Operand]) -> tuple[Function, tuple[int, ...]]:
        """A function at a member to these outputs, and the common values that it takes."""
        inputs, leaves = self.demand.inputs, self.leaves[member]
        given = [
            *map(inputs.gradient, leaves),
            *map(inputs.parameter, leaves),
            *(inputs.states[s] for s in self.held[member]),
        ]
        common = [v for v in self.commons if (member, v) in self.demand.taken]
        run, used = program(self.graph, given, common, outputs, self.demand.zeros)
        return run, tuple(self.index[v] for v in used)


def program(
    graph: Graph, given: Sequence[int], known: Sequence[int], outputs: Sequence[Operand], zeros: frozenset[int]
) -> tuple[Function, list[int]]:
    """A function of flat (`given`, those of the `known` that it uses) to these outputs, and which it uses."""
    stops = {*given, *known, *zeros}
    nodes: dict[int, Node] = {}
    met: set[int] = set()
    stack = [o for o in outputs if not isinstance(o, Literal)]
    while stack:
        value = stack.pop()
        node = graph.producer.get(value)
        if value in stops or node is None:
            met.add(value)
        elif node.id not in nodes:
            nodes[node.id] = node
            stack += node.reads
    used = [v for v in known if v in met]
    kept = sorted(nodes.values(), key=lambda n: graph.position[n.id])
    equations = [(n.equation, [i.value if isinstance(i, Literal) else i for i in n.inputs], n.outputs) for n in kept]
    constants = [v for v in graph.constants if v in met]
    absent = sorted(met & zeros)
    values = tuple(o for o in outputs if not isinstance(o, Literal))
    run = _jax.as_function(_jax.build_jaxpr(equations, graph.avals, (*given, *used, *constants, *absent), values))

    def call(*arrays: Any) -> tuple[Any, ...]:
        nothing = (_zeros(graph.values[v]) for v in absent)
        results = iter(run(*arrays, *(graph.constants[c] for c in constants), *nothing))
        return tuple(_jax.literal_value(o.value) if isinstance(o, Literal) else next(results) for o in outputs)

    return call, used


def _zeros(spec: ArraySpec) -> Any:
    return jnp.zeros(spec.shape, spec.dtype)


def _apart(row: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The arrays of these shapes in a row, one after the other."""
    found: list[Any] = []
    first = 0
    for shape in shapes:
        last = first + size(ArraySpec(shape, "bool"))
        found.append(row[first:last].reshape(shape))
        first = last
    return found


def size(spec: ArraySpec) -> int:
    """The number of elements."""
    found = 1
    for n in spec.shape:
        found *= n
    return found


def strong(spec: ArraySpec) -> ArraySpec:
    return ArraySpec(spec.shape, spec.dtype)

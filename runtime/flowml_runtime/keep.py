"""Reads the options of a dataflow function that say what stays on the workers: `keep` and the donated arguments."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from jax.tree_util import tree_flatten_with_path, tree_map

from flowml.errors import named
from flowml.ir._jax import struct_of
from flowml.ir.calls import Call, Returned, Static
from flowml.ir.trace import Trace
from flowml.lowering.stay import Stay
from flowml.numbers import whole
from flowml.plan import Plan
from flowml_runtime.driver.remote import Remote
from flowml_runtime.execution.programs import feed_slots

AUTO_BYTES = 2**16
"""`keep="auto"` keeps outputs that are larger than this."""

_FIX = "give positions of the returned tuple, patterns of paths in the result such as '0/params/*', or 'auto'"


@dataclass(frozen=True)
class Keep:
    """Which outputs stay: all large ones, all that are computed, those at positions of the returned tuple, and those
    whose paths match."""

    auto: bool = False
    everything: bool = False
    positions: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()

    @staticmethod
    def of(given: Any) -> Keep | None:
        """What a user gave. None if nothing stays. Raises TypeError."""
        if given is None:
            return None
        if isinstance(given, str) and given == "auto":
            return Keep(auto=True)
        elements: Sequence[Any] = tuple(given) if isinstance(given, tuple | list | set | frozenset) else (given,)
        numbers = [n for n in map(whole, (e for e in elements if not isinstance(e, str))) if n is not None]
        patterns = [e for e in elements if isinstance(e, str)]
        if len(numbers) + len(patterns) < len(elements):
            raise TypeError(f"keep={given!r}: {_FIX}")
        return Keep(positions=tuple(numbers), patterns=tuple(patterns))

    def outputs(self, traced: Trace, returned: Returned, name: str, held: Container[int] = ()) -> frozenset[int]:
        """The flat outputs of a function that stay. Raises ValueError for a position or pattern without outputs.

        `held` are the inputs that are on a device.
        """
        graph = traced.graph
        tree = traced.out_tree if returned.plain else returned.tree
        leaves = _leaves(traced, returned, tree.num_leaves)
        flat = {i for found in leaves.values() for i in found}
        kept: set[int] = set()
        if self.everything:
            there = graph.producer.keys() | {v for i, v in enumerate(graph.inputs) if i in held}
            kept |= {i for i, o in enumerate(graph.outputs) if o in there and i in flat}
        if self.auto:
            specs = [graph.values[o] if isinstance(o, int) else None for o in graph.outputs]
            large = {i for i, s in enumerate(specs) if s is not None and s.nbytes > AUTO_BYTES}
            kept |= large & flat
        for position in self.positions:
            kept.update(n for i in _below(tree, position, name) for n in leaves.get(i, ()))
        names = {i: graph.output_names[i] for i in sorted(flat)}
        for pattern in self.patterns:
            hit = {i for i, path in names.items() if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")}
            if not hit:
                raise ValueError(
                    f"{name}: keep={pattern!r} matches no output; the outputs are {named(list(names.values()))}; "
                    "give a pattern of one"
                )
            kept |= hit
        return frozenset(kept)


EVERYTHING = Keep(everything=True)
"""All that the program makes, or finds on a device, stays."""


def _leaves(traced: Trace, returned: Returned, count: int) -> dict[int, Sequence[int]]:
    """Leaf of the user's result -> flat outputs of the trace. A leaf may be an nnx object that was passed in, which has
    several: those of its new state."""
    if returned.plain:
        return {i: (i,) for i in range(count)}
    arrays = [i for i in range(count) if i not in returned.fixed and i not in returned.same]
    found: dict[int, Sequence[int]] = {leaf: (position,) for position, leaf in enumerate(arrays)}
    states, start = [], len(arrays)
    for tree in traced.out_tree.children()[1].children():
        states.append(range(start, start + tree.num_leaves))
        start += tree.num_leaves
    return found | {leaf: states[number] for leaf, number in returned.same.items()}


def _below(tree: Any, position: int, name: str) -> range:
    """The leaves below one element of the returned tuple. A result that is no tuple is element 0."""
    data = tree.node_data()
    is_tuple = data is not None and issubclass(data[0], tuple | list)
    children = tree.children() if is_tuple else [tree]
    if not -len(children) <= position < len(children):
        what = f"a tuple of {len(children)}" if is_tuple else "one value"
        raise ValueError(f"{name}: keep={position}, but the function returns {what}; {_FIX}")
    position %= len(children)
    start = sum(c.num_leaves for c in children[:position])
    return range(start, start + children[position].num_leaves)


def donated_inputs(call: Call, static: Static, donate: Static, count: int) -> frozenset[int]:
    """The flat inputs of a call that are donated. `count` is the number of its positional arguments."""
    fixed = {i % count for i in static.argnums if -count <= i < count} if count else set()
    originals = [i for i in range(count) if i not in fixed]
    given = {i % count for i in donate.argnums if -count <= i < count} if count else set()
    found: set[int] = set()
    for number, (path, _) in enumerate(tree_flatten_with_path((call.args, call.kwargs))[0]):
        (group, argument, *_) = path
        if originals[argument.idx] in given if group.idx == 0 else argument.key in donate.argnames:
            found.add(number)
    return frozenset(found)


def stay_of(
    keep: Keep | None, traced: Trace, call: Call, held: dict[int, str], donated: frozenset[int], name: str
) -> Stay:
    """What stays on the devices in a call."""
    kept = keep.outputs(traced, call.returned, name, held) if keep is not None else frozenset[int]()
    return Stay(held, kept, donated if kept or held else frozenset(), _shown(call.returned))


def _shown(returned: Returned) -> int | None:
    """How many of the first outputs the caller sees; None for all. The states of objects that were passed in follow."""
    return None if returned.plain else returned.tree.num_leaves - len(returned.fixed) - len(returned.same)


def described(tree: Any) -> Any:
    """The arguments, with the types of values that stay on workers in place of their handles."""

    def of(leaf: Any) -> Any:
        return struct_of(leaf.kind.spec) if type(leaf) is Remote else leaf

    return tree_map(of, tree)


def reads_there(plan: Plan, returned: Returned, held: Mapping[int, str]) -> bool:
    """Whether a program for inputs that are sent reads each of these inputs on its own device only, and does not return
    one as it is."""
    if any(o.kind == "input" and o.index in held for o in plan.outputs[: _shown(returned)]):
        return False
    reads: dict[int, set[str]] = {}
    for program in plan.programs:
        for slot in feed_slots(program):
            reads.setdefault(slot, set()).add(program.device)
    return all(reads.get(i, {device}) == {device} for i, device in held.items())

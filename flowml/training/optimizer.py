"""Slices an optax optimizer by layer, so that each home updates only its own parameters.

The whole update (`optimizer.update`, then `apply_updates`) is traced once over the full tree. The dependencies of each
new parameter show which layers the optimizer couples: an elementwise rule couples none, clipping by the global norm
couples all. What couples them is computed by all of their homes (see `coupled`), or they share one. Every store keeps
the state that it reads and that depends on no gradient, such as a step count.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from flowml.callers import raising_line
from flowml.disjoint import DisjointSets
from flowml.errors import FlowmlError, UnsupportedError
from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal
from flowml.ir.simplify import drop_dead
from flowml.ir.trace import trace
from flowml.plan import ArraySpec
from flowml.training.adapted import GrownOptimizer, WantedError, has_inside
from flowml.training.coupled import Coupling, Inputs, divide, program
from flowml.training.evaluated import kind_of
from flowml.training.ownership import Ownership, opened, ownership, together
from flowml.training.private import PrivateOptimizer, wants_examples
from flowml.training.valued import ValuedOptimizer

_DIFFER = "pytree structure error: "
"""How JAX begins the error of a tree_map over trees that differ."""


@dataclass(frozen=True)
class OptimizerSlices:
    """The traced update of a whole parameter tree, and its slices.

    The inputs of `graph` are the gradients, the parameters and the state leaves, in that order. Its outputs are the
    new parameters and the new state leaves. In `whole` branches compute one side only.
    """

    graph: Graph
    whole: Graph
    count: int
    state_tree: Any
    state_specs: tuple[ArraySpec, ...]
    state_paths: tuple[str, ...]
    param_specs: tuple[ArraySpec, ...]
    depends: tuple[int, ...]
    """For each output, the inputs that it depends on, as a bit set."""

    @cached_property
    def groups(self) -> list[list[int]]:
        """Leaves of the parameters that the optimizer couples, each group sorted."""
        found = DisjointSets(self.count)
        own = {self._behind[leaf] | 1 << leaf for leaf in range(self.count)}
        for leaves in own.union(self._behind[self.count :]):
            found.join(_bits(leaves))
        return found.sets()

    @cached_property
    def _group_of(self) -> dict[int, int]:
        return {leaf: number for number, group in enumerate(self.groups) for leaf in group}

    def is_closed(self, leaves: Sequence[int]) -> bool:
        """Whether the optimizer couples these leaves to no others."""
        counts = Counter(self._group_of[leaf] for leaf in leaves)
        return all(count == len(self.groups[number]) for number, count in counts.items())

    @cached_property
    def _closures(self) -> tuple[int, ...]:
        """All inputs that each output depends on. A state leaf includes the inputs that its update depends on."""
        return tuple(map(self._closure, self.depends))

    def _closure(self, inputs: int) -> int:
        seen, fresh = inputs, inputs
        while states := _bits(fresh >> 2 * self.count):
            behind = 0
            for state in states:
                behind |= self.depends[self.count + state]
            fresh = behind & ~seen
            seen |= behind
        return seen

    @cached_property
    def _behind(self) -> tuple[int, ...]:
        """For each output, the parameter leaves whose gradient, value or state it depends on."""
        every = (1 << self.count) - 1
        return tuple((inputs | inputs >> self.count) & every for inputs in self._closures)

    @cached_property
    def _state_by_leaf(self) -> tuple[dict[int, list[int]], list[int]]:
        """State leaves by the first parameter they depend on, and leaves that depend on none and no update reads, with
        those that their own updates read."""
        read = 0
        for inputs in self._closures[: self.count]:
            read |= inputs >> 2 * self.count
        by_leaf: dict[int, list[int]] = {}
        free: list[int] = []
        for state, behind in enumerate(self._behind[self.count :]):
            if behind:
                by_leaf.setdefault((behind & -behind).bit_length() - 1, []).append(state)
            elif not read >> state & 1:
                free += {state, *_bits(self._closures[self.count + state] >> 2 * self.count)}
        return by_leaf, free

    def state_of(self, leaves: Sequence[int]) -> tuple[int, ...]:
        """State leaves that a store of these parameters keeps: those it reads, and those that only it can update."""
        by_leaf, free = self._state_by_leaf
        wanted, read = 0, 0
        for leaf in leaves:
            wanted |= 1 << leaf
            read |= self._closures[leaf] >> 2 * self.count
        mine = (s for leaf in leaves for s in by_leaf.get(leaf, ()) if not self._behind[self.count + s] & ~wanted)
        return tuple(sorted({*free, *_bits(read), *mine}))

    def remembers_gradients(self, leaves: Sequence[int]) -> bool:
        """Whether the state of these parameters holds earlier gradients or their squares."""
        shapes = {self.param_specs[leaf].shape for leaf in leaves}
        gradients = (1 << self.count) - 1
        return any(
            self.depends[self.count + s] & gradients and self.state_specs[s].shape in shapes
            for s in self.state_of(leaves)
        )

    def update(self, leaves: Sequence[int], state: Sequence[int]) -> Callable[..., tuple[Any, ...]]:
        """The update of one store: a function of flat (gradients, parameters, state) to (parameters, state)."""
        graph = self.whole if len(leaves) == self.count else self.graph
        outputs = tuple(graph.outputs[i] for i in (*leaves, *(self.count + s for s in state)))
        inputs = tuple(
            graph.inputs[i]
            for i in (*leaves, *(self.count + leaf for leaf in leaves), *(2 * self.count + s for s in state))
        )
        return program(graph, inputs, (), outputs, frozenset())[0]

    @cached_property
    def _states(self) -> list[tuple[int, Any]]:
        """The input and the output of each leaf of the state."""
        return list(zip(self.graph.inputs[2 * self.count :], self.graph.outputs[self.count :], strict=True))

    @cached_property
    def together(self) -> tuple[list[int], dict[int, str]]:
        """The least leaf with which each leaf must share a home, and the operations that say so, by that leaf."""
        return together(self.graph, self.count, self._states)

    @cached_property
    def _owners(self) -> tuple[int, ...]:
        """The leaf to which each leaf of the state belongs, or less than 0."""
        first, _ = self.together
        given = {self.graph.inputs[half * self.count + i]: first[i] for half in (0, 1) for i in range(self.count)}
        owner = ownership(self.graph, given, self._states).owner
        return tuple(owner.get(value, -1) for value, _ in self._states)

    def divide(self, stores: Sequence[Sequence[int]]) -> Coupling:
        """The update of several stores with these leaves, which exchange what couples them. Others count as zeros."""

        def owned(given: Mapping[int, int]) -> Ownership:
            return ownership(self.graph, given, self._states)

        return divide(Inputs(self.graph, self.count, self._owners), stores, owned)


def slice_optimizer(optimizer: Any, params: Any) -> OptimizerSlices:
    """Trace `optimizer` (an `optax.GradientTransformation`) over `params` (arrays or ShapeDtypeStructs)."""
    import optax

    params = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with _raising("init(params)"):
        state = jax.eval_shape(optimizer.init, params)

    _check_wanted(optimizer, params, state)

    def update(gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
        try:
            updated = optimizer.update(gradients, state, params)
        except (TypeError, ValueError, AttributeError) as error:
            _explain(optimizer, error, gradients, params, state)
            raise
        if not isinstance(updated, tuple) or len(updated) != 2:
            raise TypeError(
                f"the optimizer's update returns a {type(updated).__name__} instead of the tuple (updates, state); "
                "give an optax.GradientTransformation"
            )
        updates, after = updated
        _check_updated(optimizer, (params, updates), (state, after))
        return optax.apply_updates(params, updates), after

    with _raising("update(updates, state, params)"):
        graph = drop_dead(trace(update, (params, params, state), {}, name="the optimizer").graph)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    specs = tuple(_jax.spec_of(x) for x in jax.tree_util.tree_leaves(params))
    divisible = opened(graph, len(specs))
    return OptimizerSlices(
        divisible,
        graph,
        len(specs),
        tree,
        state_specs=tuple(_jax.spec_of(x) for _, x in leaves),
        state_paths=tuple(_jax.path_name(path) for path, _ in leaves),
        param_specs=specs,
        depends=_dependencies(divisible),
    )


@contextmanager
def _raising(call: str) -> Generator[None]:
    """Add to an error of the user's own code which call of the optimizer it is from, and which line raised it."""
    try:
        yield
    except FlowmlError:
        raise
    except Exception as error:
        line = raising_line(error)
        if str(error).startswith(_DIFFER):
            raise ValueError(
                f"the optimizer combines two trees that differ {_difference(str(error))} (in its {call}, at {line}); a "
                "mask of optax.masked and labels of optax.multi_transform need the structure of the parameters, or of "
                "their upper part: give a function of them, such as lambda params: jax.tree.map(lambda x: x.ndim > 1, "
                "params)"
            ) from None
        if line:
            error.add_note(f"raised by the optimizer at {line}, while its {call} was traced")
        raise


def _difference(text: str) -> str:
    """Where two trees differ, from JAX's error of several lines."""
    text = re.sub(r"<class '(?:builtins\.)?([^']*)'>", r"\1", " ".join(text.removeprefix(_DIFFER).split()))
    found = re.search(r"tree_map tree(\S*) At that key path, .*? has (.*?) but at the same key path .*? has (.*)", text)
    if found is None:
        return f"({text})"
    path, one, other = found.groups()
    return f"at {path or 'the top'}: one has {one}, the other {other.partition(' so the ')[0].rstrip('.')}"


def _check_wanted(optimizer: Any, params: Any, state: Any) -> None:
    """Raise WantedError if the update wants the gradient of each example, or reads the value of the loss where it is
    given."""
    if wants_examples(state) and not has_inside(optimizer, PrivateOptimizer):
        raise WantedError("examples")
    kinds = [p.kind for p in inspect.signature(optimizer.update).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds and _reads_value(optimizer, params, state):
        raise WantedError("value")


def _check_updated(optimizer: Any, params: tuple[Any, Any], state: tuple[Any, Any]) -> None:
    """Raise WantedError if the state is of another form after an update, TypeError if the update is none of these
    parameters. Both are pairs: before and after."""
    forms = [jax.tree_util.tree_structure(tree, is_leaf=lambda x: x is None) for tree in params]
    if forms[0] != forms[1]:
        raise TypeError(
            f"the optimizer returns updates of the structure {forms[1]}, and the parameters are {forms[0]}; give an "
            "optax.GradientTransformation of parameters: a measure such as optax.measure_with_ema belongs in "
            "optax.monitor, and the fast and slow parameters of optax.lookahead in optax.LookaheadParams.init_synced"
        )
    before, after = (
        [(path, x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)] for tree in state
    )
    if before == after:
        return
    if has_inside(optimizer, GrownOptimizer):
        raise TypeError("the state of the optimizer has another form after each update; keep its shapes and dtypes")
    raise WantedError("state")


def _reads_value(optimizer: Any, params: Any, state: Any) -> bool:
    """Whether the update takes the value of the loss, and depends on it."""

    def update(value: Any, gradients: Any, params: Any, state: Any) -> Any:
        return optimizer.update(gradients, state, params, value=value)

    try:
        value = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(float))
        graph = drop_dead(trace(update, (value, params, params, state), {}, name="the optimizer").graph)
    except Exception:  # it is the user's function, and raises what it likes
        return False
    return any(mask & 1 for mask in _dependencies(graph))


def _explain(optimizer: Any, error: Exception, gradients: Any, params: Any, state: Any) -> None:
    """Raise WantedError if an update that has failed works with the value of the loss, UnsupportedError if it
    wants something else."""
    if not isinstance(optimizer, ValuedOptimizer):
        try:
            jax.eval_shape(optimizer.update, gradients, state, params, value=jnp.zeros(()))
        except Exception as wanted:  # it is the user's function, and raises what it likes
            error = wanted if _wants(wanted) else error
        else:
            raise WantedError("value") from None
        if _wants(error) and kind_of(optimizer, params, state) is not None:
            raise WantedError("loss") from None
    if isinstance(error, AttributeError) and error.name == "fast":
        raise TypeError(
            "the optimizer is optax.lookahead, whose parameters are pairs; give "
            "fit(optax.LookaheadParams.init_synced(params), ...), and the loss as it is: it gets the fast ones"
        ) from None
    if _wants(error):
        raise UnsupportedError(
            "the optimizer wants more than gradients, state, parameters, the value of the loss and the loss of the "
            f"batch ({error}); use an optimizer without such arguments, or write the loop with fm.dataflow"
        ) from None


def _wants(error: Exception) -> bool:
    return "keyword-only argument" in str(error) or "must be provided" in str(error)


def _dependencies(graph: Graph) -> tuple[int, ...]:
    behind = {v: 1 << i for i, v in enumerate(graph.inputs)}
    for node in graph.nodes:
        union = 0
        for value in node.reads:
            union |= behind.get(value, 0)
        behind.update(dict.fromkeys(node.outputs, union))
    return tuple(0 if isinstance(o, Literal) else behind.get(o, 0) for o in graph.outputs)


def _bits(mask: int) -> list[int]:
    """The numbers in a bit set, in order."""
    digits = bin(mask)[:1:-1]
    found: list[int] = []
    at = digits.find("1")
    while at >= 0:
        found.append(at)
        at = digits.find("1", at + 1)
    return found

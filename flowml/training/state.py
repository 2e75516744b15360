"""State of a model, such as batch statistics: what a loss takes and returns beside its gradients.

A leaf of state stays on one device of a replica, beside what computes it. Each microbatch is fed the value that the one
before it has fetched on this device, so microbatches see the state in order, as on one device. Another device that
reads a leaf gets a copy like any other value. Each replica has state of its own. A rule for each leaf joins it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from flowml.arguments import choice, is_text
from flowml.arrays import KEY_WORDS
from flowml.errors import PolicyError, named
from flowml.ir import _jax
from flowml.ir.graph import Graph, Operand
from flowml.ir.label import layer_of
from flowml.lowering.schedule import Schedule, in_turn
from flowml.lowering.stay import Copies, relay
from flowml.policy import Coded, Policy, Speculate

Rule = Literal["mean", "max", "sum", "first", "local"]
"""How the replicas' values of a leaf are joined. `sum` adds up what each replica has added. `first` is the value of
replica 0. With `local` every replica keeps its own, and that of replica 0 is shown. If that is lost, the first one that
is left stands for it. A lost replica counts in `max` and `sum`, and not in `mean`."""

WANTED = "with has_state=True a loss returns (scalar, state) or (scalar, (state, aux))"


def with_state(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss(params, state, batch[, rng])` as (params, batch[, rng], state) -> (scalar, (state, aux))."""

    def call(params: Any, batch: Any, *rest: Any) -> Any:
        *keys, state = rest
        state = jax.tree_util.tree_map(lambda x: x, state)  # flax nnx changes only variables of the trace it is in
        return _parted(_name(loss), loss(params, state, batch, *keys), state)

    call.__name__ = _name(loss)
    return call


def _parted(name: str, returned: Any, state: Any) -> tuple[Any, tuple[Any, Any]]:
    """What a loss returns, as (scalar, (state, aux)). Raises ValueError if it returns no state, or another one."""
    tree = jax.tree_util.tree_structure(state)
    if not isinstance(returned, tuple) or len(returned) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"{name} returns no state; {WANTED}")
    scalar, beside = returned
    pair = isinstance(beside, tuple) and len(beside) == 2  # pyright: ignore[reportUnknownArgumentType]
    if jax.tree_util.tree_structure(beside) == tree:
        new, aux = beside, None
    elif pair and jax.tree_util.tree_structure(beside[0]) == tree:
        new, aux = beside
    else:
        found = jax.tree_util.tree_structure(beside)
        raise ValueError(f"{name} returns {found} beside the scalar, and the state is {tree}; {WANTED}")
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree_util.tree_leaves(new), strict=True
    ):
        a, b = _jax.spec_of(before), _jax.spec_of(jnp.asarray(after))
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"{name} takes state {_jax.path_name(path)!r} as {a.dtype}{list(a.shape)} and returns it as "
                f"{b.dtype}{list(b.shape)}; return it with the shape and dtype that it had"
            )
    return scalar, (new, aux)


def check_policies(policies: Iterable[Policy]) -> None:
    """Raise PolicyError for a policy under which several replicas compute one batch, which a state would see twice."""
    for policy in policies:
        if isinstance(policy.quorum, Coded | Speculate):
            raise PolicyError(
                f"{policy.describe()}: several replicas may compute the same examples, and the state of a model would "
                "count them several times; use another quorum, or a loss without state"
            )


def rules_of(given: Mapping[str, Rule] | None, paths: Sequence[str], leaves: Sequence[Any]) -> tuple[Rule, ...]:
    """The rule of each leaf: that of the first pattern that matches its path, else the mean for floating leaves, the
    largest for integers and booleans, and that of replica 0 for keys, also those of `jax.random.PRNGKey`.

    Raises ValueError for an unknown rule, for a pattern that matches nothing, and for the mean of what has none.
    """
    rules: Mapping[str, Rule] = {} if given is None else given
    if not isinstance(given, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f'state_rules={given!r}: give a mapping from patterns of paths to rules, such as {{"*": "mean"}}'
        )
    for pattern, rule in rules.items():
        if not is_text(pattern):
            raise TypeError(f"state_rules has the pattern {pattern!r}; give patterns of paths as text")
        choice(f"state_rules[{pattern!r}]", rule, get_args(Rule))
        if not any(fnmatchcase(path, pattern) for path in paths):
            anew = "give a pattern of one of them" if paths else "leave it out"
            raise ValueError(f"state_rules[{pattern!r}] matches no state; there is: {named(paths) or 'none'}; {anew}")
    found: list[Rule] = []
    for path, leaf in zip(paths, leaves, strict=True):
        dtype = leaf.dtype
        floating, key = jnp.issubdtype(dtype, jnp.inexact), jnp.issubdtype(dtype, jax.dtypes.prng_key)
        usual: Rule = "mean" if floating else "first" if key or _is_raw_key(leaf) else "max"
        rule = _first(rules, path) or usual
        if (rule == "mean" and not floating) or (rule in ("max", "sum") and key):
            raise ValueError(f"state {path!r} is {dtype}, which has no {rule}; give it another of state_rules")
        found.append(rule)
    return tuple(found)


def _is_raw_key(leaf: Any) -> bool:
    """Whether a leaf has the type of keys of `jax.random.PRNGKey`: words of uint32, whose maximum is no key."""
    return leaf.dtype == np.uint32 and leaf.shape[-1:] in {(words,) for words in KEY_WORDS.values()}


def _first(rules: Mapping[str, Rule], path: str) -> Rule | None:
    for pattern, rule in rules.items():
        if fnmatchcase(path, pattern):
            return rule
    return None


def joined(rule: Rule, begun: Sequence[Any], ended: Sequence[Any], lost: Collection[int] = ()) -> list[Any]:
    """The value of a leaf that each replica goes on with, from those with which it began and ended. Some are `lost`."""
    live = [x for r, x in enumerate(ended) if r not in lost]
    arrays = [np.asarray(x) for x in ended]
    dtype = arrays[0].dtype
    match rule:
        case "local":
            return list(ended)
        case "first":
            value = np.asarray(live[0])
        case "max":
            value = np.max(arrays, axis=0)
        case "sum":
            value = np.asarray(begun[0]) + sum(x - np.asarray(b) for x, b in zip(arrays, begun, strict=True))
        case "mean":
            wide = np.float32 if dtype.itemsize < 4 else dtype
            value = np.mean([np.asarray(x).astype(wide) for x in live], axis=0, dtype=wide)
    return [np.asarray(value).astype(dtype)] * len(ended)


def layers_of(paths: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """The layer of each leaf of state: that of parameters whose name it ends with, because a leaf of
    `batch_stats/norm/mean` belongs to the layer of `params/norm/scale`; else its own."""
    layers = frozenset(known)

    def layer(path: str) -> str:
        own = layer_of(path)
        parts = own.split("/")
        names = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((name for name in names if name in layers), own)

    return tuple(map(layer, paths))


@dataclass(frozen=True)
class StateValues:
    """The state in a graph: the input and the output of each leaf, and the device on which the leaf stays."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()


def settle(graph: Graph, inputs: Sequence[int], first: int) -> tuple[Graph, StateValues]:
    """Choose the device of each leaf in a placed graph, and let the leaf be read and made there.

    `inputs` are the leaves, and their new values are outputs from position `first` on. Each gets an output of its own,
    also if the graph computes several as one value.
    """
    if not inputs:
        return graph, StateValues()
    outputs = [_value(graph.outputs[first + i]) for i in range(len(inputs))]
    devices: list[str] = []
    for value, output in zip(inputs, outputs, strict=True):
        readers = [n.device for n in graph.consumers.get(value, ())]
        made = graph.producer[output].device
        devices.append(made if made in readers or not readers else readers[0])
    graph, _ = relay(graph, dict(zip(inputs, devices, strict=True)))
    used = set(graph.outputs[:first])
    added = Copies(graph)
    for i, (value, device) in enumerate(zip(outputs, devices, strict=True)):
        if value in used or graph.producer[value].device != device:
            outputs[i] = added.add(value, graph.producer[value].layer, device)
        used.add(outputs[i])
    changed = (*graph.outputs[:first], *outputs, *graph.outputs[first + len(inputs) :])
    graph = added.placed(replace(graph, outputs=changed))
    return graph, StateValues(tuple(inputs), tuple(outputs), tuple(devices))


def ordered(plan: Schedule, state: StateValues, effects: bool) -> tuple[Schedule, tuple[str, ...]]:
    """A schedule in which microbatches see the state in order, and notes for the user. With `effects` the loss has
    ordered effects, those of a microbatch before those of the next."""
    if plan.microbatches == 1 or (not effects and _in_order(plan, state)):
        return plan, ()
    why = "its effects are ordered" if effects else "the state of a layer crosses devices"
    return in_turn(plan), (f"Microbatches run one after the other, because {why}.",)


def _in_order(plan: Schedule, state: StateValues) -> bool:
    """Whether each microbatch reads every leaf after the one before it has made it."""
    for order in plan.order.values():
        made = dict.fromkeys(state.outputs, 0)
        read: set[tuple[int, int]] = set()
        for index, microbatch in order:
            group = plan.groups[index]
            for value, output in zip(state.inputs, state.outputs, strict=True):
                if value in group.inputs and (value, microbatch) not in read:
                    read.add((value, microbatch))
                    if made[output] != microbatch:
                        return False
                if output in group.outputs:
                    made[output] += 1
    return True


def _value(output: Operand) -> int:
    assert isinstance(output, int)  # the step function copies what it returns
    return output


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)

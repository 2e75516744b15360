"""Turns a user's call into a call whose arguments and results are only arrays.

`jax.jit` takes and returns pytrees of arrays. `bind` handles the other arguments:

    static arguments          become part of the function; they are given by position or by name
    equinox modules           leaves that are not arrays are static, as under `equinox.filter_jit`
    flax nnx objects          are sent as their state and updated in place with the returned state, as under `nnx.jit`
    other objects             are refused if the function changes them in place, because the change would be lost

`bind` returns what to trace (`fn`, `args`, `kwargs`) and what the trace depends on (`key`). `finish` turns the result
of the traced function into the result for the caller.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.core import Tracer
from jax.tree_util import (
    DictKey,
    SequenceKey,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from flowml.errors import UnsupportedError
from flowml.ir.objects import Objects, is_object, is_static_leaf, static_leaves, takes_static_leaves
from flowml.numbers import whole


@dataclass(frozen=True)
class Static:
    """The arguments that are compiled in: positions (negative ones count from the end) and names."""

    argnums: tuple[int, ...] = ()
    argnames: frozenset[str] = frozenset()


def static_of(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] | None,
    argnames: str | Sequence[str] | None,
    kind: str = "static",
) -> Static:
    """The static arguments of `fn`. If only positions or names are given, the others are inferred, as by `jax.jit`.

    `kind` is "donate" for arguments that are given in the same way to be donated. Raises ValueError for a position or
    name that `fn` does not have, TypeError for a value of another type.
    """
    numbers, names = _elements(argnums), _elements(argnames)
    positions = tuple(n for n in map(whole, numbers) if n is not None)
    if len(positions) < len(numbers) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{kind}_argnums takes positions and {kind}_argnames names, got {argnums!r} and {argnames!r}")
    numbers = positions
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return Static(numbers, frozenset(names))
    kinds = {p.kind for p in parameters}
    placed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    title = getattr(fn, "__name__", type(fn).__name__)
    for number in numbers:
        if not -len(placed) <= number < len(placed) and inspect.Parameter.VAR_POSITIONAL not in kinds:
            raise ValueError(f"{kind}_argnums={number}: {title} has {len(placed)} positional arguments")
    for name in names:
        if name not in named and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(f"{kind}_argnames={name!r}: {title} has no such argument; it has {', '.join(named)}")
    if not numbers:
        numbers = tuple(i for i, name in enumerate(placed) if name in names)
    elif not names:
        at = [n % len(placed) for n in numbers if -len(placed) <= n < len(placed)]
        names = tuple(placed[n] for n in at if placed[n] in named)
    return Static(numbers, frozenset(names))


def check_apart(static: Static, donated: Static) -> None:
    """Raise ValueError for an argument that is static and donated: it is no array whose memory a call could use up."""
    both = [*static.argnames & donated.argnames] or [str(n) for n in sorted({*static.argnums} & {*donated.argnums})]
    if both:
        raise ValueError(
            f"argument {both[0]} is static and donated; a static one is compiled in, so leave it out of one"
        )


def _elements(given: Any) -> tuple[Any, ...]:
    """The elements of a sequence, or the one value that is given instead."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else (given,)


@dataclass
class Returned:
    """What `fn` of a bound call returns besides arrays, recorded while it is traced."""

    tree: Any = None
    fixed: dict[int, Any] = field(default_factory=dict[int, Any])
    """Position among the leaves -> static leaf."""
    same: dict[int, int] = field(default_factory=dict[int, int])
    """Position among the leaves -> number of the object that was passed in."""
    plain: bool = True
    """Whether the result has only arrays and no object was updated."""


@dataclass(frozen=True)
class Call:
    """A call `fn(*args, **kwargs)` with arrays only. Calls with equal `key` and signature have the same trace."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: Hashable
    returned: Returned
    objects: Objects | None = None


def bind(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    static: Static,
    name: str = "function",
    *,
    in_place: bool = True,
) -> Call:
    """Turn a call into one with arrays only. Raises ValueError for a static argument that cannot be hashed.

    Without `in_place` nnx objects are pytrees that the call leaves as they are, as under `jax.jit`.
    """
    placed = {i % len(args): args[i % len(args)] for i in static.argnums if -len(args) <= i < len(args)}
    named = {n: kwargs[n] for n in kwargs if n in static.argnames}
    placed = dict(sorted(placed.items()))
    _check_hashable(name, {**{f"argument {i}": v for i, v in placed.items()}, **named})
    given: Any = (
        tuple(a for i, a in enumerate(args) if i not in placed),
        {n: v for n, v in kwargs.items() if n not in named},
    )
    objects = Objects.of(given) if in_place else None
    if objects is not None:
        given = objects.given
    leaves, tree = tree_flatten(given)
    fixed = static_leaves(fn, given, leaves)
    if fixed:
        _check_hashable(name, {f"leaf {leaf!r}": leaf for leaf in fixed.values()})
        given = tree_unflatten(tree, [None if i in fixed else leaf for i, leaf in enumerate(leaves)])
    returned = Returned()

    def of_arrays(*arrays: Any, **named_arrays: Any) -> Any:
        inner: Any = (arrays, named_arrays)
        if fixed:
            inner = tree_unflatten(tree, list(_merged(tree_leaves(inner), fixed)))
        nodes: tuple[Any, ...] = ()
        if objects is not None:
            inner, nodes = objects.merged(inner)
        before = [_snapshot(a) for a in _arguments(inner).values()]
        positional = tuple(_merged(inner[0], placed))
        result = fn(*positional, **inner[1], **named)
        _check_unchanged(name, _arguments(inner), before, result)
        return _note(fn, name, returned, result, objects, nodes)

    if not placed and not named:  # JAX names arguments by the signature, here that of `fn`
        functools.update_wrapper(of_arrays, fn)
    typed = [(type(v), v) for v in (*placed.values(), *named.values(), *fixed.values())]
    key: Hashable = (tuple(placed), tuple(named), tuple(fixed), tuple(typed)) if typed else ()
    if objects is not None:
        key = (key, objects.graph)
    return Call(of_arrays, tuple(given[0]), dict(given[1]), key, returned, objects)


def finish(call: Call, returned: Returned, result: Any) -> Any:
    """Turn the result of the traced function into the caller's result, and update the caller's nnx objects."""
    if returned.plain:
        return result
    rest, states = result
    if call.objects is not None:
        call.objects.update(states)
    kept = {i: call.objects.nodes[n] for i, n in returned.same.items()} if call.objects is not None else {}
    return tree_unflatten(returned.tree, list(_merged(rest, {**returned.fixed, **kept})))


def _note(
    fn: Callable[..., Any], name: str, returned: Returned, result: Any, objects: Objects | None, nodes: Sequence[Any]
) -> Any:
    """The arrays of a result. `returned` keeps the rest."""
    if objects is None and not takes_static_leaves(fn, result):
        return result
    leaves, tree = tree_flatten(result, is_leaf=is_object)
    same = {i: n for i, leaf in enumerate(leaves) for n, node in enumerate(nodes) if leaf is node}
    if any(is_object(leaf) and i not in same for i, leaf in enumerate(leaves)):
        leaves, tree = tree_flatten(result, is_leaf=lambda x: any(x is node for node in nodes))
        same = {i: n for i, leaf in enumerate(leaves) for n, node in enumerate(nodes) if leaf is node}
    fixed: dict[int, Any] = {}
    if takes_static_leaves(fn, result):
        fixed = {i: leaf for i, leaf in enumerate(leaves) if i not in same and is_static_leaf(leaf)}
    returned.tree, returned.fixed, returned.same, returned.plain = tree, fixed, same, False
    states = objects.states(nodes, name) if objects is not None else ()
    return [leaf for i, leaf in enumerate(leaves) if i not in fixed and i not in same], states


def _merged(values: Sequence[Any], others: Mapping[int, Any]) -> Iterator[Any]:
    """The values in order, with `others` inserted at their positions in the result."""
    rest = iter(values)
    for position in range(len(values) + len(others)):
        yield others[position] if position in others else next(rest)


def _arguments(given: Any) -> dict[str, Any]:
    """Arguments by their names in errors."""
    return {**{f"args[{i}]": a for i, a in enumerate(given[0])}, **{f"keyword {n!r}": a for n, a in given[1].items()}}


def _snapshot(argument: Any) -> tuple[list[Any], Any]:
    return tree_flatten(argument, is_leaf=is_object)


def _check_unchanged(
    name: str, arguments: Mapping[str, Any], before: Sequence[tuple[list[Any], Any]], result: Any
) -> None:
    """Refuse a function whose result is lost because it writes to its arguments.

    Lists and dicts are the function's own copies, as under `jax.jit`. A function may change them (pop an item from its
    batch, say) if it returns something. A function that changes them and returns nothing is refused.
    """
    for (where, argument), (leaves, tree) in zip(arguments.items(), before, strict=True):
        now, now_tree = _snapshot(argument)
        if now_tree == tree and len(now) == len(leaves) and all(a is b for a, b in zip(now, leaves, strict=True)):
            continue
        paths = [p for p, _ in tree_flatten_with_path(argument, is_leaf=is_object)[0]]
        containers = all(isinstance(k, SequenceKey | DictKey) for p in paths for k in p)
        if containers and tree_leaves(result):
            continue
        changed = [keystr(p) for p, leaf in zip(paths, now, strict=True) if not any(leaf is x for x in leaves)]
        raise UnsupportedError(
            f"{name} changes its argument {where}{changed[0] if changed else ''} in place, which would be lost: the "
            f"workers have a copy; return the new {type(argument).__name__} and use that"
        )


def _check_hashable(name: str, static: Mapping[str, Any]) -> None:
    for what, value in static.items():
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"{name}: static {what} is of type {type(value).__name__}, which cannot be hashed; "
                "static arguments are part of what a plan is compiled for, so pass a hashable value"
            ) from None


def leaks(fn: Callable[..., Any]) -> dict[str, int]:
    """The variables that a function names, and the fields of the object whose method it is, that hold values of a
    trace, by their names."""
    owner: Any = getattr(fn, "__self__", None)
    fields: dict[str, Any] = getattr(owner, "__dict__", {})
    variables = {f"field {n!r} of its {type(owner).__name__}": v for n, v in fields.items()}
    try:
        around = inspect.getclosurevars(inspect.unwrap(fn))
    except (TypeError, ValueError):
        pass
    else:
        variables |= {f"global {n!r}": v for n, v in around.globals.items()}
        variables |= {f"closed-over {n!r}": v for n, v in around.nonlocals.items()}
    return {name: id(value) for name, value in variables.items() if _holds_tracer(value)}


def _holds_tracer(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tracer) or (isinstance(value, list | set) and any(isinstance(v, Tracer) for v in value))

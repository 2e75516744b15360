"""Finds the values that are parameters, and the names of their layers.

A parameter is a leaf of an argument that is a tree, or an array that the function closes over and multiplies with.
Other leaves of the argument (moments, counters, keys) are not parameters; they follow the data of their parameter.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from flowml.ir import _jax
from flowml.ir.graph import Graph, Node
from flowml.ir.label import layer_of, parameter_path
from flowml.ir.scopes import as_text

_CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "gather"})
_LIBRARIES = ("jax", "flax", "optax", "numpy", "equinox", "flowml")
_MAX_OBJECTS = 10_000
"""How many objects are searched for the name of an array. Arrays that are not found are numbered."""


def argument_parameters(graph: Graph, trees: Sequence[Sequence[int]]) -> dict[int, str]:
    """The parameters among the inputs, with their paths.

    `trees` holds the positions of the leaves of each argument that is more than one array. All parameters are in one
    argument, the first that has any. If there is a backward pass, parameters are floating arrays that it depends on,
    so the state of an optimizer is excluded. An argument on which the backward pass does not depend (the weights of a
    linear loss) can still hold the parameters, unless its paths mirror a later argument, as those of a state do.
    """
    backward = [n for n in graph.nodes if n.scope.backward]
    wanted = {v for v in _needed_by(graph, backward) if _jax.is_inexact(graph.avals[v])}
    for number, tree in enumerate(trees):
        leaves = [i for i in tree if not backward or graph.inputs[i] in wanted]
        if not leaves and not _mirrors(graph, tree, trees[number + 1 :]):
            leaves = list(tree)
        if leaves:
            names = [graph.input_names[i] for i in leaves]
            if len(leaves) < len(tree):
                names = _below_shared_position(names)
            return dict(zip((graph.inputs[i] for i in leaves), map(parameter_path, names), strict=True))
    return {}


def _mirrors(graph: Graph, tree: Sequence[int], others: Sequence[Sequence[int]]) -> bool:
    """Whether leaves of a tree end with the path of a leaf of another, as `0/mu/conv/kernel` with `conv/kernel`."""
    parts = (graph.input_names[i].split("/") for i in tree)
    ends = {"/".join(names[start:]) for names in parts for start in range(1, len(names))}
    return any(graph.input_names[i] in ends for other in others for i in other)


def _needed_by(graph: Graph, nodes: Sequence[Node]) -> set[int]:
    """The values that the nodes depend on."""
    stack, needed = [v for n in nodes for v in n.reads], set[int]()
    while stack:
        value = stack.pop()
        if value not in needed:
            needed.add(value)
            maker = graph.producer.get(value)
            stack += maker.reads if maker is not None else ()
    return needed


def _below_shared_position(names: Sequence[str]) -> list[str]:
    """The names without a leading position that all of them share, as in `0/conv/kernel` for a tuple."""
    first = {n.partition("/")[0] for n in names}
    if len(first) == 1 and next(iter(first)).isdecimal() and all("/" in n for n in names):
        return [n.partition("/")[2] for n in names]
    return list(names)


def closed_over_layers(graph: Graph, parameters: Collection[int], fn: Callable[..., Any]) -> dict[int, str]:
    """The layer of every array that `fn` closes over and that belongs to a layer with a weight.

    The layer is named after the variable that holds the array, or after the path of the array in that variable.
    """
    weights = _weights(graph, parameters)
    if not weights:
        return {}
    found: dict[int, str] = {}
    wanted: dict[Any, list[int]] = {}
    for value, constant in graph.constants.items():
        wanted.setdefault(_jax.identity(constant), []).append(value)
    taken: set[str] = set()
    for variable, tree in _variables(fn):
        paths = {v: p for p, leaf in tree for v in wanted.get(_jax.identity(leaf), ()) if v not in found}
        layers = {v: as_text(layer_of(path) if path else variable) for v, path in paths.items()}
        if taken.intersection(layers.values()):
            layers = {v: as_text(f"{variable}/{layer}") for v, layer in layers.items()}
        if taken.intersection(layers.values()):
            layers = {v: f"{layer}~{len(taken)}" for v, layer in layers.items()}
        taken.update(layers.values())
        found.update(layers)
    nameless = [v for v in graph.constants if v in weights and v not in found]
    found.update({v: f"closed_over_{i}" for i, v in enumerate(nameless)})
    weighty = {found[v] for v in weights}
    return {v: layer for v, layer in found.items() if layer in weighty}


def _weights(graph: Graph, parameters: Collection[int]) -> set[int]:
    """The constants that are multiplied with something, directly or reshaped, but never with a parameter.

    A constant that is multiplied with a parameter is data.
    """
    constants = {v for v in graph.constants if graph.values[v].shape and _jax.is_inexact(graph.avals[v])}
    origin = {v: v for v in (*constants, *parameters)}
    weights, data = set[int](), set[int]()
    for node in graph.nodes if constants else ():
        behind = {origin[v] for v in node.reads if v in origin}
        if _contracts(node.equation):
            (weights if behind.isdisjoint(parameters) else data).update(behind)
        elif len(behind) == 1 and all(v in origin for v in node.reads):
            origin.update(dict.fromkeys(node.outputs, next(iter(behind))))
    return (weights & constants) - data


def _contracts(equation: Any) -> bool:
    if equation.primitive.name in _CONTRACTIONS:
        return True
    return any(_contracts(inner) for body in _jax.nested_jaxprs(equation) for inner in body.eqns)


_Tree = list[tuple[str, Any]]


def _variables(fn: Callable[..., Any]) -> Iterator[tuple[str, _Tree]]:
    """(name, leaves by their paths) of all variables visible to a function and to the functions that it names."""
    seen: set[int] = set()
    functions: list[Any] = [fn]
    while functions and len(seen) < _MAX_OBJECTS:
        function = functions.pop(0)
        for name, value in _seen_by(function):
            if id(value) in seen or isinstance(value, type | types.ModuleType):
                continue
            seen.add(id(value))
            leaves = jax.tree_util.tree_flatten_with_path(value)[0]
            functions += [leaf for _, leaf in leaves if callable(leaf) and not isinstance(leaf, type)]
            yield name, [(_jax.path_name(path), leaf) for path, leaf in leaves]


def _seen_by(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        partial: functools.partial[Any] = function
        yield from (("args", partial.func), *((f"args{i}", a) for i, a in enumerate(partial.args)))
        yield from partial.keywords.items()
    if isinstance(function, types.MethodType):
        yield "self", function.__self__
        yield from getattr(function.__self__, "__dict__", {}).items()
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        wrapped = getattr(function, "__wrapped__", None)
        yield from [] if wrapped is None else [("wrapped", wrapped)]
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # the cell is still empty
    if str(function.__globals__.get("__name__")).partition(".")[0] not in _LIBRARIES:
        yield from ((n, function.__globals__[n]) for n in _global_names(code) if n in function.__globals__)
    yield from (function.__kwdefaults__ or {}).items()
    defaults = function.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)


def _global_names(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return list(dict.fromkeys([*code.co_names, *(n for c in inner for n in _global_names(c))]))

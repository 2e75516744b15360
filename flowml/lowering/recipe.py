"""Describes a loop, a branch or a function that calls Python, so that a worker can trace it again.

StableHLO cannot name a Python function of another process. A recipe therefore splits the program at its calls of
Python: what is between two calls is exported as StableHLO, and the calls, loops and branches become steps. The worker
builds them with JAX's public functions and compiles them to one executable.

A *token* orders calls. Every ordered call takes the token of the call before it and returns it, also from one iteration
of a loop to the next. Its value is the number of the run, which every call gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from flowml.arrays import TOKEN
from flowml.errors import UnsupportedError
from flowml.ir import _jax, host
from flowml.ir.graph import Literal, Node

Host = Callable[[host.Call], Callable[..., Any]]
"""Turns a call into a function of the token and its arrays."""

Export = Callable[[Callable[..., Any], Sequence[Any]], bytes]
"""Exports a function of flat arrays as StableHLO."""


@dataclass(frozen=True)
class Computation:
    """StableHLO, serialised by `jax.export`."""

    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Inline:
    """A function. With `apart`, XLA must not merge its operations with those before it, because it recomputes them."""

    body: Recipe
    apart: bool


@dataclass(frozen=True)
class Scan:
    body: Recipe
    constants: int
    carried: int
    options: dict[str, Any]


@dataclass(frozen=True)
class While:
    test: Recipe
    body: Recipe
    test_constants: int
    body_constants: int


@dataclass(frozen=True)
class Switch:
    branches: tuple[Recipe, ...]


What = host.Call | Computation | Inline | Scan | While | Switch


@dataclass(frozen=True)
class Step:
    """One step of a recipe: the slots that it reads and those that it fills."""

    what: What
    reads: tuple[int, ...]
    fills: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A function of flat arrays, which are in the first slots. `constants` are pairs (slot, value)."""

    constants: tuple[tuple[int, np.ndarray], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    @property
    def is_call(self) -> bool:
        """Whether the recipe is one call of Python and nothing else. It then can be called without XLA."""
        return len(self.steps) == 1 and isinstance(self.steps[0].what, host.Call)

    def __call__(self, *arrays: Any) -> list[Any]:
        """The outputs of a recipe that is one call."""
        (step,) = self.steps
        assert isinstance(step.what, host.Call)
        slots = self._slots(arrays)
        slots.update(zip(step.fills, step.what(*(slots[i] for i in step.reads)), strict=True))
        return [slots[i] for i in self.outputs]

    def run(self, arrays: Sequence[Any], token: Any, wrap: Host) -> tuple[list[Any], Any]:
        """Trace the recipe. Returns its outputs and the next token."""
        slots = self._slots(arrays)
        for step in self.steps:
            results, token = _run(step.what, [slots[i] for i in step.reads], token, wrap)
            slots.update(zip(step.fills, results, strict=True))
        return [slots[i] for i in self.outputs], token

    @property
    def calls(self) -> list[host.Call]:
        """All its calls of Python, also those in loops and branches."""
        found: list[host.Call] = []
        for step in self.steps:
            match step.what:
                case host.Call():
                    found.append(step.what)
                case Inline() | Scan():
                    found += step.what.body.calls
                case While():
                    found += step.what.test.calls + step.what.body.calls
                case Switch():
                    found += [call for branch in step.what.branches for call in branch.calls]
                case Computation():
                    pass
        return found

    def _slots(self, arrays: Sequence[Any]) -> dict[int, Any]:
        return {**dict(enumerate(arrays)), **dict(self.constants)}


def _run(what: What, arrays: list[Any], token: Any, wrap: Host) -> tuple[Sequence[Any], Any]:
    match what:
        case host.Call():
            return _call(what, arrays, token, wrap)
        case Computation():
            return jax.tree_util.tree_leaves(jax.export.deserialize(bytearray(what.data)).call(*arrays)), token
        case Inline():
            return what.body.run(jax.lax.optimization_barrier(arrays) if what.apart else arrays, token, wrap)
        case Scan():
            return _scan(what, arrays, token, wrap)
        case While():
            return _while(what, arrays, token, wrap)
        case Switch():
            index, *operands = arrays
            branches = [lambda *given, b=b: b.run(given[:-1], given[-1], wrap) for b in what.branches]
            return jax.lax.switch(jnp.int32(index), branches, *operands, token)


def _call(call: host.Call, arrays: list[Any], token: Any, wrap: Host) -> tuple[Sequence[Any], Any]:
    structs = [_jax.struct_of(s) for s in call.results]
    function = wrap(call)
    if call.pure:
        return jax.pure_callback(function, structs, token, *arrays), token
    if not call.ordered:
        return io_callback(function, structs, token, *arrays), token

    def in_turn(token: Any, *given: Any) -> Any:
        return function(token, *given), np.asarray(token)

    return io_callback(in_turn, (structs, jax.ShapeDtypeStruct(token.shape, token.dtype)), token, *arrays)


def _scan(what: Scan, arrays: list[Any], token: Any, wrap: Host) -> tuple[Sequence[Any], Any]:
    fixed, first, rows = _cut(arrays, what.constants, what.carried)

    def body(carry: Any, row: Any) -> Any:
        values, token = carry
        results, token = what.body.run([*fixed, *values, *row], token, wrap)
        return (results[: what.carried], token), results[what.carried :]

    (last, token), made = jax.lax.scan(body, (first, token), rows, **what.options)
    return [*last, *made], token


def _while(what: While, arrays: list[Any], token: Any, wrap: Host) -> tuple[Sequence[Any], Any]:
    """A loop that carries the outcome of its test, because a test itself cannot hand on a token."""
    for_test, for_body, first = _cut(arrays, what.test_constants, what.body_constants)

    def test(values: Sequence[Any], token: Any) -> Any:
        (again,), token = what.test.run([*for_test, *values], token, wrap)
        return again, values, token

    def body(carry: Any) -> Any:
        _, values, token = carry
        return test(*what.body.run([*for_body, *values], token, wrap))

    _, last, token = jax.lax.while_loop(lambda carry: carry[0], body, test(first, token))
    return last, token


def _cut(arrays: list[Any], *lengths: int) -> list[list[Any]]:
    parts: list[list[Any]] = []
    for length in lengths:
        parts.append(arrays[:length])
        arrays = arrays[length:]
    return [*parts, arrays]


def recipe_of(jaxpr: Any, constants: Sequence[Any], export: Export) -> Recipe:
    """The recipe of a jaxpr. Raises UnsupportedError where a call is inside something that has no recipe."""
    return _Writer(export).write(jaxpr, constants)


def recipe_of_node(node: Node, inputs: Sequence[int], outputs: Sequence[int], export: Export) -> Recipe:
    """The recipe of a node, as a function from the values `inputs` to `outputs`. A token of the graph is empty."""
    writer = _Writer(export)
    for value in inputs:
        writer.new(value)
    equation = node.equation
    operands = [i.value if isinstance(i, Literal) else i for i in node.inputs[: len(equation.invars)]]
    writer.add(writer.what(equation), operands, node.outputs[: len(equation.outvars)])
    for token in node.outputs[len(equation.outvars) :]:
        writer.values[writer.new(token)] = np.zeros(TOKEN.shape, TOKEN.dtype)
    return writer.recipe(outputs)


@dataclass
class _Writer:
    """Writes one recipe."""

    export: Export
    slots: dict[Any, int] = field(default_factory=dict[Any, int])
    values: dict[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])
    steps: list[Step] = field(default_factory=list[Step])
    count: int = 0

    def write(self, jaxpr: Any, constants: Sequence[Any]) -> Recipe:
        for variable in jaxpr.invars:
            self.new(variable)
        for variable, constant in zip(jaxpr.constvars, constants, strict=True):
            self.add(Computation(self.export(lambda c=constant: (c,), ())), (), (variable,))
        run: list[Any] = []
        for position, equation in enumerate(jaxpr.eqns):
            if not host.has_calls(equation):
                run.append(equation)
                continue
            self._compute(run, _read_from(jaxpr, position))
            run = []
            self.add(self.what(equation), equation.invars, equation.outvars)
        self._compute(run, _read_from(jaxpr, len(jaxpr.eqns)))
        return self.recipe(jaxpr.outvars)

    def recipe(self, outputs: Sequence[Any]) -> Recipe:
        found = tuple(self._slot(a) for a in outputs)
        return Recipe(tuple(self.values.items()), tuple(self.steps), found)

    def new(self, variable: Any = None) -> int:
        if variable is not None:
            self.slots[variable] = self.count
        self.count += 1
        return self.count - 1

    def _slot(self, atom: Any) -> int:
        if not _jax.is_literal(atom):
            return self.slots[atom]
        slot = self.new()
        self.values[slot] = _jax.literal_value(atom)
        return slot

    def add(self, what: What, reads: Sequence[Any], fills: Sequence[Any]) -> None:
        read = tuple(self._slot(a) for a in reads)
        self.steps.append(Step(what, read, tuple(self.new(v) for v in fills)))

    def _compute(self, equations: Sequence[Any], wanted: set[Any]) -> None:
        """Add a step for equations that do not call Python."""
        made = {v: None for e in equations for v in e.outvars}
        reads = list(dict.fromkeys(a for e in equations for a in e.invars if not _jax.is_literal(a) and a not in made))
        fills = [v for v in made if v in wanted]
        if not fills:
            return
        numbers = {v: n for n, v in enumerate((*reads, *made))}
        steps = [
            (
                e,
                [a if _jax.is_literal(a) else numbers[a] for a in e.invars],
                [numbers[v] for v in e.outvars],
            )
            for e in equations
        ]
        avals = {n: v.aval for v, n in numbers.items()}
        closed = _jax.build_jaxpr(steps, avals, [numbers[v] for v in reads], [numbers[v] for v in fills])
        data = self.export(_jax.as_function(closed), [_jax.struct(v.aval) for v in reads])
        self.add(Computation(data), reads, fills)

    def what(self, equation: Any) -> What:
        name, parameters = equation.primitive.name, equation.params
        if name in host.CONSTRUCTS:
            return host.Call.of(host.Found(equation))
        match name:
            case "scan":
                options = {k: parameters[k] for k in ("length", "reverse", "unroll")}
                return Scan(self._of(parameters["jaxpr"]), *_scan_counts(equation), options)
            case "while":
                test, body = self._of(parameters["cond_jaxpr"]), self._of(parameters["body_jaxpr"])
                return While(test, body, parameters["cond_nconsts"], parameters["body_nconsts"])
            case "cond":
                return Switch(tuple(map(self._of, parameters["branches"])))
            case _:
                pass
        body = _jax.called_jaxpr(equation)
        if body is not None:
            return Inline(recipe_of(*body, self.export), apart=False)
        if name in RECOMPUTED:
            apart = bool(parameters["prevent_cse"] and parameters["differentiated"])
            return Inline(recipe_of(parameters["jaxpr"], (), self.export), apart)
        found = next(host.calls(equation))
        raise UnsupportedError(f"{found.construct} is inside {name}, which no worker can call Python from")

    def _of(self, closed: Any) -> Recipe:
        return recipe_of(closed.jaxpr, closed.consts, self.export)


RECOMPUTED = frozenset({"checkpoint", "remat", "remat2"})
"""The primitives of `jax.checkpoint`."""


def _scan_counts(equation: Any) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan."""
    parameters = equation.params
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    constants, carried, _ = parameters["ft_in"].update(equation.invars).unpack()  # from JAX 0.12 on
    return len(list(constants)), len(list(carried))


def _read_from(jaxpr: Any, position: int) -> set[Any]:
    """The variables that are read from an equation on, or returned."""
    rest = (a for e in jaxpr.eqns[position:] for a in e.invars)
    return {a for a in (*rest, *jaxpr.outvars) if not _jax.is_literal(a)}

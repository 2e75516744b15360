"""Computes the form of a traced function: its operations without names. Functions of one form are exported once.

Exporting takes tens of milliseconds and a model repeats its layers, so without this most of the planning time of a deep
model would be exports. Parts of a form are compared by value where the value is complete, else by identity. Different
functions therefore never have equal forms, but equal functions may have different ones.

What this process exported stays known, within bounds, because programs repeat each other: another placement or policy
of the same model, an optimizer's update of the same shapes, an evaluation beside a training.
"""

from __future__ import annotations

import enum
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex


@dataclass(frozen=True)
class Form:
    """A hashable value that is equal only for functions that do the same."""

    value: Hashable
    lasting: bool = field(compare=False)
    """Whether all of it is compared by value. A form that is not holds functions and objects of the user."""
    nbytes: int = field(compare=False)
    """About how much memory it takes, which is many times that of the export."""


class Exported:
    """The newest exports of this process, by what they were exported for and their form. Any thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        """The bound is of exports and forms together."""
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._lock = threading.Lock()
        self._exports: OrderedDict[tuple[Hashable, Form], bytes] = OrderedDict()

    def get(self, context: Hashable, form: Form) -> bytes | None:
        with self._lock:
            if (found := self._exports.get((context, form))) is not None:
                self._exports.move_to_end((context, form))
            return found

    def add(self, context: Hashable, form: Form, data: bytes) -> None:
        """Remember an export, and forget the oldest ones if all have too many bytes together."""
        with self._lock:
            if (context, form) in self._exports:  # another thread has exported the same meanwhile
                return
            self._exports[context, form] = data
            self._nbytes += form.nbytes + len(data)
            while self._nbytes > self._max_bytes:
                (_, oldest), old = self._exports.popitem(last=False)
                self._nbytes -= oldest.nbytes + len(old)

    def __len__(self) -> int:
        return len(self._exports)


def form_of(jaxpr: Any, constants: Sequence[Any]) -> Form | None:
    """The form of a function; None if it has none."""
    writer = _Writer()
    try:
        value = writer.form(jaxpr, constants)
        hash(value)
    except TypeError:  # a parameter has no hash, or a constant is not a plain array
        return None
    return Form(value, writer.lasting, writer.nbytes)


EQUATION_BYTES = 1024
"""The memory that the form of an equation takes, rounded up: the tuples, their numbers and strings."""


class _Writer:
    """Writes a form, and notes its size, and whether it holds something that is not compared by value alone."""

    def __init__(self) -> None:
        self.lasting = True
        self.nbytes = 0

    def form(self, jaxpr: Any, constants: Sequence[Any]) -> Hashable:
        numbers: dict[Any, int] = {}

        def write(variable: Any) -> Any:
            numbers[variable] = len(numbers)
            return variable.aval

        def read(atom: Any) -> Any:
            if isinstance(atom, jex.Literal):
                return atom.aval, self._value(np.asarray(atom.val))
            return numbers[atom]

        held = tuple((write(v), self._value(c)) for v, c in zip(jaxpr.constvars, constants, strict=True))
        taken = tuple(map(write, jaxpr.invars))
        steps: list[Any] = []
        for equation in jaxpr.eqns:
            operands = tuple(map(read, equation.invars))
            results = tuple(map(write, equation.outvars))
            context = sys.intern(repr(equation.ctx))
            steps.append((equation.primitive, self._value(equation.params), operands, results, context))
        self.nbytes += EQUATION_BYTES * len(steps)
        return held, taken, tuple(steps), tuple(map(read, jaxpr.outvars))

    def _value(self, value: Any) -> Any:
        """A value with its type. 1, True and 1.0 are equal but compute different results, and so are 0.0 and -0.0."""
        match value:
            case jex.ClosedJaxpr():
                return self.form(value.jaxpr, value.consts)
            case jex.Jaxpr():
                return self.form(value, [])
            case dict():
                return tuple((k, self._value(v)) for k, v in sorted(value.items()))
            case list() | tuple():
                return type(value), tuple(map(self._value, value))
            case np.ndarray() | np.generic() | jax.Array():
                array = np.asarray(value)
                self.nbytes += array.nbytes
                return array.dtype, array.shape, array.tobytes()
            case float() | complex():
                return type(value), repr(value)
            case _:
                self.lasting = self.lasting and _is_plain(value)
                return type(value), value


def _is_plain(value: Any) -> bool:
    """Whether a value is compared by value and keeps nothing of the user's alive, as functions and tree structures do.

    JAX's own values, such as a mesh or the mark of an unspecified sharding, are equal only if they mean the same.
    """
    if value is None or isinstance(value, bool | int | str | bytes | np.dtype | type | enum.Enum | jax.sharding.Mesh):
        return True
    own = type(value).__module__.startswith("jax.")
    return own and not callable(value) and not hasattr(value, "call_wrapped")

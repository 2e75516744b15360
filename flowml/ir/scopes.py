"""Defines annotations: `layer("encoder")` labels the operations traced inside it, `device("worker:1")` pins them.

Both use JAX's name stack, because it survives differentiation, `vmap` and `jit`. A label is a plain name scope. A pin
is a name scope with a special form. Outside a flowml trace they change only names. JAX stores names and transformations
separately on the stack, so a layer may be called `jvp(x)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax

from flowml.arguments import is_text

_PIN = re.compile(r"fm\.device\((.*)\)", re.DOTALL)
_EQUATION = re.compile(r"([A-Za-z.,\s]+)(?:->([A-Za-z.\s]*))?")
_ESCAPE = "="
"""Prefix that `layer` adds to a name that would otherwise not be read as a label."""


def layer(name: str) -> AbstractContextManager[Any]:
    """Label the operations traced inside the block. Labels nest with `/`, as in `jax.named_scope`.

    Raises ValueError if the name is empty, starts with "@", or is not valid Unicode, TypeError if it is not text.
    """
    if not is_text(name):
        raise TypeError(f"layer name {name!r} is of type {type(name).__name__}; give text, as in layer('encoder')")
    if not name or name.startswith("@"):
        raise ValueError(f"layer name {name!r} must not be empty or start with '@'; try layer('encoder')")
    if as_text(name) != name:
        raise ValueError(f"layer name {name!r} is not valid Unicode; try layer({as_text(name)!r})")
    return jax.named_scope(_ESCAPE + name if _is_special(name.lstrip(_ESCAPE)) else name)


def device(name: str) -> AbstractContextManager[Any]:
    """Pin the operations traced inside the block to a device: `"worker:1"` or `"worker:1/cpu:0"`.

    Raises ValueError if `name` cannot be the name of a device.
    """
    if not is_text(name) or not name or any(c in name for c in "()@|"):
        raise ValueError(f"device name {name!r} is not valid; give device('worker:1') or device('worker:1/cpu:0')")
    return jax.named_scope(f"fm.device({name})")


@dataclass(frozen=True, slots=True)
class Scope:
    """A parsed name stack: its labels and pins from the outside in, and whether it is of the backward pass."""

    labels: tuple[str, ...]
    pins: tuple[str, ...]
    backward: bool = False

    @property
    def path(self) -> str:
        return "/".join(self.labels)


Stack = tuple[tuple[str, bool], ...]
"""A name stack from the outside in: pairs (name, whether it is the name of a transformation)."""


def parse(stack: Stack) -> Scope:
    """Parse a name stack and leave out its transformations."""
    runs: list[list[str]] = [[]]
    pins: list[str] = []
    for name, transformation in stack:
        if transformation:
            runs.append([])
        elif pin := _PIN.fullmatch(name):
            pins.append(pin[1])
        elif _is_special(name.lstrip(_ESCAPE)):
            if name.startswith(_ESCAPE):
                runs[-1].append(name.removeprefix(_ESCAPE))
        elif name:
            runs[-1].append(name)
    backward = any(transformation and name == "transpose" for name, transformation in stack)
    names = _without_repeats(runs) if backward else [name for run in runs for name in run]
    return Scope(tuple(part for name in names for part in as_text(name).split("/")), tuple(pins), backward)


def as_text(name: str) -> str:
    """A name as valid Unicode. A lone surrogate is written as `\\udcff`, because files and messages cannot hold it."""
    return name.encode("utf-8", "backslashreplace").decode()


def _without_repeats(runs: Iterable[list[str]]) -> list[str]:
    """The names without repeated scopes, which JAX adds where the backward pass recomputes a `jax.checkpoint` block."""
    names: list[str] = []
    for run in runs:
        names = run if run[: len(names)] == names else names + run
    return names


def _is_special(name: str) -> bool:
    """Whether a scope is not a label: a pin, the equation of an einsum, or the name of an equinox class.

    Equations and class names do not identify a layer of a model.
    """
    return bool(_PIN.fullmatch(name)) or name.startswith("eqx.nn.") or _is_equation(name)


def _is_equation(name: str) -> bool:
    """Whether `jnp.einsum` accepts the name as an equation. Without an arrow it also has to sum over an index."""
    found = _EQUATION.fullmatch(name)
    if found is None:
        return False
    read = [c for c in found[1] if c.isalpha()]
    if found[2] is None:
        return "," in name and len(set(read)) < len(read)
    return bool(read) and {c for c in found[2] if c.isalpha()} <= set(read)

"""Annotations: `layer("encoder")` labels what is traced inside it, `device("worker:1")` pins it.

Both ride on JAX's own name stack, the one annotation that survives differentiation, `vmap` and `jit`: a label is a
plain name scope, a pin a name scope of a form of its own. Outside a flowml trace they therefore change nothing but
names. JAX keeps names and transformations apart on the stack, so a layer may be called `jvp(x)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax

_PIN = re.compile(r"fm\.device\((.*)\)", re.DOTALL)
_EQUATION = re.compile(r"([A-Za-z.,\s]+)(?:->([A-Za-z.\s]*))?")
_ESCAPE = "="
"""Written by `layer` in front of a name that would else be read as something other than a label."""


def layer(name: str) -> AbstractContextManager[Any]:
    """Label the operations traced inside the block. Labels nest with `/`; the same as `jax.named_scope`.

    Raises ValueError for an empty name, for one that starts with "@", and for one that is not valid Unicode.
    """
    if not name or name.startswith("@"):
        raise ValueError(f"layer name {name!r} must not be empty or start with '@'; try layer('encoder')")
    if as_text(name) != name:
        raise ValueError(f"layer name {name!r} is not valid Unicode; try layer({as_text(name)!r})")
    return jax.named_scope(_ESCAPE + name if _is_special(name.lstrip(_ESCAPE)) else name)


def device(name: str) -> AbstractContextManager[Any]:
    """Pin the operations traced inside the block to a device: `"worker:1"` or `"worker:1/cpu:0"`."""
    if not name or any(c in name for c in "()@|"):
        raise ValueError(f"device name {name!r} is not one; try device('worker:1') or device('worker:1/cpu:0')")
    return jax.named_scope(f"fm.device({name})")


@dataclass(frozen=True, slots=True)
class Scope:
    """A name stack taken apart: the labels from the outside in, the pins among them, and which pass it is."""

    labels: tuple[str, ...]
    pins: tuple[str, ...]
    backward: bool = False

    @property
    def path(self) -> str:
        return "/".join(self.labels)


Stack = tuple[tuple[str, bool], ...]
"""A name stack from the outside in: (name, whether it is a transformation's)."""


def parse(stack: Stack) -> Scope:
    """Take a name stack apart, without the transformations."""
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
    """A name as valid Unicode: a lone surrogate, which no file and no message can hold, is written as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


def _without_repeats(runs: Iterable[list[str]]) -> list[str]:
    """Where the backward pass computes a block again (`jax.checkpoint`) JAX repeats the scopes around it."""
    names: list[str] = []
    for run in runs:
        names = run if run[: len(names)] == names else names + run
    return names


def _is_special(name: str) -> bool:
    """Whether a scope is no label: a pin, the equation of an einsum, or one of equinox, which names its classes.

    The last two tell no layer of a model from another.
    """
    return bool(_PIN.fullmatch(name)) or name.startswith("eqx.nn.") or _is_equation(name)


def _is_equation(name: str) -> bool:
    """Whether `jnp.einsum` takes the name as an equation. Without an arrow it also has to add something up."""
    found = _EQUATION.fullmatch(name)
    if found is None:
        return False
    read = [c for c in found[1] if c.isalpha()]
    if found[2] is None:
        return "," in name and len(set(read)) < len(read)
    return bool(read) and {c for c in found[2] if c.isalpha()} <= set(read)

"""Annotations: `layer("encoder")` labels what is traced inside it, `device("worker:1")` pins it.

Both ride on JAX's own name stack, the one annotation that survives differentiation, `vmap` and `jit`:
a label is a plain name scope, a pin a name scope with a marker in front. Outside a flowml trace they
therefore change nothing but names.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax

_PIN = "@"
_SLASH = "|"  # "/" separates the scopes of a name stack, so a device's own slash travels as this
# einsum scopes its own equation, equinox its own classes: neither tells one layer of a model from another.
_NOBODYS_LAYER = re.compile(r"->|^eqx\.")
_TRANSFORM = re.compile(r"^[A-Za-z_]\w*\(")


def layer(name: str) -> AbstractContextManager[Any]:
    """Label the operations traced inside the block. Labels nest with `/`; the same as `jax.named_scope`.

    Raises ValueError for an empty name or one that starts with "@", which marks pins.
    """
    if not name or name.startswith(_PIN):
        raise ValueError(f"layer name {name!r} must not be empty or start with {_PIN!r}; try layer('encoder')")
    return jax.named_scope(name)


def device(name: str) -> AbstractContextManager[Any]:
    """Pin the operations traced inside the block to a device: `"worker:1"` or `"worker:1/cpu:0"`."""
    if not name or any(c in name for c in "()@|"):
        raise ValueError(f"device name {name!r} is not one; try device('worker:1') or device('worker:1/cpu:0')")
    return jax.named_scope(_PIN + name.replace("/", _SLASH))


@dataclass(frozen=True, slots=True)
class Scope:
    """A name stack taken apart: the labels from the outside in, the pins among them, and which pass it is."""

    labels: tuple[str, ...]
    pins: tuple[str, ...]
    backward: bool = False

    @property
    def path(self) -> str:
        return "/".join(self.labels)


def parse(stack: str) -> Scope:
    """Take a name stack such as `transpose(jvp(fc1))/@worker:1|cpu:0` apart, without the transformations."""
    labels: list[str] = []
    pins: list[str] = []
    for component in stack.split("/"):
        name = _strip_transforms(component)
        if name.startswith(_PIN):
            pins.append(name[1:].replace(_SLASH, "/"))
        elif name and not _NOBODYS_LAYER.search(name):
            labels.append(name)
    return Scope(tuple(labels), tuple(pins), "transpose(" in stack)


def _strip_transforms(component: str) -> str:
    while match := _TRANSFORM.match(component):
        component = component[match.end() :]
    return component.rstrip(")")

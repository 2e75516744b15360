"""Keeps which kinds of values each knob of a policy has, by the names under which plans hold them.

A knob has a base class, which says what the rest of flowml asks a value of it: `Completion`, `Late`, `Topology`,
`Graph`, `Apply`, `AnyFilter`. A kind is a class that follows this base and `Value`, and is registered here. A plan
holds a value as its fields and the name of its kind, and each process that reads the plan finds the kind by this name.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

import msgspec

from flowml.errors import PolicyError

_Found = TypeVar("_Found", bound=type)


class Knob:
    """The base of the bases. They are no structs themselves, so that msgspec asks `read` for what follows them."""

    __slots__ = ()


_kinds: dict[tuple[type[Knob], str], type] = {}
_reading = threading.RLock()
"""msgspec crashes if two threads resolve a type for the first time at once."""


def register(kind: _Found) -> _Found:
    """Let values of a class travel in plans. Decorates the class, which follows the base of a knob and `Value`.

    Each process that takes part in a fit has to know the class. Those that have not imported its module find it if it
    is installed with an entry point of the group `flowml.kinds`.

    Raises:
        PolicyError: for a class that is no kind of a knob, or whose name another one has.
    """
    name = getattr(getattr(kind, "__struct_config__", None), "tag", None)
    bases = [base for base in kind.__mro__ if Knob in base.__bases__]
    if not bases or not isinstance(name, str) or not kind.__struct_config__.frozen:
        raise PolicyError(
            f"{kind.__name__} is no kind of a knob; write `class {kind.__name__}(Late, Value, frozen=True, tag=True)`, "
            "with the base of its knob in place of Late"
        )
    for base in bases:
        known = _kinds.setdefault((base, name), kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise PolicyError(f"{known.__module__}.{known.__name__} has the name {name!r} already; give tag= another")
        _kinds[base, name] = kind
    return kind


def check(base: type[Knob], value: object) -> None:
    """Raise PolicyError for a value that follows a base and whose class is not registered: no plan could hold it."""
    tag = getattr(getattr(value, "__struct_config__", None), "tag", None)
    if isinstance(value, base) and _kinds.get((base, str(tag))) is not type(value):
        name = type(value).__name__
        raise PolicyError(f"{name} is not registered; write @flowml.policy.register before its class")


def kinds_of(base: type[Knob]) -> tuple[type, ...]:
    """The kinds of a knob."""
    return tuple(kind for (of, _), kind in _kinds.items() if of is base)


@functools.cache
def _load_installed() -> None:
    """Import what installed packages have registered: the modules of entry points of the group `flowml.kinds`."""
    for found in entry_points(group="flowml.kinds"):
        found.load()


def read(base: type, value: Any, hook: Callable[[type, Any], Any] | None = None) -> Any:
    """The value of a knob that msgspec has read as a mapping. `hook` reads what no knob is."""
    if not issubclass(base, Knob):
        if hook is None:
            raise NotImplementedError(f"no knob has a {base.__name__}")
        return hook(base, value)
    name = value.get("type") if isinstance(value, dict) else None  # pyright: ignore[reportUnknownMemberType]
    kind = _kinds.get((base, name)) if isinstance(name, str) else None
    if kind is None and isinstance(name, str):
        _load_installed()
        kind = _kinds.get((base, name))
    if kind is None:
        raise ValueError(
            f"{name!r} is no {base.__name__.lower()} that this process knows; import the module that registers it "
            "there, or install it with an entry point of the group 'flowml.kinds'"
        )
    with _reading:
        return msgspec.convert(value, kind, dec_hook=read)

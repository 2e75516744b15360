"""Refers to methods without keeping their objects alive.

An object that gives one of its methods to a part of itself would otherwise be in a cycle with it, and both would stay
until the garbage collector comes: with them the arrays of a run that is over, run after run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakMethod

P = ParamSpec("P")
R = TypeVar("R")


def weakly(method: Callable[P, R]) -> Callable[P, R]:
    """A bound method, for parts of its object, which end with it. Does nothing, and returns None, once it is gone."""
    found = WeakMethod(cast(Any, method))

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        now = found()
        return cast(R, None) if now is None else now(*args, **kwargs)

    return call

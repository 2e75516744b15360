"""Futures as arguments of other calls: the next program takes their values where they are.

The results of a submitted call are sent to this process, because most callers read them. Once a future of a function
has been an argument, the results of its later submitted calls stay on the workers, and are brought here when they are
asked for.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol, TypeVar

from jax.tree_util import tree_flatten, tree_leaves, tree_map, tree_unflatten

from flowml_runtime.driver.remote import Remote
from flowml_runtime.execution.future import Future

T = TypeVar("T")


class Chained(Protocol):
    """A function. `chained` says whether a future of it was an argument of another call."""

    chained: bool


def without_futures(arguments: Any) -> Any:
    """The arguments, with the results of other calls in place of their futures."""
    if not any(isinstance(leaf, Future) for leaf in tree_leaves(arguments)):
        return arguments
    return tree_map(lambda leaf: leaf.as_argument() if isinstance(leaf, Future) else leaf, arguments)


def brought(stays: Future[T]) -> Future[T]:
    """A future of the same call, whose result is brought here when it is asked for. As an argument it stays."""
    view = stays.then(_brought)
    view.argument = stays.as_argument
    return view


def _brought(result: Any) -> Any:
    leaves, tree = tree_flatten(result)
    remotes = [leaf for leaf in leaves if type(leaf) is Remote]
    values = iter(remotes[0].check(None).recall(remotes) if remotes else ())
    return tree_unflatten(tree, [next(values) if type(leaf) is Remote else leaf for leaf in leaves])


def noticed(future: Future[T], owner: Chained) -> Future[T]:
    """The future, which tells its function when it is an argument. It does not keep the function alive."""
    where = weakref.ref(owner)

    def argument() -> T:
        found = where()
        if found is not None:
            found.chained = True
        return future.result()  # no deadline: that of the call whose argument this is

    future.argument = argument
    return future

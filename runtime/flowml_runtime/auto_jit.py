"""Runs the outermost `jax.jit` calls of an unmodified script on a cluster, where that is faster.

Inside `auto_jit`, `jax.jit` of the script's own files, also by `flax.nnx.jit` or `equinox.filter_jit`, makes an
`AutoJit`. The first calls of each signature run with jit and are timed. Then the cost model plans the function for the
cluster. If the plan uses more than one device, the next calls run on the cluster with `keep="auto"`; they are timed
too, and the faster way is kept.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import tree_flatten, tree_map

from flowml.errors import FlowmlError, PlacementError, UnsupportedError
from flowml.ir._jax import is_tracing, jit_is_off, trace_context
from flowml_runtime.dataflow import ClusterLike, Dataflow
from flowml_runtime.driver.remote import Remote
from flowml_runtime.driver.trial import TIMED_CALLS, WARMING_CALLS
from flowml_runtime.keep import AUTO_BYTES

SHORT_S = 1e-3
"""A call that takes less than this cannot gain from a cluster: messages alone take a good part of it."""

_SHARED = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")
"""The options that jit and dataflow programs share."""
_WRAPPERS = ("equinox._jit", "equinox._compile_utils", "flax.nnx.transforms.compilation")
"""The modules of `equinox.filter_jit` and `flax.nnx.jit`. They split objects into arrays and the rest, and give
`jax.jit` a function of arrays."""
_HARMLESS = ("keep_unused", "inline")
"""The options of jit that do not change what a program computes or where."""


class Way:
    """How calls of one signature run: with jit until they are timed, then perhaps on the cluster."""

    def __init__(self) -> None:
        self.on_cluster = False
        self.settled = False
        self.why = ""
        """Why it is settled."""
        self.calls = {False: 0, True: 0}
        """The number of calls, with jit (False) and on the cluster (True)."""
        self._taken_s: dict[bool, list[float]] = {False: [], True: []}

    def took(self, seconds: float) -> bool:
        """Count the time of a call. Returns whether there are now enough for a decision."""
        taken_s = self._taken_s[self.on_cluster]
        taken_s.append(seconds)
        return len(taken_s) >= WARMING_CALLS + TIMED_CALLS

    def median_s(self, on_cluster: bool) -> float:
        """The median of the timed calls, without the first ones, which also compile and allocate memory."""
        return statistics.median(self._taken_s[on_cluster][WARMING_CALLS:])

    def settle(self, on_cluster: bool, why: str) -> None:
        self.on_cluster, self.settled, self.why = on_cluster, True, why


class AutoJit:
    """A function under `jax.jit` that runs as a dataflow program where that is faster. Its other parts are jit's."""

    def __init__(self, jitted: Any, program: Dataflow[..., Any], now_s: Callable[[], float]) -> None:
        self._jitted = jitted
        self._program = program
        self._now_s = now_s
        self._lock = threading.Lock()
        self._recent: tuple[Any, tuple[Hashable, ...], Hashable, Way] | None = None
        self.ways: dict[Hashable, Way] = {}
        update_wrapper(self, jitted.__wrapped__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        way = None if is_tracing() or jit_is_off() else self._way(args, kwargs)
        if way is None:
            return self._jitted(*args, **kwargs)
        if way.settled:
            return self._run(way, args, kwargs)
        began_s = self._now_s()
        result = jax.block_until_ready(self._run(way, args, kwargs))
        if way.took(self._now_s() - began_s):
            self._decide(way, *tree_map(_described, (args, kwargs)))
        return result

    def _run(self, way: Way, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if way.on_cluster:
            try:
                result = self._program(*args, **kwargs)
            except (UnsupportedError, PlacementError) as error:  # both are raised before anything runs
                way.settle(False, str(error).partition("\n")[0])
            else:
                way.calls[True] += 1
                return result
        args, kwargs = tree_map(_fetched, (tuple(args), kwargs))
        way.calls[False] += 1
        return self._jitted(*args, **kwargs)

    def _way(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Way | None:
        """The way of these arguments, or None for arguments that only jit can judge."""
        leaves, tree = tree_flatten((args, kwargs))
        kinds, settings = tuple([_kind(leaf) for leaf in leaves]), trace_context()
        recent = self._recent
        if recent is not None and recent[:3] == (tree, kinds, settings):
            return recent[3]
        try:
            key = self._program.key(*args, **kwargs)
        except Exception:  # jit raises the error that the author of the script expects
            return None
        if key is None:
            return None
        with self._lock:
            way = self.ways.setdefault(key, Way())
        if not way.on_cluster and not way.calls[True] and any(map(_stays, leaves)):
            way.settle(True, "arguments are on the cluster")
        if None not in kinds:
            self._recent = tree, kinds, settings, way
        return way

    def _decide(self, way: Way, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        jit_s = way.median_s(False)
        if way.calls[True]:
            cluster_s = way.median_s(True)
            way.settle(cluster_s < jit_s, f"{_ms(cluster_s)} a call on the cluster, {_ms(jit_s)} with jit")
            return
        if jit_s < SHORT_S:
            way.settle(False, f"{_ms(jit_s)} a call is too short to gain")
            return
        try:
            plan = self._program.plan(*args, **kwargs)
        except FlowmlError as error:
            way.settle(False, str(error).partition("\n")[0])
            return
        if any(task.kind == "python" for task in plan.tasks):
            way.settle(False, "it calls Python, and on a worker that would use copies of the script's objects")
        elif len(plan.partitions) > 1:
            way.on_cluster = True
        else:
            way.settle(False, f"{_ms(jit_s)} a call; no cut over devices is expected to be faster")


def _stays(leaf: Any) -> bool:
    """Whether a leaf is a value on a worker that is worth leaving there."""
    return type(leaf) is Remote and leaf.nbytes > AUTO_BYTES


def _fetched(leaf: Any) -> Any:
    return leaf.fetch() if type(leaf) is Remote else leaf


def _described(leaf: Any) -> Any:
    """A leaf without its value, which the call may have used up."""
    if isinstance(leaf, jax.Array):
        weak = getattr(leaf, "weak_type", False)  # arrays of typed keys have no weak type
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)
    return leaf


def _kind(leaf: Any) -> Hashable | None:
    """What a lookup of the last call compares: equal kinds have equal programs. None: every call looks in full."""
    if type(leaf) is Remote:
        return Remote, leaf.kind
    if isinstance(leaf, jax.Array):
        return type(leaf), leaf.aval
    return (np.ndarray, leaf.shape, leaf.dtype) if type(leaf) is np.ndarray else None


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


@dataclass
class Record:
    """What `auto_jit` made: the functions of a script, in the order in which they were given to `jax.jit`."""

    functions: list[AutoJit] = field(default_factory=list[AutoJit])

    def lines(self) -> list[str]:
        """For each function that was called, how its calls ran and why."""
        return [line for function in self.functions for line in _lines(function)]


@contextmanager
def auto_jit(
    cluster: ClusterLike, folder: Path, *, now_s: Callable[[], float] = time.perf_counter
) -> Generator[Record]:
    """Inside the block, `jax.jit` called by a file in `folder` makes functions that may run on `cluster`.

    Calls with options that place or compile in a way of their own (shardings, device, backend, compiler options) stay
    with jit, as do the calls of libraries.
    """
    original, record = jax.jit, Record()

    def jit(*functions: Any, **options: Any) -> Any:
        jitted = original(*functions, **options)
        given = {name for name, value in options.items() if not _is_none(value)}
        if given - {*_SHARED, *_HARMLESS} or not _is_in(_caller(), folder):
            return jitted
        return made(jitted, options) if functions else lambda function: made(jitted(function), options)

    def made(jitted: Any, options: dict[str, Any]) -> AutoJit:
        shared: dict[str, Any] = {name: options.get(name) for name in _SHARED}
        program = Dataflow(jitted.__wrapped__, cluster=cluster, placement="auto", keep="auto", in_place=False, **shared)
        record.functions.append(AutoJit(jitted, program, now_s))
        return record.functions[-1]

    jax.jit = jit
    try:
        yield record
    finally:
        jax.jit = original


def _is_none(option: Any) -> bool:
    """Whether an option of jit says nothing. flax gives None for each argument."""
    return option is None or (isinstance(option, tuple | list) and all(map(_is_none, option)))


def _caller() -> str:
    """The file that called `jax.jit`, or a library's function that does nothing but prepare arguments for it."""
    frame: Any = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_WRAPPERS):
        frame = frame.f_back
    return frame.f_code.co_filename


def _is_in(file: str, folder: Path) -> bool:
    path = Path(file).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts


def _lines(function: AutoJit) -> list[str]:
    """One line for each signature of a function that was called."""
    found: list[str] = []
    for way in function.ways.values():
        with_jit, on_cluster = way.calls[False], way.calls[True]
        counts = [f"{with_jit} with jit"] * bool(with_jit) + [f"{on_cluster} on the cluster"] * bool(on_cluster)
        why = way.why or "too few calls to decide"
        found.append(f"{function.__name__}: {', '.join(counts)} ({why})")
    return found

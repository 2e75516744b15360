"""`dataflow` runs any JAX function as a program on a cluster; it is used like `jax.jit`.

The first call with a new signature compiles the function for the cluster's devices and loads the plan on its workers.
Later calls with that signature only send inputs. A signature consists of the static arguments, the tree structure, the
shape, dtype and weak type of each leaf, and the JAX settings in force.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from flowml.devices import platforms_of
from flowml.effects import EffectsChoice, EffectsOption
from flowml.errors import FlowmlError, PlacementError
from flowml.ir._jax import ClosesOverTracerError, jit_is_off, trace_context
from flowml.ir.calls import Call, Returned, bind, check_apart, finish, static_of
from flowml.leaves import why_no_array
from flowml_runtime.bound import Method
from flowml_runtime.chained import brought, noticed, without_futures
from flowml_runtime.driver.call_io import signature
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.progress import shown
from flowml_runtime.driver.remote import Remote
from flowml_runtime.driver.session import Session
from flowml_runtime.driver.steps import UnloadedError
from flowml_runtime.driver.trial import Trial, trial_of
from flowml_runtime.execution.future import Future
from flowml_runtime.interrupts import heeding_interrupts
from flowml_runtime.keep import EVERYTHING, Keep, described, donated_inputs, reads_there, stay_of
from flowml_runtime.mixtures import Caller
from flowml_runtime.recent import Recent, kind_of
from flowml_runtime.reviving import revived, with_workers

if TYPE_CHECKING:
    from flowml.devices import Device
    from flowml.ir.graph import Graph
    from flowml.placement.links import Links
    from flowml.plan import Plan

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


_PASS_ARRAYS = (
    "pass arrays or numbers, or name the argument in static_argnums or static_argnames, to have the program compiled "
    "for it"
)


class ClusterLike(Protocol):
    """The part of a cluster that a dataflow program uses."""

    @property
    def devices(self) -> Sequence[Device]: ...
    @property
    def session(self) -> Session: ...
    def links_for(self, placement: Any) -> Links: ...


@dataclass
class _Program:
    """The program of one signature. The first call loads it on the cluster."""

    plan: Plan
    out_tree: Any
    returned: Returned
    handle: LoadedPlan | None = None
    trial: Trial | None = None
    forget: Callable[[LoadedPlan], None] = lambda _: None
    """Removes it from the programs of its function, unless it has been loaded again since."""
    on_one_device: bool = False
    """Whether this is the one-device program with which a trial compares a pipeline."""

    def is_stranded(self, devices: Sequence[Device]) -> bool:
        """Whether it has lost a worker that is not back, so that it has to be placed anew."""
        stopped = self.handle is not None and self.handle.steps.stopped
        return stopped and not {d.name for d in devices}.issuperset(self.plan.devices)


@dataclass(frozen=True)
class _Arguments:
    """The arguments of a call: bound to the function, the key of its program, and the flat arrays."""

    call: Call
    key: tuple[Hashable, ...]
    """(arguments that are not arrays, tree structure, signatures, settings), and in `submit` what stays otherwise."""
    leaves: list[Any]
    positional: int
    """The number of positional arguments, static ones included."""
    keep: Keep | None = None
    """What stays on the workers, if not what the function says."""

    @property
    def held(self) -> dict[int, str]:
        """The inputs that are on a device already. Raises an error for a value that cannot be used."""
        found = {i: leaf for i, leaf in enumerate(self.leaves) if type(leaf) is Remote}
        for leaf in found.values():
            leaf.check(None)
        return {i: leaf.kind.device for i, leaf in found.items()}


class Dataflow(Generic[P, R]):
    """A function that runs as a dataflow program. `dataflow` makes it. It is safe to call from several threads."""

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        cluster: ClusterLike | None,
        placement: Any,
        static_argnums: int | Sequence[int] | None,
        static_argnames: str | Sequence[str] | None,
        donate_argnums: int | Sequence[int] | None = None,
        donate_argnames: str | Sequence[str] | None = None,
        keep: Any = None,
        effects: EffectsChoice = "run",
        in_place: bool = True,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"dataflow() takes a function, got {type(fn).__name__}")
        if isinstance(cluster, type) or not (cluster is None or hasattr(cluster, "links_for")):
            raise TypeError(f"cluster={cluster!r} is of type {type(cluster).__name__}; give an fm.Cluster")
        self._donate = static_of(fn, donate_argnums, donate_argnames, "donate")
        self._keep = Keep.of(keep)
        self._effects = EffectsOption(effects)
        self._in_place = in_place
        self.chained = False
        update_wrapper(self, fn)
        self._fn = fn
        self._name = str(getattr(fn, "__name__", type(fn).__name__))
        self._cluster = cluster
        self._placement = placement
        self._static = static_of(fn, static_argnums, static_argnames)
        check_apart(self._static, self._donate)
        self._now_s = now_s
        self._recent: Recent | None = None
        self._lock = threading.RLock()  # tracing a function may call its own program
        self._programs: weakref.WeakKeyDictionary[ClusterLike, dict[Hashable, _Program]] = weakref.WeakKeyDictionary()
        self._loads: weakref.WeakKeyDictionary[ClusterLike, weakref.WeakSet[LoadedPlan]] = weakref.WeakKeyDictionary()
        """What was loaded and may still be, also of programs that were forgotten while they were loaded again."""
        weakref.finalize(self, _release, self._loads).atexit = False

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A program that a class has is a method, as under jit: calls get the instance first."""
        return self if instance is None else Method(self, instance)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function on the cluster. Inside another JAX transformation it is inlined, like jit.

        If arguments are lost with a worker, those that `fm.save` has written last are taken in their place.
        """
        try:
            recent = self._recent
            if recent is not None:
                leaves, tree = tree_flatten((args, kwargs))
                cluster = self._current()
                if recent.fits(cluster, tree, leaves):
                    direct = recent.handle.direct if recent.on_device else None
                    try:
                        if direct is None:
                            return cast(R, tree_unflatten(recent.out_tree, cluster.session.call(recent.handle, leaves)))
                        recent.handle.steps.use()
                        return cast(R, tree_unflatten(recent.out_tree, direct(leaves)))
                    except UnloadedError:
                        self._recent = None
                    except Exception:
                        if direct is None:
                            raise
                        self._recent = None  # the full call below finds out what is wrong, and where
            return self._call(args, kwargs)
        except FlowmlError as error:
            again = revived(error, args, kwargs, self._caller())
        return with_workers(self._current(), self._call, again)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        given = None if jit_is_off() else self._sort(args, kwargs)
        if given is None:
            return self._fn(*args, **kwargs)

        def run(session: Session, program: _Program, handle: LoadedPlan) -> R:
            trial = program.trial
            if trial is None or trial.over:
                self._recent = self._remember(program, handle, given)
                return _finish(program, given.call, session.call(handle, given.leaves))
            began_s = self._now_s()
            outputs = jax.block_until_ready(session.call(handle, given.leaves))
            trial.took(self._now_s() - began_s, on_one_device=program.on_one_device)
            return _finish(program, given.call, outputs)

        try:
            return self._loaded(given, run)
        except ClosesOverTracerError:
            return self._fn(*args, **kwargs)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Start a call and return at once. Several calls may run at once. The future's result is the output pytree."""
        if jit_is_off():
            done: Future[R] = Future(self._name, lambda value: cast(R, value))
            done.complete(self._fn(*args, **kwargs))
            return done
        try:
            return self._submit(args, kwargs)
        except FlowmlError as error:
            again = revived(error, args, kwargs, self._caller())
        return with_workers(self._current(), self._submit, again)

    def _submit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[R]:
        given = self._not_traced("submit", args, kwargs)
        if given.call.objects is not None:
            raise TypeError(
                f"{self._name}.submit() cannot update nnx objects, because a later call could read them before the "
                f"update; call {self._name}()"
            )

        if self.chained:
            given = replace(given, keep=EVERYTHING, key=(*given.key, EVERYTHING))

        def start(session: Session, program: _Program, handle: LoadedPlan) -> Future[R]:
            finish_call = partial(_finish, program, given.call)  # without `self`: a future must not keep the program
            future = session.submit(handle, given.leaves).then(finish_call)
            return brought(future) if given.keep else noticed(future, self) if self._keep is None else future

        return self._loaded(given, start)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments, which may be `jax.ShapeDtypeStruct`s. Compiles if necessary; runs nothing."""
        return self._program(self._current(), self._not_traced("plan", args, kwargs, values=False)).plan

    def key(self, *args: Any, **kwargs: Any) -> Hashable | None:
        """For the runtime: what calls that run the same program have in common. None if an argument is being traced."""
        given = self._sort(args, kwargs, values=False)
        return None if given is None else given.key

    def _caller(self) -> Caller:
        return Caller(self._name, getattr(self._fn, "__code__", None), self._keep is not None or self.chained)

    def programs_on(self, cluster: ClusterLike) -> dict[Hashable, _Program]:
        """The programs that are compiled for a cluster."""
        return self._programs.get(cluster) or {}

    def _not_traced(
        self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, values: bool = True
    ) -> _Arguments:
        given = self._sort(args, kwargs, values=values)
        if given is None:
            raise TypeError(
                f"{self._name}.{method}() cannot be traced by another JAX transformation; call {self._name}()"
            )
        return given

    def _remember(self, program: _Program, handle: LoadedPlan, given: _Arguments) -> Recent | None:
        leaves: Sequence[Any] = given.leaves
        kinds = tuple(kind for kind in map(kind_of, leaves) if kind is not None)
        special, tree, _, settings = given.key
        if special != () or not program.returned.plain or len(kinds) < len(leaves):
            return None
        on_device = all(kind is not np.ndarray and kind is not Remote for kind, _, _ in kinds)
        return Recent(weakref.ref(self._current()), tree, kinds, settings, handle, program.out_tree, on_device)

    def _sort(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, values: bool = True) -> _Arguments | None:
        """Sort the arguments of a call. Returns None if an argument is being traced.

        Raises TypeError for an argument that is not an array, or has no `values`; ValueError for a static one that has
        no hash.
        """
        args, kwargs = without_futures(args), without_futures(kwargs)
        call = bind(self._fn, args, kwargs, self._static, self._name, in_place=self._in_place)
        leaves, tree = tree_flatten((call.args, call.kwargs))
        try:
            signatures = tuple([signature(leaf) for leaf in leaves])
        except (TypeError, ValueError, OverflowError):
            raise self._not_an_array(call) from None
        types = set(map(type, leaves))
        if any(issubclass(kind, Tracer) for kind in types):
            return None
        if values and any(issubclass(kind, jax.ShapeDtypeStruct) for kind in types):
            raise self._not_an_array(call)
        return _Arguments(call, (call.key, tree, signatures, trace_context()), leaves, len(args))

    def _loaded(
        self,
        given: _Arguments,
        use: Callable[[Session, _Program, LoadedPlan], T],
    ) -> T:
        """Load the program of a call if necessary, and `use` it."""
        cluster = self._current()
        program = self._program(cluster, given)
        session = cluster.session
        while True:
            handle = program.handle
            if handle is None or handle.steps.stopped:
                with self._lock:
                    known = program.handle
                    handle = program.handle = session.load(program.plan) if known is None else session.reload(known)
                    handle.forget = partial(program.forget, handle)
                    handle.maker = self._caller().maker
                    self._loads.setdefault(cluster, weakref.WeakSet()).add(handle)
            try:
                return use(session, program, handle)
            except UnloadedError:  # it has just been unloaded to make room for another program
                continue

    def _program(self, cluster: ClusterLike, given: _Arguments) -> _Program:
        held = given.held
        if held:
            return self._held(cluster, given, held)
        program = self._compiled(cluster, given.key, self._placement, given)
        if program.trial is None or not program.trial.on_one_device:
            return program
        alone = self._compiled(cluster, (given.key, "on one device"), _on_one_device, given)
        alone.trial, alone.on_one_device = program.trial, True
        return alone

    def _held(self, cluster: ClusterLike, given: _Arguments, held: Mapping[int, str]) -> _Program:
        """The program for inputs that are on devices: the one for sent inputs, if it reads each only on its device."""
        key = (given.key, tuple(held.items()))
        programs = self._programs.get(cluster) or {}
        sent = programs.get(given.key)
        if key not in programs and sent is not None and reads_there(sent.plan, sent.returned, held):
            with self._lock:
                programs[key] = sent
        return self._compiled(cluster, key, self._placement, given)

    def _compiled(self, cluster: ClusterLike, key: Hashable, placement: Any, given: _Arguments) -> _Program:
        programs = self._programs.get(cluster)
        found = programs.get(key) if programs is not None else None
        if found is not None and not found.is_stranded(cluster.devices):
            return found
        with self._lock:
            programs = self._programs.setdefault(cluster, {})
            found = programs.get(key)
            if found is None or found.is_stranded(cluster.devices):
                found = programs[key] = self._compile(cluster, placement, given)
                found.forget = partial(_forget, weakref.ref(self), weakref.ref(cluster))
            return found

    @heeding_interrupts()
    def _compile(self, cluster: ClusterLike, placement: Any, given: _Arguments) -> _Program:
        from flowml.compiler import compile_call

        call, held, keep = given.call, given.held, given.keep or self._keep
        call = replace(call, args=described(call.args), kwargs=described(call.kwargs)) if held else call
        donated = donated_inputs(call, self._static, self._donate, given.positional)
        try:
            with shown(lambda: f"compiling {self._name}"):
                compiled = compile_call(
                    self._fn,
                    call,
                    devices=cluster.devices,
                    placement=placement,
                    platforms=platforms_of(cluster.devices),
                    name=self._name,
                    links=cluster.links_for(placement),
                    stay=lambda traced: stay_of(keep, traced, call, held, donated, self._name),
                    effects=self._effects.on(cluster.devices),
                )
        except PlacementError as error:
            raise cluster.session.explained(error, repr(self._name)) from None
        self._effects.tell(self._name, compiled.left_out)
        trial = trial_of(compiled.plan, placement) if keep is None and not held else None
        return _Program(compiled.plan, compiled.out_tree, call.returned, trial=trial)

    def _current(self) -> ClusterLike:
        if self._cluster is not None:
            self._cluster.session.check_owner()
            return self._cluster
        from flowml_runtime.cluster import current_cluster

        cluster = current_cluster()
        cluster.session.check_owner()
        return cluster

    def _not_an_array(self, call: Call) -> TypeError | OverflowError:
        """The error for the first argument that is no array, or has no values."""
        for path, leaf in tree_flatten_with_path((call.args, call.kwargs))[0]:
            where = f"args{keystr(path[1:])}" if path[0].idx == 0 else f"keyword {keystr(path[1:])}"
            try:
                signature(leaf)
            except (TypeError, ValueError, OverflowError) as error:
                if isinstance(error, OverflowError):
                    return OverflowError(f"{self._name}: {where}: {error}; give a number that fits, or an array")
                return TypeError(f"{self._name}: {where} {why_no_array(leaf, _PASS_ARRAYS)}")
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return TypeError(
                    f"{self._name}: {where} is a jax.ShapeDtypeStruct without values; pass an array, or have the plan "
                    f"of these shapes made by {self._name}.plan(...)"
                )
        raise AssertionError("every leaf is an array")


def _forget(function: weakref.ref[Dataflow[Any, Any]], cluster: weakref.ref[ClusterLike], handle: LoadedPlan) -> None:
    """Remove a program whose plan was unloaded. A handle must keep neither the function nor the cluster alive.

    A program may have several keys: that of sent inputs, and one for each way in which inputs were on devices.
    """
    owner, where = function(), cluster()
    programs = owner.programs_on(where) if owner is not None and where is not None else {}
    for key in [key for key, program in programs.copy().items() if program.handle is handle]:
        programs.pop(key, None)


def _finish(program: _Program, call: Call, flat: Sequence[Any]) -> Any:
    return finish(call, program.returned, tree_unflatten(program.out_tree, flat))


def _release(loads: Mapping[ClusterLike, Iterable[LoadedPlan]]) -> None:
    """Request that the plans of a deleted object be unloaded. A finalizer may run on any thread: it never waits."""
    for cluster, handles in loads.items():
        for handle in handles:
            cluster.session.release(handle)


def _on_one_device(graph: Graph, devices: Sequence[Device]) -> dict[int, Device]:
    return {node.id: devices[0] for node in graph.nodes}


@overload
def dataflow(
    fn: Callable[P, R],
    *,
    cluster: ClusterLike | None = None,
    placement: Any = "auto",
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep: Any = None,
    effects: EffectsChoice = "run",
) -> Dataflow[P, R]: ...
@overload
def dataflow(
    fn: None = None,
    *,
    cluster: ClusterLike | None = None,
    placement: Any = "auto",
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep: Any = None,
    effects: EffectsChoice = "run",
) -> Callable[[Callable[P, R]], Dataflow[P, R]]: ...
def dataflow(
    fn: Callable[P, R] | None = None,
    *,
    cluster: ClusterLike | None = None,
    placement: Any = "auto",
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep: Any = None,
    effects: EffectsChoice = "run",
) -> Dataflow[P, R] | Callable[[Callable[P, R]], Dataflow[P, R]]:
    """Run a JAX function as a dataflow program on a cluster. Use it as a function or a decorator, like `jax.jit`.

    Args:
        fn: a function that takes and returns pytrees of arrays.
        cluster: where to run; defaults to the innermost `with cluster:` block at the time of the call.
        placement: which device runs which part: "auto", a mapping from layer patterns to devices, `Pipeline`,
            `AutoPlacement`, or a callable.
        static_argnums, static_argnames: arguments that are compiled in, by position or name; they must be hashable.
            Leaves of equinox modules that are not arrays are always static.
        donate_argnums, donate_argnames: arguments whose handles the call uses up: workers overwrite their memory. The
            arrays of other arguments are sent to the workers, and stay valid.
        keep: outputs that stay on the workers, as `fm.Remote`s: positions of the returned tuple, patterns of paths in
            the result ("0/params/*"), or "auto" for outputs larger than 64 KiB. The program of a call whose arguments
            stay on workers runs where they are, with placement "auto".
        effects: "run" runs callbacks and debug prints on workers that allow Python; "drop" leaves out what `jax.debug`
            does, with one warning.

    Returns: an object that is called like `fn`, with `.submit(...)` -> Future and `.plan(...)` -> Plan. A call
    raises FlowmlError if it fails on the cluster, TypeError if an argument is not an array.
    """
    options: dict[str, Any] = {
        "cluster": cluster,
        "placement": placement,
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
        "donate_argnums": donate_argnums,
        "donate_argnames": donate_argnames,
        "keep": keep,
        "effects": effects,
    }
    if fn is None:
        return lambda function: Dataflow(function, **options)
    return Dataflow(fn, **options)

"""Wraps JAX's internals. Only this file uses them, so a change in JAX affects one place.

Passes use it to trace functions, look into nested calls, build a callable from a list of equations, export it as
StableHLO, and restore weak types.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config as jax_config
from jax._src import core as jax_core
from jax._src import source_info_util, xla_bridge
from jax._src.interpreters import mlir, pxla
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import linalg
from jax._src.lib import guard_lib, xla_client  # pyright: ignore[reportPrivateImportUsage]
from jax.extend import core as jex

from flowml.arrays import ArraySpec, name_of
from flowml.errors import UnsupportedError
from flowml.ir.keys import key_dtype
from flowml.ir.scopes import as_text
from flowml.plan import Setting

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "custom_jvp_call", "custom_vjp_call"})
"""Calls whose bodies are inlined into the graph. Custom rules are not needed after differentiation."""

_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
"""In the path of a file of an installed library."""

_OUTSIDE_CONTEXT = (
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_legacy_prng_key",
    "jax_debug_nans",
    "jax_debug_infs",
)
"""Settings that change the result of tracing or of a call but are not part of JAX's trace context."""

_IN_KEY = tuple(n for n in (*_OUTSIDE_CONTEXT, "jax_check_tracer_leaks") if n in jax_config.config_states)
"""What the key of a program has besides JAX's trace context. jit looks nothing up while it checks for leaks."""

SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel",
    "jax_softmax_custom_jvp",
    *_OUTSIDE_CONTEXT,
)
"""Settings that are part of a plan: the 64-bit setting, and those that change what the code of a callback computes."""

CALLBACK_LOG = "jax._src.callback"
"""The name of the log in which JAX notes the errors of callbacks."""

ArrayImpl: type = xla_client.ArrayImpl  # pyright: ignore[reportPrivateImportUsage]
"""The class of all arrays of this process. `jax.Array`, its base, has not all of its methods."""

_WIDE = frozenset({"int64", "uint64", "float64", "complex128"})


def backends_started() -> bool:
    """Whether XLA runs in this process. The first array or computation starts it."""
    return xla_bridge.backends_are_initialized()


def trace_context() -> Hashable:
    """The settings that decide the result of tracing: the key of JAX's caches, and `_IN_KEY`.

    A version of JAX without that key has the value of every setting in its place.
    """
    states = jax_config.config_states
    own = (
        jax_config.trace_context() if hasattr(jax_config, "trace_context") else tuple(s.value for s in states.values())
    )
    return own, tuple([states[name].value for name in _IN_KEY])


def settings(*, wide: bool) -> tuple[Setting, ...]:
    """The current settings of this thread. With `wide`, 64 bits are on in any case."""
    found = {
        name: _plain(jax_config.config_states[name].value) for name in SETTINGS if name in jax_config.config_states
    }
    if wide:
        found["jax_enable_x64"] = True
    return tuple(found.items())


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


@contextmanager
def under(settings: Iterable[Setting]) -> Generator[None]:
    """Apply settings inside the block, in this thread only. Raises ValueError for one that is not in `SETTINGS`."""
    with ExitStack() as stack:
        for name, value in settings:
            state = jax_config.config_states.get(name) if name in SETTINGS else None
            if state is None:
                raise ValueError(f"{name!r} is not a JAX setting that a plan can bring")
            if _plain(state.value) != value:
                stack.enter_context(state(value))
        yield


def exact_types() -> Any:
    """A context in which JAX keeps arrays of 64 bits, independent of the setting of this thread."""
    return jax.enable_x64(True)


class explicit_transfers:  # it is used like a function
    """A context in which the arrays that move count as those of `jax.device_put` and `jax.device_get`: a call of the
    library moves its arrays on purpose, so `jax.transfer_guard("disallow")` allows it.

    A class, because a call of a small program would notice the time of two generators.
    """

    __slots__ = ("_before", "_state")

    def __enter__(self) -> None:
        state: Any = guard_lib.thread_local_state()
        self._state = state
        self._before = state.explicit_device_put, state.explicit_device_get
        state.explicit_device_put = state.explicit_device_get = True

    def __exit__(self, *_: object) -> None:
        self._state.explicit_device_put, self._state.explicit_device_get = self._before


def is_wide(dtype: str) -> bool:
    """Whether JAX narrows arrays of this dtype if 64 bits are off."""
    return dtype in _WIDE


def computes_wide(equation: Any) -> bool:
    """Whether an equation, or one inside its loops and branches, makes or reads a value of 64 bits."""
    atoms = (*equation.invars, *equation.outvars)
    if any(_is_wide_type(getattr(a.aval, "dtype", None)) for a in atoms):
        return True
    return any(computes_wide(inner) for body in nested_jaxprs(equation) for inner in body.eqns)


class ClosesOverTracerError(UnsupportedError):
    """A function closes over a tracer, so only the transformation that made the tracer can run it."""


def jit_is_off() -> bool:
    """Whether `jax.disable_jit` is on in this thread."""
    return bool(jax_config.config_states["jax_disable_jit"].value)


def compile_settings() -> tuple[object, ...]:
    """JAX's settings of how this thread compiles a program. Neither programs nor JAX's trace context have them."""
    efforts = ("jax_optimization_level", "jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
    return (jax.config.read("jax_disable_most_optimizations"), *(getattr(jax.config, e, None) for e in efforts))


def is_tracing() -> bool:
    """Whether this thread is inside a transformation of JAX, such as jit or vmap."""
    return not jax_core.trace_state_clean()


@dataclass(frozen=True)
class Traced:
    """A traced function: its jaxpr, constants, the names of inputs and outputs, and trees."""

    jaxpr: Any
    constants: tuple[Any, ...]
    in_tree: Any
    out_tree: Any
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    trees: tuple[tuple[int, ...], ...]
    """For each argument that is more than one array, the positions of its leaves among the inputs."""
    left_out: tuple[Any, ...]


def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rewrite: Callable[[Any], tuple[Any, Sequence[Any]]],
) -> Traced:
    """Trace `fn` as `jax.jit` would. Leaves are arrays or ShapeDtypeStructs.

    `rewrite` returns the program that is to be run, and the operations that it leaves out.
    """
    with jax.disable_jit(False):  # a plan is compiled even if jit is disabled
        traced = jax.jit(fn, keep_unused=True).trace(*args, **kwargs)
    leaves, in_tree = jax.tree_util.tree_flatten_with_path((tuple(args), dict(kwargs)))
    if len(traced.jaxpr.jaxpr.invars) > len(leaves):  # tracers are added as arguments
        raise ClosesOverTracerError(
            "the function closes over a value that another JAX transformation is tracing; pass it as an argument"
        )
    closed, left_out = rewrite(without_refs(traced.jaxpr))
    closed = without_dead_code(closed)
    outs, out_tree = jax.tree_util.tree_flatten_with_path(traced.out_info)
    return Traced(
        jaxpr=closed.jaxpr,
        constants=tuple(closed.consts),
        in_tree=in_tree,
        out_tree=out_tree,
        input_names=tuple(path_name(p[2:] if _is_args(p) else p[1:]) for p, _ in leaves),
        output_names=tuple(path_name(p) for p, _ in outs),
        trees=_trees(leaves),
        left_out=tuple(left_out),
    )


def _trees(leaves: Sequence[tuple[Any, Any]]) -> tuple[tuple[int, ...], ...]:
    found: dict[Any, list[int]] = {}
    for position, (path, _) in enumerate(leaves):
        if len(path) > 2:
            found.setdefault(path[:2], []).append(position)
    return tuple(map(tuple, found.values()))


def _is_args(path: Sequence[Any]) -> bool:
    return path[0] == jax.tree_util.SequenceKey(0)


def path_name(path: Sequence[Any]) -> str:
    """A tree path as text: `conv1/kernel`."""
    return "/".join(_key_name(k) for k in path)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return as_text(str(getattr(key, attribute)))
    return as_text(str(key))


def without_dead_code(closed: Any) -> Any:
    """The program without dead code (also in loops, branches and rules of derivatives), as jit runs it."""
    used = [True] * len(closed.jaxpr.outvars)
    jaxpr, constants, _ = pe.dce_jaxpr_consts(closed.jaxpr, used, instantiate=True)
    kept = [c for c, used in zip(closed.consts, constants, strict=True) if used]
    return jex.ClosedJaxpr(jaxpr, kept)


def without_refs(closed: Any) -> Any:
    """The program in which values take the place of the mutable Refs that it makes, as jit runs it."""
    if not any(type(e).__name__ == "InternalMutableArrayEffect" for e in closed.jaxpr.effects):
        return closed
    from jax._src.state.discharge import discharge_state

    return discharge_state(closed)


def aval_of(spec: ArraySpec) -> Any:
    """JAX's description of an array with this spec."""
    return jax.typeof(np.zeros(spec.shape, spec.dtype))


def spec_of(aval: Any) -> ArraySpec:
    """The spec of an array, aval or ShapeDtypeStruct."""
    dtype = aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return ArraySpec(tuple(aval.shape), str(dtype))
    if dtype == jax.dtypes.float0:
        return ArraySpec(tuple(aval.shape), "float0")
    return ArraySpec(tuple(aval.shape), name_of(np.dtype(dtype)), bool(getattr(aval, "weak_type", False)))


def float0_literal(aval: Any) -> Any:
    """A literal of dtype float0, which has no values."""
    return jex.Literal(np.zeros(aval.shape, jax.dtypes.float0), aval)


def identity(array: Any) -> Any:
    """A key that is equal for an array that a function closes over and for the constant traced from it."""
    if isinstance(array, np.ndarray):
        return cast(Any, array).ctypes.data, array.shape, array.strides
    return id(array)


def is_inexact(aval: Any) -> bool:
    """Whether an abstract value is of a floating or complex type."""
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def name_stack(equation: Any) -> tuple[tuple[str, bool], ...]:
    """The scopes and transformations around an equation, from the outside in: (name, whether a transformation)."""
    return tuple(
        (entry.name, isinstance(entry, source_info_util.Transform)) for entry in equation.source_info.name_stack.stack
    )


def source_line(equation: Any) -> str:
    """The line of the user's code where an equation was traced: "model.py:12 (forward)"; "" if JAX does not know."""
    trace = equation.source_info.traceback
    frame = _users_frame(trace) or source_info_util.user_frame(trace)
    return f"{frame.file_name}:{frame.start_line} ({frame.function_name})" if frame is not None else ""


def has_users_line(equation: Any) -> bool:
    """Whether JAX knows a line outside of installed libraries. What a library compiles by itself has none."""
    return _users_frame(equation.source_info.traceback) is not None


def at_line_of(equation: Any, caller: Any) -> Any:
    """The equation with the line of another one."""
    info = equation.source_info.replace(traceback=caller.source_info.traceback)
    return equation.replace(source_info=info)


def _users_frame(traceback: Any) -> Any:
    """The innermost frame outside of JAX and of installed libraries."""
    frames = source_info_util.user_frames(traceback)
    return next((f for f in frames if not _INSTALLED.search(f.file_name)), None)


def whereabouts(equation: Any, layer: str = "") -> str:
    """An operation and its location, for errors: "ffi_call in layer 'head' at model.py:12 (forward)"."""
    line = source_line(equation)
    return f"{equation.primitive.name}{f' in layer {layer!r}' if layer else ''}{f' at {line}' if line else ''}"


def called_jaxpr(equation: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The body (jaxpr, constants) of a call to inline, or None for other equations."""
    if equation.primitive.name not in INLINED:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = equation.params.get(key)
        if body is not None:
            return (body.jaxpr, tuple(body.consts)) if hasattr(body, "jaxpr") else (body, ())
    return None


def nested_jaxprs(equation: Any) -> list[Any]:
    """Every jaxpr in the parameters of an equation (bodies of loops, branches, remat)."""
    return [getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(equation.params)]


def copy_equation(aval: Any) -> Any:
    """An equation that copies an array."""
    return jax.make_jaxpr(jnp.copy)(struct(aval)).jaxpr.eqns[-1]


def build_jaxpr(
    equations: Sequence[tuple[Any, Sequence[Any], Sequence[int]]],
    avals: Mapping[int, Any],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> Any:
    """The closed jaxpr of a function of a flat list of arrays that runs the equations.

    Each equation comes as (JaxprEqn, operands, output values); an operand is a value or a JAX literal.
    """
    variables: dict[int, Any] = {}

    def variable(value: int) -> Any:
        if value not in variables:
            variables[value] = jex.Var(avals[value])
        return variables[value]

    invars = [variable(v) for v in inputs]
    # Equal tasks must not differ in the source lines of their equations.
    nowhere = source_info_util.new_source_info()
    eqns = [
        equation.replace(
            source_info=nowhere,
            invars=[variable(o) if isinstance(o, int) else o for o in operands],
            outvars=[variable(v) for v in outs],
        )
        for equation, operands, outs in equations
    ]
    info = jex.DebugInfo("task", "task", tuple(f"a{i}" for i in range(len(invars))), tuple("r" for _ in outputs))
    jaxpr = jex.Jaxpr((), invars, [variable(v) for v in outputs], eqns, frozenset(), info)
    return jex.ClosedJaxpr(jaxpr, ())


def as_function(closed: Any) -> Callable[..., tuple[Any, ...]]:
    """A closed jaxpr as a function of a flat list of arrays."""

    def task(*arrays: Any) -> tuple[Any, ...]:
        given = [_moved(a, v.aval, into=True) for a, v in zip(arrays, closed.jaxpr.invars, strict=True)]
        results = jex.jaxpr_as_fun(closed)(*given)
        return tuple(_moved(r, v.aval, into=False) for r, v in zip(results, closed.jaxpr.outvars, strict=True))

    return task


def _moved(array: Any, aval: Any, *, into: bool) -> Any:
    """A value in the memory that a task computes with (`into`), or that tasks exchange values in.

    They differ where a `jax.checkpoint` policy offloads a value to the host and the task that made it ends.
    """
    memory: Any = getattr(aval, "memory_space", None)
    if getattr(memory, "name", "Device") != "Host":
        return array
    return jax.device_put(array, memory if into else type(memory).Device)


def struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def struct_of(spec: ArraySpec) -> jax.ShapeDtypeStruct:
    """The ShapeDtypeStruct that a spec describes."""
    if spec.dtype.startswith("key<"):
        dtype: Any = key_dtype(spec.dtype)
        return jax.ShapeDtypeStruct(spec.shape, dtype)
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), weak_type=spec.weak_type)


def lowered(traced: Any, platform: str) -> Any:
    """The module of StableHLO for a traced function, as jit lowers it on `platform`."""
    parameters = mlir.LoweringParameters(hoist_constants_as_args=False)
    return traced.lower(lowering_platforms=(platform,), _private_parameters=parameters)._lowering.stablehlo()


def load_lapack() -> None:
    """Register the kernels of LAPACK. They are SciPy's, which takes a third of a second to load."""
    linalg.initialize_lapack()


def array_type(struct: jax.ShapeDtypeStruct, *, weak: bool) -> Any:
    """The type of an array of this shape and dtype."""
    return jax_core.ShapedArray(struct.shape, struct.dtype, weak_type=weak)


def array_of(buffer: Any, aval: Any, *, copy: bool) -> jax.Array:
    """An array of type `aval` from a buffer of its shape and dtype. With `copy` it has memory of its own.

    Nothing is compiled and the array is not bound to a device, even if its type is weak or has 64 bits. A `jax.Array`
    stays on its device; a NumPy array goes to the default one.
    """
    if isinstance(buffer, jax.Array):
        (device,), sharding = buffer.devices(), buffer.sharding
    else:
        sharding = default_sharding()
        (device,) = sharding.device_set
    wide = True if _is_wide_type(aval.dtype) else None
    put: Any = xla_client.batched_device_put  # pyright: ignore[reportPrivateImportUsage]
    return cast(jax.Array, put(aval, sharding, [buffer], [device], False, copy, enable_x64=wide))


def default_sharding() -> jax.sharding.SingleDeviceSharding:
    """The sharding of arrays that are made without one."""
    return _sharding_of(pxla.get_default_device())


@functools.lru_cache
def _sharding_of(device: Any) -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(device)


@functools.lru_cache
def _is_wide_type(dtype: Any) -> bool:
    return is_wide(str(dtype))


def literal_value(atom: Any) -> np.ndarray:
    """The NumPy value of a JAX literal."""
    return np.asarray(atom.val, atom.aval.dtype)


def register_array_like(kind: type) -> None:
    """Let JAX take objects of a subclass of `jax.Array` as arguments. It gets the value by `__jax_array__` when it
    needs it.

    Without these tables `jax.jit`, and with it most of `jax.numpy`, refuses all types but its own. The registry gives a
    repeated call of `jit` the value at once, and `jax.device_get` the array below a typed key.
    """
    try:
        from jax._src import core, dtypes, tree_util

        def shard(arrays: Sequence[Any], shardings: Any, layouts: Any, copy: Any) -> Any:
            return pxla.shard_args(shardings, layouts, copy, [a.__jax_array__() for a in arrays])  # pyright: ignore

        core.pytype_aval_mappings[kind] = lambda array: array.aval
        pxla.shard_arg_handlers[kind] = shard
        dtypes.canonicalize_value_handlers[kind] = lambda array, **_: array.__jax_array__()
        tree_util.dispatch_registry.register_node(
            kind, lambda array: ((array.__jax_array__(),), None), lambda _, values: values[0]
        )
    except (ImportError, AttributeError, TypeError):  # another version of JAX: jnp.asarray still takes the objects
        return

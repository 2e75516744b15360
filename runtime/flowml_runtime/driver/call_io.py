"""Converts the arguments of a call to the inputs of a plan, and the outputs of a plan to the results of the call.

`Feeder` turns arguments into plain buffers of the declared dtype: typed keys into their key data, Python scalars into
arrays. `Restorer` turns outputs into `jax.Array`s with the weak types and key types of the original function. All small
results go through one compiled identity, which is several times cheaper than a `device_put` for each. Large results
enter JAX without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.api_util
import jax.numpy as jnp
import numpy as np

from flowml.ir._jax import exact_types, is_wide, key_implementation, with_weak_type
from flowml.plan import ArraySpec, Output, Plan
from flowml_runtime.driver.remote import Remote
from flowml_runtime.execution.programs import Array, buffer_struct, constant_array
from flowml_runtime.transport.arrays import own_copy

LARGE_BYTES = 2**18
"""From this size on, entering JAX without a copy saves more time than its `device_put` costs."""

Signature = tuple[tuple[int, ...], Any, bool]
"""(shape, dtype, weak type): the part of a leaf for which a call is compiled."""


def signature(leaf: Any) -> Signature:
    """The signature of an argument leaf, with the dtype that JAX gives it. Raises TypeError if it is not an array."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)  # arrays of typed keys have no weak type
    if type(leaf) is np.ndarray:
        config: Any = jax.config
        return leaf.shape, _jax_dtype(leaf.dtype, config.jax_enable_x64), False
    if type(leaf) is Remote:
        return leaf.kind.signature
    if isinstance(leaf, jax.ShapeDtypeStruct):
        extended = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return leaf.shape, leaf.dtype if extended else jax.dtypes.canonicalize_dtype(leaf.dtype), bool(leaf.weak_type)
    if isinstance(leaf, jax.Ref):
        raise TypeError("a Ref is no array")
    aval: Any = jax.api_util.shaped_abstractify(leaf)
    return aval.shape, _no_time(aval.dtype), aval.weak_type


@functools.lru_cache
def _jax_dtype(dtype: np.dtype[Any], x64: bool) -> Any:
    """The dtype that JAX gives a NumPy array, cached by the setting `x64`. Raises TypeError if it holds no numbers."""
    del x64  # it is part of the cache key
    aval: Any = jax.api_util.shaped_abstractify(np.empty((), dtype))
    return _no_time(aval.dtype)


def _no_time(dtype: Any) -> Any:
    """The dtype. Raises TypeError for dates and durations, which JAX takes as arguments but cannot compute with."""
    if isinstance(dtype, np.dtype) and dtype.kind in "mM":
        raise TypeError("dates and durations are no numbers")
    return dtype


class Feeder:
    """Turns the flat arguments of a call into the input buffers of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._name = plan.name
        self._specs = [
            (s.shape, buffer_struct(s).dtype, s.dtype.startswith("key<"), n)
            for s, n in zip(plan.inputs, plan.input_names, strict=True)
        ]

    def __call__(self, leaves: Sequence[Any], *, copy: bool) -> list[Array]:
        """The input buffers. With `copy` they share no memory that the caller could write to.

        Raises TypeError for leaves that the plan was not compiled for.
        """
        if len(leaves) != len(self._specs):
            raise TypeError(f"plan {self._name!r} takes {len(self._specs)} arrays, got {len(leaves)}")
        buffers: list[Array] = []
        for leaf, (shape, dtype, key, name) in zip(leaves, self._specs, strict=True):
            if type(leaf) is Remote:
                buffer: Array = leaf
            elif isinstance(leaf, jax.Array):
                buffer = jax.random.key_data(leaf) if key else leaf
            else:
                buffer = own_copy(leaf, dtype) if copy else np.asarray(leaf, dtype)
            if (leaf if key else buffer).shape != shape:
                raise TypeError(f"argument {name} of {self._name!r} has shape {np.shape(leaf)}, not {shape}")
            buffers.append(buffer)
        return buffers


class Restorer:
    """Turns the fetched outputs of a plan into its flat results."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._wide = any(is_wide(o.spec.dtype) for o in plan.outputs)
        seen: set[tuple[str, int]] = set()
        self._plain = [
            _is_plain(o) and (o.kind, o.index) not in seen and not seen.add((o.kind, o.index)) for o in plan.outputs
        ]
        self._compiled: dict[tuple[int, ...], Callable[..., list[jax.Array]]] = {}

    def __call__(self, fetched: Sequence[Array], inputs: Sequence[Any], kept: Sequence[Remote] = ()) -> list[Any]:
        """The results. `kept` are the handles of the outputs that stay, by slot."""
        if self._wide:  # the thread that takes the result may have 64 bits disabled
            with exact_types():
                return self._restore(fetched, inputs, kept)
        return self._restore(fetched, inputs, kept)

    def _restore(self, fetched: Sequence[Array], inputs: Sequence[Any], kept: Sequence[Remote]) -> list[Any]:
        outputs = self._plan.outputs
        sources: dict[str, Sequence[Any]] = {"fetch": fetched, "input": inputs, "keep": kept}
        results: list[Any] = [None if o.kind == "constant" else sources[o.kind][o.index] for o in outputs]
        through: list[int] = []
        for position, (value, plain) in enumerate(zip(results, self._plain, strict=True)):
            if type(value) is Remote:
                continue
            if outputs[position].spec.dtype == "float0":
                results[position] = np.zeros(outputs[position].spec.shape, jax.dtypes.float0)
            elif not plain or not (isinstance(value, jax.Array) or value.nbytes >= LARGE_BYTES):
                through.append(position)
            elif not isinstance(value, jax.Array):
                results[position] = jax.device_put(value)
        if through:
            key = tuple(through)
            restore = self._compiled.get(key) or self._compile(key)
            restored = restore(*[results[p] for p in through if outputs[p].kind != "constant"])
            for position, value in zip(through, restored, strict=True):
                results[position] = value
        return results

    def _compile(self, positions: tuple[int, ...]) -> Callable[..., list[jax.Array]]:
        """An executable that returns new arrays, because the owner of an argument that is returned may donate it."""
        outputs = [self._plan.outputs[p] for p in positions]
        constants = [constant_array(self._plan.constants[o.index]) if o.kind == "constant" else None for o in outputs]

        def restore(*buffers: Any) -> list[Any]:
            given = iter(buffers)
            return [typed(next(given) if c is None else c, o.spec) for o, c in zip(outputs, constants, strict=True)]

        structs = [buffer_struct(o.spec) for o in outputs if o.kind != "constant"]
        compiled = jax.jit(restore).lower(*structs).compile()
        self._compiled[positions] = compiled
        return compiled


def _is_plain(output: Output) -> bool:
    return output.kind == "fetch" and not output.spec.weak_type and not output.spec.dtype.startswith("key<")


def typed(buffer: Any, spec: ArraySpec) -> Any:
    """A buffer as an array of the spec's key type or weak type."""
    if spec.dtype.startswith("key<"):
        return jax.random.wrap_key_data(buffer, impl=key_implementation(spec.dtype))
    return with_weak_type(buffer) if spec.weak_type else buffer

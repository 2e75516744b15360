"""Converts the arguments of a call to the inputs of a plan, and the outputs of a plan to the results of the call.

`Feeder` turns arguments into plain buffers of the declared dtype: typed keys into their key data, Python scalars into
arrays. `Restorer` turns outputs into `jax.Array`s with the weak types and key types of the original function, and
compiles nothing for it. Large results enter JAX without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.api_util
import jax.numpy as jnp
import numpy as np

from flowml.ir._jax import array_of, array_type, exact_types, explicit_transfers, is_wide
from flowml.ir.keys import key_implementation
from flowml.plan import ArraySpec, Constant, Plan
from flowml_runtime.driver.remote import Kind, Remote
from flowml_runtime.execution.programs import Array, buffer_struct, constant_array
from flowml_runtime.transport.arrays import own_copy

LARGE_BYTES = 2**18
"""From this size on a result shares memory with the message that brought it. A smaller one would keep it all alive."""

Signature = tuple[tuple[int, ...], Any, bool]
"""(shape, dtype, weak type): the part of a leaf for which a call is compiled."""


def signature(leaf: Any) -> Signature:
    """The signature of an argument leaf, with the dtype that JAX gives it. Raises TypeError if it is not an array."""
    if type(leaf) is Remote:
        return leaf.kind.signature
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)  # arrays of typed keys have no weak type
    if type(leaf) is np.ndarray:
        config: Any = jax.config
        return leaf.shape, _jax_dtype(leaf.dtype, config.jax_enable_x64), False
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
        self._inputs = plan.inputs
        self._specs = [
            (s.shape, buffer_struct(s).dtype, s.dtype.startswith("key<"), n)
            for s, n in zip(plan.inputs, plan.input_names, strict=True)
        ]
        self._known: tuple[list[Kind | None], tuple[int, ...]] = [], ()
        """The kinds of the handles among the last arguments, and the positions of the others."""

    def __call__(self, leaves: Sequence[Any], *, copy: bool) -> list[Array]:
        """The input buffers. With `copy` they share no memory that the caller could write to.

        Raises TypeError for leaves that the plan was not compiled for.
        """
        if len(leaves) != len(self._specs):
            raise TypeError(f"plan {self._name!r} takes {len(self._specs)} arrays, got {len(leaves)}")
        buffers: list[Array] = list(leaves)
        kinds = [leaf.kind if type(leaf) is Remote else None for leaf in leaves]
        known, others = self._known
        if kinds != known:
            # A handle of 64 bits may come to a call without them, which takes its value as jit does.
            same = [
                k is not None and (k.spec.shape, k.spec.dtype) == (s.shape, s.dtype)
                for k, s in zip(kinds, self._inputs, strict=True)
            ]
            others = tuple([i for i, given in enumerate(same) if not given])
        for i in others:
            buffers[i] = self._buffer(leaves[i], *self._specs[i], copy=copy)
        self._known = kinds, others
        return buffers

    def _buffer(self, leaf: Any, shape: tuple[int, ...], dtype: Any, key: bool, name: str, *, copy: bool) -> Array:
        if type(leaf) is Remote and leaf.kind.spec.shape == shape and not key:
            leaf = np.asarray(leaf)
        if isinstance(leaf, jax.Array):
            buffer: Array = jax.random.key_data(leaf) if key and type(leaf) is not Remote else leaf
        else:
            buffer = own_copy(leaf, dtype) if copy else np.asarray(leaf, dtype)
        if (leaf if key else buffer).shape != shape:
            raise TypeError(f"argument {name} of {self._name!r} has shape {np.shape(leaf)}, not {shape}")
        return buffer


class Restorer:
    """Turns the fetched outputs of a plan into its flat results."""

    def __init__(self, plan: Plan) -> None:
        self._outputs = plan.outputs
        self._wide = any(is_wide(o.spec.dtype) for o in plan.outputs)
        used = {o.index for o in plan.outputs if o.kind == "constant"}
        self._constants = {i: _buffer(plan.constants[i]) for i in used}
        seen: set[tuple[str, int]] = set()
        self._own = [
            o.kind == "fetch" and (o.kind, o.index) not in seen and not seen.add((o.kind, o.index))
            for o in plan.outputs
        ]
        """The results whose memory nobody else reads: the first one of each fetched value."""
        self._avals = [buffer_type(o.spec) for o in plan.outputs]
        self._kept = [(p, o.index) for p, o in enumerate(plan.outputs) if o.kind == "keep"]
        self._others = [p for p, o in enumerate(plan.outputs) if o.kind != "keep"]

    def __call__(self, fetched: Sequence[Array], inputs: Sequence[Any], kept: Sequence[Remote] = ()) -> list[Any]:
        """The results. `kept` are the handles of the outputs that stay, by slot."""
        sources: dict[str, Any] = {"fetch": fetched, "input": inputs, "constant": self._constants}
        results: list[Any] = [None] * len(self._outputs)
        for position, slot in self._kept:
            results[position] = kept[slot]
        if not self._others:
            return results
        wide = exact_types() if self._wide else nullcontext()  # the thread that takes it may have 64 bits disabled
        with explicit_transfers(), wide:
            for position in self._others:
                output = self._outputs[position]
                results[position] = self._result(position, sources[output.kind][output.index])
        return results

    def _result(self, position: int, value: Any) -> Any:
        if type(value) is Remote:  # of the state of an object that was passed in: it is there already
            return value
        return restored(value, self._outputs[position].spec, self._avals[position], own=self._own[position])


def restored(value: Array, spec: ArraySpec, aval: Any = None, *, own: bool) -> Any:
    """A buffer as a result of the type `aval`, that of the spec. It is copied if it is not the result's `own`.

    The owner of a value that is also an argument or another result may donate it.
    """
    if spec.dtype == "float0":
        return np.zeros(spec.shape, jax.dtypes.float0)
    here, is_key = isinstance(value, jax.Array), spec.dtype.startswith("key<")
    if own and here and not spec.weak_type and not is_key:
        return value
    own = own and (here or value.nbytes >= LARGE_BYTES)
    array = array_of(value, aval or buffer_type(spec), copy=not own)
    return jax.random.wrap_key_data(array, impl=key_implementation(spec.dtype)) if is_key else array


def buffer_type(spec: ArraySpec) -> Any:
    """The type of the buffer of a result."""
    return array_type(buffer_struct(spec), weak=spec.weak_type)


def _buffer(constant: Constant) -> np.ndarray[Any, Any] | None:
    """The values of a constant, unless its type has none."""
    return None if constant.spec.dtype == "float0" else np.asarray(constant_array(constant))

"""The zoo: functions of every kind that JAX programs are made of, each small and labelled with layers.

A plan must compute what `jax.jit` computes, for each of these and every legal placement; tests of the
compiler, the executor and the cluster all draw from this one table.

    for case in CASES:
        fn, args = case.make()
        case.check(case.jit(fn)(*args, **case.kwargs), something(fn)(*args, **case.kwargs))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo import functions, models

Function = Callable[..., Any]
Make = Callable[[], tuple[Function, tuple[Any, ...]]]


@dataclass(frozen=True)
class Case:
    """One function with arguments. `layers` are patterns that each match some of its nodes (None: unlabelled).

    `tolerance` bounds relative and absolute differences of floating point results; all else must be equal.
    """

    name: str
    make: Make
    layers: tuple[str, ...] | None = None
    tolerance: float = 1e-5
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    static_argnums: tuple[int, ...] = ()
    donate_argnums: tuple[int, ...] = ()

    def jit(self, fn: Function) -> Function:
        """The reference."""
        return jax.jit(fn, static_argnums=self.static_argnums, donate_argnums=self.donate_argnums)

    def check(self, expected: Any, actual: Any) -> None:
        """Raise AssertionError unless trees, shapes, types and values agree."""
        want, tree = jax.tree_util.tree_flatten_with_path(expected)
        got, other = jax.tree_util.tree_flatten(actual)
        assert tree == other, f"{self.name}: result tree {other}, expected {tree}"
        for (path, e), a in zip(want, got, strict=True):
            where = f"{self.name}{jax.tree_util.keystr(path)}"
            assert _kind(a) == _kind(e), f"{where}: {_kind(a)}, expected {_kind(e)}"
            _check_values(where, e, a, self.tolerance)


def _kind(array: Any) -> tuple[Any, ...]:
    return array.shape, array.dtype, getattr(array, "weak_type", False)


def _check_values(where: str, expected: Any, actual: Any, tolerance: float) -> None:
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        expected, actual = jax.random.key_data(expected), jax.random.key_data(actual)
    if jnp.issubdtype(expected.dtype, jnp.inexact):
        wide = np.complex128 if jnp.issubdtype(expected.dtype, jnp.complexfloating) else np.float64
        e, a = np.asarray(expected).astype(wide), np.asarray(actual).astype(wide)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance, err_msg=where)
    else:
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected), err_msg=where)


CASES: tuple[Case, ...] = (
    Case("scopes", functions.scopes, ("enc", "dec")),
    Case("no cut edge", functions.no_cut_edge, ("left", "right")),
    Case("tied weights", functions.tied_weights, ("embed", "body", "unembed")),
    Case("tied weights, gradient", functions.tied_weights_gradient, ("embed", "body", "unembed")),
    Case("skip connections", functions.skip_connections, ("down0", "down1", "up0", "up1")),
    Case("while_loop", functions.while_loop, ("loop", "after")),
    Case("fori_loop", functions.fori_loop, ("loop", "after")),
    Case("cond", functions.cond, ("test", "branch")),
    Case("switch", functions.switch, ("pick", "branch")),
    Case("custom_vjp", functions.custom_vjp, ("one", "two")),
    Case("custom_jvp", functions.custom_jvp, ("one", "two")),
    Case("remat", functions.remat, ("one", "two")),
    Case("keys", functions.keys, ("split", "draw")),
    Case("rbg keys", functions.rbg_keys, ("split", "draw")),
    Case("dropout", functions.dropout, ("one", "drop", "two")),
    Case("many dtypes", functions.many_dtypes, ("cast", "use"), tolerance=1e-2),
    Case("donated arguments", functions.donated, ("one", "two"), donate_argnums=(0, 1)),
    Case("trees with None", functions.trees_with_none, ("one", "two")),
    Case("records", functions.records, ("one", "two")),
    Case("zero-size arrays", functions.zero_size, ("one", "two")),
    Case("literals out", functions.literals_out, ("one",)),
    Case("inputs out", functions.inputs_out, ("one",)),
    Case("captured constant", functions.captured_constant, ("one", "two")),
    Case("duplicated outputs", functions.duplicated_outputs, ("one", "two")),
    Case("unused inputs", functions.unused_inputs, ("one", "two")),
    Case("weak types", functions.weak_types, ("one", "two")),
    Case("static arguments", functions.static_arguments, ("one", "two"), static_argnums=(1, 2)),
    Case(
        "keyword arguments",
        functions.keyword_arguments,
        ("one", "two"),
        kwargs={"scale": 2.0, "shift": {"by": np.float32(3)}},
    ),
    Case("vmap", functions.vmapped, ("one", "two")),
    Case("nested jit", functions.nested_jit, ("outer", "deep")),
    Case("fft", functions.fft, ("spectrum", "back")),
    Case("sort and top_k", functions.sorting, ("sort", "top")),
    Case("decompositions", functions.decompositions, ("qr", "cholesky", "svd"), tolerance=1e-4),
    Case("scatter and gather", functions.scatter_gather, ("scatter", "gather")),
    Case("hessian", functions.hessian, ("one", "two")),
    Case("mlp", models.mlp, ("l0", "l1", "l2")),
    Case("mlp, value_and_grad", models.mlp_gradient, ("l0", "l1", "l2")),
    Case("mlp, adam step", models.mlp_adam, ("l0", "l1", "l2"), tolerance=1e-4),
    Case("linen cnn", models.linen_cnn, ("conv1", "conv2", "fc")),
    Case("linen cnn, value_and_grad", models.linen_cnn_gradient, ("conv1", "conv2", "fc"), tolerance=1e-4),
    Case("linen batch norm", models.linen_batch_norm, ("dense", "norm")),
    Case("nnx mlp", models.nnx_mlp, ("first", "second")),
    Case("equinox mlp", models.equinox_mlp),
    Case("attention", models.attention, ("qkv", "scores", "out")),
    Case("transformer", models.transformer, ("embed", "block0", "block1", "head")),
    Case(
        "transformer, value_and_grad",
        models.transformer_gradient,
        ("embed", "block0", "block1", "head"),
        tolerance=1e-4,
    ),
    Case("lstm", models.lstm, ("embed", "cell", "head")),
    Case("lstm, value_and_grad", models.lstm_gradient, ("embed", "cell", "head"), tolerance=1e-4),
    Case("scan over stacked layers, gradient", models.stacked_scan_gradient, ("stack", "head"), tolerance=1e-4),
    Case("unlabelled", models.unlabelled),
)

BY_NAME = {case.name: case for case in CASES}

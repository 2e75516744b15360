"""Programs of lineax, optimistix and diffrax run as under jit. Their primitives are Python functions of the library.
Those call Python at run time: a solver that fails raises its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from equinox.internal import noinline

import flowml as fm
from tests.training.reference import assert_close

A = jnp.eye(4) * 3 + 0.1
B = jnp.arange(4.0)
Y = jnp.ones(3)


def solve(a: jax.Array, b: jax.Array) -> jax.Array:
    with fm.layer("solve"):
        x = lx.linear_solve(lx.MatrixLinearOperator(a), b, lx.LU()).value
    with fm.layer("next"):
        return jax.vmap(lambda v: lx.linear_solve(lx.MatrixLinearOperator(a.T), v).value)(jnp.stack([x, b]))


def iterate(a: jax.Array, b: jax.Array) -> jax.Array:
    """A solver with a function in place of a matrix, in a loop that is differentiated."""
    struct = jax.ShapeDtypeStruct((4,), jnp.float32)
    operator = lx.FunctionLinearOperator(lambda v: a @ v, struct, lx.positive_semidefinite_tag)

    def step(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return lx.linear_solve(operator, carry, lx.CG(1e-5, 1e-5)).value, carry[0]

    return jax.grad(lambda b: jax.lax.scan(step, b, None, length=3)[1].sum())(b)


def root(y: jax.Array) -> jax.Array:
    def found(factor: jax.Array) -> jax.Array:
        return optx.root_find(lambda y, f: jnp.cos(y) - y * f, optx.Newton(1e-6, 1e-6), y[0] / 2, args=factor).value

    return jax.grad(found)(y[1])


def stiff(y: jax.Array) -> Any:
    term = diffrax.ODETerm(lambda t, y, args: -y * 2)
    control = diffrax.PIDController(1e-5, 1e-5)
    return diffrax.diffeqsolve(term, diffrax.Kvaerno3(), 0.0, 1.0, 0.1, y, stepsize_controller=control).ys


def with_progress(y: jax.Array) -> Any:
    """The meter has a lock, in a global of its module."""
    term, meter = diffrax.ODETerm(lambda t, y, args: -y), diffrax.TextProgressMeter()
    return diffrax.diffeqsolve(term, diffrax.Euler(), 0.0, 1.0, 0.25, y, progress_meter=meter).ys


def shown(y: jax.Array) -> Any:
    """What is printed is a module of equinox, whose missing fields are a sentinel."""
    return jax.grad(lambda y: eqx.debug.backward_nan(y * 2).sum())(y), noinline(lambda v: jnp.sin(v) * 2)(y)


CASES: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    "solve": (solve, (A, B)),
    "iterate": (iterate, (A, B)),
    "root": (root, (Y,)),
    "stiff": (stiff, (Y,)),
    "with_progress": (with_progress, (Y,)),
    "shown": (shown, (Y,)),
}


@pytest.mark.parametrize("case", CASES)
def test_solvers_run_as_under_jit(threads_cluster: fm.Cluster, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    function, arguments = CASES[case]
    want = jax.jit(function)(*arguments)
    jax.effects_barrier()
    printed = capfd.readouterr().out
    got = fm.dataflow(function, cluster=threads_cluster)(*arguments)
    assert_close(got, want)
    assert capfd.readouterr().out == printed


def test_a_solver_that_fails_raises_its_error_in_the_driver(threads_cluster: fm.Cluster) -> None:
    run = fm.dataflow(solve, cluster=threads_cluster)
    with pytest.raises(fm.FlowmlError, match="returned non-finite"):
        run(A * 0, B)
    assert np.isfinite(np.asarray(run(A, B))).all()

"""What was exported for one program serves the next ones of the process, if it does the same."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from flowml.ir.exports import export
from flowml.ir.forms import Exported, Form, form_of

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
X = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def lowerings(work: Callable[[], Any]) -> int:
    """How many functions JAX lowers during `work`."""
    found: list[str] = []

    def heard(event: str, _: float, **__: Any) -> None:
        found.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        work()
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    return found.count(LOWERED)


def form(fn: Callable[..., Any], *inputs: Any) -> Any:
    traced = jax.jit(fn).trace(*inputs)
    return form_of(traced.jaxpr.jaxpr, traced.jaxpr.consts)


def scaled(by: Any) -> Callable[[Any], Any]:
    return lambda x: [jnp.tanh(x @ x) * by]


def test_an_equal_function_of_another_program_is_not_lowered_again() -> None:
    by = float(np.random.default_rng().normal())
    first: list[bytes] = []
    assert lowerings(lambda: first.append(export(scaled(by), [X], ["cpu"]))) == 1
    assert lowerings(lambda: first.append(export(scaled(by), [X], ["cpu"]))) == 0
    assert first[0] == first[1]


def test_what_differs_is_lowered() -> None:
    by = float(np.random.default_rng().normal())
    made = [export(scaled(by), [X], ["cpu"])]
    for fn, shape, platforms in [
        (scaled(by + 1), X, ["cpu"]),
        (scaled(np.float64(by)), X, ["cpu"]),
        (scaled(-by), X, ["cpu"]),
        (scaled(by), jax.ShapeDtypeStruct((9, 9), jnp.float32), ["cpu"]),
        (scaled(by), jax.ShapeDtypeStruct((8, 8), jnp.bfloat16), ["cpu"]),
        (scaled(by), X, ["cuda"]),
        (scaled(np.full((8, 8), by, np.float32)), X, ["cpu"]),
        (scaled(np.full((8, 8), by + 1, np.float32)), X, ["cpu"]),
    ]:
        made.append(export(fn, [shape], platforms))
    with jax.default_matmul_precision("highest"):
        made.append(export(scaled(by), [X], ["cpu"]))
    with jax.enable_x64(True):
        made.append(export(lambda x: [x.sum(dtype=jnp.promote_types(x.dtype, float))], [X], ["cpu"]))
    made.append(export(lambda x: [x.sum(dtype=jnp.promote_types(x.dtype, float))], [X], ["cpu"]))
    # A NumPy scalar has the bits of the Python number in this function.
    assert len(set(made)) == len(made) - 1


def test_functions_of_the_user_are_not_kept_alive() -> None:
    """A callback, a rule for derivatives and the structure of a tree hold what the user wrote."""

    class Big:
        def __call__(self, x: Any) -> Any:
            return x

    def called(big: Big) -> Callable[[Any], Any]:
        return lambda x: [jax.pure_callback(big, X, x)]

    def ruled(big: Big) -> Callable[[Any], Any]:
        fn = jax.custom_jvp(lambda x: x * 2)
        fn.defjvp(lambda primals, tangents: (big(primals[0]), tangents[0]))
        return lambda x: [jax.lax.fori_loop(0, 2, lambda _, y: fn(y), x)]

    for wrap in (called, ruled):
        big = Big()
        found = form(wrap(big), X)
        assert found is None or not found.lasting
        seen = weakref.ref(big)
        if wrap is ruled:
            export(wrap(big), [X], ["cpu"])
        del big, found
        jax.clear_caches()
        gc.collect()
        assert seen() is None


@pytest.mark.parametrize(
    "fn", [jnp.tanh, jnp.linalg.norm, lambda x: jnp.sort(x, axis=0), lambda x: x[::2].at[0].set(3)]
)
def test_forms_of_plain_functions_last(fn: Callable[..., Any]) -> None:
    assert form(fn, X).lasting


def test_the_oldest_are_forgotten() -> None:
    exported, forms = Exported(max_bytes=10), [Form(key, lasting=True, nbytes=1) for key in range(5)]
    for form in forms[:4]:
        exported.add("cpu", form, b"12")
        exported.get("cpu", forms[0])
    assert [exported.get("cpu", form) for form in forms[:4]] == [b"12", None, b"12", b"12"]
    assert exported.get("gpu", forms[0]) is None
    exported.add("cpu", forms[2], b"12")
    assert len(exported) == 3, "the same again counts once"
    exported.add("cpu", forms[4], bytes(10))
    assert len(exported) == 0, "what is larger than the bound is not kept"


def test_the_size_of_a_form_is_what_it_takes() -> None:
    """Forms are many times larger than exports, so a bound on exports alone let them grow to gigabytes."""

    def deep(x: Any) -> Any:
        for _ in range(100):
            x = jnp.tanh(jnp.where(x > 0, x, x + np.ones((8, 8), np.float32)) @ x)
        return x.sum()

    traced = jax.jit(jax.grad(deep)).trace(X)
    gc.collect()
    tracemalloc.start()
    found = form_of(traced.jaxpr.jaxpr, traced.jaxpr.consts)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert found is not None
    assert taken / 2 < found.nbytes < 3 * taken
    assert found.nbytes > 5 * len(export(jax.grad(deep), [X], ["cpu"]))

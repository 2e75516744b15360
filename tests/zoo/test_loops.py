"""Training loops in the style of public scripts run distributed, with state that stays on the workers, as under jit.

Each runs under three placements, and through a `Trainer` where that fits. A call moves its batch and its metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.zoo.loop import ROWS, STEPS, Loop, Made, Supervised
from tests.zoo.loops import LOOPS

SUPERVISED = tuple(loop for loop in LOOPS if loop.make.__annotations__["return"] == "Supervised")


def placement_of(kind: str, loop: Loop) -> Any:
    if kind == "pattern":
        return {pattern: f"worker:{i}" for i, patterns in enumerate(loop.layers) for pattern in patterns}
    return fm.Pipeline(stages=2) if kind == "pipeline" else kind


def close(found: Any, wanted: Any, tolerance: float) -> None:
    """Equal in structure and kinds, and in value up to the tolerance, relative to the largest value of an array."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, e), a in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        if not isinstance(e, jax.Array | np.ndarray):
            assert a is e or a == e
            continue
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (e.shape, e.dtype), where
        if jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(jnp.asarray(a)), jax.random.key_data(e)
        a, e = np.asarray(a), np.asarray(e)
        if e.dtype.kind in "iub":
            np.testing.assert_array_equal(a, e, err_msg=where)
        else:
            scale = float(np.max(np.abs(e), initial=1e-2))
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale, err_msg=where)


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def moved(cluster: Any, call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and the bytes of the arrays that the driver sends and gets meanwhile."""
    found: list[int] = []
    session, endpoint = cluster.session, cluster.endpoint
    send, receive = endpoint.send, session.on_message

    def sending(peer: str, message: Any, arrays: Sequence[Any] = (), timeout_s: float | None = None) -> None:
        found.append(sum(a.nbytes for a in arrays))
        send(peer, message, arrays, timeout_s)

    def receiving(peer: str, message: Any, arrays: Sequence[Any]) -> None:
        found.append(sum(a.nbytes for a in arrays))
        receive(peer, message, arrays)

    endpoint.send, session.on_message = sending, receiving
    try:
        return call(), sum(found)
    finally:
        del endpoint.send, session.on_message


@cache
def reference(loop: Loop) -> tuple[Made, Any, list[Any], int]:
    """The loop, its last state and the metrics of all steps under jit, and how often that compiles."""
    found = loop.make()
    program = found.made() if isinstance(found, Supervised) else found
    step, state, metrics = program.jit(program.step), program.state, list[Any]()
    for batch in program.batches:
        state, told = step(state, batch)
        metrics.append(told)
    return program, state, metrics, step._cache_size() if program.jit is jax.jit else 1


@pytest.mark.parametrize("kind", ["auto", "pipeline", "pattern"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_a_loop_equals_jit_and_moves_its_batch_and_metrics(loop: Loop, kind: str, threads_cluster: fm.Cluster) -> None:
    program, wanted, metrics, compiled = reference(loop)
    where = placement_of(kind, loop)
    step = fm.dataflow(program.step, cluster=threads_cluster, placement=where, keep=0, donate_argnums=0)
    state: Any = program.state
    for number, batch in enumerate(program.batches):
        (state, found), travelled = moved(threads_cluster, lambda s=state, b=batch, f=step: f(s, b))
        close(found, metrics[number], loop.tolerance)
        if number >= compiled:  # a call that compiles sends a plan, and the first one sends the state
            most = max(2 * nbytes(batch) + nbytes(found), nbytes(state) // 100)
            assert travelled <= most, f"{kind}: call {number} moves {travelled} bytes, more than {most}"
    kept = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, fm.Remote)]
    assert len(kept) == sum(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(wanted))
    devices = {part.device for part in step.plan(state, program.batches[0]).partitions}
    assert len(devices) == (1 if kind == "auto" else 2), f"{kind}: {devices}"
    close(state, wanted, loop.tolerance)


@pytest.mark.parametrize("loop", SUPERVISED, ids=lambda loop: loop.name)
def test_a_trainer_equals_the_plain_loop(loop: Loop, threads_cluster: fm.Cluster) -> None:
    task: Any = loop.make()
    trainer = fm.Trainer(
        task.loss,
        task.optimizer,
        cluster=threads_cluster,
        placement=fm.Pipeline(stages=2),
        has_state=task.state is not None,
    )
    result = trainer.fit(
        task.params, task.source, batch_size=ROWS, steps=STEPS, state=task.state, progress=False, seed=3
    )
    params, model, losses = plain(task)
    close(result.params, params, loop.tolerance)
    close(result.state, model, loop.tolerance)
    np.testing.assert_allclose([record["loss"] for record in result.history], losses, rtol=1e-4)


def plain(task: Supervised) -> tuple[Any, Any, list[float]]:
    """The loop over the batches of a fit, with its keys: parameters, model state, losses."""
    has_state = task.state is not None
    params, model, moments = task.params, task.state, task.optimizer.init(task.params)
    gradient, losses = jax.jit(jax.value_and_grad(task.loss, has_aux=has_state)), list[float]()
    order = epoch_order(STEPS * ROWS, 3, 0)
    for number in range(STEPS):
        batch = jax.tree.map(lambda x, n=number: x[order[n * ROWS :][:ROWS]], task.source)
        key = [jax.random.fold_in(jax.random.key(3), number)] if task.rng else []
        value, gradients = gradient(params, *([model] if has_state else []), batch, *key)
        value, model = value if has_state else (value, None)
        updates, moments = task.optimizer.update(gradients, moments, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return params, model, losses

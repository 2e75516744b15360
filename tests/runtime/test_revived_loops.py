"""A loop with kept values goes on after the loss of a worker, from the state that was saved last."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from tests.conftest import wait_until
from tests.stalls import stop

PLACE = {"a": "worker:0", "b": "worker:1"}


def train_step(state: Any, x: Any) -> Any:
    with fm.layer("a"):
        h = state["a"] * 0.5 + x
    with fm.layer("b"):
        b = state["b"] + h.sum()
    return {"a": h, "b": b}, jnp.sum(b)


def first() -> Any:
    return {"a": np.arange(4, dtype=np.float32), "b": np.ones(3, np.float32)}


def expected(steps: int) -> Any:
    state = first()
    for _ in range(steps):
        state, _ = jax.jit(train_step)(state, 1.0)
    return state


def assert_is(state: Any, steps: int) -> None:
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected(steps)), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-6)


def lose(cluster: fm.Cluster, worker: str) -> None:
    cluster.end_worker(worker)
    wait_until(lambda: worker not in {d.worker for d in cluster.devices}, "the loss is known", 30)


def said(call: Callable[[], object]) -> None:
    """The first call that misses a lost value raises the error, because its batch was chosen for the lost state."""
    with pytest.raises(fm.WorkerLostError, match=r"was lost.*; call .* again: it goes on from the state saved in"):
        call()


def run(step: Any, state: Any, times: int) -> Any:
    for _ in range(times):
        state, _ = step(state, 1.0)
    return state


@pytest.mark.parametrize("donate", [None, 0])
@pytest.mark.parametrize("lost", ["worker:0", "worker:1"])
def test_a_worker_that_the_placement_names_is_started_again(tmp_path: Path, lost: str, donate: int | None) -> None:
    with fm.Cluster.threads(workers=2) as cluster:
        step = fm.dataflow(train_step, cluster=cluster, placement=PLACE, keep=0, donate_argnums=donate)
        state = run(step, first(), 3)
        where = fm.save(state, tmp_path)
        state = run(step, state, 2)
        lose(cluster, lost)
        said(lambda: step(state, 1.0))
        with pytest.warns(fm.FlowmlWarning) as caught:
            state = run(step, state, 1)
        (text,) = [str(w.message) for w in caught]
        assert f"{lost} was lost (" in text and f"train_step goes on from the state saved in {where}" in text
        assert_is(state, 4)
        assert [state[k].device for k in "ab"] == ["worker:0/cpu:0", "worker:1/cpu:0"]
        assert_is(run(step, state, 2), 6)


def test_without_a_placement_the_remaining_workers_take_over(tmp_path: Path) -> None:
    with fm.Cluster.threads(workers=2) as cluster:
        step = fm.dataflow(train_step, cluster=cluster, keep=0)
        state = fm.put(first(), cluster, "worker:0")
        state = run(step, state, 2)
        fm.save((7, state), tmp_path)
        lose(cluster, state["a"].device.partition("/")[0])
        said(lambda: step(state, 1.0))
        with pytest.warns(fm.FlowmlWarning, match="goes on from the state saved"):
            state = run(step, state, 1)
        assert_is(state, 3)
        assert {state[k].device for k in "ab"} == {"worker:1/cpu:0"}
        assert_is(run(step, state, 1), 4)


def test_a_call_that_loses_a_worker_says_that_the_next_one_goes_on(tmp_path: Path) -> None:
    with fm.Cluster.local(workers=2) as cluster:
        step = fm.dataflow(train_step, cluster=cluster, placement=PLACE, keep=0, donate_argnums=0)
        state = run(step, first(), 2)
        fm.save(state, tmp_path)
        stop(cluster.pids["worker:1"])
        plans = cluster.session._plans  # pyright: ignore[reportPrivateUsage]

        def kill() -> None:
            wait_until(lambda: any(len(handle.steps) for handle in plans.values()), "the call is in flight", 30)
            os.kill(cluster.pids["worker:1"], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(
            fm.WorkerLostError,
            match=r"worker:1 was lost[^;]*; call train_step again: it goes on from the state saved in",
        ):
            step(state, 1.0)
        killer.join(30)
        with pytest.warns(fm.FlowmlWarning, match="goes on from the state saved"):
            state, _ = step(state, 1.0)  # all of its values were donated to the call that failed
        assert_is(state, 3)


def test_a_submitted_call_that_loses_a_worker_raises_once_too(tmp_path: Path) -> None:
    """Its future has the error, and the state was donated to it: the next call with that state goes on."""
    with fm.Cluster.local(workers=2) as cluster:
        step = fm.dataflow(train_step, cluster=cluster, placement=PLACE, keep=0, donate_argnums=0)
        state = run(step, first(), 2)
        fm.save(state, tmp_path)
        stop(cluster.pids["worker:1"])
        future = step.submit(state, 1.0)
        os.kill(cluster.pids["worker:1"], signal.SIGKILL)
        with pytest.raises(fm.WorkerLostError, match=r"worker:1 was lost"):
            future.result(60)
        with pytest.warns(fm.FlowmlWarning, match="goes on from the state saved"):
            state, _ = step.submit(state, 1.0).result(60)
        assert_is(state, 3)


def test_a_loop_that_loads_the_saved_state_takes_each_batch_once(tmp_path: Path) -> None:
    """A batch that was chosen for the state that is lost is not applied to the saved one."""

    def count(state: Any, batch: Any) -> Any:
        with fm.layer("a"):
            seen = state["a"].at[batch].add(1)
        with fm.layer("b"):
            done = state["b"] + 1
        return {"a": seen, "b": done}, done

    with fm.Cluster.threads(workers=2) as cluster:
        step = fm.dataflow(count, cluster=cluster, placement=PLACE, keep=0, donate_argnums=0)
        state: Any = {"a": np.zeros(12, np.int32), "b": np.int32(0)}
        done, losses = 0, 0
        while done < 12:
            if done == 8 and not losses:
                lose(cluster, "worker:1")
            try:
                state, number = step(state, done)
                done = int(number)
            except fm.WorkerLostError:
                cluster.bring_back(cluster.lost)
                state = fm.load(tmp_path, cluster, PLACE)
                done, losses = int(state["b"]), losses + 1
            if done == 5:
                fm.save(state, tmp_path)
        assert losses == 1
        np.testing.assert_array_equal(state["a"], np.ones(12))


def test_all_of_a_state_comes_from_one_save(tmp_path: Path) -> None:
    """Of two arguments one is lost. The other is from a later step, and must not go on with the saved one."""

    def step_of(a: Any, b: Any, x: Any) -> Any:
        state, total = train_step({"a": a, "b": b}, x)
        return state["a"], state["b"], total

    with fm.Cluster.threads(workers=2) as cluster:
        step = fm.dataflow(step_of, cluster=cluster, placement=PLACE, keep=(0, 1))
        placed = fm.put(first(), cluster, PLACE)
        a, b = placed["a"], placed["b"]
        for _ in range(2):
            a, b, _ = step(a, b, 1.0)
        fm.save((a, b), tmp_path)
        a, b, _ = step(a, b, 1.0)
        lose(cluster, "worker:1")
        assert not a.is_lost() and b.is_lost()
        said(lambda: step(a, b, 1.0))
        with pytest.warns(fm.FlowmlWarning, match="goes on from"):
            a, b, _ = step(a, b, 1.0)
        assert_is({"a": a, "b": b}, 3)


def test_the_error_says_what_to_do_where_nothing_fits(tmp_path: Path) -> None:
    with fm.Cluster.threads(workers=2) as cluster:
        step = fm.dataflow(train_step, cluster=cluster, placement=PLACE, keep=0)
        state = run(step, first(), 1)
        fm.save(state["a"], tmp_path)  # not all of the state
        lose(cluster, "worker:1")
        with pytest.raises(fm.WorkerLostError, match=r"fm\.save the state of train_step now and then"):
            step(state, 1.0)


@pytest.mark.parametrize("told", [False, True])
def test_a_saved_state_that_was_removed_is_named(tmp_path: Path, *, told: bool) -> None:
    with fm.Cluster.threads(workers=2) as cluster:
        step = fm.dataflow(train_step, cluster=cluster, placement=PLACE, keep=0)
        state = run(step, first(), 1)
        where = fm.save(state, tmp_path / "saved")
        lose(cluster, "worker:1")
        if told:
            said(lambda: step(state, 1.0))
        shutil.rmtree(tmp_path / "saved")
        for _ in range(2):
            with pytest.raises(fm.WorkerLostError, match=f"saved in {where} is not there any more; save to"):
                step(state, 1.0)


def test_a_used_up_handle_is_still_an_error(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """Without a loss a saved state hides no mistake."""
    step = fm.dataflow(train_step, cluster=threads_cluster, placement=PLACE, keep=0, donate_argnums=0)
    state = run(step, first(), 1)
    fm.save(state, tmp_path)
    run(step, state, 1)
    with pytest.raises(fm.ClusterError, match="was donated to"):
        step(state, 1.0)


def test_a_loaded_state_is_a_saved_one(tmp_path: Path) -> None:
    fm.save(first(), tmp_path)
    with fm.Cluster.threads(workers=2) as cluster:
        step = fm.dataflow(train_step, cluster=cluster, placement=PLACE, keep=0)
        state = run(step, fm.load(tmp_path, cluster, PLACE, like=first()), 2)
        lose(cluster, "worker:0")
        said(lambda: step.submit(state, 1.0))
        with pytest.warns(fm.FlowmlWarning, match="goes on from"):
            state = step.submit(state, 1.0).result(60)[0]
        assert_is(state, 1)


def test_a_loop_of_an_equinox_module_goes_on(tmp_path: Path) -> None:
    def step_of(state: Any, x: Any) -> Any:
        model, count = state
        value, gradient = eqx.filter_value_and_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(model)
        return (eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient)), count + 1), value

    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x = np.arange(12, dtype=np.float32).reshape(4, 3) / 12
    wanted: Any = model, jnp.int32(0)
    for _ in range(4):
        wanted, _ = eqx.filter_jit(step_of)(wanted, x)
    with fm.Cluster.threads(workers=2) as cluster:
        places = {"*layers/0": "worker:0", "*layers/1": "worker:1"}
        step = fm.dataflow(step_of, cluster=cluster, placement=places, keep=0, donate_argnums=0)
        state: Any = model, jnp.int32(0)
        for _ in range(3):
            state, _ = step(state, x)
        fm.save(state, tmp_path)
        state, _ = step(state, x)
        lose(cluster, "worker:1")
        said(lambda: step(state, x))
        with pytest.warns(fm.FlowmlWarning, match="goes on from the state saved"):
            state, _ = step(state, x)
        assert state[0].activation is model.activation and int(state[1]) == 4
        for number in (0, 1):
            np.testing.assert_allclose(state[0].layers[number].weight, wanted[0].layers[number].weight, rtol=1e-5)

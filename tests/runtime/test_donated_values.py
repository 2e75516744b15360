"""What is donated, what stays beside it, and that the memory of a kept state is overwritten in place."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime.driver.remote import Remote
from flowml_runtime.driver.steps import Steps
from flowml_runtime.execution.kept import value_of
from flowml_runtime.execution.step_program import StepFault
from tests.conftest import wait_until

SIDE = 64
DEVICE = "worker:0/cpu:0"


@pytest.fixture(scope="module")
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=1) as cluster:
        yield cluster


def grown(state: Any, x: Any) -> Any:
    return jax.tree_util.tree_map(lambda a: a * 2 + x, state), x + 1


def held(cluster: fm.Cluster) -> int:
    gc.collect()
    return cluster.session.held.on(DEVICE)


def test_values_of_one_call_may_be_donated_apart(cluster: fm.Cluster) -> None:
    both = fm.dataflow(lambda x: (x + 1, x + 2, x + 3), cluster=cluster, keep=(0, 1, 2))
    double = fm.dataflow(lambda a: a * 2, cluster=cluster, keep=0, donate_argnums=0)
    wait_until(lambda: held(cluster) == 0, "handles of earlier tests are freed")
    a, b, c = both(np.zeros(4, np.float32))
    nbytes = a.nbytes
    result = double(a)
    np.testing.assert_array_equal(double(b), np.full(4, 4))  # a sibling of a donated value is usable
    np.testing.assert_array_equal(c, np.full(4, 3))
    np.testing.assert_array_equal(result, np.full(4, 2))
    for gone in (a, b):
        with pytest.raises(ClusterError, match="was donated to step"):
            double(gone)
        with pytest.raises(ClusterError, match="was donated to step"):
            np.asarray(gone)
    assert not c.is_deleted() and a.is_deleted()
    wait_until(lambda: held(cluster) == 2 * nbytes, "only what can be used is kept")
    del a, b, gone
    assert held(cluster) == 2 * nbytes  # the donated values are not freed twice
    del c, result
    wait_until(lambda: held(cluster) == 0, "everything is freed")


def failing(x: Any) -> Any:
    def fail(v: Any) -> Any:
        raise ZeroDivisionError("no such quotient")

    return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x) * 2


@pytest.mark.parametrize("keep", [0, None])
def test_a_value_that_was_donated_to_a_failed_call_names_the_failure(cluster: fm.Cluster, keep: int | None) -> None:
    program = fm.dataflow(failing, cluster=cluster, keep=keep, donate_argnums=0)
    value: Any = fm.put(np.ones(3, np.float32), cluster)
    with pytest.raises(fm.FlowmlError, match="no such quotient"):
        np.asarray(program(value))
    with pytest.raises(
        ClusterError, match=r"was donated to step \d+ of failing at .*, which failed; begin again.*quotient"
    ):
        value.fetch()
    with pytest.raises(ClusterError, match="which failed; begin again from values that you have fetched or saved"):
        program(value)
    assert "which failed" in repr(value)


def test_a_value_that_a_failed_call_on_this_thread_took_names_the_failure(cluster: fm.Cluster) -> None:
    program = fm.dataflow(lambda x: x * 2, cluster=cluster, keep=0, donate_argnums=0)
    value: Any = program(fm.put(np.ones(3, np.float32), cluster))
    value.fetch()  # it is there, so that the next call need not wait
    ((_, known),) = program.programs_on(cluster).items()
    assert known.handle is not None and known.handle.local is not None
    with pytest.MonkeyPatch.context() as patch:

        def keep(*_: Any) -> Any:
            raise StepFault("task0") from ZeroDivisionError("no such quotient")

        patch.setattr(known.handle.local, "keep", keep)
        with pytest.raises(fm.FlowmlError, match="no such quotient"):
            program(value)
    with pytest.raises(ClusterError, match=r"which failed; begin again from .* no such quotient"):
        value.fetch()


def test_a_kept_state_is_overwritten_in_place_and_equals_jit(cluster: fm.Cluster) -> None:
    start = {"a": np.ones((SIDE, SIDE), np.float32), "b": [np.arange(5.0, dtype=np.float32), np.float32(3)]}
    program = fm.dataflow(grown, cluster=cluster, keep=0, donate_argnums=0)
    jitted = jax.jit(grown)
    state, wanted, at = start, start, list[set[int]]()
    for step in range(6):
        x = np.float32(step)
        state, shown = program(state, x)
        wanted, expected = jitted(wanted, x)
        assert float(shown) == float(expected)
        at.append(addresses(cluster, state))
    for mine, theirs in zip(*map(jax.tree_util.tree_leaves, (state, wanted)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert at[-1] == at[-2]


def addresses(cluster: fm.Cluster, state: Any) -> set[int]:
    """Where the worker has the large arrays of a kept state."""
    session: Any = cluster.session
    (worker,) = session._local.values()
    names = [x.number for x in jax.tree_util.tree_leaves(state) if isinstance(x, Remote) and x.nbytes > 4096]
    (cells,) = [[mine[n] for n in names] for mine in worker._keeping.kept._cells.values() if mine]
    return {value_of(cell).unsafe_buffer_pointer() for cell in cells}


def test_an_argument_of_another_shape_is_refused_by_its_name(cluster: fm.Cluster) -> None:
    program = fm.dataflow(lambda a: a * 2, cluster=cluster)
    handle = cluster.session.load(program.plan(np.zeros(3, np.float32)))
    for given in (np.zeros(2, np.float32), fm.put(np.zeros(2, np.float32), cluster)):
        with pytest.raises(TypeError, match=r"argument .* has shape \(2,\), not \(3,\)"):
            cluster.session.submit(handle, [given])


def test_a_call_that_fetches_is_reported_by_one_message(cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fm.dataflow(grown, cluster=cluster, keep=0)
    silent = fm.dataflow(lambda x: (x, x * 2), cluster=cluster, keep=(0, 1))
    collect, told = Steps.collect, list[tuple[int, ...]]()

    def collecting(steps: Steps, step: int, slots: Any, arrays: Any) -> None:
        told.append(tuple(slots))
        collect(steps, step, slots, arrays)

    monkeypatch.setattr(Steps, "collect", collecting)
    x = np.float32(2)
    state, shown = program.submit({"a": x}, x).result(60)
    assert (float(state["a"]), float(shown), told) == (6.0, 3.0, [(0,)])
    assert float(silent.submit(x).result(60)[1]) == 4.0
    assert told == [(0,), (0,)]


def test_calls_leave_nothing_behind_where_they_keep_nothing() -> None:
    def apart(x: Any) -> Any:
        with fm.layer("a"):
            y = x + 1
        with fm.layer("b"):
            return y * 2, y

    with fm.Cluster.threads(workers=2) as cluster:
        program = fm.dataflow(apart, cluster=cluster, placement={"a": "worker:0", "b": "worker:1"}, keep=0)
        for number in range(3):
            kept, shown = program(np.float32(number))
            assert (float(kept), float(shown)) == ((number + 1) * 2, number + 1)
        session: Any = cluster.session
        making = [worker._keeping.kept._making for worker in session._local.values()]
        wait_until(lambda: not any(making), "no step is to make a value")


def test_a_step_with_kept_values_runs_on_its_callers_thread(
    cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fm.dataflow(lambda x, y: (x @ x + y, y.sum()), cluster=cluster, keep=0, donate_argnums=0)
    x, y = np.eye(64, dtype=np.float32), np.ones((64, 64), np.float32)
    state, _ = program(x, y)
    sent: list[Any] = []
    monkeypatch.setattr(cluster.endpoint, "send", lambda *message: sent.append(message))
    for _ in range(2):
        given = state
        state, total = program(given, y)
        assert float(total) == 64 * 64
        assert given.is_deleted()
    jax.block_until_ready(state)
    assert state.is_ready()
    assert sent == []
    monkeypatch.undo()
    expected = x
    for _ in range(3):
        expected = expected @ expected + y
    np.testing.assert_allclose(state, expected, rtol=1e-6)


def test_a_call_does_not_overtake_one_that_reads_what_it_overwrites(cluster: fm.Cluster) -> None:
    bump = fm.dataflow(lambda x: x + 1, cluster=cluster, keep=0, donate_argnums=0)
    read = fm.dataflow(lambda x: x * 10, cluster=cluster)
    value = bump(np.zeros(4, np.float32))
    seen = []
    for _ in range(20):
        seen.append(read.submit(value))
        value = bump(value)
    assert [float(future.result(60)[0]) for future in seen] == [10.0 * (n + 1) for n in range(20)]
    assert float(value[0]) == 21.0


def test_what_a_step_leaves_beside_a_donated_state_is_read_later(process_cluster: fm.Cluster) -> None:
    """The next step has taken the state before the worker has seen that the first one made it."""

    def step(state: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, 40, lambda _, s: jnp.tanh(s @ s) * 0.5, state), x * 2 + 1

    program = fm.dataflow(step, cluster=process_cluster, keep=(0, 1), donate_argnums=0)
    for _ in range(3):
        state, x, left = fm.put(np.eye(300, dtype="f"), process_cluster), np.zeros(50_000, "f"), list[Any]()
        for _ in range(6):
            x = x + 1
            state, beside = program(state, x)
            left.append(beside)
        assert [float(np.asarray(beside).max()) for beside in left] == [2.0 * i + 3 for i in range(6)]
        assert np.isfinite(np.asarray(state)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 0, "donate_argnums": 0},
        {"static_argnames": "n", "donate_argnums": (0, 1)},
        {"static_argnums": 1, "donate_argnames": ("x", "n")},
    ],
)
def test_an_argument_is_not_static_and_donated(cluster: fm.Cluster, options: dict[str, Any]) -> None:
    def fn(x: Any, n: int) -> Any:
        return x * n

    with pytest.raises(ValueError, match=r"argument [xn] is static and donated; a static one is compiled in"):
        fm.dataflow(fn, cluster=cluster, **options)
    with pytest.raises(ValueError, match=r"is static and donated"):
        fm.compile(fn, np.ones(3), 2, devices=["cpu:0"], **options)

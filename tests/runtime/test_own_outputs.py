"""Each output that stays is a value of its own, as with jit: one value in two leaves, and inputs that pass through."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml_runtime.execution.kept import value_of
from tests.conftest import wait_until

SHAPE = (64, 8)
TWO = {"w": "worker:0", "v": "worker:1"}


@pytest.fixture(scope="module", params=["threads", "local"])
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    with getattr(fm.Cluster, request.param)(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=1) as cluster:
        yield cluster


def start() -> dict[str, Any]:
    return {
        name: jnp.full(SHAPE, i, jnp.float32) for i, name in enumerate(("best", "frozen", "prev", "target", "v", "w"))
    }


def step(state: Any, x: Any) -> Any:
    """New parameters in two leaves each, the old ones, and a leaf that passes through and is read."""
    with fm.layer("w"):
        w = jnp.tanh(state["w"] * 0.9 + x * state["frozen"])
    with fm.layer("v"):
        v = state["v"] + w
    return {"best": v, "frozen": state["frozen"], "prev": state["w"], "target": w, "v": v, "w": w}, jnp.sum(v)


def held(cluster: fm.Cluster) -> int:
    gc.collect()
    return sum(cluster.session.held.on(d.name) for d in cluster.devices)


@pytest.mark.parametrize("donate", [None, 0])
@pytest.mark.parametrize("placement", ["auto", TWO])
def test_a_state_with_one_value_in_two_leaves_equals_jit(cluster: fm.Cluster, placement: Any, donate: Any) -> None:
    program = fm.dataflow(step, cluster=cluster, placement=placement, keep=0, donate_argnums=donate)
    jitted = jax.jit(step)
    wait_until(lambda: held(cluster) == 0, "the values of earlier tests are freed")
    state, wanted = start(), start()
    nbytes = sum(leaf.nbytes for leaf in state.values())
    for i in range(5):
        state, shown = program(state, np.float32(i))
        wanted, expected = jitted(wanted, np.float32(i))
        np.testing.assert_allclose(shown, expected, rtol=1e-6)
        wait_until(lambda: held(cluster) == nbytes, "one state is held")
    assert len({id(leaf) for leaf in state.values()}) == len(state)
    assert len(set(map(id, program.programs_on(cluster).values()))) == 1, "the first program serves all calls"
    state["w"].delete()
    state["v"].delete()
    for name in ("best", "frozen", "prev", "target"):
        np.testing.assert_allclose(state[name], wanted[name], rtol=1e-6)


def test_an_input_that_passes_through_is_copied(cluster: fm.Cluster) -> None:
    value = fm.put(jnp.ones(SHAPE), cluster, "worker:1")
    same, more = fm.dataflow(lambda a: (a, a + 1), cluster=cluster, keep=(0, 1))(value)
    assert same is not value
    assert same.device == value.device
    value.delete()
    np.testing.assert_array_equal(same, np.ones(SHAPE))
    fm.dataflow(lambda a: a * 2, cluster=cluster, keep=0, donate_argnums=0)(same)
    assert same.is_deleted()
    np.testing.assert_array_equal(more, np.full(SHAPE, 2))
    twice = fm.dataflow(lambda a: (a, a), cluster=cluster, keep=(0, 1))
    for given in (more, np.full(SHAPE, 2, "f")):
        first, second = twice(given)
        first.delete()
        np.testing.assert_array_equal(second, np.full(SHAPE, 2))
    np.testing.assert_array_equal(more, np.full(SHAPE, 2))


def test_an_input_that_passes_through_and_does_not_stay_is_fetched(cluster: fm.Cluster) -> None:
    value = fm.put(jnp.ones(SHAPE), cluster, "worker:1")
    program = fm.dataflow(lambda a: (a, a, jnp.sum(a)), cluster=cluster)
    program(np.ones(SHAPE, "f"))  # the program for inputs that are sent is another one
    first, second, _ = program(value)
    value.delete()
    assert not isinstance(first, fm.Remote)
    first.delete()
    np.testing.assert_array_equal(second, np.ones(SHAPE))


def test_a_value_that_stays_and_is_fetched_survives_its_donation(cluster: fm.Cluster) -> None:
    program = fm.dataflow(lambda a: (a * 2, a * 2), cluster=cluster, keep=0)
    double = fm.dataflow(lambda a: a * 2, cluster=cluster, keep=0, donate_argnums=0)
    kept, fetched = program(jnp.ones(SHAPE))
    again = double(kept)
    np.testing.assert_array_equal(fetched, np.full(SHAPE, 2))
    np.testing.assert_array_equal(again, np.full(SHAPE, 4))


def test_a_chain_of_futures_copies_what_passes_through(cluster: fm.Cluster) -> None:
    program = fm.dataflow(lambda a: (a, a + 1), cluster=cluster)
    program.submit(*program.submit(jnp.ones(SHAPE)).result()[:1]).result()
    value = fm.put(jnp.ones(SHAPE), cluster, "worker:1")
    future = program.submit(value)
    total = fm.dataflow(lambda pair: pair[0] + pair[1], cluster=cluster).submit(future)
    np.testing.assert_array_equal(total.result(60), np.full(SHAPE, 3))
    chained = program.submit(value)
    value.delete()
    np.testing.assert_array_equal(chained.result(60)[0], np.ones(SHAPE))


def address(cluster: fm.Cluster, handle: Any) -> int:
    """Where the worker has a kept value."""
    session: Any = cluster.session
    (worker,) = session._local.values()
    cell = next(mine[handle.number] for mine in worker._keeping.kept._cells.values() if handle.number in mine)
    return value_of(cell).unsafe_buffer_pointer()


def test_a_donated_input_that_passes_through_is_not_copied(one: fm.Cluster) -> None:
    def more(state: Any, x: Any) -> Any:
        return {**state, **step({k: state[k] for k in start()}, x)[0], "z": state["z"] + x}, x

    loop = fm.dataflow(more, cluster=one, keep=0, donate_argnums=0)
    big = jnp.ones((512, 512))
    state, _ = loop({**start(), "a": big, "z": big}, np.float32(1))
    before = {name: address(one, state[name]) for name in ("a", "z")}
    for _ in range(3):
        state, _ = loop(state, np.float32(1))
    assert {name: address(one, state[name]) for name in before} == before
    assert len(state) == len({address(one, leaf) for leaf in state.values()})


@pytest.mark.parametrize("submitted", [False, True])
def test_both_ways_to_run_a_step_give_values_of_their_own(one: fm.Cluster, submitted: bool) -> None:
    program = fm.dataflow(lambda a, x: ((a, a * x, a * x), x + 1), cluster=one, keep=0)
    double = fm.dataflow(lambda a: a * 2, cluster=one, keep=0, donate_argnums=0)
    value = fm.put(jnp.ones(SHAPE), one)
    (a, b, c), _ = program.submit(value, 2.0).result(60) if submitted else program(value, 2.0)
    double(value)
    double(b)
    np.testing.assert_array_equal(a, np.ones(SHAPE))
    np.testing.assert_array_equal(c, np.full(SHAPE, 2))


def test_an_array_without_values_is_returned(one: fm.Cluster) -> None:
    nothing = np.zeros(3, jax.dtypes.float0)
    program = fm.dataflow(lambda a, b: (a, a, np.zeros(2, jax.dtypes.float0), b + 1), cluster=one, keep=(0, 1, 2, 3))
    *empty, more = program(nothing, 1.0)
    assert [(a.dtype, a.shape) for a in empty] == [(jax.dtypes.float0, (n,)) for n in (3, 3, 2)]
    assert float(more) == 2

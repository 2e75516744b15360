"""The driver keeps a bounded number of plans that were unloaded from the workers, and forgotten ones compile again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.trainer import MAX_PROGRAMS

MOST = 3


@pytest.fixture(params=["threads_cluster", "process_cluster"])
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    found: fm.Cluster = request.getfixturevalue(request.param)
    before, found.max_programs = found.max_programs, MOST
    yield found
    found.max_programs = before


def plans(program: Any, cluster: fm.Cluster) -> int:
    return len(program.programs_on(cluster))


def test_one_function_of_many_shapes(cluster: fm.Cluster) -> None:
    program = fm.dataflow(lambda x: x * 2, cluster=cluster)
    for _ in range(2):
        for length in range(1, 12):
            np.testing.assert_array_equal(program(np.ones(length, np.float32)), 2)
            assert plans(program, cluster) <= 2 * MOST + 1
    assert plans(program, cluster) >= MOST


def test_many_functions(cluster: fm.Cluster) -> None:
    programs = [fm.dataflow(lambda x, n=n: x * n, cluster=cluster) for n in range(12)]
    for _ in range(2):
        for n, program in enumerate(programs):
            assert program(jnp.float32(1)) == n
            assert sum(plans(p, cluster) for p in programs) <= 2 * MOST + 1


def test_a_forgotten_plan_is_freed(cluster: fm.Cluster) -> None:
    program = fm.dataflow(lambda x: x + 1, cluster=cluster)
    program(np.ones(50, np.float32))
    first = weakref.ref(next(iter(program.programs_on(cluster).values())))
    assert first() is not None
    for length in range(1, 2 * MOST + 3):
        program(np.ones(length, np.float32))
    gc.collect()
    assert first() is None


def test_a_trainer_keeps_a_bounded_number_of_programs(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(lambda p, b: jnp.mean(b["x"] * p["w"]), optax.sgd(0.1), cluster=threads_cluster)
    for length in range(1, MAX_PROGRAMS + 4):
        trainer.plan({"w": jnp.ones(())}, {"x": np.ones((2, length), np.float32)})
    assert len(trainer._programs) == MAX_PROGRAMS


def test_a_program_with_two_keys_is_forgotten_under_both(cluster: fm.Cluster) -> None:
    """A program for sent inputs also serves inputs that are on the device where it reads them."""

    def step(x: Any) -> Any:
        return x + 1

    program = fm.dataflow(step, cluster=cluster, keep=0, placement={"*": "worker:0"})
    kept = program(program(np.ones(50, np.float32)))
    found = list(program.programs_on(cluster).values())
    assert len(found) == 2 and found[0] is found[1]
    first = weakref.ref(found.pop())
    del found[:]
    other = fm.dataflow(lambda x: x * 2, cluster=cluster)
    for length in range(1, 2 * MOST + 3):
        other(np.ones(length, np.float32))
    assert not plans(program, cluster)
    gc.collect()
    assert first() is None
    np.testing.assert_array_equal(np.asarray(program(kept)), 4)

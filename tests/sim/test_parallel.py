"""A simulation with several processes does what one process does."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.sim.partition import firsts
from flowml_runtime.sim.world import Layout

SITES = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), 3, fm.Quorum(0.75))
POLICIES: dict[str, Any] = {
    "synchronous": fm.policies.synchronous(),
    "quorum": fm.policies.quorum(0.75),
    "stale": fm.policies.asynchronous(2),
    "local": fm.policies.local_sgd(3),
    "sites": fm.Policy(topology=SITES, quorum=fm.Quorum(0.9)),
    "speculation": fm.policies.speculate(2),
    "deadline": fm.policies.deadline(0.5),
    "ring": fm.policies.gossip(),
    "two rules": {"a": fm.policies.quorum(0.5), "**": fm.policies.synchronous()},
}
PARAMS = {"a": jnp.ones(4), "b": jnp.ones(3)}
REGIONS = fm.sim.Sites({("x", "y"): (2e-3, 1e7)}, {"x": 7, "y": 5})


def loss(params: Any, batch: Any) -> Any:
    hidden = jnp.tanh(batch["x"] @ params["a"])
    return jnp.mean((hidden * params["b"].sum()) ** 2)


def fit(
    jobs: int | None,
    policy: Any = None,
    compute: fm.sim.ComputeModel | None = None,
    network: fm.sim.NetworkModel | None = None,
    *,
    workers: int = 12,
    replicas: int = 12,
    callbacks: Any = (),
    **options: Any,
) -> fm.TrainingResult:
    compute, network = compute or fm.sim.LogNormal(0.1, 0.3), network or fm.sim.Network(1e-3, 1e6, 4e6)
    options = {"arithmetic": False, **options}
    cluster = fm.SimulatedCluster(workers, compute, network, jobs=jobs, **options)
    policies = fm.policies.quorum(0.75) if policy is None else policy
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=replicas, policies=policies)
    source = {"x": np.zeros((8 * replicas, 4), np.float32)}
    return trainer.fit(PARAMS, source, batch_size=2 * replicas, steps=12, progress=False, callbacks=callbacks)


def known(result: fm.TrainingResult) -> tuple[object, ...]:
    """What is known of a fit, as text where NaN may be in it."""
    table, late = result.table(), str(result.stragglers())
    return result.trace_hash, result.events, result.virtual_seconds, result.ledger, table, late, repr(result.history)


def children() -> set[int]:
    """The processes that this one has started and not waited for. Clusters that tests share are among them."""
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return set(map(int, file.read().split()))


@pytest.fixture
def others() -> set[int]:
    """The processes that were there before a simulation."""
    return children()


def test_processes_may_send_each_other_more_than_a_pipe_holds() -> None:
    """In a window of many workers with a large latency both do so at once, and none may wait for the other to read."""
    workers, models = 3000, (fm.sim.LogNormal(0.1, 1.0), fm.sim.Network(0.5, 1e9))
    source = {"x": np.zeros((workers, 4), np.float32)}
    cluster = fm.SimulatedCluster(workers, *models, arithmetic=False, jobs=2)
    policies = fm.policies.local_sgd(20)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers, policies=policies)
    result = trainer.fit(PARAMS, source, batch_size=workers, steps=20, progress=False)
    assert result.ledger.used == 20 * workers


@pytest.mark.parametrize("name", POLICIES)
def test_any_number_of_processes_does_the_same(name: str) -> None:
    assert known(fit(3, POLICIES[name])) == known(fit(1, POLICIES[name]))


@pytest.mark.parametrize("name", ["quorum", "stale", "sites", "two rules"])
def test_messages_that_want_no_answer_may_wait(name: str) -> None:
    """With many workers some do, because the other process is not as far. Nothing depends on which."""
    many = {"workers": 300, "replicas": 300}
    assert known(fit(2, POLICIES[name], **many)) == known(fit(1, POLICIES[name], **many))


@pytest.mark.parametrize(
    ("compute", "network"),
    [
        (fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e6)),
        (fm.sim.Straggler(fm.sim.Constant(0.1), 3, share=0.25), fm.sim.Network(1e-3, 1e4)),
        (fm.sim.LogNormal(0.1, 0.3), REGIONS),
    ],
)
def test_on_any_machines_and_links(compute: fm.sim.ComputeModel, network: fm.sim.NetworkModel) -> None:
    alone = known(fit(1, None, compute, network))
    assert known(fit(2, None, compute, network)) == alone


@pytest.mark.parametrize(
    ("jobs", "options", "why"),
    [
        (2, {"arithmetic": True}, "arithmetic is on"),
        (2, {"faults": [fm.sim.Disorder(lost=0.1)]}, "faults"),
        (2, {"network": fm.sim.Network(1e-3, 1e6, None, 1e6)}, "downlinks"),
        (2, {"network": fm.sim.Network(0.0, 1e6)}, "latency of 0"),
        (2, {"policy": fm.policies.all_reduce()}, "add up over all"),
    ],
)
def test_what_cannot_be_divided_runs_in_one_process(jobs: int, options: dict[str, Any], why: str) -> None:
    with pytest.warns(fm.FlowmlWarning, match=f"jobs=2: the simulation runs in one process, because .*{why}"):
        asked = fit(jobs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fm.FlowmlWarning)
        assert fit(None, **options).trace_hash == asked.trace_hash


def test_bad_numbers_of_processes() -> None:
    with pytest.raises(ValueError, match="jobs=0: give at least 1"):
        fit(0)
    with pytest.raises(TypeError, match="jobs="):
        fit(1.5)  # pyright: ignore[reportArgumentType]


class Fails(fm.sim.Constant):
    """Fails in the process that draws the times of step 5 and is not the one of the driver."""

    def draw(self, seed: int, workers: Any, steps: Any) -> Any:
        if os.getpid() != _DRIVER and np.max(steps) >= 5:
            self.fail()
        return super().draw(seed, workers, steps)

    def fail(self) -> None:
        raise ZeroDivisionError("there is no such step")


class Dies(Fails):
    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


_DRIVER = os.getpid()


def test_an_error_in_another_process_is_raised_with_its_text(others: set[int]) -> None:
    with pytest.raises(fm.SimulationError, match="ZeroDivisionError: there is no such step"):
        fit(2, compute=Fails(0.1))
    assert children() <= others
    assert fit(2).events


def test_a_process_that_is_killed_ends_the_fit(others: set[int]) -> None:
    with pytest.raises(fm.SimulationError, match=r"a process of the simulation has ended.*jobs=1"):
        fit(2, compute=Dies(0.1))
    assert children() <= others


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_processes_end_with_the_fit(error: type[BaseException], others: set[int]) -> None:
    def stop(record: Any) -> None:
        if record["step"] == 3:
            raise error

    with pytest.raises(error):
        fit(3, callbacks=[stop])
    assert children() <= others


def test_an_interrupt_of_the_whole_group_ends_only_the_driver(others: set[int]) -> None:
    """Ctrl-C reaches all processes of a terminal's group."""
    interrupted: set[int] = set()

    def stop(record: Any) -> None:
        if record["step"] == 3:
            for child in children() - others:
                os.kill(child, signal.SIGINT)
                interrupted.add(child)

    assert known(fit(3, callbacks=[stop])) == known(fit(1))
    assert len(interrupted) == 2


def test_shares_are_even_by_the_work_in_them() -> None:
    """The home, to which all replicas push, and the driver are in two processes. The first worker is the home."""
    workers = 1000
    models = fm.sim.LogNormal(0.1, 0.3), fm.sim.Network(1e-3, 1e9)
    cluster = fm.SimulatedCluster(workers, *models, arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers)
    plan = trainer.plan(PARAMS, {"x": np.zeros((workers, 4), np.float32)})
    numbers = {f"worker:{i}": i for i in range(workers)}
    (first, second), four = firsts(Layout.of(plan), numbers, 2), firsts(Layout.of(plan), numbers, 4)
    assert first == 0 and 500 < second < 900, "the driver takes more than the home"
    assert len(four) == 4 and four[1] < four[2] - four[1], "the share with the home has fewer workers"


def test_more_workers_are_beside_the_driver_where_sites_have_leaders() -> None:
    workers = 400
    cluster = fm.SimulatedCluster(workers, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9), arithmetic=False)
    inside = fm.Policy(topology=fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), 20, fm.Quorum(0.75)))
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers, policies=inside)
    plan = trainer.plan(PARAMS, {"x": np.zeros((workers, 4), np.float32)})
    _, second = firsts(Layout.of(plan), {f"worker:{i}": i for i in range(workers)}, 2)
    assert workers / 2 < second < workers * 3 / 4

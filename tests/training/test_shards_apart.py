"""Replicas that share no clocks and have a shard each: every one visits its own at its own pace, as in Downpour."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from flowml.sim import Crash
from flowml.splits import dealt
from flowml_runtime.environment import checkpoints
from tests.training.reference import BATCH, EXAMPLES, assert_close, data, mlp, mlp_loss
from tests.training.test_checkpoints import Stopped
from tests.training.test_splits import BATCHES, KINDS, Seen

REPLICAS, STEPS, RATE = 2, 20, 0.02
SHARDS = KINDS[:-1]
ALONE = fm.Policy(payload=fm.Delta(), every=STEPS, staleness=fm.UNBOUNDED, apply="sum")
"""Replicas train alone and send once, so the result says which examples each had, in which order."""
SLOW = ((1.0,) * STEPS, (0.1,) * STEPS)
SOURCE = data()


def simulated(**options: Any) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(REPLICAS, fm.sim.Recorded(SLOW), fm.sim.Network(1e-4, 1e9), **options)


@pytest.fixture(params=["threads", "processes", "simulated"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "simulated":
        with closing(simulated()) as made:
            yield made
    else:
        yield request.getfixturevalue({"threads": "threads_cluster", "processes": "process_cluster"}[request.param])


def fit(cluster: Any, policy: fm.Policy = ALONE, source: Any = SOURCE, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(
        mlp_loss,
        optax.sgd(RATE),
        cluster=cluster,
        replicas=REPLICAS,
        policies=policy,
        delays=options.pop("delays", None),
    )
    options = {"batch_size": BATCH, "steps": STEPS, "seed": 7, "shuffle": fm.Shards(), "progress": False, **options}
    return trainer.fit(mlp(), source, **options)


def items(kind: Any, replica: int, steps: int = STEPS) -> Iterator[np.ndarray]:
    """The examples of each step of a replica."""
    for epoch, place in (divmod(step, BATCHES) for step in range(steps)):
        order = epoch_order(EXAMPLES, 7, epoch, shuffle=dealt(kind, REPLICAS, BATCH))
        yield order[: BATCHES * BATCH].reshape(BATCHES, REPLICAS, -1)[place, replica]


@cache
def gradient() -> Any:
    return jax.jit(jax.grad(mlp_loss))


def trained_alone(kind: Any) -> Any:
    """The sum of what each replica has made of its own shard, by hand."""
    total = mlp()
    for replica in range(REPLICAS):
        own = mlp()
        for rows in items(kind, replica):
            step = gradient()(own, {name: leaf[rows] for name, leaf in SOURCE.items()})
            own = jax.tree.map(lambda p, g: p - RATE * g, own, step)
        total = jax.tree.map(lambda t, o, p: t + (o - p), total, own, mlp())
    return total


@pytest.mark.parametrize("kind", SHARDS, ids=str)
def test_each_replica_visits_its_own_shard_at_its_own_pace(cluster: Any, kind: Any) -> None:
    slow = None if isinstance(cluster, fm.SimulatedCluster) else {"worker:0": 0.01}
    result = fit(cluster, shuffle=kind, delays=slow)
    assert_close(result.params, trained_alone(kind))
    ledger = result.ledger
    assert [tally.used for tally in ledger.replicas] == [STEPS] * REPLICAS
    assert (ledger.used, ledger.dropped, ledger.outstanding, len(result.history)) == (STEPS * REPLICAS, 0, 0, STEPS)


@pytest.mark.parametrize("kind", SHARDS[:2], ids=str)
def test_what_the_driver_feeds_is_the_same(threads_cluster: fm.Cluster, kind: Any) -> None:
    assert_close(fit(threads_cluster, source=Seen(), shuffle=kind).params, trained_alone(kind))


POLICIES = {
    "asynchronous": fm.policies.asynchronous(),
    "bounded": fm.policies.asynchronous(staleness=2),
    "Downpour": fm.policies.downpour(2, 4),
    "softsync": fm.policies.softsync(2),
    "elastic averaging": fm.policies.elastic_averaging(2, 0.2),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_example_is_visited_once_in_an_epoch(cluster: Any, policy: str) -> None:
    result = fit(cluster, POLICIES[policy], steps=None, epochs=3)
    assert result.ledger.seen == ((3, EXAMPLES),)
    assert [tally.used for tally in result.ledger.replicas] == [3 * BATCHES] * REPLICAS
    assert mlp_loss(result.params, SOURCE) < mlp_loss(mlp(), SOURCE)


def test_the_rest_of_an_epoch_belongs_to_shards_too(threads_cluster: fm.Cluster) -> None:
    source = {name: leaf[: EXAMPLES - 5] for name, leaf in SOURCE.items()}
    result = fit(threads_cluster, POLICIES["Downpour"], source, steps=None, epochs=2, last="use")
    assert result.ledger.seen == ((2, EXAMPLES - 5),)


def test_hogwild_threads_have_shards() -> None:
    with closing(fm.Cluster.threads(workers=1, devices_per_worker=2)) as cluster:
        trainer = fm.Trainer(mlp_loss, optax.sgd(RATE), cluster=cluster, replicas=2, policies=fm.policies.hogwild())
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=2, shuffle=fm.Shards(), progress=False)
    assert result.ledger.seen == ((2, EXAMPLES),)


@pytest.mark.parametrize("kind", SHARDS[:2], ids=str)
@pytest.mark.parametrize("after", [4, 12])
def test_a_fit_goes_on_with_the_shards_that_it_had(cluster: Any, kind: Any, after: int, tmp_path: Path) -> None:
    """Also where some replicas have done all their steps and others have not."""

    def stop(record: dict[str, Any]) -> None:
        if checkpoints.snapshots(tmp_path):
            raise Stopped

    slow = None if isinstance(cluster, fm.SimulatedCluster) else {"worker:0": 0.08}
    checkpoint = fm.Checkpoint(tmp_path, every_steps=after)
    with pytest.raises(Stopped):
        fit(cluster, shuffle=kind, checkpoint=checkpoint, callbacks=[stop], delays=slow)
    assert 0 < fm.restore(tmp_path).step < STEPS
    result = fit(cluster, shuffle=kind, checkpoint=checkpoint, resume="auto")
    assert_close(result.params, trained_alone(kind))
    assert [tally.used for tally in result.ledger.replicas] == [STEPS] * REPLICAS


def test_snapshots_are_taken_while_only_slow_replicas_have_steps_left(tmp_path: Path) -> None:
    """Replica 1 is done after 2 s, at the 11th of the records, and replica 0 after 20 s."""
    with closing(simulated()) as cluster:
        fit(cluster, checkpoint=fm.Checkpoint(tmp_path, every_steps=1, keep=50))
        taken = [checkpoints.step_of(path) for path in checkpoints.snapshots(tmp_path)]
    assert len([step for step in taken if 12 <= step < STEPS]) > 3


LOST = {"at the start": 0.05, "in the middle": 0.45, "after it has done its steps": 3.5}


@pytest.mark.parametrize("when", LOST)
@pytest.mark.parametrize("policy", ["asynchronous", "Downpour", "bounded", "softsync"])
def test_what_is_left_of_a_lost_shard_is_done_by_others(policy: str, when: str, tmp_path: Path) -> None:
    """The worker is the home of a layer, so another run begins."""
    faults = [Crash(1, LOST[when], 0.2)]
    with closing(simulated(faults=faults)) as cluster, pytest.warns(fm.FlowmlWarning, match="worker:1 was lost"):
        result = fit(
            cluster, POLICIES[policy], steps=None, epochs=3, on_loss="shrink", shuffle=fm.Shards(reassign_every=1),
            checkpoint=fm.Checkpoint(tmp_path, every_steps=2),
        )  # fmt: skip
    ledger = result.ledger
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.unseen == 3 * BATCHES * REPLICAS
    if not ledger.dropped:
        assert ledger.seen == ((3, EXAMPLES),)
    assert jnp.isfinite(mlp_loss(result.params, SOURCE))

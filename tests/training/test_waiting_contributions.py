"""A snapshot holds what waits at a home or at the leader of a site: no contribution is lost or applied twice."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.environment import checkpoints
from tests.training.reference import assert_same
from tests.training.test_checkpoints import STEPS, STOP, Stopped, assert_goes_on, case

REPLICAS, ROUNDS = 3, 12


def linear(w: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Its gradient for an example is the example, which is 1 at another place each time. So the sum of the parameters
    counts what is applied."""
    return jnp.sum(jnp.mean(batch["x"], axis=0) * w)


def counted(
    cluster: Any, path: Path, policy: fm.Policy, delays: Any = None, steps: int = ROUNDS
) -> tuple[float, Any, dict[str, Any]]:
    """A fit that is stopped at its second snapshot and goes on: the parameter, the ledger and what waited."""
    found: dict[str, Any] = {}
    trainer = fm.Trainer(
        linear, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=policy, delays=delays or {}
    )
    checkpoint = fm.Checkpoint(path, every_steps=3, keep=9)

    def stop(_: dict[str, Any]) -> None:
        if len(checkpoints.snapshots(path)) > 1:
            raise Stopped

    def fit(**more: Any) -> fm.TrainingResult:
        source = {"x": np.eye(REPLICAS * 4, dtype=np.float32)}
        options: dict[str, Any] = {"batch_size": REPLICAS, "steps": steps, "progress": False, "checkpoint": checkpoint}
        return trainer.fit(jnp.zeros(REPLICAS * 4), source, **options, **more)

    with suppress(Stopped):
        fit(callbacks=[stop])
        for newer in checkpoints.snapshots(path)[:-2]:  # it ended before the driver saw the second on the disk
            shutil.rmtree(newer)
    found = {name: array for name, array in fm.restore(path).buffers.items() if name.startswith("waiting/")}
    result = fit(resume="auto")
    assert_same(fm.restore(path).params, result.params)
    return float(result.params.sum()), result.ledger, found


@pytest.mark.parametrize(
    "filters", [(), (fm.filters.top_k(1),), (fm.filters.top_k(1), fm.filters.key_cache())], ids=len
)
def test_late_contributions_wait_for_a_later_clock(threads_cluster: fm.Cluster, tmp_path: Path, filters: Any) -> None:
    """Of each snapshot some are late, because one replica is slow, and the parameter has all that the ledger counts.
    What a late contribution means does not depend on what is sent and decoded after it."""
    policy = fm.policies.quorum(1, late="fold", filters=filters)
    value, ledger, waiting = counted(threads_cluster, tmp_path, policy, {"worker:1": 0.03})
    assert waiting
    assert ledger.folded
    assert value == pytest.approx(-(ledger.used + ledger.folded) / REPLICAS)
    assert ledger.used + ledger.folded + ledger.dropped + ledger.unseen == REPLICAS * ROUNDS


@pytest.mark.parametrize("need", [2, 3])
def test_contributions_wait_for_others(threads_cluster: fm.Cluster, tmp_path: Path, need: int) -> None:
    policy = fm.Policy(staleness=fm.UNBOUNDED, quorum=fm.Quorum(need, late="fold"))
    value, ledger, _ = counted(threads_cluster, tmp_path, policy, {"worker:1": 0.01})
    assert ledger.used == REPLICAS * ROUNDS
    assert value == pytest.approx(-REPLICAS * ROUNDS / need)


def test_portions_of_batches_are_granted_again(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """Which replica computes a portion, and which one a copy, is a matter of time. The update is not."""
    one = case(threads_cluster, tmp_path, fm.policies.speculate(2, after=0.1), replicas=3)
    whole = one.fit()
    one.stopped()
    resumed = one.resumed()
    assert_same((resumed.params, resumed.opt_state), (whole.params, whole.opt_state))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history[STOP:]]
    ledger = resumed.ledger
    assert (ledger.used, ledger.outstanding, ledger.seen) == (STEPS * 6, 0, whole.ledger.seen)
    assert sum(tally.used for tally in ledger.replicas) == ledger.used


SERVER = fm.ParameterServer()
WITHIN: dict[str, fm.Policy] = {
    "gradients": fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, ((0, 1), (2,)), fm.Quorum(1.0))),
    "filtered sums": fm.Policy(
        topology=fm.Hierarchy(SERVER, SERVER, ((0, 1), (2,)), fm.Quorum(1.0)),
        filters=(fm.filters.top_k(0.3).with_error_feedback(),),
        every=2,
    ),
    "own parameters": fm.Policy(
        topology=fm.Hierarchy(SERVER, SERVER, ((0, 1), (2,)), fm.Quorum(1.0)), payload=fm.Delta(), every=3
    ),
}


@pytest.mark.parametrize("name", WITHIN)
def test_sites_that_decide_go_on_bit_by_bit(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    assert_goes_on(case(threads_cluster, tmp_path, WITHIN[name], replicas=3))


def two_layers(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    return linear(params["a"], batch) + linear(params["b"], batch)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", ["threads", "simulated"])
def test_a_late_contribution_is_decoded_before_a_newer_one(threads_cluster: fm.Cluster, kind: str, every: int) -> None:
    """A commit may name a newer contribution of a replica beside a late one. Keys are cached in the order of pushes."""
    replicas, filters = 4, (fm.filters.top_k(1.0), fm.filters.key_cache())
    late = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.4), 3.0, workers=(2,))
    simulated = fm.SimulatedCluster(replicas, late, fm.sim.Network(1e-3, 1e9))
    cluster = threads_cluster if kind == "threads" else simulated
    policy = fm.Policy(quorum=fm.Quorum(1, late="fold"), every=every, filters=filters)
    trainer = fm.Trainer(two_layers, optax.sgd(1.0), cluster=cluster, replicas=replicas, policies=policy)
    rows = np.eye(replicas * 4, dtype=np.float32)
    first = {layer: jnp.zeros(replicas * 4) for layer in "ab"}
    result = trainer.fit(first, {"x": rows}, batch_size=replicas, steps=30, progress=False)
    assert result.ledger.folded
    steps = (result.ledger.used + result.ledger.folded) / replicas  # a contribution is the mean of `every`
    for value in result.params.values():
        assert float(value.sum()) == pytest.approx(-steps / every, rel=1e-4)

"""Snapshots are steps of the protocol, so simulated fits write them too, and go on from them at virtual time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.environment import checkpoints
from flowml_runtime.sim import kept
from tests.training import test_site_quorum as sites
from tests.training import test_sites_that_decide as deciding
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss
from tests.training.test_checkpoints import POLICIES, STEPS, STOP, Stopped, assert_goes_on, case
from tests.training.test_site_quorum import CLOCKS, EXAMPLES, ITEM, REPLICAS, by_example

FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
UNEVEN = fm.sim.LogNormal(mean_s=0.1, sigma=0.5)


def simulated(workers: int, machines: Any = UNEVEN, **options: Any) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(workers, machines, FAST, **{"arithmetic": True, **options})


@pytest.mark.filterwarnings("ignore:mlp_loss is not convex", "ignore:.*all replicas are in one site")
@pytest.mark.parametrize("name", POLICIES)
def test_a_simulated_fit_goes_on_bit_by_bit(tmp_path: Path, name: str) -> None:
    assert_goes_on(case(simulated(4), tmp_path, POLICIES[name]))


@pytest.mark.parametrize("name", ["residuals", "own parameters", "gossip and copies"])
def test_the_buffers_are_those_of_real_workers(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    """Real workers keep a few more, such as keys that readers have cached, and simulated ones rhythms beside values."""
    found: list[Any] = []
    for kind, cluster in (("real", threads_cluster), ("simulated", simulated(4))):
        one = case(cluster, tmp_path / kind, POLICIES[name])
        one.fit(steps=STOP, checkpoint=one.checkpoint())
        found.append(fm.restore(one.path).buffers)
    real, virtual = found
    both = [n for n in sorted(real.keys() & virtual.keys()) if n.split("/")[-1] not in ("steps", "taken", "since")]
    assert {n for n in real if "/filters/" in n or "/mirror/" in n or "/values/" in n} <= set(both)
    for buffer in both:
        np.testing.assert_array_equal(virtual[buffer], real[buffer], buffer)


def stopped_and_resumed(
    policy: fm.Policy, machines: Any, seed: int, path: Path, every: int
) -> tuple[fm.TrainingResult, int]:
    """A fit that stops at its first snapshot and goes on in another cluster, and how much waited there."""

    def fit(**more: Any) -> fm.TrainingResult:
        cluster = simulated(REPLICAS, machines, seed=seed)
        trainer = fm.Trainer(by_example, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=policy)
        start = {"each": jnp.zeros(EXAMPLES), "all": jnp.zeros(1)}
        source, checkpoint = {"one": np.eye(EXAMPLES, dtype=np.float32)}, fm.Checkpoint(path, every_steps=every)
        options: dict[str, Any] = {"batch_size": REPLICAS * ITEM, "steps": CLOCKS, "checkpoint": checkpoint}
        return trainer.fit(start, source, **options, **more)

    def stop(_: dict[str, Any]) -> None:
        if checkpoints.snapshots(path):
            raise Stopped

    with pytest.raises(Stopped):
        fit(callbacks=[stop])
    waited = len([name for name in fm.restore(path).buffers if name.startswith("waiting/")])
    return fit(resume="auto"), waited


def assert_counts(result: fm.TrainingResult, *, once: bool) -> None:
    """The parameters have the examples that the ledger counts, each `once`, or with a weight of its site."""
    ledger, counted = result.ledger, -np.asarray(result.params["each"])
    taken = ledger.used + ledger.folded
    assert taken + ledger.dropped + ledger.unseen == REPLICAS * CLOCKS
    assert np.count_nonzero(counted > 1e-7) == ITEM * taken
    if once:
        np.testing.assert_allclose(sorted(counted)[EXAMPLES - ITEM * taken :], 1 / ITEM, atol=1e-6)
    seen = ((0, EXAMPLES - ITEM * taken), (1, ITEM * taken))
    assert ledger.seen == tuple((times, count) for times, count in seen if count)


@pytest.mark.parametrize("seed", [1, 5, 4, 13])
def test_quorums_inside_sites_go_on(tmp_path: Path, seed: int) -> None:
    """With any late rule. Seeds 4 and 13 requeue: what replicas had skipped and not given back was lost."""
    policy, machines = sites.drawn(seed)
    result, _ = stopped_and_resumed(policy, machines, seed, tmp_path, 1 + seed % 3)
    assert_counts(result, once=not policy.apply.averages)


@pytest.mark.parametrize("seed", [5, 13, 17])
def test_sites_with_own_parameters_go_on(tmp_path: Path, seed: int) -> None:
    policy, machines = deciding.drawn(seed)
    result, _ = stopped_and_resumed(policy, machines, seed, tmp_path, 1 + seed % 3)
    assert_counts(result, once=False)


def test_late_sums_of_sites_wait_for_a_later_clock(tmp_path: Path) -> None:
    """Both a late replica of a site, and the late sum of another site."""
    inside, between = fm.Quorum(0.4, late="fold"), fm.Quorum(1, late="fold")
    topology = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites.SITES, inside)
    policy = fm.Policy(topology=topology, quorum=between, apply="sum")
    result, waited = stopped_and_resumed(policy, fm.sim.LogNormal(0.1, 1.0), 3, tmp_path, 3)
    assert waited
    assert result.ledger.folded
    assert_counts(result, once=True)


def test_without_arithmetic_a_fit_goes_on_by_its_clocks(tmp_path: Path) -> None:
    """It keeps no values, so they are the first ones, and no fit with values goes on from it."""
    policies = {"fc0*": fm.policies.diloco(4), "fc1*": fm.policies.quorum(1, late="fold"), "*": fm.policies.every(3)}
    one = case(simulated(4, arithmetic=False), tmp_path, policies)
    whole = one.fit()
    one.fit(steps=STOP, checkpoint=one.checkpoint())
    resumed = one.resumed()
    total = (resumed.ledger.used, resumed.ledger.folded, resumed.ledger.dropped, resumed.ledger.unseen)
    assert sum(total) == sum((whole.ledger.used, whole.ledger.folded, whole.ledger.dropped, whole.ledger.unseen))
    assert [r["step"] for r in resumed.history][-1] == STEPS - 1
    assert_same(fm.restore(one.path).params, mlp())
    other = case(simulated(4), tmp_path, policies)
    with pytest.raises(fm.CheckpointError, match="workers=simulated without arithmetic there and simulated here"):
        other.resumed()


def test_a_fit_goes_on_after_a_simulated_crash(tmp_path: Path) -> None:
    """What it had done after its last snapshot is done again, with the same result."""
    policies, source = {"fc0*": fm.policies.diloco(4), "*": fm.Policy()}, data()

    def fit(**more: Any) -> fm.TrainingResult:
        faults = more.pop("faults", ())
        cluster = simulated(2, fm.sim.Constant(0.1), faults=faults)
        trainer = fm.Trainer(mlp_loss, optax.adam(0.01), cluster=cluster, replicas=2, policies=policies)
        return trainer.fit(mlp(), source, batch_size=BATCH, steps=STEPS, progress=False, **more)

    whole, checkpoint = fit(), fm.Checkpoint(tmp_path, every_s=0.25)
    with pytest.raises(fm.WorkerLostError, match=r"it stopped at 0\.7 s"):
        fit(checkpoint=checkpoint, faults=(fm.sim.Crash(worker=1, at_s=0.7),))
    assert 0 < fm.restore(tmp_path).step < STEPS
    resumed = fit(checkpoint=checkpoint, resume="auto")
    assert_same((resumed.params, resumed.opt_state), (whole.params, whole.opt_state))


def test_a_simulated_fit_is_validated_as_a_real_one(threads_cluster: fm.Cluster) -> None:
    found: list[Any] = []
    for cluster in (simulated(2), threads_cluster):
        trainer = fm.Trainer(mlp_loss, optax.adam(0.01), cluster=cluster, replicas=2)
        result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=6, validation=data(48, seed=1), validate_every=3)
        found.append([(record["step"], float(record["loss"])) for record in result.validation])
    assert [step for step, _ in found[0]] == [2, 5]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    trainer = fm.Trainer(mlp_loss, optax.adam(0.01), cluster=simulated(2, arithmetic=False), replicas=2)
    with pytest.raises(fm.UnsupportedError, match="has no parameters to validate"):
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=6, validation=data(48))


@pytest.mark.parametrize(
    "policy", [fm.policies.quorum(0.75), fm.policies.asynchronous(), fm.policies.quorum(3, late="fold")]
)
def test_others_go_on_without_a_replica_that_holds_a_snapshot_up(tmp_path: Path, policy: fm.Policy) -> None:
    """A second is lost, and snapshots and validations are taken again when the replica is heard of. Meanwhile those of
    the others are written where decisions say what counts."""
    parted = fm.sim.Partition([3], 2.0, 8.0)
    cluster = simulated(4, fm.sim.Constant(0.1), faults=[parted])
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy)
    checkpoint = fm.Checkpoint(tmp_path, every_steps=5, keep=100)
    options: dict[str, Any] = {"checkpoint": checkpoint, "validation": data(), "validate_every": 5}
    shown: list[int] = []
    result = trainer.fit(
        mlp(),
        data(),
        batch_size=BATCH,
        steps=150,
        progress=False,
        callbacks=[lambda r: shown.append(r["step"])],
        **options,
    )
    assert shown == list(range(150))
    times = [record["seconds"] for record in result.history]
    assert sum(2 < t < 8 for t in times) > 30
    assert max(np.diff(times)) < 1.5
    steps = [int(p.name.removeprefix("step-")) for p in sorted(tmp_path.iterdir()) if p.name.startswith("step-")]
    written = np.interp(steps, range(1, 151), times)
    without = sum(parted.start_s + 1 < at < parted.end_s for at in written)
    assert without > 5 if policy.clocked else not without
    assert sum(at >= parted.end_s for at in written) > 5
    assert steps[-1] == 150
    assert sum("validation" in record for record in result.history) == len(steps) - without


def test_a_snapshot_that_was_withdrawn_meanwhile_is_not_told() -> None:
    """Applies may take so long that a step has begun again, whose gradients have no fate yet."""
    told: list[Any] = []
    node: Any = SimpleNamespace(machine=SimpleNamespace(held=5), send=lambda *message: told.append(message))
    asked: Any = SimpleNamespace(number=4)
    kept.export(node, asked)
    assert not told

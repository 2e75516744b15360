"""Replicas that add up gradients among themselves go on without the lost ones, as those of a parameter server do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
from flowml import filters
from flowml.errors import UnsupportedError
from flowml.policy import Delta, ParameterServer, Quorum
from tests.training.reference import BATCH, assert_close, data, mlp, mlp_loss
from tests.training.test_lost_and_replaced import COUPLED

WORKERS, STEPS = 4, 12
SUMS: dict[str, tuple[fm.Policy, fm.Policy]] = {
    "all-reduce": (fm.policies.all_reduce(), fm.policies.synchronous()),
    "ring": (fm.Policy(topology=fm.Ring()), fm.policies.synchronous()),
    "tree": (fm.Policy(topology=fm.Tree()), fm.policies.synchronous()),
    "every": (fm.Policy(topology=fm.AllReduce(), every=4), fm.policies.every(4)),
    "exchange": (
        fm.Policy(topology=fm.AllReduce(), filters=(filters.quantise(8),)),
        fm.Policy(filters=(filters.quantise(8),)),
    ),
    "changes": (
        fm.Policy(topology=fm.AllReduce(), payload=Delta(), every=4),
        fm.Policy(payload=Delta(), every=4),
    ),
}


def shrunk(cluster: fm.Cluster, policy: fm.Policy, ends: dict[int, str], **layout: Any) -> fm.TrainingResult:
    """A fit of which these workers end at these steps, each after the one before it has been left out."""
    due, counts = sorted(ends.items()), [WORKERS + 1]

    def end(record: dict[str, Any]) -> None:
        if due and record["step"] >= due[0][0] and record["replicas"] < counts[-1]:
            counts.append(record["replicas"])
            cluster.end_worker(due.pop(0)[1])

    optimizer, checkpoint = layout.pop("optimizer", optax.adam(1e-2)), layout.pop("checkpoint", None)
    trainer = fm.Trainer(mlp_loss, optimizer, cluster=cluster, policies=policy, **{"replicas": WORKERS, **layout})
    options: dict[str, Any] = {
        "batch_size": BATCH,
        "steps": STEPS,
        "seed": 3,
        "progress": False,
        "checkpoint": checkpoint,
    }
    try:
        with pytest.warns(fm.FlowmlWarning, match="left out with (its|their) replica"):
            return trainer.fit(mlp(), data(), callbacks=[end], on_loss="shrink", **options)
    finally:
        cluster.bring_back(cluster.lost)


def assert_alike(cluster: fm.Cluster, sums: fm.Policy, server: fm.Policy, ends: dict[int, str], **layout: Any) -> None:
    found, wanted = shrunk(cluster, sums, ends, **layout), shrunk(cluster, server, ends, **layout)
    assert [loss.resumed_at for loss in found.losses] == [loss.resumed_at for loss in wanted.losses]
    assert found.ledger == wanted.ledger
    assert found.ledger.outstanding == 0
    assert_close((found.params, found.opt_state), (wanted.params, wanted.opt_state))
    assert [r["replicas"] for r in found.history] == [r["replicas"] for r in wanted.history]


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_goes_on_as_a_parameter_server_does(threads: fm.Cluster, name: str) -> None:
    """Both begin anew without worker 0, the first home, and then without worker 2: there is no snapshot before."""
    assert_alike(threads, *SUMS[name], {0: "worker:0", 1: "worker:2"})


def sited(**rules: Any) -> fm.Policy:
    return fm.Policy(topology=fm.Hierarchy(fm.Ring(), ParameterServer(), 2), **rules)


@pytest.mark.parametrize("ends", [("worker:0",), ("worker:1",), ("worker:2", "worker:3"), ("worker:0", "worker:3")])
def test_sites_go_on_with_those_that_are_left(threads: fm.Cluster, ends: tuple[str, ...]) -> None:
    """A leader ends, another replica, all of a site, and one of each."""
    assert_alike(threads, sited(every=2), fm.policies.every(2), dict(enumerate(ends)))


def test_sites_whose_leaders_filter(threads: fm.Cluster, tmp_path: Path) -> None:
    policy, checkpoint = sited(filters=(filters.top_k(0.5),)), fm.Checkpoint(tmp_path, every_steps=2)
    found = shrunk(threads, policy, {5: "worker:0", 8: "worker:3"}, checkpoint=checkpoint)
    first, second = (loss.resumed_at for loss in found.losses)
    assert first > 0, "it goes on from a snapshot"
    assert found.ledger.used == 4 * first + 3 * (second - first) + 2 * (STEPS - second)
    assert found.ledger.outstanding == 0
    assert found.history[-1]["replicas"] == 2


@pytest.mark.parametrize(
    "policy",
    [
        sited(staleness=2),
        sited(payload=Delta(), every=2),
        fm.Policy(topology=fm.Hierarchy(ParameterServer(), ParameterServer(), 2, Quorum(1))),
        fm.Policy(topology=fm.Hierarchy(fm.AllReduce(), fm.AllReduce(), 2)),
    ],
)
def test_other_sites_are_refused(threads: fm.Cluster, policy: fm.Policy) -> None:
    with pytest.raises(UnsupportedError, match=r"the leader of a site of layer .* give on_loss='replace'"):
        trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=threads, policies=policy, replicas=WORKERS)
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, on_loss="shrink")


def test_one_replica_is_left(threads: fm.Cluster) -> None:
    assert_alike(threads, *SUMS["ring"], {0: "worker:0", 1: "worker:2", 2: "worker:3"})


def test_replicas_that_share_workers() -> None:
    """Two replicas are on each worker, which adds their gradients up before it sends them."""
    with fm.Cluster.threads(workers=2, devices_per_worker=2) as cluster:
        assert_alike(cluster, *SUMS["all-reduce"], {0: "worker:0"})


def test_stages(threads: fm.Cluster) -> None:
    layout: dict[str, Any] = {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2}
    assert_alike(threads, *SUMS["all-reduce"], {0: "worker:1"}, **layout)


def test_homes_that_exchange_values(threads: fm.Cluster) -> None:
    assert_alike(threads, *SUMS["all-reduce"], {0: "worker:0"}, optimizer=COUPLED)

"""The ledger after losses, leaves and joins, with a policy for each layer: its rows say what each layer has applied.

Each example belongs to one item, and to one parameter of each layer. So a layer has applied an item if and only if its
parameters are not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.test_elastic import STEP_S, doing
from tests.training.test_handed_over import gone

REPLICAS, STEPS, ITEM = 4, 300, 6
PUSH = 50
"""The steps between two pushes: a loss is hardly ever just after one."""
POLICIES: dict[str, dict[str, fm.Policy]] = {
    "sync and local": {"a": fm.Policy(), "b": fm.policies.local_sgd(PUSH)},
    "asynchronous and local": {"a": fm.policies.asynchronous(), "b": fm.policies.local_sgd(PUSH)},
    "sync and sums of steps": {"a": fm.Policy(), "b": fm.policies.every(PUSH)},
    "sums and DiLoCo": {"a": fm.policies.all_reduce(), "b": fm.policies.diloco(PUSH)},
    "quorum and DiLoCo": {"a": fm.policies.quorum(0.75), "b": fm.policies.diloco(PUSH)},
    "sync and asynchronous sums": {"a": fm.Policy(), "b": fm.policies.asynchronous(every=PUSH)},
    "sums and sums of steps": {"a": fm.policies.all_reduce(), "b": fm.policies.all_reduce(every=PUSH)},
    "asynchronous sums": {"a": fm.policies.asynchronous(), "b": fm.policies.asynchronous(every=PUSH)},
    "local and local": {"a": fm.policies.local_sgd(PUSH), "b": fm.policies.local_sgd(PUSH)},
}


def loss(params: Any, batch: Any) -> Any:
    return sum(jnp.mean(params[layer][batch["id"]]) for layer in "ab")


def fit(cluster: fm.Cluster, mix: dict[str, fm.Policy], at: dict[int, Callable[[], object]], **options: Any) -> Any:
    examples = STEPS * REPLICAS * ITEM
    delays = {f"worker:{i}": STEP_S for i in range(REPLICAS)}
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=mix, delays=delays)
    params = {layer: jnp.zeros(examples) for layer in "ab"}
    source = {"id": np.arange(examples, dtype=np.int32)}
    leaves = options.pop("leaves", "")
    options = {"batch_size": REPLICAS * ITEM, "epochs": 1, "progress": False, **options}
    try:
        return trainer.fit(params, source, callbacks=[doing(at)], **options)
    finally:
        if leaves:
            gone(cluster, leaves)
        cluster.bring_back(cluster.lost)


def assert_right(found: fm.TrainingResult) -> None:
    """The ledger says what was applied."""
    ledger = found.ledger
    applied = {layer: np.asarray(found.params[layer]) != 0 for layer in "ab"}
    some = np.count_nonzero(applied["a"] | applied["b"])
    assert dict(ledger.seen) == {times: n for times, n in ((0, len(applied["a"]) - some), (1, some)) if n}
    assert ledger.used * ITEM == some, "an item is used if some layer has applied it"
    assert sum(tally.used for tally in ledger.replicas) == ledger.used
    assert ledger.outstanding == 0
    rows = {name.partition(" ")[0]: tally for name, tally in ledger.groups.items()}
    header, _, *lines = found.table().splitlines()
    for layer, line in zip("ab", lines[:2], strict=True):
        tally = rows.get(layer, ledger)
        assert tally.used * ITEM == np.count_nonzero(applied[layer]), layer
        assert tally.used + tally.dropped == ledger.used + ledger.dropped, layer
        assert line[header.index("used") :].split()[:2] == [str(tally.used), str(tally.dropped)]
    assert np.max(np.abs(found.params["a"])) <= 1.001 / ITEM, "an item is applied twice"
    differ = np.count_nonzero(applied["a"] != applied["b"])
    assert ledger.partly * ITEM == differ or ("quorum" in found.table() and ledger.partly * ITEM < differ)


@pytest.mark.parametrize("mix", POLICIES)
def test_a_loss(threads: fm.Cluster, mix: str) -> None:
    with pytest.warns(fm.FlowmlWarning, match="worker:3 was lost"):
        found = fit(threads, POLICIES[mix], {70: lambda: threads.end_worker("worker:3")}, on_loss="shrink")
    assert [lost.workers for lost in found.losses] == [("worker:3",)]
    assert_right(found)


@pytest.mark.parametrize("mix", POLICIES)
def test_a_worker_leaves(threads: fm.Cluster, mix: str) -> None:
    at = {40: lambda: threads.end_worker("worker:3", notice=True)}
    found = fit(threads, POLICIES[mix], at, on_loss="shrink", leaves="worker:3")
    assert [change.left for change in found.changes] == [("worker:3",)]
    assert_right(found)
    if "quorum" not in mix:
        dropped = [tally.dropped for tally in (found.ledger, *found.ledger.groups.values())]
        assert not any(dropped), "it leaves after a push of its own"


@pytest.mark.parametrize("mix", POLICIES)
def test_a_loss_and_a_join(threads: fm.Cluster, mix: str) -> None:
    at = {40: lambda: threads.end_worker("worker:3"), 60: lambda: threads.start_worker("worker:3")}
    with pytest.warns(fm.FlowmlWarning, match="worker:3 was lost"):
        found = fit(threads, POLICIES[mix], at, replicas="elastic")
    assert [change.joined for change in found.changes] == [("worker:3",)]
    assert_right(found)


@pytest.mark.parametrize("both", [False, True])
def test_what_a_lost_replica_has_mixed_in_is_dropped_by_the_layer_that_is_mixed(
    threads: fm.Cluster, both: bool
) -> None:
    at = {40: lambda: threads.end_worker("worker:3"), 60: lambda: threads.start_worker("worker:3")}
    mix = {"a": fm.policies.gossip("ring") if both else fm.Policy(), "b": fm.policies.gossip("ring")}
    with pytest.warns(fm.FlowmlWarning, match="worker:3 was lost"):
        found = fit(threads, mix, at, replicas="elastic")
    ((lost,), (joined,)) = found.losses, found.changes
    items = REPLICAS * STEPS - (joined.step - lost.resumed_at)
    dropped = lost.resumed_at
    ledger = found.ledger
    assert (ledger.used, ledger.dropped) == ((items - dropped, dropped) if both else (items, 0))
    rows = {name.partition(" ")[0]: (tally.used, tally.dropped) for name, tally in ledger.groups.items()}
    assert rows == ({} if both else {"a": (items, 0), "b": (items - dropped, dropped)})


def test_a_checkpoint_of_fewer_replicas_goes_on_with_all(threads: fm.Cluster, tmp_path: Path) -> None:
    """A replica was lost between two pushes."""
    mix, options = POLICIES["sync and local"], {"checkpoint": fm.Checkpoint(tmp_path)}
    at = {70: lambda: threads.end_worker("worker:3")}
    with pytest.warns(fm.FlowmlWarning, match="worker:3 was lost"):
        fit(threads, mix, at, on_loss="shrink", epochs=None, steps=120, **options)
    found = fit(threads, mix, {}, resume="auto", **options)
    assert found.resumed_at == 120
    assert_right(found)

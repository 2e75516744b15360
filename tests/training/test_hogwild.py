"""Replicas on the devices of one worker update parameters that they share: each update counts once, none waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training import home
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from tests.training.reference import BATCH, EXAMPLES, assert_close, data, mlp, mlp_loss, optax_loop

SOURCE = data()
EPOCHS = 12
ITEMS = EPOCHS * EXAMPLES * 2 // BATCH


@pytest.fixture(scope="module")
def one_process() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=1, devices_per_worker=2)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one_worker() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.threads(workers=1, devices_per_worker=2)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def virtual() -> Iterator[fm.SimulatedCluster]:
    network = fm.sim.Network(1e-3, 1e6)
    with closing(fm.SimulatedCluster(1, fm.sim.LogNormal(0.1, 0.5), network, devices_per_worker=2)) as cluster:
        yield cluster


@pytest.fixture(params=["one_process", "one_worker", "virtual"])
def cluster(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def fit(cluster: Any, policy: Any, loss: Any = mlp_loss, params: Any = None, **options: Any) -> fm.TrainingResult:
    optimizer = options.pop("optimizer", optax.sgd(0.05))
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, replicas=2, policies=policy, **options)
    return trainer.fit(mlp() if params is None else params, SOURCE, batch_size=BATCH, epochs=EPOCHS, progress=False)


def test_each_update_counts_exactly_once(cluster: Any) -> None:
    """The gradient of this loss is the sum of the examples, whatever the parameters are."""

    def linear(params: Any, batch: Any) -> Any:
        return jnp.mean(batch["x"] @ params["fc"]["w"]) + jnp.sum(params["other"]["b"])

    params = {"fc": {"w": jnp.zeros((12, 1))}, "other": {"b": jnp.zeros(3)}}
    result = fit(cluster, fm.policies.hogwild(), linear, params, optimizer=optax.sgd(1.0))
    items = SOURCE["x"].sum(0)[:, None] * EPOCHS / (BATCH / 2)
    np.testing.assert_allclose(result.params["fc"]["w"], -items, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(result.params["other"]["b"], np.full(3, -ITEMS, np.float32))
    assert (result.ledger.used, result.ledger.dropped, result.ledger.outstanding) == (ITEMS, 0, 0)
    for traffic in result.traffic.values():
        assert traffic == {
            "pushes": ITEMS,
            "pushed_bytes": 0,
            "pushed_wire_bytes": 0,
            "published_wire_bytes": 0,
            "shared_wire_bytes": 0,
        }


def test_the_loss_falls_as_in_serial(cluster: Any) -> None:
    serial = optax_loop(mlp_loss, mlp(), optax.sgd(0.05), SOURCE, ITEMS, batch_size=BATCH // 2)
    result = fit(cluster, {"fc1/*": fm.policies.hogwild(every=2), "*": fm.policies.hogwild()})
    expected = float(mlp_loss(serial.params, SOURCE))
    assert float(mlp_loss(result.params, SOURCE)) <= expected * 1.2 < float(mlp_loss(mlp(), SOURCE)) / 2


def test_one_replica_is_serial(one_worker: fm.Cluster) -> None:
    for optimizer in (optax.sgd(0.05), optax.adam(1e-2)):
        trainer = fm.Trainer(mlp_loss, optimizer, cluster=one_worker, policies=fm.policies.hogwild())
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=7)
        expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, 7)
        assert_close(result.params, expected.params)
        assert_close(result.opt_state, expected.opt_state)


def test_beside_other_rules_and_with_other_applies(one_worker: fm.Cluster, virtual: fm.SimulatedCluster) -> None:
    scaled = fm.Policy(topology=fm.SharedMemory(), apply=fm.StalenessScaled())
    policies = {"fc0/*": fm.policies.hogwild(), "fc1/*": scaled, "*": fm.policies.diloco(4, outer=optax.sgd(0.7))}
    for cluster in (one_worker, virtual):
        result = fit(cluster, policies, microbatches=2)
        assert float(mlp_loss(result.params, SOURCE)) < float(mlp_loss(mlp(), SOURCE)) / 2


def test_a_gradient_that_is_not_finite_is_left_out(one_worker: fm.Cluster, virtual: fm.SimulatedCluster) -> None:
    def loss(params: Any, batch: Any) -> Any:
        return mlp_loss(params, batch) * jnp.where(jnp.any(batch["x"][:, 0] == SOURCE["x"][0, 0]), jnp.nan, 1.0)

    for cluster in (one_worker, virtual):
        with pytest.warns(fm.FlowmlWarning, match="holds NaN or infinity"):
            result = fit(cluster, fm.policies.hogwild(), loss)
        assert {layer: sum(c.values()) for layer, c in result.ledger.nonfinite.items()} == dict.fromkeys(mlp(), EPOCHS)
        assert np.isfinite(float(mlp_loss(result.params, SOURCE)))


def test_workers_share_no_memory(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(fm.PlacementError, match=r"replicas run on .*worker:0.*worker:2.*devices_per_worker=2, or use"):
        fit(threads_cluster, fm.policies.hogwild())


@pytest.mark.parametrize(
    ("knobs", "nearest"),
    [
        ({"quorum": fm.Quorum(0.75)}, "leave quorum and staleness out"),
        ({"staleness": 3}, "leave quorum and staleness out"),
        ({"payload": fm.Delta()}, "use payload=Gradient"),
        ({"payload": fm.Factors()}, "use payload=Gradient"),
        ({"filters": (fm.filters.sign(),)}, "leave filters out"),
        ({"every": fm.Every(2, pull=4)}, "leave pull out"),
    ],
)
def test_what_shared_memory_has_no_use_for_is_refused(knobs: Any, nearest: str) -> None:
    with pytest.raises(fm.PolicyError, match=nearest):
        fm.Policy(topology=fm.SharedMemory(), **knobs)


def test_an_update_that_is_told_twice_is_an_error() -> None:
    machine = home.Home(Terms(2, 1, 1, (StoreTerms((0,), fm.policies.hogwild()),), 9), (0,))
    machine.step(home.StoreLoaded(0))
    assert machine.step(home.Updated(0, 1, 0)) == []
    assert machine.step(home.Updated(0, 1, 1, applied=False)) == []
    assert machine.version(0) == 1
    with pytest.raises(ProtocolError, match="replica 1 updates store 0 twice at clock 1"):
        machine.step(home.Updated(0, 1, 1))

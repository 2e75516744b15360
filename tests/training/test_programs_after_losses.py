"""What a fit compiles beside its step runs on workers that are left: validation, other shapes, and what comes after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.holdings import Holdings
from flowml_runtime.driver.remote import Kind
from tests.training.reference import BATCH, data, mlp, mlp_loss, predict
from tests.training.test_elastic import doing, without

STEPS = 12
LOST_AT = 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {"replicas": 4},
    "stages": {"replicas": 2, "placement": fm.Pipeline(stages=2)},
    "names": {"replicas": 2, "placement": {"fc0": "worker:0", "fc*": "worker:1"}},
}


@pytest.fixture(scope="module")
def whole() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=4) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole: fm.Cluster) -> Iterator[fm.Cluster]:
    yield whole
    whole.bring_back(whole.lost)


def outputs(params: Any, batch: Any) -> Any:
    return predict(params, batch["x"])


def trained(trainer: fm.Trainer, cluster: fm.Cluster, **given: Any) -> fm.TrainingResult:
    """A fit that loses worker:0."""
    options: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False, "on_loss": "shrink", **given}
    options["callbacks"] = [doing({LOST_AT: lambda: without(cluster, "worker:0")})]
    with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost at step .* left out"):
        return trainer.fit(mlp(), options.pop("source", data()), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lasts", [{}, {"on_loss": None, "replicas": "elastic"}], ids=["shrink", "elastic"])
def test_validation_goes_on_without_the_first_replica(cluster: fm.Cluster, layout: str, lasts: dict[str, Any]) -> None:
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, **LAYOUTS[layout])
    found = trained(trainer, cluster, validation=data(50, seed=3), validate_every=3, **lasts)
    assert [one["step"] for one in found.validation] == [2, 5, 8, 11]
    np.testing.assert_allclose(found.validation[-1]["loss"], mlp_loss(found.params, data(50, seed=3)), rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_fit_has_trained_is_evaluated_without_the_first_replica(cluster: fm.Cluster, layout: str) -> None:
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, **LAYOUTS[layout])
    params = trained(trainer, cluster).params
    for _ in range(2):  # without worker:0, and with it again
        found = trainer.evaluate(params, data(), lambda params, batch: {"loss": mlp_loss(params, batch)})
        np.testing.assert_allclose(found["loss"], mlp_loss(params, data()), rtol=1e-5)
        rows = trainer.predict(params, data(), outputs)
        np.testing.assert_allclose(rows, outputs(params, data()), rtol=1e-5, atol=1e-6)
        cluster.bring_back(cluster.lost)


def test_the_parameters_are_brought_where_a_replica_that_is_left_has_them(
    cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, **LAYOUTS["stages"])
    params = trained(trainer, cluster).params
    where: set[str] = set()
    bring = Holdings.bring

    def noting(self: Holdings, arrays: Any, kinds: Sequence[Kind], name: str) -> Any:
        where.update(kind.device for kind in kinds)
        return bring(self, arrays, kinds, name)

    monkeypatch.setattr(Holdings, "bring", noting)
    trainer.predict(params, data(), outputs)
    assert where == {"worker:2/cpu:0", "worker:3/cpu:0"}


def test_a_fit_that_begins_without_the_first_replica_validates(cluster: fm.Cluster) -> None:
    without(cluster, "worker:0")
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=4)
    options: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False, "replicas": "elastic"}
    found = trainer.fit(mlp(), data(), validation=data(50, seed=3), validate_every=6, **options)
    assert [one["step"] for one in found.validation] == [5, 11]


class Lengths:
    """Batches of several lengths, each with the first example of a work item."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return 8 * len(self._lengths)

    def __getitem__(self, rows: np.ndarray) -> Any:
        return np.ones((len(rows), self._lengths[rows[0] // 8], 2), np.float32) * (rows[0] + 1)


def square(params: Any, batch: Any) -> Any:
    return jnp.mean((batch @ params) ** 2)


@pytest.mark.parametrize("lasts", ["shrink", "elastic", "elastic from the beginning"])
@pytest.mark.parametrize("lengths", [(4, 6, 4, 6, 6, 4), (4,) * 5 + (6, 4, 6)], ids=["known before", "new after"])
def test_batches_of_other_shapes_go_on(cluster: fm.Cluster, lengths: Sequence[int], lasts: str) -> None:
    trainer = fm.Trainer(square, optax.sgd(1e-6), cluster=cluster, replicas=4)
    options: dict[str, Any] = {"batch_size": 32, "steps": 24, "progress": False, "shuffle": False}
    options |= {"on_loss": "shrink"} if lasts == "shrink" else {"replicas": "elastic"}
    if lasts == "elastic from the beginning":
        without(cluster, "worker:0")
        found = trainer.fit(jnp.ones(2), Lengths(lengths), **options)
    else:
        options["callbacks"] = [doing({0: lambda: without(cluster, "worker:0")})]
        with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost at step .* left out"):
            found = trainer.fit(jnp.ones(2), Lengths(lengths), **options)
    assert found.history[-1]["replicas"] == 3


def test_a_fit_that_is_to_shrink_says_how_it_begins_without_a_lost_worker(cluster: fm.Cluster) -> None:
    without(cluster, "worker:0")
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=4)
    options: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False}
    with pytest.raises(fm.WorkerLostError, match=r"worker:0 was lost .*bring_back.*replicas='elastic'"):
        trainer.fit(mlp(), data(), on_loss="shrink", **options)
    assert trainer.fit(mlp(), data(), replicas="elastic", **options).history[-1]["replicas"] == 3


@pytest.mark.parametrize("placement", ["worker:0", {"a": "worker:0/cpu:0"}])
def test_a_placement_of_a_lost_worker_says_so(cluster: fm.Cluster, tmp_path: Path, placement: Any) -> None:
    tree = {"a": np.ones(3, np.float32)}
    fm.save(tree, tmp_path)
    without(cluster, "worker:0")
    for act in (lambda: fm.put(tree, cluster, placement), lambda: fm.load(tmp_path, cluster, placement)):
        with pytest.raises(fm.WorkerLostError, match=r"worker:0 was lost .*the arrays cannot.*cluster\.bring_back"):
            act()
    with pytest.raises(fm.PlacementError, match="matches no leaf"):
        fm.put(tree, cluster, {"b": "worker:1"})
    with pytest.raises(fm.PlacementError, match=r"worker:7.*does not exist"):
        fm.put(tree, cluster, "worker:7")

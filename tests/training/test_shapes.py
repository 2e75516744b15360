"""Batches of several shapes in one fit: a program is compiled for each, and training equals the plain loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import FlowmlError, WorkerLostError
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.session import Session
from flowml_runtime.driver.training import feeding
from tests.training.reference import assert_close

LENGTHS = (6, 6, 10, 4, 10, 6)
BATCH, WIDTH = 8, 5


def loss(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    with fm.layer("one"):
        h = jnp.tanh(batch["x"] @ params["one"]["w"])
    with fm.layer("two"):
        return jnp.mean((jnp.mean(h @ params["two"]["w"], 1) - batch["y"]) ** 2)


def parameters() -> dict[str, dict[str, jax.Array]]:
    a, b = jax.random.split(jax.random.key(0))
    return {"one": {"w": jax.random.normal(a, (WIDTH, 7))}, "two": {"w": jax.random.normal(b, (7, 2))}}


class Buckets:
    """Examples of one length for each `rows` of them, in order; the batches of an epoch take turns."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS, rows: int = BATCH) -> None:
        rng = np.random.default_rng(0)
        self.lengths, self.rows = lengths, rows
        self.x = rng.normal(size=(len(lengths) * rows, max(lengths), WIDTH)).astype(np.float32)
        self.y = rng.normal(size=(len(lengths) * rows, 2)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        (length,) = {self.lengths[int(i) // self.rows] for i in indices} if len(indices) else {1}
        return {"x": self.x[indices, :length], "y": self.y[indices]}


class Masked(Buckets):
    """Batches padded to one length, with a mask: what a batch of several lengths is worth."""

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        lengths = np.array([self.lengths[int(i) // self.rows] for i in indices])
        mask = (np.arange(self.x.shape[1]) < lengths[:, None]).astype(np.float32)
        return {"x": self.x[indices], "y": self.y[indices], "mask": mask}


def masked_loss(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    h = jnp.tanh(batch["x"] @ params["one"]["w"]) @ params["two"]["w"] * batch["mask"][..., None]
    return jnp.mean((jnp.sum(h, 1) / jnp.sum(batch["mask"], 1)[:, None] - batch["y"]) ** 2)


def plain(source: Any, steps: int, function: Callable[..., Any] = loss) -> tuple[Any, list[float]]:
    params, optimizer = parameters(), optax.adam(1e-2)
    state, losses = optimizer.init(params), list[float]()

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(function)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    for i in range(steps):
        first = i * BATCH % len(source)
        params, state, value = step(params, state, source[np.arange(first, first + BATCH)])
        losses.append(float(value))
    return params, losses


def fit(cluster: fm.Cluster, source: Any, steps: int = 9, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.adam(1e-2), cluster=cluster, **options)
    return trainer.fit(parameters(), source, batch_size=BATCH, steps=steps, shuffle=False)


PLANS: dict[str, dict[str, Any]] = {
    "one device": {},
    "two stages": {"placement": fm.Pipeline(2)},
    "microbatches": {"placement": fm.Pipeline(2), "microbatches": 2},
    "replicas": {"replicas": 2},
    "all-reduce": {"replicas": 2, "policies": fm.policies.all_reduce()},
    "everything": {
        "replicas": 2,
        "placement": fm.Pipeline(2),
        "microbatches": 2,
        "policies": {"one/*": fm.policies.all_reduce()},
    },
}


CASES = [(kind, plan) for kind in ("threads_cluster", "process_cluster") for plan in PLANS]
CASES.remove(("process_cluster", "everything"))  # which has two workers
CASES += [("simulated", "two stages"), ("simulated", "everything")]


@pytest.fixture
def simulated() -> fm.SimulatedCluster:
    return fm.SimulatedCluster(4, fm.sim.LogNormal(0.1, 0.5), fm.sim.Network(1e-3, 1e6))


@pytest.mark.parametrize(("kind", "plan"), CASES)
def test_a_fit_over_several_shapes_equals_the_plain_loop(kind: str, plan: str, request: pytest.FixtureRequest) -> None:
    result = fit(request.getfixturevalue(kind), Buckets(), **PLANS[plan])
    params, losses = plain(Buckets(), 9)
    assert_close(result.params, params)
    np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=1e-5)
    assert "others for x float32[10, 5]" in result.plan.explain()


def test_replicas_may_have_other_shapes_in_one_step(threads_cluster: fm.Cluster) -> None:
    lengths = (6, 10, 4, 6, 10, 10, 4, 6)
    result = fit(threads_cluster, Buckets(lengths, BATCH // 2), replicas=2)
    params, losses = plain(Masked(lengths, BATCH // 2), 9, masked_loss)
    assert_close(result.params, params)
    np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=1e-5)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the first leaf of a microbatch, for each training plan that is loaded."""
    found: list[tuple[int, ...]] = []
    load = Session.load

    def noted(session: Session, plan: fm.Plan, meanwhile: Callable[[], None] = lambda: None) -> LoadedPlan:
        assert plan.training is not None
        found.append(plan.training.batch_specs[0].shape)
        return load(session, plan, meanwhile)

    monkeypatch.setattr(Session, "load", noted)
    return found


def test_each_shape_is_compiled_once_for_all_fits(threads_cluster: fm.Cluster, loads: list[tuple[int, ...]]) -> None:
    trainer = fm.Trainer(loss, optax.adam(1e-2), cluster=threads_cluster, replicas=2)
    for lengths in ((6, 6, 10, 4, 10, 6), (10, 4, 6)):  # the second fit begins with another of them
        source = Buckets(lengths)
        result = trainer.fit(parameters(), source, batch_size=BATCH, steps=7, shuffle=False)
        assert_close(result.params, plain(source, 7)[0])
    assert loads == [(4, 6, 5), (4, 10, 5), (4, 4, 5)]


def test_the_first_work_item_says_which_shape_is_compiled_first(
    threads_cluster: fm.Cluster, loads: list[tuple[int, ...]]
) -> None:
    source = Buckets((10, *(6,) * 5))  # the order of the epoch begins with another example than the source
    source.lengths, source.rows = (10, *(6,) * 47), 1
    trainer = fm.Trainer(loss, optax.adam(1e-2), cluster=threads_cluster)
    seed = next(s for s in range(99) if 0 not in fm.data.epoch_order(48, s, 0)[:BATCH])
    trainer.fit(parameters(), source, batch_size=BATCH, steps=1, seed=seed)
    assert loads == [(8, 6, 5)]


@pytest.mark.parametrize("policy", [fm.policies.every(3), fm.policies.quorum(1.0), fm.policies.every(2)])
def test_what_a_policy_does_is_the_same_for_any_shape(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    """Gradients are gathered over steps of several shapes. Padded batches of one shape are worth the same."""
    options: dict[str, Any] = {"replicas": 2, "policies": policy, "cluster": threads_cluster}
    padded = fm.Trainer(masked_loss, optax.adam(1e-2), **options)
    expected = padded.fit(parameters(), Masked(), batch_size=BATCH, steps=9, shuffle=False)
    options.pop("cluster")
    result = fit(threads_cluster, Buckets(), **options)
    assert_close(result.params, expected.params)
    assert result.ledger.used == expected.ledger.used == 18


def test_a_quorum_leaves_items_of_any_shape_out(threads_cluster: fm.Cluster) -> None:
    result = fit(
        threads_cluster,
        Buckets(),
        steps=12,
        replicas=2,
        placement=fm.Pipeline(2),
        policies=fm.policies.quorum(0.5),
        delays={"worker:2": 0.02},
    )
    assert len(result.history) == 12
    assert result.ledger.used + result.ledger.dropped + result.ledger.returned >= 12
    assert result.ledger.dropped


def test_replicas_on_their_own_take_items_of_any_shape(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster, Buckets(), steps=12, replicas=2, policies=fm.policies.asynchronous())
    assert result.ledger.used == 24
    assert all(np.isfinite(r["loss"]) for r in result.history)


def test_another_dtype_is_another_program(threads_cluster: fm.Cluster) -> None:
    class Halves(Buckets):
        def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            batch = super().__getitem__(indices)
            return {**batch, "x": batch["x"].astype(np.float16)} if batch["x"].shape[1] == 10 else batch

    result = fit(threads_cluster, Halves())
    assert_close(result.params, plain(Halves(), 9)[0])


def long_is_slow(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    """A model whose stages are cut at another layer where examples are long."""
    x = batch["x"]
    for name in ("one", "two", "three", "four"):
        with fm.layer(name):
            w = params[name]
            x = x @ (w if name != "one" else (w @ w @ w)[:WIDTH, :WIDTH])
            if name == "four":
                x = x + jnp.tanh(x @ jnp.swapaxes(x, 1, 2)) @ x * 1e-3
    with fm.layer("four"):
        return jnp.mean(x**2)


def test_the_first_shape_says_where_layers_are(threads_cluster: fm.Cluster) -> None:
    lengths = (2, 400, 2)
    source = Buckets(lengths)
    params = {"one": jnp.eye(128), **{n: jnp.eye(WIDTH) for n in ("two", "three", "four")}}
    trainer = fm.Trainer(long_is_slow, optax.sgd(1e-2), cluster=threads_cluster, placement=fm.Pipeline(2))

    def homes(length: int) -> list[str]:
        x, y = ((BATCH, length, WIDTH), "float32"), ((BATCH, 2), "float32")
        batch = {"x": jax.ShapeDtypeStruct(*x), "y": jax.ShapeDtypeStruct(*y)}
        training = trainer.plan(params, batch).training
        assert training is not None
        return [s.home for s in training.stores]

    assert homes(2) != homes(400), "the shape does not matter to the cut, so this test shows nothing"
    result = trainer.fit(params, source, batch_size=BATCH, steps=3, shuffle=False)
    assert result.plan.training is not None
    assert [s.home for s in result.plan.training.stores] == homes(2)
    step = jax.jit(jax.grad(long_is_slow))
    for i in range(3):
        gradients = step(params, source[np.arange(i * BATCH, (i + 1) * BATCH)])
        params = jax.tree.map(lambda p, g: p - 1e-2 * g, params, gradients)
    assert_close(result.params, params)


def with_lengths(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    return loss(params, batch), jnp.mean(batch["x"], (0, 2))


class Short(Buckets):
    """Gives a row too few where examples are long."""

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = super().__getitem__(indices)
        return jax.tree.map(lambda x: x[1:], batch) if batch["x"].shape[1] == 10 else batch


class Wide(Buckets):
    """Gives examples of other features where they are long."""

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = super().__getitem__(indices)
        return {**batch, "x": batch["x"][..., :3]} if batch["x"].shape[1] == 10 else batch


@pytest.mark.parametrize(
    ("source", "function", "error", "says"),
    [
        (Short, loss, ValueError, r"gave shape \(7, 10, 5\) for 'x' and 8 indices; its first dimension must be 8"),
        (
            Wide,
            loss,
            ValueError,
            r"examples x float32\[10, 3\], y .* after others with x float32\[6, 5\], .* or a loss that",
        ),
        (Buckets, with_lengths, FlowmlError, "changes the shapes or dtypes of aux; give batches of one shape"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_named(
    threads_cluster: fm.Cluster, source: type[Any], function: Any, error: type[Exception], says: str
) -> None:
    trainer = fm.Trainer(function, optax.adam(1e-2), cluster=threads_cluster)
    with pytest.raises(error, match=says):
        trainer.fit(parameters(), source(), batch_size=BATCH, steps=9, shuffle=False)
    params, _ = plain(Buckets(), 2)  # and the trainer goes on
    result = fit(threads_cluster, Buckets(), steps=2)
    assert_close(result.params, params)


def test_factors_of_another_shape_are_refused(threads_cluster: fm.Cluster) -> None:
    def wide(params: Any, batch: Any) -> Any:
        with fm.layer("w"):
            return jnp.mean((jnp.tile(batch["x"].reshape(-1, WIDTH), 13) @ params["w"]) ** 2)

    class Columns(Buckets):
        def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"x": super().__getitem__(indices)["x"]}

    trainer = fm.Trainer(wide, optax.sgd(0.1), cluster=threads_cluster, replicas=2, policies=fm.policies.factors())
    with pytest.raises(FlowmlError, match=r"changes what is sent for layer 'w'.*policies that send plain gradients"):
        trainer.fit({"w": jnp.ones((65, 64))}, Columns((2, 4)), batch_size=BATCH, steps=4, shuffle=False)


def test_there_is_an_end_to_shapes(threads_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "MAX_SHAPES", 2)
    with pytest.raises(
        ValueError,
        match=r"at most 2 shapes, .* one more, with examples x float32\[4, 5\].*to a few lengths",
    ):
        fit(threads_cluster, Buckets())


def test_a_worker_that_is_lost_when_a_shape_comes_is_named(
    no_leaks: Callable[[], AbstractContextManager[None]],
) -> None:
    with no_leaks(), fm.Cluster.local(workers=2) as cluster:

        class Killing(Buckets):
            def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
                batch = super().__getitem__(indices)
                if batch["x"].shape[1] == 10:
                    os.kill(cluster.pids["worker:1"], signal.SIGKILL)
                return batch

        with pytest.raises(WorkerLostError, match=r"worker:1 .*lost") as caught:
            fit(cluster, Killing(), placement=fm.Pipeline(2))
        assert caught.value.worker == "worker:1"

"""Optimizers that evaluate the loss within an update: line searches, estimators of the Hessian, sharpness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flowml as fm
from flowml.data import epoch_order
from flowml.errors import UnsupportedError
from flowml.training.evaluated import evaluations
from flowml.training.spec import TrainingSpec
from flowml.training.step import item_key
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_checkpoints import assert_goes_on, case
from tests.training.test_coupled_fits import simulated
from tests.training.test_extra_arguments import assert_close

STEPS = 4
SEARCH = optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5))
WAYS: dict[str, dict[str, Any]] = {
    "one": {"replicas": 1},
    "two homes": {"replicas": 2},
    "two stages": {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2},
    "sums": {"replicas": 2, "policies": fm.policies.all_reduce()},
}


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """Compiling takes most of the time, and what is compiled runs a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _batches() -> Any:
    source = data()
    per_epoch = len(source["x"]) // BATCH
    for number in range(STEPS):
        order = epoch_order(len(source["x"]), 0, number // per_epoch)[number % per_epoch * BATCH :][:BATCH]
        yield {name: rest[order] for name, rest in source.items()}


def loop(optimizer: Any, asks: tuple[str, ...], loss: Any = mlp_loss) -> tuple[Any, Any]:
    @jax.jit
    def step(number: Any, params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        def of(params: Any) -> Any:
            return loss(params, batch, number)

        value, gradients = jax.value_and_grad(of)(params)
        every = {"value": value, "grad": gradients, "value_fn": of, "grad_fn": lambda params, _: jax.grad(of)(params)}
        updates, state = optimizer.update(gradients, state, params, **{name: every[name] for name in asks})
        return optax.apply_updates(params, updates), state

    params, state = mlp(), optimizer.init(mlp())
    for number, batch in enumerate(_batches()):
        params, state = step(number, params, state, batch)
    return params, state


def fit(cluster: Any, optimizer: Any = SEARCH, loss: Any = mlp_loss, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, **options)
    return trainer.fit(mlp(), data(), batch_size=BATCH, steps=STEPS, progress=False)


OPTIMIZERS = {
    "backtracking": (SEARCH, ("value", "grad", "value_fn")),
    "lbfgs": (optax.lbfgs(), ("value", "grad", "value_fn")),
    "sam": (contrib.sam(optax.sgd(0.01), optax.sgd(0.1), opaque_mode=True), ("grad_fn",)),
}


@pytest.mark.parametrize(
    ("name", "way"), [*(("backtracking", way) for way in WAYS), ("lbfgs", "two stages"), ("sam", "two homes")]
)
def test_a_fit_equals_the_plain_loop(threads_cluster: fm.Cluster, name: str, way: str) -> None:
    optimizer, asks = OPTIMIZERS[name]
    found = fit(threads_cluster, optimizer, **WAYS[way])
    wanted = loop(optimizer, asks, lambda params, batch, _: mlp_loss(params, batch))
    assert_close(found.params, wanted[0])
    assert_close(found.opt_state, wanted[1])
    assert way == "one" or any("(batch) share a home" in note for note in found.plan.notes)


def _dropping(params: Any, batch: Any, rng: Any) -> Any:
    kept = jax.random.bernoulli(rng, 0.8, batch["x"].shape)
    return mlp_loss(params, {**batch, "x": jnp.where(kept, batch["x"], 0)}), {"rows": jnp.float32(1)}


def test_a_random_loss_is_evaluated_with_the_keys_of_its_gradients(threads_cluster: fm.Cluster) -> None:
    def whole(params: Any, batch: Any, number: Any) -> Any:
        halves = [jax.tree.map(lambda x, r=r: x[r * BATCH // 2 :][: BATCH // 2], batch) for r in (0, 1)]
        losses = [_dropping(params, half, item_key(0, 2 * number + r, 0, 1))[0] for r, half in enumerate(halves)]
        return (losses[0] + losses[1]) / 2

    found = fit(threads_cluster, loss=_dropping, replicas=2)
    assert_close(found.params, loop(SEARCH, ("value", "grad", "value_fn"), whole)[0])


def test_a_simulated_fit_is_the_real_one_and_one_goes_on(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    real, virtual = (fit(cluster, replicas=2) for cluster in (threads_cluster, simulated()))
    assert_close(virtual.params, real.params)
    assert_goes_on(case(threads_cluster, tmp_path, optimizer=SEARCH))
    trainer, saved = (
        fm.Trainer(mlp_loss, SEARCH, cluster=threads_cluster),
        fm.Checkpoint(tmp_path / "own", every_steps=2),
    )
    found = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, checkpoint=saved, progress=False)
    assert_close(fm.restore(tmp_path / "own").params, found.params)


@pytest.mark.parametrize(("name", "before", "after"), [("lbfgs", 1, 2), ("sam", 2, 1), ("backtracking", 2, 2)])
def test_a_fit_goes_on_with_other_shares_of_the_batch(
    threads_cluster: fm.Cluster, tmp_path: Path, name: str, before: int, after: int
) -> None:
    """The leaves of the batch in a snapshot have other shapes then. They are zeros, and no reason to refuse or warn."""
    optimizer, saved = OPTIMIZERS[name][0], fm.Checkpoint(tmp_path)
    options: dict[str, Any] = {"batch_size": BATCH, "progress": False}
    first = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, replicas=before)
    first.fit(mlp(), data(), steps=2, checkpoint=saved, **options)
    second = fm.Trainer(
        mlp_loss, optimizer, cluster=threads_cluster, replicas=after, microbatches=2 if before == after else 1
    )
    resumed = second.fit(mlp(), data(), steps=STEPS, checkpoint=saved, resume="auto", **options)
    whole = second.fit(mlp(), data(), steps=STEPS, **options)
    assert resumed.resumed_at == 2
    assert_close(resumed.params, whole.params)
    assert_close(resumed.opt_state, whole.opt_state)


def test_another_rate_of_an_optimizer_that_evaluates_the_loss_is_warned_of(
    threads_cluster: fm.Cluster, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"batch_size": BATCH, "progress": False, "checkpoint": fm.Checkpoint(tmp_path)}
    for steps, replicas, rate in ((1, 1, 0.1), (2, 2, 0.2)):
        optimizer = optax.chain(optax.sgd(rate), optax.scale_by_backtracking_linesearch(5))
        trainer = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, replicas=replicas)
        if steps == 1:
            trainer.fit(mlp(), data(), steps=1, **options)
            continue
        with pytest.warns(fm.FlowmlWarning, match="the update of the optimizer is another one"):
            trainer.fit(mlp(), data(), steps=2, resume="auto", **options)


def test_the_loss_is_that_of_the_replicas_that_take_part(threads_cluster: fm.Cluster) -> None:
    """A replica whose gradient is not finite is left out of the gradient, and of the loss."""
    source = data()
    source["x"] = source["x"].copy()
    rows = epoch_order(len(source["x"]), 0, 0)[:BATCH]
    source["x"][rows[0]] = np.nan  # in the first half of the first batch
    trainer = fm.Trainer(mlp_loss, SEARCH, cluster=threads_cluster, replicas=2)
    with pytest.warns(fm.FlowmlWarning):
        found = trainer.fit(mlp(), source, batch_size=BATCH, steps=1, progress=False)
    second = {name: rest[rows[BATCH // 2 :]] for name, rest in data().items()}
    value, gradients = jax.value_and_grad(mlp_loss)(mlp(), second)
    updates, _ = SEARCH.update(
        gradients, SEARCH.init(mlp()), mlp(), value=value, grad=gradients, value_fn=lambda p: mlp_loss(p, second)
    )
    assert_close(found.params, optax.apply_updates(mlp(), updates))


def test_every_type_of_a_batch_arrives_as_it_was() -> None:
    rng = np.random.default_rng(0)
    batch = {
        "float": rng.normal(size=(6, 2)).astype(np.float32),
        "nan": np.full((6,), np.nan, np.float32),
        "half": rng.normal(size=(6,)).astype(np.float16),
        "complex": (rng.normal(size=(6,)) + 1j).astype(np.complex64),
        "label": rng.integers(-(2**31), 2**31 - 1, size=(6, 1), dtype=np.int32),
        "byte": rng.integers(0, 255, size=(6,), dtype=np.uint8),
        "mask": rng.integers(0, 2, size=(6,)).astype(bool),
    }
    spec = TrainingSpec(lambda params, batch: (jnp.float32(0), batch), optax.sgd(1), replicas=3, microbatches=2)
    found = evaluations(spec, batch)
    pieces = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(6)]
    sent = [found.placed(piece, jnp.array([0, 3 + i // 2, i % 2], jnp.uint32)) for i, piece in enumerate(pieces)]
    seen: list[Any] = []

    def look(params: Any, batch: Any) -> Any:
        jax.debug.callback(seen.append, batch)
        return jnp.float32(0)

    means = [sum(leaves) / 6 for leaves in zip(*sent, strict=True)]
    evaluations(TrainingSpec(look, optax.sgd(1), replicas=3, microbatches=2), batch).of_batch(means)(None)
    jax.effects_barrier()
    got = jax.tree.map(lambda *rows: np.concatenate(rows), *sorted(seen, key=lambda x: _place(x, pieces)))
    for name, wanted in batch.items():
        assert got[name].dtype == wanted.dtype
        np.testing.assert_array_equal(got[name], wanted)


def _place(seen: Any, pieces: Any) -> int:
    return next(i for i, piece in enumerate(pieces) if np.array_equal(piece["label"], seen["label"]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"policies": fm.policies.quorum(0.5)},
            "the whole batch of each step, and 'fc0/bias' has the policy .*synchronous",
        ),
        ({"policies": fm.policies.every(2)}, "the whole batch of each step"),
        ({"weight": lambda batch: jnp.float32(1)}, "weights or a shorter last batch"),
    ],
)
def test_a_loss_without_meaning_is_refused(threads_cluster: fm.Cluster, options: Any, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        fit(threads_cluster, replicas=2, **options)


def test_an_unknown_argument_is_refused_by_name(threads_cluster: fm.Cluster) -> None:
    def update(updates: Any, state: Any, params: Any = None, *, hessian: Any) -> Any:
        return updates, state

    optimizer: Any = optax.GradientTransformationExtraArgs(optax.identity().init, update)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match=r"keyword-only argument: 'hessian'.*write the loop with fm.dataflow"):
        fit(threads_cluster, optimizer)

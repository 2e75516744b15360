"""A loss that is no mean over examples: pieces count by their weight, as in one mean over the whole batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import assert_close

ROWS, TOKENS, WIDTH = 48, 12, 6
BATCH = 16
STEPS = 6


def tokens(rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows of tokens of which the first few are real: few in the second half of each batch, so that pieces differ."""
    rng = np.random.default_rng(0)
    length = np.where(np.arange(rows) % BATCH < BATCH // 2, TOKENS, 1 + np.arange(rows) % 3)
    return {
        "x": rng.normal(size=(rows, TOKENS, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(rows, TOKENS)).astype(np.float32),
        "mask": np.arange(TOKENS)[None] < length[:, None],
    }


SOURCE = tokens()


def params() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "fc1": {"w": jax.random.normal(keys[0], (WIDTH, 8)) / 3, "b": jnp.zeros(8)},
        "fc2": {"w": jax.random.normal(keys[1], (8,)) / 3},
    }


def masked_mean(params: Any, batch: Any) -> Any:
    with fm.layer("fc1"):
        h = jnp.tanh(batch["x"] @ params["fc1"]["w"] + params["fc1"]["b"])
    with fm.layer("fc2"):
        error = (h @ params["fc2"]["w"] - batch["y"]) ** 2
        return jnp.sum(error * batch["mask"]) / jnp.sum(batch["mask"])


def with_tokens(params: Any, batch: Any) -> Any:
    loss = masked_mean(params, batch)
    return loss, {"tokens": jnp.sum(batch["mask"]), "root": jnp.sqrt(loss), "rows": batch["mask"].shape[0]}


def loop(optimizer: Any, steps: int = STEPS, every: int = 1, total: bool = False) -> tuple[Any, list[float]]:
    """Steps of one jitted function on whole batches; with `every` on so many batches at once.

    With `total` the gradients of the batches are added, each a mean.
    """
    values, losses = params(), []
    state = optimizer.init(values)
    one = jax.jit(jax.value_and_grad(masked_mean))
    for start in range(0, steps, every):
        batches = [
            {k: v[np.arange(s * BATCH, (s + 1) * BATCH) % ROWS] for k, v in SOURCE.items()}
            for s in range(start, start + every)
        ]
        losses += [float(one(values, b)[0]) for b in batches]
        if total:
            gradient = jax.tree.map(lambda *g: sum(g), *(one(values, b)[1] for b in batches))
        else:
            gradient = one(values, jax.tree.map(lambda *b: np.concatenate(b), *batches))[1]
        updates, state = optimizer.update(gradient, state, values)
        values = optax.apply_updates(values, updates)
    return values, losses


def fit(cluster: fm.Cluster, loss: Any = with_tokens, **options: Any) -> fm.TrainingResult:
    options = {"weight": "tokens", **options}
    return fm.Trainer(loss, optax.adam(1e-2), cluster=cluster, **options).fit(
        params(), SOURCE, batch_size=BATCH, steps=STEPS, shuffle=False
    )


POLICIES = {
    "server": fm.Policy(),
    "all-reduce": fm.policies.all_reduce(),
    "ring": fm.Policy(topology=fm.Ring()),
    "factors": fm.policies.factors(),
    "quorum": fm.policies.quorum(1.0),
}


LAYOUTS = [(2, 1, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (4, 2, 1)]


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in POLICIES for layout in LAYOUTS if name != "ring" or layout[0] > 1],  # a ring has two
    ids=str,
)
def test_pieces_count_by_their_weight(threads_cluster: fm.Cluster, name: str, layout: tuple[int, int, int]) -> None:
    replicas, microbatches, stages = layout
    expected, losses = loop(optax.adam(1e-2))
    result = fit(
        threads_cluster,
        replicas=replicas,
        microbatches=microbatches,
        placement=fm.Pipeline(stages),
        policies=POLICIES[name],
    )
    assert_close(result.params, expected)
    np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=1e-5)
    first = SOURCE["mask"][:BATCH]
    aux = result.history[0]["aux"]
    assert int(aux["tokens"]) == first.sum()
    assert int(aux["rows"]) == BATCH


@pytest.mark.parametrize("name", ["server", "all-reduce"])
def test_on_processes(process_cluster: fm.Cluster, name: str) -> None:
    expected, losses = loop(optax.adam(1e-2))
    for weight in ("tokens", lambda batch: batch["mask"].sum()):
        result = fit(process_cluster, replicas=2, microbatches=2, policies=POLICIES[name], weight=weight)
        assert_close(result.params, expected)
        np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=1e-5)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_function_of_the_batch(threads_cluster: fm.Cluster, stages: int) -> None:
    expected, losses = loop(optax.adam(1e-2))
    result = fit(
        threads_cluster,
        masked_mean,
        weight=lambda batch: batch["mask"].sum(),
        replicas=2,
        microbatches=2,
        placement=fm.Pipeline(stages),
    )
    assert_close(result.params, expected)
    np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=1e-5)


@pytest.mark.parametrize("policy", [fm.policies.every(3), fm.policies.all_reduce(every=3)], ids=str)
@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_over_several_steps(threads_cluster: fm.Cluster, policy: fm.Policy, layout: tuple[int, int]) -> None:
    for rule, total in ((policy, False), (_summing(policy), True)):
        expected, _ = loop(optax.adam(1e-2), every=3, total=total)
        if total and layout[0] > 1:
            continue  # each replica's mean is added, which no mean over the whole batch is
        result = fit(threads_cluster, replicas=layout[0], microbatches=layout[1], policies=rule)
        assert_close(result.params, expected)


def _summing(policy: fm.Policy) -> fm.Policy:
    return fm.Policy(topology=policy.topology, every=policy.every, apply="sum")


@pytest.mark.parametrize("policy", [fm.Policy(apply="sum"), fm.policies.all_reduce(apply="sum")], ids=str)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_sum_adds_the_means_of_replicas(threads_cluster: fm.Cluster, policy: fm.Policy, microbatches: int) -> None:
    result = fm.Trainer(
        with_tokens, optax.sgd(0.1), cluster=threads_cluster, replicas=2, microbatches=microbatches,
        policies=policy, weight="tokens",
    ).fit(params(), SOURCE, batch_size=BATCH, steps=1, shuffle=False)  # fmt: skip
    halves = [{k: v[i : i + BATCH // 2] for k, v in SOURCE.items()} for i in (0, BATCH // 2)]
    gradients = [jax.grad(masked_mean)(params(), half) for half in halves]
    expected = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b), params(), *gradients)
    assert_close(result.params, expected)


def test_one_replica_that_is_asynchronous_equals_the_loop(threads_cluster: fm.Cluster) -> None:
    expected, losses = loop(optax.adam(1e-2))
    for microbatches in (1, 4):
        result = fit(threads_cluster, microbatches=microbatches, policies=fm.policies.asynchronous())
        assert_close(result.params, expected)
        np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=1e-5)


def test_a_piece_without_tokens_counts_nothing(threads_cluster: fm.Cluster) -> None:
    """Its mean is 0 / 0. The whole batch has tokens, and so the step is the one on these."""
    source = {**SOURCE, "mask": SOURCE["mask"] & (np.arange(ROWS) % BATCH < BATCH // 2)[:, None]}
    whole = {k: v[:BATCH] for k, v in source.items()}
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params(), jax.grad(masked_mean)(params(), whole))
    for policy in (fm.Policy(), fm.policies.all_reduce(), fm.policies.factors()):
        result = fm.Trainer(
            with_tokens, optax.sgd(0.1), cluster=threads_cluster, replicas=2, microbatches=2, weight="tokens",
            policies=policy,
        ).fit(params(), source, batch_size=BATCH, steps=1, shuffle=False)  # fmt: skip
        assert_close(result.params, expected)
        np.testing.assert_allclose(result.history[0]["loss"], masked_mean(params(), whole), rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        ("words", r"weight='words' names no leaf of the loss's aux; there are: 'root', 'rows', 'tokens'"),
        (lambda batch: batch["mask"], r"weight=<lambda> is bool\[8,12\]; a weight is one real number a batch"),
        (3, r"weight=3 is a int; give the name of a leaf of aux, or a function of the batch"),
    ],
)
def test_weights_that_are_none(threads_cluster: fm.Cluster, weight: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        fit(threads_cluster, replicas=2, weight=weight)


def wide_layer(params: Any, batch: Any) -> Any:
    h = jnp.tanh(batch["x"] @ params["fc"]["w"])
    return jnp.sum(h.mean(axis=1) * batch["n"]) / jnp.sum(batch["n"])


@pytest.mark.parametrize("apply", ["mean", "sum"])
def test_factors_carry_their_weight(threads_cluster: fm.Cluster, apply: Any) -> None:
    rng = np.random.default_rng(0)
    source = {"x": rng.normal(size=(8, 64)).astype(np.float32), "n": np.array([1, 0, 0, 0, 5, 9, 2, 4], np.float32)}
    start = {"fc": {"w": jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32)}}
    trainer = fm.Trainer(
        wide_layer, optax.sgd(1.0), cluster=threads_cluster, replicas=2, microbatches=2,
        policies=fm.policies.factors(apply=apply), weight=lambda batch: batch["n"].sum(),
    )  # fmt: skip
    result = trainer.fit(start, source, batch_size=8, steps=1, shuffle=False)
    assert any("pushed as factors" in note for note in result.plan.notes)
    pieces = [source] if apply == "mean" else [{k: v[i : i + 4] for k, v in source.items()} for i in (0, 4)]
    gradient = sum(jax.grad(wide_layer)(start, piece)["fc"]["w"] for piece in pieces)
    assert_close(result.params["fc"]["w"], start["fc"]["w"] - gradient)


def summed(params: Any, batch: Any) -> Any:
    return jnp.sum((batch["x"] @ params["fc1"]["w"]) ** 2)


def mean(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["fc1"]["w"]) ** 2)


def noisy(params: Any, batch: Any, rng: Any) -> Any:
    return mean(params, batch) * jax.random.uniform(rng, ())


def of_one_shape(params: Any, batch: Any) -> Any:
    assert batch["x"].shape[0] == BATCH // 2
    return jnp.sum(batch["x"] @ params["fc1"]["w"])


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
@pytest.mark.parametrize("layout", [{"replicas": 2}, {"microbatches": 2}], ids=str)
def test_a_loss_that_is_no_mean_over_examples_warns_once(
    kind: str, layout: dict[str, int], request: pytest.FixtureRequest
) -> None:
    cluster = request.getfixturevalue(kind)
    for loss, weight in ((masked_mean, None), (summed, None), (with_tokens, lambda batch: batch["mask"].shape[0])):
        trainer = fm.Trainer(loss, optax.sgd(0.0), cluster=cluster, weight=weight, **layout)
        with pytest.warns(
            fm.FlowmlWarning, match=rf"{loss.__name__} is no mean over examples.* give Trainer\(weight=\)"
        ):
            trainer.fit(params(), SOURCE, batch_size=BATCH, steps=1, shuffle=False)
        trainer.fit(params(), SOURCE, batch_size=BATCH, steps=1, shuffle=False)  # warnings are errors here


def test_a_loss_that_is_a_mean_is_evaluated_once_on_the_same_examples(threads_cluster: fm.Cluster) -> None:
    evaluated: list[int] = []

    def loss(params: Any, batch: Any) -> Any:
        evaluated.append(len(batch["x"]))
        return masked_mean(params, batch)

    def fit(source: dict[str, np.ndarray]) -> list[int]:
        evaluated.clear()
        trainer = fm.Trainer(loss, optax.sgd(0.0), cluster=threads_cluster, replicas=2)
        trainer.fit(params(), source, batch_size=BATCH, steps=1, shuffle=False)
        return evaluated[:]

    equal = {**SOURCE, "mask": np.ones_like(SOURCE["mask"])}
    assert BATCH in fit(equal), "on the whole batch; replicas take half of it"
    assert BATCH not in fit(equal)
    assert BATCH in fit({**equal, "x": equal["x"] + 1})
    with pytest.warns(fm.FlowmlWarning, match="is no mean over examples"):  # on others it may be none
        fit(SOURCE)


@pytest.mark.parametrize("loss", [mean, noisy, of_one_shape])
def test_a_loss_of_which_nothing_can_be_said_does_not_warn(threads_cluster: fm.Cluster, loss: Any) -> None:
    trainer = fm.Trainer(loss, optax.sgd(0.0), cluster=threads_cluster, replicas=2)
    trainer.fit(params(), SOURCE, batch_size=BATCH, steps=1, shuffle=False)


def test_a_single_piece_does_not_warn(threads_cluster: fm.Cluster) -> None:
    fm.Trainer(summed, optax.sgd(0.0), cluster=threads_cluster).fit(params(), SOURCE, batch_size=BATCH, steps=1)


PIECES = {"replicas": {"replicas": 2}, "microbatches": {"microbatches": 2}}


def weighted_by(cluster: fm.Cluster, weights: list[float], **options: Any) -> fm.TrainingResult:
    """Two steps whose halves have these weights; the weight is a function of the batch."""
    w = np.repeat(np.asarray(weights, np.float32), BATCH // 2)
    source = {**{k: v[: len(w)] for k, v in SOURCE.items()}, "w": w}
    trainer = fm.Trainer(masked_mean, optax.sgd(0.1), cluster=cluster, weight=lambda b: b["w"][0], **options)
    return trainer.fit(params(), source, batch_size=BATCH, steps=len(weights) // 2, shuffle=False)


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_the_history_leaves_out_the_replica_whose_weight_is_refused(threads_cluster: fm.Cluster, weight: float) -> None:
    with pytest.warns(fm.FlowmlWarning, match="of replica 1 at step 0"):
        result = weighted_by(threads_cluster, [3.0, weight], replicas=2)
    half = {k: v[: BATCH // 2] for k, v in SOURCE.items()}
    value, gradient = jax.value_and_grad(masked_mean)(params(), half)
    np.testing.assert_allclose(result.history[0]["loss"], value, rtol=1e-5)
    assert result.history[0]["replicas"] == 1
    assert_close(result.params, jax.tree.map(lambda p, g: p - 0.1 * g, params(), gradient))


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", ["server", "all-reduce", "factors"])
def test_a_step_without_weight_has_no_replicas_in_its_record(
    threads_cluster: fm.Cluster, name: str, pieces: str
) -> None:
    result = weighted_by(threads_cluster, [0.0, 0.0], policies=POLICIES[name], **PIECES[pieces])
    assert np.isnan(result.history[0]["loss"]) and result.history[0]["replicas"] == 0
    assert_close(result.params, params())


@pytest.mark.parametrize("pieces", PIECES)
def test_a_weight_below_0_is_refused(threads_cluster: fm.Cluster, pieces: str) -> None:
    for name in ("server", "all-reduce", "factors"):
        with pytest.warns(fm.FlowmlWarning, match=r"the weight of .* is below 0 or not finite; the"):
            result = weighted_by(threads_cluster, [-1.0, -1.0], policies=POLICIES[name], **PIECES[pieces])
        assert np.isnan(result.history[0]["loss"]) and result.history[0]["replicas"] == 0
        assert result.ledger.nonfinite
        assert_close(result.params, params())

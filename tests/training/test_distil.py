"""A home distils the models of its replicas: the mean of their outputs is learnt by a model of the original size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

import flowml as fm
from flowml.data import epoch_order

DIGITS: Any = load_digits()
IMAGES = (np.asarray(DIGITS.images).reshape(-1, 64) / 16).astype(np.float32)
LABELS = np.asarray(DIGITS.target).astype(np.int32)
SOURCE = {"x": IMAGES[:768], "y": LABELS[:768]}
TRANSFER = IMAGES[768:1280]  # the labels of these examples are not used
TEST = {"x": IMAGES[1280:], "y": LABELS[1280:]}
REPLICAS, BATCH = 2, 64
START = {
    "fc1": {
        "w": (np.random.default_rng(0).normal(size=(64, 16)) / 8).astype(np.float32),
        "b": np.zeros(16, np.float32),
    },
    "fc2": {"w": (np.random.default_rng(1).normal(size=(16, 10)) / 4).astype(np.float32)},
}
Params = Any


def predict(params: Params, images: Any) -> Any:
    return jnp.tanh(images @ params["fc1"]["w"] + params["fc1"]["b"]) @ params["fc2"]["w"]


def entropy(logits: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def loss(params: Params, batch: Any) -> Any:
    return entropy(predict(params, batch["x"]), batch["y"])


def distil(**options: Any) -> fm.Distill:
    options = {"steps": 60, "optimizer": optax.adam(0.01), **options}
    return fm.Distill(predict, TRANSFER, **options)


def policy(every: Any = 6, **options: Any) -> fm.Policy:
    return fm.Policy(payload=fm.Weights(), every=every, apply=distil(**options))


def fit(cluster: Any, chosen: fm.Policy, *, steps: int = 6, replicas: int = REPLICAS, **options: Any) -> Params:
    options = {"placement": fm.Pipeline(1), **options}
    trainer = fm.Trainer(loss, optax.sgd(0.5), cluster=cluster, replicas=replicas, policies=chosen, **options)
    result = trainer.fit(START, SOURCE, batch_size=BATCH, steps=steps, seed=4, progress=False)
    assert result.ledger.used == steps * replicas
    return result.params


def virtual(workers: int = REPLICAS, *, arithmetic: bool = True) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(workers, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=arithmetic)


def naive_members(start: Params, first: int, steps: int, replicas: int) -> list[Params]:
    """Each replica's own steps from `start`, in a plain loop."""
    gradient, found = jax.jit(jax.grad(loss)), list[Params]()
    size = BATCH // replicas
    for replica in range(replicas):
        params = start
        for step in range(first, first + steps):
            epoch, place = divmod(step, len(SOURCE["x"]) // BATCH)
            rows = epoch_order(len(SOURCE["x"]), 4, epoch)[place * BATCH + replica * size :][:size]
            slope = gradient(params, {k: v[rows] for k, v in SOURCE.items()})
            params = jax.tree_util.tree_map(lambda p, g: p - 0.5 * g, params, slope)
        found.append(params)
    return found


def naive_student(members: Sequence[Params], *, steps: int = 60, size: int | None = None, error: Any = None) -> Params:
    """A student of the members' mean outputs, in a plain loop."""
    targets = np.mean([predict(m, TRANSFER) for m in members], axis=0)
    params = jax.tree_util.tree_map(lambda *ps: np.mean(ps, axis=0), *members)
    error = error or (lambda outputs, wanted: jnp.mean((outputs - wanted) ** 2))
    gradient = jax.jit(jax.grad(lambda p, x, t: error(predict(p, x), t)))
    optimizer, size = optax.adam(0.01), size or len(TRANSFER)
    state = optimizer.init(params)
    for step in range(steps):
        start = step % (len(TRANSFER) // size) * size
        slope = gradient(params, TRANSFER[start : start + size], targets[start : start + size])
        updates, state = optimizer.update(slope, state, params)
        params = optax.apply_updates(params, updates)
    return params


def close(params: Params, expected: Params) -> None:
    for a, b in zip(jax.tree_util.tree_leaves(params), jax.tree_util.tree_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_the_mean_output_is_as_good_and_the_student_has_the_original_size() -> None:
    """The loss is convex in the outputs, so that of their mean is at most the mean of the members' losses."""
    members = naive_members(START, 0, 24, REPLICAS)
    mean_output = np.mean([predict(m, TEST["x"]) for m in members], axis=0)
    losses = [float(loss(m, TEST)) for m in members]
    assert float(entropy(mean_output, TEST["y"])) <= np.mean(losses)
    student = fit(virtual(), policy(24), steps=24)
    shapes = jax.tree_util.tree_map(lambda p: (p.shape, p.dtype), student)
    assert shapes == jax.tree_util.tree_map(lambda p: (p.shape, p.dtype), START)
    assert float(loss(student, TEST)) <= 1.02 * float(entropy(mean_output, TEST["y"]))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all examples": ({}, {}),
    "batches": ({"batch_size": 100}, {"size": 100}),
    "another loss": (
        {"loss": lambda o, t: jnp.mean(jnp.abs(o - t)), "steps": 20},
        {"error": lambda o, t: jnp.mean(jnp.abs(o - t)), "steps": 20},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_student_equals_that_of_a_plain_loop(case: str) -> None:
    options, plain = CASES[case]
    expected = naive_student(naive_members(START, 0, 6, REPLICAS), **plain)
    close(fit(virtual(), policy(**options)), expected)


def test_replicas_go_on_from_the_student() -> None:
    first = naive_student(naive_members(START, 0, 4, REPLICAS))
    close(fit(virtual(), policy(4), steps=8), naive_student(naive_members(first, 4, 4, REPLICAS)))


def test_any_number_of_models_is_distilled() -> None:
    """More than one task takes at once."""
    close(fit(virtual(16), policy(4), steps=4, replicas=16), naive_student(naive_members(START, 0, 4, 16)))


def test_real_workers_distil_and_repeat_it_to_the_bit(threads_cluster: fm.Cluster) -> None:
    first, again = (fit(threads_cluster, policy(fm.Once())) for _ in range(2))
    close(first, naive_student(naive_members(START, 0, 6, REPLICAS)))
    for a, b in zip(jax.tree_util.tree_leaves(first), jax.tree_util.tree_leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_processes_distil(process_cluster: fm.Cluster) -> None:
    close(fit(process_cluster, policy()), naive_student(naive_members(START, 0, 6, REPLICAS)))


@pytest.mark.parametrize("simulated", [True, False], ids=["simulated", "threads"])
@pytest.mark.parametrize("on_nonfinite", ["refuse", "raise"])
def test_a_student_that_diverges_ends_the_fit(threads_cluster: fm.Cluster, simulated: bool, on_nonfinite: str) -> None:
    """No loss of a replica shows it, and after the last step its parameters are the result."""
    cluster = virtual() if simulated else threads_cluster
    wild = policy(2, optimizer=optax.sgd(1e6))
    with pytest.raises(fm.FlowmlError, match=r"the student of layer .* holds NaN or infinity: its training diverged"):
        fit(cluster, wild, steps=2, on_nonfinite=on_nonfinite)


def test_a_late_model_is_left_out_of_the_mean() -> None:
    compute = fm.sim.Straggler(fm.sim.Constant(0.1), 5.0, workers=(1,))
    cluster = fm.SimulatedCluster(2, compute, fm.sim.Network(1e-4, 1e9))
    chosen = fm.Policy(payload=fm.Weights(), every=4, apply=distil(), quorum=fm.Quorum(1))
    trainer = fm.Trainer(loss, optax.sgd(0.5), cluster=cluster, replicas=2, policies=chosen)
    result = trainer.fit(START, SOURCE, batch_size=BATCH, steps=4, seed=4, progress=False)
    close(result.params, naive_student(naive_members(START, 0, 4, 2)[:1]))


def test_the_policy_is_told_and_its_clocks_are_simulated_without_arithmetic() -> None:
    assert policy().describe() == "every 6, weights, distill 60"
    assert fm.Policy(payload=fm.Weights(), apply=fm.Prox(l2=0.1, after=distil())).describe().endswith("l2 0.1")
    fit(virtual(arithmetic=False), policy())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: distil(steps=0), r"Distill\(steps=0\): give a whole number of at least 1"),
        (lambda: distil(batch_size=1.5), r"Distill\(batch_size=1.5\): give a whole number"),
        (lambda: distil(optimizer=None), r"the student needs an optimizer; give an optax"),
        (lambda: distil(loss=3), r"Distill\(loss=3\): give a function loss\(outputs, targets\)"),
        (lambda: fm.Distill("f", TRANSFER, 1, optax.sgd(1.0)), r"give a function predict\(params, inputs\)"),
        (lambda: fm.Policy(apply=distil()), r"the outputs of whole models are averaged.*use payload=Weights\(\)"),
        (lambda: fm.Policy(payload=fm.Weights(), apply=distil(), topology=fm.Ring()), "use topology=fm.Param"),
        (lambda: fm.Policy(payload=fm.Weights(), apply=distil(), topology=fm.Gossip()), "is not sound"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(fm.PolicyError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predict": lambda p, x: x @ p["fc9"]}, r"predict\(params, inputs\) cannot be traced.*KeyError: 'fc9'"),
        ({"predict": lambda p, x: jnp.sum(x)}, r"returns an array of float32\[\] for 512 examples"),
        ({"predict": lambda p, x: jnp.argmax(predict(p, x), 1)}, r"array of int32\[512\].*such as logits"),
        ({"predict": lambda p, x: ()}, "predict returns no array"),
        ({"inputs": TRANSFER[:0]}, r"has arrays of 0 rows; give arrays with one row for each example"),
        ({"inputs": {"a": TRANSFER, "b": TRANSFER[1:]}}, r"has arrays of 511, 512 rows"),
        ({"inputs": 3.0}, r"has 3.0, which has no rows"),
        ({"inputs": np.array([[0.0, np.nan], [np.inf, 1.0]], np.float32)}, r"has 2 values that are NaN or infinite"),
        ({"batch_size": 513}, r"batch_size=513\) with 512 examples as inputs; give batch_size=512 or less"),
        ({"loss": lambda o, t: o - t}, r"loss returns .*return one floating number"),
    ],
)
def test_functions_that_do_not_fit_the_model_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"predict": predict, "inputs": TRANSFER, "steps": 2, "optimizer": optax.sgd(0.1), **options}
    with pytest.raises(fm.PolicyError, match=message):
        fit(virtual(), fm.Policy(payload=fm.Weights(), apply=fm.Distill(**given)))


def test_a_home_needs_whole_models() -> None:
    with pytest.raises(fm.PolicyError, match=r"'fc1/b' with sync for 'fc2/w' is not sound.*give all layers the same"):
        fit(virtual(), {"fc1*": policy(1), "*": fm.Policy()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        fm.PolicyError, match=r"stages of a pipeline send it their parts apart.*worker:0.*Pipeline\(1\)"
    ):
        fit(virtual(4), policy(), placement=fm.Pipeline(2))

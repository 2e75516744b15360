"""Numbers that users give to a Trainer and its fits: NumPy's integers are taken, what no message carries is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.numbers import MOST
from flowml_runtime import wire
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss, optax_loop

SOURCE = data()
BEYOND = [-1, 2**53, 2**63, -(2**70)]
NO_NUMBER: list[Any] = [1.5, 16.0, np.float32(3), True, "3", None, [3], np.array([1, 2])]


def trainer(cluster: fm.Cluster, **options: Any) -> fm.Trainer:
    return fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, **options)


def fit(cluster: fm.Cluster, **changes: Any) -> fm.TrainingResult:
    options = {"batch_size": BATCH, "steps": 2, **changes}
    return trainer(cluster, replicas=2).fit(mlp(), SOURCE, **options)


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
def test_integers_of_numpy_are_numbers(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    given = trainer(cluster, replicas=np.int64(2), microbatches=np.uint8(2), delays={"worker:0": np.float32(0.0)})
    result = given.fit(
        mlp(), SOURCE, batch_size=np.int32(BATCH), steps=np.int64(3), seed=np.int64(3), shuffle=np.bool_(True)
    )
    plain = trainer(cluster, replicas=2, microbatches=2).fit(mlp(), SOURCE, batch_size=BATCH, steps=3, seed=3)
    assert_same(result.params, plain.params)
    assert len(fit(cluster, steps=None, epochs=np.int16(1)).history) == len(SOURCE["x"]) // BATCH


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
def test_a_number_that_no_message_carries_is_refused_and_the_next_fit_runs(
    kind: str, request: pytest.FixtureRequest
) -> None:
    cluster = request.getfixturevalue(kind)
    for name in ("seed", "steps", "batch_size"):
        for value in BEYOND:
            with pytest.raises(ValueError, match=rf"{name}={value}: give |needs at least that many examples"):
                fit(cluster, **{name: value})
        for value in NO_NUMBER:
            if name == "steps" and value is None:
                continue
            with pytest.raises(TypeError, match=rf"{name}=.* is of type {type(value).__name__}; give a whole number"):
                fit(cluster, **{name: value})
    with pytest.raises(TypeError, match=r"epochs=1.0 is of type float; give a whole number"):
        fit(cluster, steps=None, epochs=1.0)
    with pytest.raises(ValueError, match=r"the number of work items of all fits .* give less than 2\*\*53"):
        fit(cluster, steps=MOST)
    assert len(fit(cluster).history) == 2


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda c: trainer(c, replicas=2.0), r"replicas=2.0 is of type float; give a whole number"),
        (lambda c: trainer(c, microbatches="2"), r"microbatches='2' is of type str; give a whole number"),
        (lambda c: trainer(c, replicas=True), r"replicas=True is of type bool"),
        (lambda c: trainer(c, replicas=2**53), r"replicas=9007199254740992: give less than 2\*\*53"),
        (
            lambda c: trainer(c, delays={"worker:0": float("nan")}),
            r"delays\['worker:0'\]=nan: give seconds of at least 0",
        ),
        (lambda c: trainer(c, delays={"worker:0": "1"}), r"delays\['worker:0'\]='1': give seconds of at least 0"),
        (lambda c: trainer(c, policies=[fm.Policy()]), r"policies=\[.*\] is a list; give a mapping"),
    ],
)
def test_arguments_of_the_trainer_are_checked(
    threads_cluster: fm.Cluster, make: Callable[[fm.Cluster], fm.Trainer], error: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        make(threads_cluster)


def test_one_policy_is_that_of_all_parameters(threads_cluster: fm.Cluster) -> None:
    one = trainer(threads_cluster, replicas=2, policies=fm.policies.every(2))
    all_of_them = trainer(threads_cluster, replicas=2, policies={"*": fm.policies.every(2)})
    results = [t.fit(mlp(), SOURCE, batch_size=BATCH, steps=4) for t in (one, all_of_them)]
    assert_same(results[0].params, results[1].params)
    assert results[0].plan.training.stores[0].policy.describe() == "every 2"


def test_the_start_message_of_every_accepted_fit_survives_the_wire() -> None:
    for seed in (0, 1, np.int64(2**40), MOST):
        start = wire.StartTraining(
            plan_id="p",
            run=MOST,
            total_clocks=MOST,
            seed=int(seed),
            shuffle=True,
            examples=MOST,
            source="fed",
            delays=(("worker:0", (0.5,)),),
        )
        assert wire.decode(wire.encode(start)) == start


def test_the_largest_seed_trains_like_the_loop(process_cluster: fm.Cluster) -> None:
    expected = optax_loop(mlp_loss, mlp(), optax.sgd(0.1), SOURCE, 2, seed=MOST)
    alone = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=process_cluster, placement=fm.Pipeline(1))
    assert_same(alone.fit(mlp(), SOURCE, batch_size=BATCH, steps=2, seed=MOST).params, expected.params)


def test_the_data_module_needs_no_import_of_its_own() -> None:
    code = "import flowml as fm; print(fm.data.epoch_order(4, seed=0, epoch=0, shuffle=False).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 1, 2, 3]"


def test_the_start_of_a_fit_does_not_grow_with_its_steps(threads_cluster: fm.Cluster) -> None:
    """Counted in calls of Python functions: a fit of ten million steps that ends after its first."""

    def calls(steps: int) -> int:
        count = 0

        def profile(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += event == "call"

        def stop(record: dict[str, Any]) -> None:
            raise InterruptedError

        once = trainer(threads_cluster, replicas=2)
        once.fit(mlp(), SOURCE, batch_size=BATCH, steps=1)
        sys.setprofile(profile)
        try:
            with pytest.raises(InterruptedError):
                once.fit(mlp(), SOURCE, batch_size=BATCH, steps=steps, callbacks=[stop])
        finally:
            sys.setprofile(None)
        return count

    assert calls(10_000_000) < calls(10) + 5_000


def unused_loss(params: Any, batch: Any) -> Any:
    """Its gradient depends on no parameter, and of `fc1` on nothing at all."""
    return jnp.mean(batch["x"] @ params["fc0"]["kernel"])


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
@pytest.mark.parametrize("policy", [fm.policies.all_reduce(), fm.Policy(topology=fm.Ring()), fm.Policy()], ids=str)
def test_a_gradient_that_ignores_the_parameters_trains(
    kind: str, policy: fm.Policy, request: pytest.FixtureRequest
) -> None:
    cluster = request.getfixturevalue(kind)
    for loss in (unused_loss, lambda p, b: jnp.mean(b["x"])):
        expected = optax_loop(loss, mlp(), optax.adam(0.01), SOURCE, 12)
        run = fm.Trainer(loss, optax.adam(0.01), cluster=cluster, replicas=2, policies=policy)
        result = run.fit(mlp(), SOURCE, batch_size=BATCH, steps=12)
        np.testing.assert_allclose(result.params["fc0"]["kernel"], expected.params["fc0"]["kernel"], atol=1e-5)
        np.testing.assert_array_equal(result.params["fc1"]["kernel"], mlp()["fc1"]["kernel"])
        assert len(result.history) == 12


def test_a_quorum_of_more_replicas_than_there_are_is_refused(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(fm.PolicyError, match=r"Quorum\(9\) asks for more replicas than there are \(2\)"):
        trainer(threads_cluster, replicas=2, policies=fm.policies.quorum(9)).fit(
            mlp(), SOURCE, batch_size=BATCH, steps=2
        )

"""Steps that end between two microbatches equal the gradient of the microbatches that were computed, and no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import BATCH, EXAMPLES, data, mlp, mlp_loss

SOURCE = data()
MICROBATCHES = 4
STEP = 0.1
LIMIT = 0.12
"""A replica of twice the step time is about to begin its last microbatch after 0.15 s. See `USED`."""
USED = (4, 3)
"""The microbatches that each of two replicas computes."""

Loss = Any


def simulated(stages: int = 1, *, arithmetic: bool = True) -> fm.SimulatedCluster:
    slow = tuple(range(stages, 2 * stages))
    compute = fm.sim.Straggler(fm.sim.Constant(STEP), 2.0, workers=slow)
    return fm.SimulatedCluster(2 * stages, compute, fm.sim.Network(1e-5, 1e9), arithmetic=arithmetic)


def fit(cluster: Any, policy: fm.Policy, *, steps: int = 6, loss: Loss = mlp_loss, **options: Any) -> Any:
    options = {"microbatches": MICROBATCHES, "placement": fm.Pipeline(1), "replicas": 2, **options}
    optimizer = options.pop("optimizer", optax.sgd(0.1, momentum=0.9))
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, policies=policy, **options)
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=steps, seed=5, progress=False)
    ledger = result.ledger
    assert ledger.used == 2 * steps, "every replica contributes to every step"
    assert not ledger.outstanding and not ledger.dropped
    assert sum(t.left_out for t in ledger.epochs) == sum(t.left_out for t in ledger.replicas) == ledger.left_out
    assert ledger.examples == sum(times * many for times, many in ledger.seen) == BATCH * steps - ledger.left_out
    return result


def examples(step: int, replica: int, used: int) -> np.ndarray:
    """The examples that a replica uses in a step: the first microbatches of its work item."""
    a_step, size = EXAMPLES // BATCH, BATCH // 2
    epoch, place = divmod(step, a_step)
    start = (place * 2 + replica) * size
    return epoch_order(EXAMPLES, 5, epoch)[start : start + size * used // MICROBATCHES]


def naive(
    used: Sequence[int], *, steps: int = 6, every: int = 1, added: bool = False, optimizer: Any = None, loss: Any = None
) -> Any:
    """Parameters after gradients over exactly the examples that were used.

    A step's gradient is the mean over the examples of all replicas, or with `added` the sum of the means of each.
    """
    optimizer, loss = optimizer or optax.sgd(0.1, momentum=0.9), loss or mlp_loss
    params, gradient = mlp(), jax.jit(jax.grad(loss))
    state, waiting = optimizer.init(params), []
    for step in range(steps):
        waiting += [examples(step, r, n) for r, n in enumerate(used)]
        if (step + 1) % every and step + 1 < steps:
            continue
        groups = waiting if added else [np.concatenate(waiting)]
        found = [gradient(params, {k: v[g] for k, v in SOURCE.items()}) for g in groups]
        total = jax.tree_util.tree_map(lambda *gs: sum(gs[1:], gs[0]), *found)
        updates, state = optimizer.update(total, state, params)
        params, waiting = optax.apply_updates(params, updates), []
    return params


def close(result: Any, params: Any) -> None:
    for a, b in zip(jax.tree_util.tree_leaves(result.params), jax.tree_util.tree_leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parameter server": ({}, {}),
    "all-reduce": ({"topology": fm.AllReduce()}, {}),
    "every 2 under an all-reduce": ({"every": 2, "topology": fm.AllReduce()}, {"every": 2}),
    "sum": ({"apply": "sum"}, {"added": True}),
    "outer": ({"apply": fm.Outer(optax.adam(0.05))}, {"optimizer": optax.adam(0.05)}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_the_gradient_of_the_microbatches_that_were_computed(case: str) -> None:
    knobs, options = CASES[case]
    result = fit(simulated(), fm.policies.drop_compute(LIMIT, **knobs))
    assert [t.left_out for t in result.ledger.replicas] == [0, 6 * 3], "a microbatch of 3 examples in each of 6 steps"
    close(result, naive(USED, **options))


def test_the_loss_of_a_step_is_the_mean_over_the_examples_that_were_used() -> None:
    result = fit(simulated(), fm.policies.drop_compute(LIMIT), steps=1)
    used = np.concatenate([examples(0, r, n) for r, n in enumerate(USED)])
    assert math.isclose(
        result.history[0]["loss"], float(mlp_loss(mlp(), {k: v[used] for k, v in SOURCE.items()})), rel_tol=1e-5
    )


@pytest.mark.parametrize(
    ("schedule", "topology", "limit_s"), [("1f1b", fm.ParameterServer(), 0.03), ("gpipe", fm.AllReduce(), 0.012)]
)
def test_all_stages_of_a_pipeline_leave_out_the_same_microbatches(schedule: str, topology: Any, limit_s: float) -> None:
    policy = fm.policies.drop_compute(limit_s, topology=topology)
    result = fit(simulated(stages=3), policy, placement=fm.Pipeline(3), schedule=schedule)
    left_out = [t.left_out // (6 * 3) for t in result.ledger.replicas]
    assert 0 <= left_out[0] < left_out[1] < MICROBATCHES
    close(result, naive([MICROBATCHES - n for n in left_out]))


def test_without_arithmetic_the_same_is_left_out() -> None:
    for stages in (1, 2):
        runs = [
            fit(simulated(stages, arithmetic=a), fm.policies.drop_compute(0.04), placement=fm.Pipeline(stages))
            for a in (True, False)
        ]
        assert runs[0].ledger == runs[1].ledger
        assert runs[0].ledger.left_out
        assert runs[0].virtual_seconds == runs[1].virtual_seconds


def test_a_weight_of_the_users_counts_examples_of_the_microbatches_that_were_used() -> None:
    def weight(batch: Any) -> Any:
        return jnp.sum(jnp.abs(batch["y"][:, 0]))

    def loss(params: Any, batch: Any) -> Any:
        each = jnp.abs(batch["y"][:, 0])
        error = jnp.mean((jnp.tanh(batch["x"] @ params["fc0"]["kernel"])[:, :2] - batch["y"]) ** 2, axis=1)
        rest = sum(jnp.sum(leaf) for name in ("fc1", "fc2") for leaf in params[name].values())
        return jnp.sum(error * each) / jnp.sum(each) + 0.0 * (rest + jnp.sum(params["fc0"]["bias"]))

    result = fit(simulated(), fm.policies.drop_compute(LIMIT), loss=loss, weight=weight)
    close(result, naive(USED, loss=loss))


def test_local_steps_use_what_was_computed() -> None:
    """A replica that updates parameters of its own divides by the microbatches of its step, and its change counts by
    those that it has computed, as a gradient does."""
    policy = fm.Policy(payload=fm.Delta(), every=6, quorum=fm.Deadline(limit_s=LIMIT, of="microbatches"))
    result = fit(simulated(), policy, optimizer=optax.sgd(0.1))
    step = jax.jit(jax.grad(mlp_loss))
    ends: list[Any] = []
    for replica, used in enumerate(USED):
        params = mlp()
        for clock in range(6):
            chosen = examples(clock, replica, used)
            gradient = step(params, {k: v[chosen] for k, v in SOURCE.items()})
            params = jax.tree_util.tree_map(lambda p, g: p - 0.1 * g, params, gradient)
        ends.append(params)
    shares = np.array(USED) / sum(USED)
    close(result, jax.tree_util.tree_map(lambda a, b: shares[0] * a + shares[1] * b, *ends))


def test_the_update_is_unbiased() -> None:
    """Over orders of the data, the mean update is the gradient of all examples, whatever is left out."""
    few = {k: v[:16] for k, v in SOURCE.items()}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    params = {"w": jnp.zeros((few["x"].shape[1], 2))}
    trainer = fm.Trainer(
        loss, optax.sgd(1.0), cluster=simulated(), replicas=2, microbatches=4, policies=fm.policies.drop_compute(0.04)
    )
    found: list[np.ndarray] = []
    for seed in range(48):
        result = trainer.fit(params, few, batch_size=16, steps=1, seed=seed, progress=False)
        assert result.ledger.left_out == 10, "a replica uses 2 of its 4 microbatches, the slow one 1"
        found.append(-np.asarray(result.params["w"]))
    whole = np.asarray(jax.grad(loss)(params, few)["w"])
    error = np.mean(found, axis=0) - whole
    deviation = np.std(found, axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(error) < 5 * deviation + 1e-6)
    assert np.sum(np.mean(found, axis=0) * whole) / np.sum(whole**2) > 0.8, "what is left out does not count as 0"


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
def test_a_slow_replica_stops_on_real_workers(kind: str, request: pytest.FixtureRequest) -> None:
    """The slow one takes 1.5 s for a microbatch, so it computes one. The other one has 1 s for four tiny ones."""
    cluster = request.getfixturevalue(kind)
    policy = fm.policies.drop_compute(1.0)
    result = fit(cluster, policy, steps=1, delays={"worker:1": 6.0})
    assert [t.left_out for t in result.ledger.replicas] == [0, 9]
    close(result, naive((4, 1), steps=1))


def test_a_slow_replica_of_two_stages_stops_on_real_workers(threads_cluster: fm.Cluster) -> None:
    policy = fm.policies.drop_compute(1.0, topology=fm.AllReduce())
    result = fit(threads_cluster, policy, steps=1, delays={"worker:2": 6.0}, placement=fm.Pipeline(2))
    fast, slow = (t.left_out // 3 for t in result.ledger.replicas)
    assert fast == 0 < slow
    close(result, naive((4, 4 - slow), steps=1))


def first(params: Any, batch: Any) -> Any:
    return mlp_loss(params, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 1}, r"with microbatches=1 leaves nothing out: a replica stops between two"),
        (
            {"policies": {"fc0*": fm.policies.drop_compute(0.1), "*": fm.Policy()}},
            r"of one layer with quorum=Quorum\(1.0\) of another is not sound: a replica that stops between micro",
        ),
    ],
)
def test_what_cannot_leave_out_microbatches_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"policies": fm.policies.drop_compute(0.1), "microbatches": 4, **options}
    trainer = fm.Trainer(first, optax.sgd(0.1), cluster=simulated(), replicas=2, placement=fm.Pipeline(1), **given)
    with pytest.raises(fm.PolicyError, match=message):
        trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=1)


def test_two_towers_that_meet_in_the_loss_leave_out_the_same() -> None:
    """No stage begins each microbatch here, so the stage decides that makes what the others wait for."""

    def towers(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params["a"]) ** 2) + jnp.mean((batch["x"] @ params["b"] - batch["y"]) ** 2)

    params = {"a": jnp.ones((12, 2)), "b": jnp.ones((12, 2))}
    trainer = fm.Trainer(
        towers,
        optax.sgd(0.1),
        cluster=simulated(stages=2),
        replicas=2,
        microbatches=MICROBATCHES,
        placement={"b": "worker:1", "a": "worker:0"},
        policies=fm.policies.drop_compute(0.04),
    )
    result = trainer.fit(params, SOURCE, batch_size=BATCH, steps=1, seed=5, progress=False)
    used = [MICROBATCHES - t.left_out // 3 for t in result.ledger.replicas]
    assert min(used) < MICROBATCHES
    chosen = np.concatenate([examples(0, r, n) for r, n in enumerate(used)])
    gradient = jax.grad(towers)(params, {k: v[chosen] for k, v in SOURCE.items()})
    close(result, jax.tree_util.tree_map(lambda p, g: p - 0.1 * g, params, gradient))

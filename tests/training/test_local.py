"""Replicas with parameters of their own equal the loops that define them, step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import flowml as fm
from flowml.data import epoch_order
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec
from tests.training.reference import BATCH, EXAMPLES, FEATURES, assert_close, data, mlp, mlp_loss, optax_loop, predict

SOURCE = data()
STEPS = 13
LAYOUTS = {"1 stage": fm.Pipeline(1), "2 stages": fm.Pipeline(2)}


@dataclass
class Loop:
    """What a loop of replicas gives: the mean of their parameters before each step, and the global ones."""

    before: list[Any]
    params: Any
    last: list[Any]
    """The parameters of each replica after the last step."""
    state: Any
    """The optimizer state of replica 0 after the last step."""


def replica_loop(
    loss: Any,
    params: Any,
    inner: Any,
    shares: Callable[[int], list[Any]],
    steps: int,
    rhythms: Mapping[str, fm.Every],
    *,
    outer: Any = None,
    alpha: float = 0.0,
    plain: Collection[str] = (),
    weigh: Callable[[Any], float] = lambda batch: 1.0,
) -> Loop:
    """Replicas that each train alone. A layer's mean change is applied when its rhythm says, and taken a delay later.

    The layers in `plain` have no outer optimizer, and replicas take their global values whole. A replica counts by what
    the batches of its steps since the last push `weigh`.
    """
    count = len(shares(0))
    outer = outer or optax.sgd(1.0)
    shared, outer_states = dict(params), {k: outer.init(v) for k, v in params.items()}
    own, started = [dict(params) for _ in range(count)], [dict(params) for _ in range(count)]
    states = [inner.init(params) for _ in range(count)]
    weights = [dict.fromkeys(params, 0.0) for _ in range(count)]
    takes: dict[int, list[str]] = {}
    before: list[Any] = []
    gradient = jax.jit(jax.grad(loss))
    for step in range(steps):
        for layer in takes.pop(step, []):
            kept = 0 if layer in plain else alpha
            for r in range(count):
                own[r][layer] = jax.tree.map(lambda g, x, a=kept: (1 - a) * g + a * x, shared[layer], own[r][layer])
                started[r][layer] = shared[layer]
        before.append(jax.tree.map(lambda *xs: np.mean(xs, axis=0), *own))
        for r, share in enumerate(shares(step)):
            updates, states[r] = inner.update(gradient(own[r], share), states[r], own[r])
            own[r] = optax.apply_updates(own[r], updates)
            weights[r] = {layer: found + weigh(share) for layer, found in weights[r].items()}
        for layer, every in rhythms.items():
            if step + 1 != steps and (step + 1 - every.offset) % every.push:
                continue
            deltas = [jax.tree.map(jnp.subtract, started[r][layer], own[r][layer]) for r in range(count)]
            given = [weights[r].pop(layer) for r in range(count)]
            parts = [w / (sum(given) or 1.0) for w in given]
            mean = jax.tree.map(lambda *xs, parts=parts: sum(x * p for x, p in zip(xs, parts, strict=True)), *deltas)
            if layer in plain:
                shared[layer] = jax.tree.map(jnp.subtract, shared[layer], mean)
            else:
                updates, outer_states[layer] = outer.update(mean, outer_states[layer], shared[layer])
                shared[layer] = optax.apply_updates(shared[layer], updates)
            for r in range(count):
                started[r][layer], weights[r][layer] = own[r][layer], 0.0
            takes.setdefault(step + 1 + every.delay, []).append(layer)
    return Loop(before, shared, own, states[0])


def shares(step: int, replicas: int = 2) -> list[Any]:
    """The batch of each replica at a step."""
    per_epoch = EXAMPLES // BATCH
    order = epoch_order(EXAMPLES, 0, step // per_epoch)[step % per_epoch * BATCH :][:BATCH]
    return [{k: v[rows] for k, v in SOURCE.items()} for rows in np.split(order, replicas)]


def watched_loss(params: Any, batch: Any) -> Any:
    """The loss, and the parameters that it was computed with. A record of a fit has their mean over replicas."""
    return mlp_loss(params, batch), params


@pytest.fixture(scope="module")
def two_devices_each() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=2, devices_per_worker=2)) as cluster:
        yield cluster


@pytest.fixture(params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue({"threads": "threads_cluster", "processes": "two_devices_each"}[request.param])


def watched_fit(cluster: fm.Cluster, policies: Any, layout: str, inner: Any, **options: Any) -> Any:
    trainer = fm.Trainer(
        watched_loss, inner, cluster=cluster, replicas=2, placement=LAYOUTS[layout], policies=policies, **options
    )
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


def assert_equal_steps(result: Any, expected: Loop) -> None:
    assert len(result.history) == len(expected.before)
    for record, params in zip(result.history, expected.before, strict=True):
        assert_close(record["aux"], params)
    assert_close(result.params, expected.params)
    assert_close(getattr(result.opt_state, "own", result.opt_state), expected.state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_sgd_of_one_step_is_synchronous_sgd(cluster: fm.Cluster, layout: str) -> None:
    trainer = fm.Trainer(
        mlp_loss,
        optax.sgd(0.1),
        cluster=cluster,
        replicas=2,
        placement=LAYOUTS[layout],
        policies=fm.policies.local_sgd(1),
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    expected = optax_loop(mlp_loss, mlp(), optax.sgd(0.1), SOURCE, STEPS, items=2)
    assert_close(result.params, expected.params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_sgd_equals_the_loop_at_every_step(cluster: fm.Cluster, layout: str) -> None:
    inner = optax.adam(1e-2)
    result = watched_fit(cluster, fm.policies.local_sgd(4), layout, inner)
    assert_equal_steps(result, replica_loop(mlp_loss, mlp(), inner, shares, STEPS, dict.fromkeys(mlp(), fm.Every(4))))
    every_step = watched_fit(cluster, fm.Policy(), layout, inner)
    for layer, traffic in result.traffic.items():
        pushes = -(-STEPS // 4)
        assert traffic["pushes"] == 2 * pushes
        assert traffic["pushed_bytes"] * STEPS == every_step.traffic[layer]["pushed_bytes"] * pushes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diloco_equals_the_loop_at_every_step(cluster: fm.Cluster, layout: str) -> None:
    inner, outer = optax.adam(1e-2), optax.sgd(0.7, momentum=0.9, nesterov=True)
    result = watched_fit(cluster, fm.policies.diloco(3), layout, inner, microbatches=2)
    every = dict.fromkeys(mlp(), fm.Every(3))
    assert_equal_steps(result, replica_loop(mlp_loss, mlp(), inner, shares, STEPS, every, outer=outer))
    assert jax.tree.leaves(result.opt_state.outer)[0].any(), "the momentum of the outer optimizer"


def test_layers_keep_their_own_rules(threads_cluster: fm.Cluster) -> None:
    """Streaming DiLoCo of two layers beside a synchronous one, at a stale share of the replicas' own values."""
    inner = optax.sgd(0.1)
    stream = fm.policies.diloco(4, outer=optax.sgd(0.8), fragments=2, delay=1, alpha=0.25)
    result = watched_fit(threads_cluster, {"fc1/*": fm.Policy(), "*": stream}, "2 stages", inner)
    rhythms = {"fc0": fm.Every(4, offset=1, delay=1), "fc1": fm.Every(1), "fc2": fm.Every(4, offset=3, delay=1)}
    streamed = replica_loop(
        mlp_loss, mlp(), inner, shares, STEPS, rhythms, outer=optax.sgd(0.8), alpha=0.25, plain={"fc1"}
    )
    assert_equal_steps(result, streamed)


STREAMED = {
    "whole": (
        {"delay": 0, "alpha": 0.0},
        {
            "first": [1, -1, -3, -11, -13, -15, -17, -19, -21, -35, -37, -39, -41, -43, -45, -59],
            "second": [1, -1, -3, -5, -7, -9, -23, -25, -27, -29, -31, -33, -47, -49, -51, -53],
        },
        {3: {"first": -11}, 6: {"second": -23}, 9: {"first": -35}, 12: {"second": -47}},
    ),
    "own": (
        {"delay": 0, "alpha": 1.0},
        {"first": [1 - 2 * i for i in range(16)], "second": [1 - 2 * i for i in range(16)]},
        {3: {"first": -11}, 6: {"second": -23}, 9: {"first": -23}, 12: {"second": -23}},
    ),
    "half, a step later": (
        {"delay": 1, "alpha": 0.5},
        {
            "first": [1, -1, -3, -6, -8, -10, -12, -14, -16, -21.5, -23.5, -25.5, -27.5, -29.5, -31.5, -35.75],
            "second": [1, -1, -3, -5, -7, -9, -15, -17, -19, -21, -23, -25, -29, -31, -33, -35],
        },
        {3: {"first": -7}, 6: {"second": -19}, 9: {"first": -25}, 12: {"second": -31}},
    ),
}
"""Weights before each step, and global weights from a step on, of torchft's deterministic test of Streaming DiLoCo
(meta-pytorch/torchft, BSD-3): two replicas, two fragments of one weight each that begins at 1, all gradients 2, inner
SGD at rate 1, outer SGD at rate 2, and 6 steps between synchronisations of a fragment."""


@pytest.mark.filterwarnings("ignore:replicas first exchange parameters of second")
@pytest.mark.parametrize("case", STREAMED)
def test_streaming_diloco_gives_the_weights_that_torchft_publishes(threads_cluster: fm.Cluster, case: str) -> None:
    options, weights, shared = STREAMED[case]

    def loss(params: Any, batch: Any) -> Any:
        return 2 * (params["first"][0] + params["second"][0]) + 0 * jnp.mean(batch), params

    policy = fm.policies.diloco(6, outer=optax.sgd(2.0), fragments=2, **options)
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=threads_cluster, replicas=2, policies=policy)

    def fit(steps: int) -> Any:
        begin = {"first": jnp.ones(1), "second": jnp.ones(1)}
        return trainer.fit(begin, np.zeros((32, 1), np.float32), batch_size=2, steps=steps)

    for step, record in enumerate(fit(16).history):
        for name, expected in weights.items():
            np.testing.assert_allclose(record["aux"][name], expected[step], rtol=1e-5, err_msg=f"{name} at {step}")
    for step, expected in shared.items():
        found = fit(step - options["delay"]).params
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=f"{name} from step {step}")


def elastic_loop(pull: float, every: int, steps: int, replicas: int) -> Loop:
    """The synchronous algorithm of the paper: replicas and centre move towards each other, all from the same centre."""
    centre, own = mlp(), [mlp() for _ in range(replicas)]
    before: list[Any] = []
    for step in range(steps):
        before.append(jax.tree.map(lambda *xs: np.mean(xs, axis=0), *own))
        for r, share in enumerate(shares(step, replicas)):
            gradients = jax.grad(mlp_loss)(own[r], share)
            own[r] = jax.tree.map(lambda x, g: x - 0.1 * g, own[r], gradients)
        if (step + 1) % every == 0 or step + 1 == steps:
            apart = [jax.tree.map(lambda x, c: pull * (x - c), x, centre) for x in own]
            own = [jax.tree.map(jnp.subtract, x, d) for x, d in zip(own, apart, strict=True)]
            centre = jax.tree.map(lambda c, *ds: sum(ds, c), centre, *apart)
    return Loop(before, centre, own, optax.sgd(0.1).init(centre))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elastic_averaging_equals_the_loop_at_every_step(cluster: fm.Cluster, layout: str) -> None:
    policy = fm.policies.elastic_averaging(3, 0.3, staleness=0)
    result = watched_fit(cluster, policy, layout, optax.sgd(0.1))
    assert_equal_steps(result, elastic_loop(0.3, 3, STEPS, 2))


def test_one_replica_without_waiting_is_elastic_too(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(
        watched_loss, optax.sgd(0.1), cluster=threads_cluster, policies=fm.policies.elastic_averaging(3, 0.3)
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    assert_equal_steps(result, elastic_loop(0.3, 3, STEPS, 1))


@pytest.mark.parametrize(
    "policy",
    [
        fm.policies.elastic_averaging(3, 0.3),
        fm.policies.downpour(2, 4),
        fm.policies.downpour(4, 2, optax.adagrad(0.05)),
        fm.policies.asynchronous(every=4, apply="sum", payload=fm.Delta()),
    ],
    ids=["elastic", "Downpour", "Downpour, Adagrad", "Project Adam"],
)
def test_replicas_that_do_not_wait_learn(cluster: fm.Cluster, policy: fm.Policy) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.05), cluster=cluster, replicas=2, policies=policy)
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=15)
    assert mlp_loss(result.params, SOURCE) < 0.5 * mlp_loss(mlp(), SOURCE)
    assert result.ledger.used == 2 * 60


def test_one_replica_of_downpour_sends_each_step_once(threads_cluster: fm.Cluster) -> None:
    """Whatever the rhythms, the home of a single replica ends where the replica does."""
    plain = optax_loop(mlp_loss, mlp(), optax.sgd(0.05), SOURCE, STEPS)
    for push, pull in ((1, 1), (3, 1), (1, 3), (2, 3), (3, 2)):
        policy = fm.policies.downpour(push, pull)
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.05), cluster=threads_cluster, policies=policy)
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
        if pull % push == 0:
            assert_close(result.params, plain.params)
        assert [t["pushes"] for t in result.traffic.values()] == [-(-STEPS // push)] * len(result.traffic)


def test_the_average_of_replicas_that_trained_alone_is_better_than_they_are(threads_cluster: fm.Cluster) -> None:
    """Zinkevich et al.: a convex loss of the mean is at most the mean of the losses."""
    digits = load_digits()
    source = {"x": (digits.data / 16).astype(np.float32), "y": digits.target}
    begin = {"fc": {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}}

    def loss(params: Any, batch: Any) -> Any:
        scores = batch["x"] @ params["fc"]["kernel"] + params["fc"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()

    def share(step: int) -> list[Any]:
        order = epoch_order(len(digits.target), 0, 0)[step * 64 :][:64]
        return [{k: v[rows] for k, v in source.items()} for rows in np.split(order, 4)]

    trainer = fm.Trainer(loss, optax.sgd(0.5), cluster=threads_cluster, replicas=4, policies=fm.policies.average_once())
    result = trainer.fit(begin, source, batch_size=64, steps=25)
    alone = replica_loop(loss, begin, optax.sgd(0.5), share, 25, {"fc": fm.Once()})
    assert_close(result.params, jax.tree.map(lambda *xs: np.mean(xs, axis=0), *alone.last))
    losses = [float(loss(params, source)) for params in alone.last]
    assert float(loss(result.params, source)) < np.mean(losses)
    assert result.traffic["fc"]["pushes"] == 4


def test_a_gradient_that_is_not_finite_leaves_a_replica_as_it_is(threads_cluster: fm.Cluster) -> None:
    bad = {k: v.copy() for k, v in SOURCE.items()}
    bad["x"][epoch_order(EXAMPLES, 0, 0)[0]] = np.nan  # of replica 0 at step 0
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2, policies=fm.policies.local_sgd(4)
    )
    with pytest.warns(fm.FlowmlWarning, match="NaN or infinity"):
        result = trainer.fit(mlp(), bad, batch_size=BATCH, steps=4)
    own = [mlp(), mlp()]
    for step in range(4):
        for r, rows in enumerate(shares(step)):
            if (step, r) != (0, 0):
                own[r] = jax.tree.map(lambda x, g: x - 0.1 * g, own[r], jax.grad(mlp_loss)(own[r], rows))
    assert_close(result.params, jax.tree.map(lambda a, b: (a + b) / 2, *own))


def test_a_fit_continues_from_the_optimizer_state_of_another(threads_cluster: fm.Cluster) -> None:
    policy = fm.policies.diloco(4)
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2, policies=policy)
    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": False}
    first = trainer.fit(mlp(), SOURCE, steps=4, **options)
    second = trainer.fit(first.params, SOURCE, steps=4, opt_state=first.opt_state, **options)
    whole = trainer.fit(mlp(), SOURCE, steps=8, **options)
    assert_close(second.params, whole.params)
    assert_close(second.opt_state, whole.opt_state)


def test_a_layer_that_two_stages_use_cannot_be_local() -> None:
    def tied(params: Any, batch: Any) -> Any:
        with fm.device("worker:0"):
            hidden = jnp.tanh(batch["x"] @ params["tied"])
        with fm.device("worker:1"):
            return jnp.mean((hidden @ params["tied"].T - batch["x"]) ** 2)

    spec = TrainingSpec(tied, optax.sgd(0.1), policies=fm.policies.local_sgd(4))
    with pytest.raises(
        fm.PolicyError, match=r"'tied' .*several devices of a replica use one.*place them on one device"
    ):
        compile_training(spec, {"tied": jnp.zeros((FEATURES, 4))}, SOURCE, ["worker:0/cpu:0", "worker:1/cpu:0"])


def test_layers_on_several_devices_that_the_optimizer_couples_cannot_be_local_and_why_is_said() -> None:
    def staged(params: Any, batch: Any) -> Any:
        with fm.device("worker:0"):
            hidden = jnp.tanh(batch["x"] @ params["a"])
        with fm.device("worker:1"):
            return jnp.mean((hidden @ params["b"] - batch["x"]) ** 2)

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    params = {"a": jnp.zeros((FEATURES, 4)), "b": jnp.zeros((4, FEATURES))}
    devices = ["worker:0/cpu:0", "worker:1/cpu:0"]
    with pytest.raises(fm.PolicyError, match=r"the optimizer reads the gradients of all of them.*clip_by_global_norm"):
        compile_training(TrainingSpec(staged, clipped, policies=fm.policies.diloco(4)), params, SOURCE, devices)


def test_more_fragments_than_layers_are_refused(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, policies=fm.policies.diloco(8, fragments=4))
    with pytest.raises(fm.PolicyError, match=r"3 layers .* for 4 fragments"):
        trainer.plan(mlp(), SOURCE)


def test_a_step_of_weighted_microbatches_is_one_weighted_mean(threads_cluster: fm.Cluster) -> None:
    def weight(batch: Any) -> Any:
        return jnp.sum(batch["x"][:, 0] > 0)

    def weighted(params: Any, batch: Any) -> Any:
        rows = (batch["x"][:, 0] > 0).astype(jnp.float32)
        losses = jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2, axis=1)
        return jnp.sum(losses * rows) / jnp.maximum(jnp.sum(rows), 1)

    inner = optax.adam(1e-2)
    trainer = fm.Trainer(
        weighted,
        inner,
        cluster=threads_cluster,
        replicas=2,
        microbatches=2,
        weight=weight,
        policies=fm.policies.local_sgd(4),
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    every = dict.fromkeys(mlp(), fm.Every(4))
    expected = replica_loop(weighted, mlp(), inner, shares, STEPS, every, weigh=lambda b: float(weight(b)))
    assert_close(result.params, expected.params)


def test_dtypes_stay_as_they_are(threads_cluster: fm.Cluster) -> None:
    begin = mlp(dtype=jnp.bfloat16)
    for policy in (fm.policies.diloco(2, alpha=0.5), fm.policies.elastic_averaging(2, 0.25, staleness=0)):
        trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=threads_cluster, replicas=2, policies=policy)
        result = trainer.fit(begin, SOURCE, batch_size=BATCH, steps=6)
        assert jax.tree.map(lambda x: x.dtype, result.params) == jax.tree.map(lambda x: x.dtype, begin)
        assert mlp_loss(result.params, SOURCE) < mlp_loss(begin, SOURCE)


def test_more_replicas_than_one_task_folds() -> None:
    replicas, inner, outer = 12, optax.sgd(0.1), optax.sgd(0.7, momentum=0.9, nesterov=True)
    with fm.Cluster.threads(workers=replicas) as cluster:
        trainer = fm.Trainer(mlp_loss, inner, cluster=cluster, replicas=replicas, policies=fm.policies.diloco(3))
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=7)
    every = dict.fromkeys(mlp(), fm.Every(3))
    expected = replica_loop(mlp_loss, mlp(), inner, lambda step: shares(step, replicas), 7, every, outer=outer)
    assert_close(result.params, expected.params)


def test_batches_of_several_shapes_update_the_same_parameters(threads_cluster: fm.Cluster) -> None:
    class Growing:
        """Examples whose number of columns is 12, or 6 in every other work item."""

        def __len__(self) -> int:
            return EXAMPLES

        def __getitem__(self, indices: Any) -> Any:
            columns = 12 if indices[0] // 12 % 2 == 0 else 6
            return {"x": SOURCE["x"][indices][:, :columns], "y": SOURCE["y"][indices]}

    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"]
        return mlp_loss(params, {"x": jnp.pad(x, ((0, 0), (0, 12 - x.shape[1]))), "y": batch["y"]})

    source, inner = Growing(), optax.sgd(0.1)
    trainer = fm.Trainer(loss, inner, cluster=threads_cluster, replicas=2, policies=fm.policies.local_sgd(2))
    result = trainer.fit(mlp(), source, batch_size=BATCH, steps=4, shuffle=False)

    def ordered(step: int) -> list[Any]:
        return [source[np.arange(12) + step * BATCH + 12 * r] for r in range(2)]

    expected = replica_loop(loss, mlp(), inner, ordered, 4, dict.fromkeys(mlp(), fm.Every(2)))
    assert_close(result.params, expected.params)


def scaled_loss(params: Any, batch: Any) -> Any:
    """A parameter is used in the scope of another layer."""
    with fm.layer("a"):
        hidden = jnp.tanh(batch["x"] @ params["a"])
    with fm.layer("c"):
        return jnp.mean((hidden @ params["c"] * params["s"] - batch["y"]) ** 2)


@pytest.mark.parametrize(
    "policies", [fm.policies.synchronous(), fm.policies.local_sgd(2), {"s": fm.policies.local_sgd(2)}]
)
def test_each_stage_has_work_where_links_are_slow(policies: Any) -> None:
    """A gradient that is copied with the path of its parameter is no stage."""
    cluster = fm.SimulatedCluster(4, fm.sim.Constant(0.003), fm.sim.Network(1e-2, 1e7))
    params = {"a": np.ones((6, 5), np.float32), "c": np.ones((5, 2), np.float32), "s": np.float32(1.5)}
    source = {"x": np.ones((32, 6), np.float32), "y": np.ones((32, 2), np.float32)}
    trainer = fm.Trainer(
        scaled_loss, optax.sgd(0.01), cluster=cluster, replicas=2, policies=policies, placement=fm.Pipeline(stages=2)
    )
    plan = trainer.plan(params, {name: leaf[:16] for name, leaf in source.items()})
    assert len({node.device for node in plan.nodes if node.op == "dot_general"}) == 2
    assert len(trainer.fit(params, source, batch_size=16, steps=4, progress=False).history) == 4

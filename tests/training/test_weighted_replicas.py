"""Replicas with parameters of their own count by the weights of the batches that they have trained on.

The reference is `replica_loop`: the mean of changes, each with the sum of its weights since the last push.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.worker.training.applying import given_of
from flowml_runtime.worker.training.own_values import Weights
from tests.training.reference import BATCH, assert_close, data, mlp, mlp_loss, predict
from tests.training.test_checkpoints import Case, assert_goes_on
from tests.training.test_decoupled import EVERY, ROUNDS, TIMES, rounds_loop, together
from tests.training.test_local import replica_loop, shares

SOURCE, STEPS, INNER = data(), 12, optax.adam(1e-2)
P = fm.policies


def weight(batch: Any) -> Any:
    """What a batch weighs: the rows that count, which differ between replicas."""
    return jnp.sum(batch["x"][:, 0] > 0.3)


def loss(params: Any, batch: Any) -> Any:
    rows = (batch["x"][:, 0] > 0.3).astype(batch["x"].dtype)
    losses = jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2, axis=1)
    return jnp.sum(losses * rows) / jnp.sum(rows)  # NaN where no row counts


def weigh(batch: Any) -> float:
    return float(weight(batch))


def fit(cluster: Any, policies: Any, replicas: int = 2, steps: int = STEPS, **options: Any) -> fm.TrainingResult:
    options = {"weight": weight, **options}
    trainer = fm.Trainer(loss, INNER, cluster=cluster, replicas=replicas, policies=policies, **options)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=steps, progress=False)


def simulated(replicas: int) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(replicas, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))


@pytest.fixture(params=["threads", "processes", "simulated"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "simulated":
        with closing(simulated(2)) as made:
            yield made
    else:
        yield request.getfixturevalue({"threads": "threads_cluster", "processes": "process_cluster"}[request.param])


METHODS: dict[str, tuple[fm.Policy, fm.Every, dict[str, Any]]] = {
    "local SGD": (P.local_sgd(4), fm.Every(4), {}),
    "DiLoCo": (P.diloco(3), fm.Every(3), {"outer": optax.sgd(0.7, momentum=0.9, nesterov=True)}),
    "delayed": (
        P.diloco(4, delay=2, alpha=0.5, outer=optax.sgd(0.5)),
        P.diloco(4, delay=2).every,
        {"outer": optax.sgd(0.5), "alpha": 0.5},
    ),
    "decoupled": (P.decoupled_diloco(4, 1.0, outer=optax.sgd(1.0)), fm.Every(4), {}),
    "SparseLoCo, all of it": (P.sparse_loco(4, keep=1.0, bits=8), fm.Every(4), {}),
    "one average": (P.average_once(), fm.Every(STEPS), {}),
    "averages": (fm.Policy(payload=fm.Weights(), every=4), fm.Every(4), {}),
    "all-reduce": (P.local_sgd(4, topology=fm.AllReduce()), fm.Every(4), {}),
    "ring": (P.diloco(4, topology=fm.Ring(), outer=optax.sgd(1.0)), fm.Every(4), {}),
    "tree": (fm.Policy(payload=fm.Weights(), every=4, topology=fm.Tree()), fm.Every(4), {}),
    "sites of one": (
        P.local_sgd(4, topology=fm.Hierarchy(fm.AllReduce(), fm.ParameterServer(), ((0,), (1,)))),
        fm.Every(4),
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:loss is not convex")
@pytest.mark.parametrize("method", METHODS)
def test_methods_equal_the_loop_that_weighs(cluster: Any, method: str) -> None:
    policy, every, options = METHODS[method]
    result = fit(cluster, policy)
    expected = replica_loop(loss, mlp(), INNER, shares, STEPS, dict.fromkeys(mlp(), every), weigh=weigh, **options)
    tolerance = {"atol": 2e-2} if method.startswith("Sparse") else {}
    for found, wanted in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(found, wanted, **({"rtol": 1e-4, "atol": 2e-6} | tolerance))
    alike = replica_loop(loss, mlp(), INNER, shares, STEPS, dict.fromkeys(mlp(), every), **options)
    with pytest.raises(AssertionError):
        assert_close(result.params, alike.params)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_microbatches_and_a_leaf_of_aux(threads_cluster: fm.Cluster, microbatches: int) -> None:
    def counted(params: Any, batch: Any) -> Any:
        return loss(params, batch), {"rows": weight(batch)}

    trainer = fm.Trainer(
        counted, INNER, cluster=threads_cluster, replicas=2, microbatches=microbatches, weight="rows",
        policies=P.local_sgd(4),
    )  # fmt: skip
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    expected = replica_loop(loss, mlp(), INNER, shares, STEPS, dict.fromkeys(mlp(), fm.Every(4)), weigh=weigh)
    assert_close(result.params, expected.params)


def test_fragments_count_by_their_own_windows(threads_cluster: fm.Cluster) -> None:
    policy = P.diloco(6, fragments=3, outer=optax.sgd(0.7))
    rhythms = {f"fc{i}": policy.every.fragment(i) for i in range(3)}
    expected = replica_loop(loss, mlp(), INNER, shares, STEPS, rhythms, outer=optax.sgd(0.7), weigh=weigh)
    assert_close(fit(threads_cluster, policy).params, expected.params)


@pytest.mark.parametrize("kind", ["real", "simulated"])
@pytest.mark.parametrize("local", [fm.AllReduce(), fm.ParameterServer()], ids=["all-reduce", "leader"])
def test_a_site_counts_by_the_weights_of_its_replicas(kind: str, local: Any) -> None:
    """Replicas 0 and 1 are a site, which is one replica of their two shares; replica 2 is alone."""
    policy = P.local_sgd(4, topology=fm.Hierarchy(local, fm.ParameterServer(), ((0, 1), (2,))))
    with closing(fm.Cluster.threads(workers=3) if kind == "real" else simulated(3)) as cluster:
        result = fit(cluster, policy, replicas=3)

    def of_sites(step: int) -> list[Any]:
        first, second, third = shares(step, 3)
        return [{k: np.concatenate([first[k], second[k]]) for k in first}, third]

    expected = replica_loop(loss, mlp(), INNER, of_sites, STEPS, dict.fromkeys(mlp(), fm.Every(4)), weigh=weigh)
    assert_close(result.params, expected.params)


@pytest.mark.parametrize("late", ROUNDS)
def test_a_quorum_weighs_what_is_there_and_what_is_folded_in(late: Any) -> None:
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    cluster = fm.SimulatedCluster(3, fm.sim.Recorded(TIMES), fm.sim.Network(1e-4, 1e9))
    policy = P.decoupled_diloco(EVERY, 2, grace=0.01, late=late)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=3, policies=policy, weight=weight)
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=12, progress=False)
    assert_close(result.params, rounds_loop(ROUNDS[late], outer, loss=loss, weigh=weigh))
    with pytest.raises(AssertionError):
        assert_close(result.params, rounds_loop(ROUNDS[late], outer, loss=loss))


def test_feedback_keeps_what_a_weighed_change_lost() -> None:
    """A replica sends the largest elements of its change times its weight, and keeps the rest of this product."""
    filters = (fm.filters.top_k(1.0).with_error_feedback(), fm.filters.quantise(8))
    policy = P.decoupled_diloco(EVERY, 1.0, outer=optax.sgd(1.0), filters=filters)
    with closing(simulated(3)) as cluster:
        trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=3, policies=policy, weight=weight)
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=12, progress=False)
    expected = rounds_loop([together(0), together(1), together(2)], optax.sgd(1.0), loss=loss, weigh=weigh)
    for found, wanted in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-2)


def tokens(values: list[float], rows: int = 8) -> dict[str, np.ndarray]:
    """Two shards of examples with targets -1 and 1; each example of shard i has values[i] tokens."""
    half = rows * 2
    y = np.repeat(np.float32([-1, 1]), half)[:, None]
    return {"y": y, "n": np.repeat(np.asarray(values, np.float32), half)}


def distance(params: Any, batch: Any) -> Any:
    total = jnp.sum(batch["n"])
    squares = jnp.sum(batch["n"][:, None] * (params["w"] - batch["y"]) ** 2)
    return squares / total, {"tokens": total}


def by_tokens(cluster: Any, policy: fm.Policy, values: list[float], steps: int = 8, **options: Any) -> Any:
    options = {"weight": "tokens", **options}
    trainer = fm.Trainer(distance, optax.sgd(0.25), cluster=cluster, replicas=2, policies=policy, **options)
    source = tokens(values)
    return trainer.fit(
        {"w": jnp.zeros(1)}, source, batch_size=8, steps=steps, shuffle=fm.Shards(contiguous=True), progress=False
    )


CONSTANT = {
    "local SGD": P.local_sgd(4),
    "all-reduce": P.local_sgd(4, topology=fm.AllReduce()),
    "averages": fm.Policy(payload=fm.Weights(), every=4),
    "averages on a ring": fm.Policy(payload=fm.Weights(), every=4, topology=fm.Ring()),
}


@pytest.mark.parametrize("rule", CONSTANT)
def test_tokens_one_to_three_meet_at_a_half(cluster: Any, rule: str) -> None:
    result = by_tokens(cluster, CONSTANT[rule], [1, 3], steps=40)
    np.testing.assert_allclose(result.params["w"], 0.5, atol=1e-3)


@pytest.mark.parametrize("rule", CONSTANT)
def test_a_replica_without_weight_does_not_count_and_none_keeps_all(threads_cluster: fm.Cluster, rule: str) -> None:
    result = by_tokens(threads_cluster, CONSTANT[rule], [0, 3], steps=40)
    np.testing.assert_allclose(result.params["w"], 1.0, atol=1e-3)
    result = by_tokens(threads_cluster, CONSTANT[rule], [0, 0])
    np.testing.assert_array_equal(result.params["w"], 0.0)


def test_an_ensemble_counts_by_weights(threads_cluster: fm.Cluster) -> None:
    """The student learns the weighted mean of outputs, which is linear here."""
    inputs = np.ones((4, 1), np.float32)
    policy = P.ensemble_compression(lambda p, x: x * p["w"], inputs, every=8, steps=20, optimizer=optax.sgd(0.3))
    result = by_tokens(threads_cluster, policy, [1, 3], steps=40)
    np.testing.assert_allclose(result.params["w"], 0.5, atol=1e-3)
    np.testing.assert_array_equal(by_tokens(threads_cluster, policy, [0, 0]).params["w"], 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["local SGD", "averages", "all-reduce"])
def test_narrow_parameters_are_weighed_in_float32(threads_cluster: fm.Cluster, dtype: str, rule: str) -> None:
    """A weight of a million tokens times a change overflows float16."""
    trainer = fm.Trainer(
        distance, optax.sgd(0.25), cluster=threads_cluster, replicas=2, policies=CONSTANT[rule], weight="tokens"
    )
    begin = {"w": jnp.zeros(1, dtype)}
    source = tokens([1e6, 3e6])
    result = trainer.fit(begin, source, batch_size=8, steps=40, shuffle=fm.Shards(contiguous=True))
    assert result.params["w"].dtype == dtype
    np.testing.assert_allclose(np.float32(result.params["w"]), 0.5, atol=1e-2)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("rule", ["local SGD", "all-reduce"])
def test_a_weight_that_is_none_is_refused_and_blamed(cluster: Any, rule: str, bad: float) -> None:
    """The steps of replica 1 are left out, and weigh nothing, so replica 0 alone counts."""
    with pytest.warns(fm.FlowmlWarning) as caught:
        result = by_tokens(cluster, CONSTANT[rule], [1, bad], steps=40)
    said = [str(w.message) for w in caught if "left out of the update" in str(w.message)]
    assert said and all("the weight of replica 1 at step 0 is below 0 or not finite" in text for text in said)
    assert not any("the loss of" in str(w.message) for w in caught)
    np.testing.assert_allclose(result.params["w"], -1.0, atol=1e-3)
    assert result.ledger.nonfinite == {"w": {1: 40}}


def test_a_weight_that_is_none_ends_a_fit_that_asks_for_it(cluster: Any) -> None:
    with pytest.raises(fm.WorkerError, match=r"the weight of replica 1 is below 0 or not finite.*Trainer\(weight=\)"):
        by_tokens(cluster, P.local_sgd(4), [1, -1], on_nonfinite="raise")


@pytest.mark.parametrize(
    ("policy", "how"),
    [
        (P.gossip(), "doubly stochastic"),
        (P.no_loco(4), "doubly stochastic"),
        (P.elastic_averaging(4, 0.25, staleness=0), "same share of its distance"),
        (P.admm(0.5), "mean of all reports"),
        (P.gaia(0.1, sites=2), "share of the replicas"),
    ],
    ids=lambda p: p.describe() if isinstance(p, fm.Policy) else "",
)
def test_where_a_weight_has_no_meaning_a_warning_says_what_counts(
    threads_cluster: fm.Cluster, policy: fm.Policy, how: str
) -> None:
    """The weight of microbatches still counts in the steps of a replica: halves of tokens 1 and 3 of a batch."""
    trainer = fm.Trainer(
        distance, optax.sgd(0.25), cluster=threads_cluster, replicas=2, microbatches=2, policies=policy, weight="tokens"
    )
    each = {"y": np.tile(np.float32([-1, -1, 1, 1]), 8)[:, None], "n": np.tile(np.float32([1, 1, 3, 3]), 8)}
    with pytest.warns(fm.FlowmlWarning) as caught:
        result = trainer.fit({"w": jnp.zeros(1)}, each, batch_size=8, steps=48, shuffle=False)
    said = [str(w.message) for w in caught]
    assert len(said) == 1 and how in said[0] and policy.describe() in said[0] and "not between replicas" in said[0]
    np.testing.assert_allclose(result.params["w"], 0.5, atol=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.Trainer(lambda p, b: distance(p, b)[0], optax.sgd(0.25), cluster=threads_cluster, replicas=2,
                   policies=policy).plan({"w": jnp.zeros(1)}, {k: v[:8] for k, v in each.items()})  # fmt: skip


@pytest.mark.parametrize("kind", ["real", "simulated"])
@pytest.mark.parametrize("rule", ["local SGD", "averages", "delayed"])
def test_a_fit_that_goes_on_in_the_middle_of_a_window_has_its_weights(
    kind: str, rule: str, tmp_path: Any, threads_cluster: fm.Cluster
) -> None:
    policies = {**CONSTANT, "delayed": P.diloco(4, delay=2, alpha=0.25, outer=optax.sgd(1.0))}
    with closing(simulated(2)) as other:
        cluster = threads_cluster if kind == "real" else other
        trainer = fm.Trainer(loss, INNER, cluster=cluster, replicas=2, policies=policies[rule], weight=weight)

        def run(**more: Any) -> fm.TrainingResult:
            options: dict[str, Any] = {"batch_size": BATCH, "steps": 8, "seed": 3, "progress": False, **more}
            return trainer.fit(mlp(), SOURCE, **options)

        assert_goes_on(Case(run, tmp_path / "checkpoints"))


def test_weights_of_steps_are_kept_as_one_array() -> None:
    weights = Weights(2)
    for value in (1.0, 2.0, 4.0):
        weights.add(value)
    copy = Weights(2)
    copy.restore(weights.export())
    copy.keep_last()
    assert copy.take() == 3.0 and weights.take() == 7 / 3
    assert weights.take() == 1.0, "nothing was counted"
    assert Weights(0).export().shape == (2,)


STEADY = ((0.1,) * 12, (0.1,) * 12, (0.27, 0.26, 0.28, 0.27) * 3)
"""Replica 2 is late in every step, and never nearly in time, so small differences of traffic change no decision."""
LATE = {
    "gradients": P.quorum(2, late=fm.Fold(0.5)),
    "gradients, no decay": P.compensate(0.6),
    "changes": P.decoupled_diloco(4, 2, grace=0.01, late=fm.Fold(0.5)),
}


@pytest.mark.parametrize("policy", LATE)
@pytest.mark.parametrize("optimizer", ["alone", "coupled"])
def test_equal_weights_change_nothing_of_what_is_folded_in(policy: str, optimizer: str) -> None:
    """A decay multiplies what is late, and not its weight in the mean; homes that are coupled know of both."""
    inner = optax.sgd(0.1)
    inner = inner if optimizer == "alone" else optax.chain(optax.clip_by_global_norm(100.0), inner)
    found: list[fm.TrainingResult] = []
    for given in (None, lambda batch: 7 * jnp.ones(())):
        cluster = fm.SimulatedCluster(3, fm.sim.Recorded(STEADY), fm.sim.Network(1e-4, 1e9))
        trainer = fm.Trainer(mlp_loss, inner, cluster=cluster, replicas=3, policies=LATE[policy], weight=given)
        found.append(trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=12, progress=False))
    assert found[0].ledger.folded == found[1].ledger.folded > 0
    assert_close(found[1].params, found[0].params)


PS = fm.ParameterServer()
SITES: dict[str, fm.Policy] = {
    f"{remote}, {late}": fm.Policy(topology=fm.Hierarchy(PS, remote, ((0, 1, 2), (3,)), quorum=fm.Quorum(1, late=late)))
    for remote in (PS, fm.Ring())
    for late in (fm.Fold(), fm.Fold(0.5))
}
SITES |= {
    f"own parameters, {late}": P.local_sgd(
        4, topology=fm.Hierarchy(PS, PS, ((0, 1, 2), (3,)), quorum=fm.Quorum(1, late=late))
    )
    for late in (fm.Fold(), fm.Fold(0.5))
}


@pytest.mark.parametrize("policy", SITES)
def test_equal_weights_change_nothing_of_what_a_site_folds_in(policy: str) -> None:
    """A replica that a site's sum of a clock lacks weighs in it what the others weigh."""
    found: list[fm.TrainingResult] = []
    for given in (None, lambda batch: 7 * jnp.ones(())):
        cluster = fm.SimulatedCluster(4, fm.sim.Recorded((*STEADY, STEADY[0])), fm.sim.Network(1e-4, 1e9))
        trainer = fm.Trainer(
            mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=SITES[policy], weight=given
        )
        found.append(trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=12, progress=False))
    assert found[0].ledger.folded == found[1].ledger.folded > 0
    assert_close(found[1].params, found[0].params)


def test_what_decays_keeps_its_weight_in_the_mean() -> None:
    spec: Any = SimpleNamespace(policy=fm.policies.local_sgd(4), applies=SimpleNamespace(weighted=True))
    given = given_of(spec, [([], 0.6), ([], 0.4 * 0.25)], (), full=0.5, decays=(1.0, 0.25))
    assert [(g.coefficient, g.scale) for g in given] == [(0.6, 0.5), (0.4, 0.125)]


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_a_weight_that_is_none_is_refused_beside_factors(threads_cluster: fm.Cluster, bad: float) -> None:
    def dense(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    source = {"x": np.ones((8, 32), np.float32), "n": np.repeat(np.float32([1, bad]), 4)}
    trainer = fm.Trainer(
        dense, optax.sgd(0.1), cluster=threads_cluster, replicas=2, policies=P.factors(), weight=lambda b: b["n"][0]
    )
    with pytest.warns(fm.FlowmlWarning, match="the weight of replica 1 at step 0 is below 0 or not finite"):
        result = trainer.fit({"w": jnp.ones((32, 32))}, source, batch_size=8, steps=1, shuffle=False)
    assert any(part.factors for store in result.plan.training.stores for part in store.parts)
    expected = 1 - 0.1 * jax.grad(lambda w: dense({"w": w}, {"x": source["x"][:4]}))(jnp.ones((32, 32)))
    assert_close(result.params["w"], jnp.asarray(expected))


def test_changes_that_a_home_takes_two_at_a_time_without_clocks() -> None:
    """Each pair has one change of each replica, because they are equally fast."""
    policy = fm.Policy(payload=fm.Delta(), every=4, staleness=fm.UNBOUNDED, quorum=fm.Quorum(2, late="fold"))
    with closing(simulated(2)) as cluster:
        result = by_tokens(cluster, policy, [1, 3], steps=80)
    np.testing.assert_allclose(result.params["w"], 0.5, atol=1e-3)


def test_a_replica_that_stops_between_microbatches_counts_by_those_that_it_has() -> None:
    """DropCompute with parameters of their own: replica 1 computes 1 of 4 microbatches of a step, replica 0 all."""
    rule = fm.Policy(payload=fm.Delta(), every=2, quorum=fm.Deadline(limit_s=0.5, of="microbatches"))
    cluster = fm.SimulatedCluster(2, fm.sim.Recorded([[0.1] * 8, [2.0] * 8]), fm.sim.Network(1e-4, 1e9))
    y = np.repeat(np.float32([-1, 1]), 16)[:, None]
    trainer = fm.Trainer(
        lambda p, b: jnp.mean((p["w"] - b["y"]) ** 2), optax.sgd(0.25), cluster=cluster, replicas=2, microbatches=4,
        policies=rule,
    )  # fmt: skip
    result = trainer.fit(
        {"w": jnp.zeros(1)}, {"y": y}, batch_size=8, steps=8, shuffle=fm.Shards(contiguous=True), progress=False
    )
    assert result.ledger.left_out == 8 * 3
    np.testing.assert_allclose(result.params["w"], -1 + 2 / 5, atol=0.02)

"""Filters of what replicas push: lossless ones change no bit, lossy ones train, and bytes are those on the wire."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import BATCH, EXAMPLES, assert_same, data, mlp, mlp_loss

SOURCE = data()
STEPS = 6
CLUSTERS = pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
LOSSLESS = [(fm.filters.compress(),), (fm.filters.compress(9),)]
EVERYTHING = [
    (fm.filters.top_k(1.0),),
    (fm.filters.top_k(1.0).with_error_feedback(), fm.filters.key_cache(), fm.filters.compress()),
    (fm.filters.top_k(1.0), fm.filters.key_cache()),
    (fm.filters.kkt(1e-30),),
    (fm.filters.significance(0.0),),
    (fm.filters.random_skip(1.0),),
]


def fit(cluster: fm.Cluster, filters: Any = (), loss: Any = mlp_loss, **options: Any) -> fm.TrainingResult:
    knobs = {k: options.pop(k) for k in ("staleness", "every", "quorum", "apply") if k in options}
    options = {"replicas": 2, "policies": fm.Policy(filters=filters, **knobs), **options}
    trainer = fm.Trainer(loss, optax.adam(1e-2), cluster=cluster, **options)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


def text(filters: Any) -> str:
    return ", ".join(map(str, filters))


@CLUSTERS
@pytest.mark.parametrize("filters", [*LOSSLESS, *EVERYTHING], ids=text)
def test_filters_that_lose_nothing_change_no_bit(kind: str, filters: Any, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    plain, filtered = fit(cluster), fit(cluster, filters)
    assert_same(filtered.params, plain.params)
    assert_same(filtered.opt_state, plain.opt_state)


@CLUSTERS
def test_bytes_are_those_on_the_wire(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    for filters in ((fm.filters.top_k(0.1).with_error_feedback(), fm.filters.quantise(4)), (fm.filters.sign(),)):
        result = fit(cluster, filters)
        sizes = {layer: [leaf.shape for leaf in jax.tree.leaves(values)] for layer, values in mlp().items()}
        for layer, shapes in sizes.items():
            form = [fm.filters.Form(shape, np.dtype(np.float32)) for shape in shapes]
            each = sum(fm.filters.nbytes(filters, x) or 0 for x in form)
            assert result.traffic[layer]["pushes"] == 2 * STEPS
            assert result.traffic[layer]["pushed_bytes"] == each * 2 * STEPS
            assert result.traffic[layer]["pushed_wire_bytes"] == each * STEPS, "one replica is at the home"
    plain, packed = fit(cluster), fit(cluster, (fm.filters.significance(5.0),))
    assert 0 < packed.traffic["fc1"]["pushed_bytes"] < plain.traffic["fc1"]["pushed_bytes"] / 2


@CLUSTERS
def test_int8_is_as_good_within_its_bound(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    params, found = mlp(), [fm.Policy(filters=f) for f in ((fm.filters.quantise(8),), ())]
    coarse, exact = (
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=2, policies=policy)
        .fit(params, SOURCE, batch_size=BATCH, steps=1)
        .params
        for policy in found
    )
    rows = epoch_order(EXAMPLES, 0, 0)[:BATCH].reshape(2, -1)
    gradients = [jax.tree.leaves(jax.grad(mlp_loss)(params, {k: v[r] for k, v in SOURCE.items()})) for r in rows]
    for a, b, *mine in zip(jax.tree.leaves(coarse), jax.tree.leaves(exact), *gradients, strict=True):
        bound = 0.1 * np.mean([np.abs(g).max() / 127 / 2 for g in mine])
        assert 0 < np.abs(a - b).max() <= bound * 1.001 + 1e-7


OTHERS = [
    (
        fm.filters.top_k(0.1).with_error_feedback(),
        fm.filters.key_cache(),
        fm.filters.quantise(4),
        fm.filters.compress(),
    ),
    (fm.filters.random_k(0.3).with_error_feedback(),),
    (fm.filters.random_skip(0.5).with_error_feedback(), fm.filters.compress()),
    (fm.filters.low_rank(2).with_error_feedback(), fm.filters.quantise(8)),
    (fm.filters.significance(0.5), fm.filters.key_cache(), fm.filters.compress()),
    (fm.filters.kkt(0.001), fm.filters.quantise(8, stochastic=True)),
    (fm.filters.quantise(2).with_error_feedback(),),
    (fm.filters.sign().with_error_feedback(),),
]
RULES: list[dict[str, Any]] = [
    {"placement": fm.Pipeline(2), "microbatches": 2},
    {"every": 2},
    {"staleness": fm.UNBOUNDED},
    {"staleness": 2, "apply": "sum"},
    {"quorum": fm.Quorum(0.5)},
    {"quorum": fm.Quorum(0.5), "staleness": 1},
]


@pytest.mark.parametrize(("number", "filters"), list(enumerate(OTHERS)), ids=str)
def test_every_filter_trains_under_several_rules(threads_cluster: fm.Cluster, number: int, filters: Any) -> None:
    for rule in (RULES[number % len(RULES)], RULES[(number + 3) % len(RULES)]):
        result = fit(threads_cluster, filters, **rule)
        assert mlp_loss(result.params, SOURCE) < mlp_loss(mlp(), SOURCE)


@pytest.mark.parametrize("filters", OTHERS[:4], ids=text)
def test_two_runs_agree_to_the_bit(threads_cluster: fm.Cluster, filters: Any) -> None:
    first, second = fit(threads_cluster, filters), fit(threads_cluster, filters)
    assert_same(first.params, second.params)


def test_layers_are_filtered_by_their_own_rules(threads_cluster: fm.Cluster) -> None:
    rules = {"fc1/kernel": fm.Policy(filters=(fm.filters.low_rank(1).with_error_feedback(),)), "*": fm.Policy()}
    result = fit(threads_cluster, policies=rules)
    plain = fit(threads_cluster)
    kernels = {name: t["pushed_bytes"] for name, t in result.traffic.items() if "fc1" in name}
    assert sum(kernels.values()) == 2 * STEPS * 4 * (16 + 16 + 16)
    assert result.traffic["fc0"] == plain.traffic["fc0"]


def weighted(params: Any, batch: Any) -> Any:
    errors = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2, axis=-1)
    return jnp.sum(errors * batch["keep"]) / jnp.sum(batch["keep"]), {"kept": jnp.sum(batch["keep"])}


def test_weights_are_not_filtered(threads_cluster: fm.Cluster) -> None:
    rng = np.random.default_rng(0)
    source = {**data(), "keep": rng.integers(0, 2, 96).astype(np.float32)}
    start = {"w": jnp.zeros((12, 2))}
    found = [
        fm.Trainer(weighted, optax.sgd(0.1), cluster=threads_cluster, replicas=2, weight="kept", policies=policy)
        .fit(start, source, batch_size=BATCH, steps=STEPS)
        .params
        for policy in (fm.Policy(), fm.Policy(filters=(fm.filters.top_k(1.0), fm.filters.compress())))
    ]
    assert_same(*found)


@CLUSTERS
def test_digits_are_learnt_from_one_percent(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    digits = load_digits()
    source = {"x": (digits.data / 16).astype(np.float32), "y": digits.target.astype(np.int32)}
    keys = jax.random.split(jax.random.key(0))
    start = {"fc0": jax.random.normal(keys[0], (64, 64)) / 8, "fc1": jax.random.normal(keys[1], (64, 10)) / 8}

    def logits(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["fc0"]) @ params["fc1"]

    def loss(params: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"]).mean()

    def accuracy(params: Any) -> float:
        return float(jnp.mean(jnp.argmax(logits(params, source["x"]), -1) == source["y"]))

    found: dict[str, float] = {}
    sent: dict[str, int] = {}
    for name, filters in {
        "plain": (),
        "top 1 %": (fm.filters.top_k(0.01).with_error_feedback(),),
        "top 1 % without feedback": (fm.filters.top_k(0.01),),
    }.items():
        trainer = fm.Trainer(loss, optax.sgd(0.5), cluster=cluster, replicas=2, policies=fm.Policy(filters=filters))
        result = trainer.fit(start, source, batch_size=64, steps=300)
        found[name], sent[name] = accuracy(result.params), sum(t["pushed_bytes"] for t in result.traffic.values())
    assert found["plain"] > 0.95
    assert found["top 1 %"] > found["plain"] - 0.04
    assert found["top 1 % without feedback"] < found["top 1 %"]
    assert sent["top 1 %"] < sent["plain"] / 45


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: fm.Policy(topology=fm.Ring(), filters=(fm.filters.significance(0.1),)),
            r"same size at each step, and that of significance\(0.1\).with_error_feedback\(\) depends on the values",
        ),
        (
            lambda: fm.Policy(topology=fm.AllReduce(), filters=(fm.filters.compress(),)),
            r"that of compress\(\) depends on the values",
        ),
        (
            lambda: fm.Policy(topology=fm.Tree(2), filters=(fm.filters.top_k(0.1), fm.filters.key_cache())),
            r"what key_cache\(\) sends has a meaning only with what it has sent before",
        ),
        (lambda: fm.Policy(payload=fm.Factors(), filters=(fm.filters.top_k(0.1),)), "payload=fm.Gradient"),
        (lambda: fm.Policy(filters=(fm.filters.quantise(8), fm.filters.top_k(0.1))), "has no effect"),
        (lambda: fm.Policy(filters=fm.filters.top_k(0.1)), "give a tuple of filters"),
        (lambda: fm.Policy(filters=("zip",)), "is not a filter"),
    ],
)
def test_unsound_policies_are_refused(make: Any, why: str) -> None:
    with pytest.raises(fm.PolicyError, match=why):
        make()


def test_a_count_that_a_layer_does_not_have_is_refused(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(fm.PolicyError, match=r"top_k\(100\) asks for 100 elements of 'fc0/bias', which has 16"):
        fit(threads_cluster, (fm.filters.top_k(100),))


def test_a_policy_with_filters_says_so() -> None:
    policy = fm.Policy(filters=(fm.filters.top_k(0.01).with_error_feedback(), fm.filters.compress()))
    assert policy.describe() == "sync, top_k(0.01).with_error_feedback(), compress()"


@pytest.mark.parametrize(
    "filters", [(fm.filters.quantise(4),), (fm.filters.top_k(0.2).with_error_feedback(),)], ids=text
)
def test_deltas_are_filtered(threads_cluster: fm.Cluster, filters: Any) -> None:
    rule = fm.Policy(every=2, payload=fm.Delta(), filters=filters)
    result = fit(threads_cluster, policies=rule)
    assert mlp_loss(result.params, SOURCE) < mlp_loss(mlp(), SOURCE)
    form = fm.filters.Form((16, 16), np.dtype(np.float32)), fm.filters.Form((16,), np.dtype(np.float32))
    each = sum(fm.filters.nbytes(filters, x) or 0 for x in form)
    assert result.traffic["fc1"]["pushed_bytes"] == result.traffic["fc1"]["pushes"] * each


def test_parameters_are_sent_whole(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(fm.PolicyError, match="would be averaged as 0"):
        fm.Policy(every=2, payload=fm.Weights(), filters=(fm.filters.top_k(0.1),))
    with pytest.raises(fm.PolicyError, match="is on gradients"):
        fm.Policy(every=2, payload=fm.Delta(), filters=(fm.filters.kkt(0.1),))
    rules = [fm.Policy(every=2, payload=fm.Weights(), filters=f) for f in ((), (fm.filters.compress(),))]
    assert_same(*(fit(threads_cluster, policies=rule).params for rule in rules))

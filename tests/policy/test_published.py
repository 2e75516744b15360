"""Named policies of published methods: each is the composition of its row, and Adam's rules follow the shapes."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

F = fm.filters


def predict(params: Any, inputs: Any) -> Any:
    return inputs @ params["w"]


ADAM = optax.adam(1e-3)
INPUTS = np.ones((4, 2), np.float32)
COMPOSITIONS: dict[str, tuple[fm.Policy, fm.Policy]] = {
    "ring": (fm.policies.ring(), fm.Policy(topology=fm.Ring())),
    "ssp": (fm.policies.ssp(3), fm.policies.asynchronous(staleness=3)),
    "parameter server": (
        fm.policies.parameter_server(0.1, staleness=2),
        fm.Policy(staleness=2, filters=(F.kkt(0.1), F.key_cache(), F.compress()), apply=fm.Prox(l1=0.1)),
    ),
    "Adam, convolution": (
        fm.policies.adam_convolution(8),
        fm.policies.asynchronous(every=8, payload=fm.Delta(), apply="sum"),
    ),
    "Adam, epoch": (
        fm.policies.adam_epoch(0.75),
        fm.Policy(staleness=fm.UNBOUNDED, quorum=fm.Quorum(0.75, of="samples", over="epoch")),
    ),
    "vote": (fm.policies.vote(3), fm.Policy(apply=fm.Vote(3))),
    "PowerSGD": (fm.policies.power_sgd(2), fm.Policy(filters=(F.low_rank(2).with_error_feedback(),))),
    "1 bit": (fm.policies.one_bit(), fm.Policy(filters=(F.sign().with_error_feedback(),))),
    "QSGD": (fm.policies.qsgd(4), fm.Policy(filters=(F.quantise(4, stochastic=True),))),
    "DGC": (fm.policies.deep_compression(0.01), fm.Policy(filters=(F.top_k(0.01).with_error_feedback(),))),
    "skeleton": (fm.policies.skeleton(0.1), fm.Policy(filters=(F.random_k(0.1).with_error_feedback(),))),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_name_is_its_composition(name: str) -> None:
    named, composed = COMPOSITIONS[name]
    assert named == composed


def test_ensemble_compression_distils_weights() -> None:
    policy = fm.policies.ensemble_compression(predict, INPUTS, every=5, steps=10, optimizer=ADAM)
    assert policy.describe() == "every 5, weights, distill 10"


def test_adam_chooses_by_shape() -> None:
    rule = fm.policies.adam_auto(batch=16, k=8)
    assert rule("conv/kernel", (3, 3, 16, 32)) == fm.policies.adam_convolution(8)
    assert rule("fc1/kernel", (256, 128)).payload == fm.Factors()
    assert rule("fc2/kernel", (128, 10)).payload == fm.Policy().payload, "16 (128 + 10) numbers are more than 1,280"
    assert rule("fc1/bias", (256,)).payload == fm.Policy().payload
    crossover = fm.policies.adam_auto(batch=64)
    assert crossover("fc", (128, 128)).payload == fm.Policy().payload, "64 (128 + 128) is just m n"
    assert crossover("fc", (128, 130)).payload == fm.Factors()
    with pytest.raises(fm.PolicyError, match="at least 1"):
        fm.policies.adam_auto(0)


def model(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 8, 8, 1)).astype(np.float32)
    y = np.sign(x.mean(axis=(1, 2, 3))).astype(np.float32)
    shapes = {"conv": (3, 3, 1, 4), "fc1": (256, 64), "fc2": (64, 1), "bias": (1,)}
    params = {k: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}
    return params, {"x": x, "y": y}


def loss(params: Any, batch: Any) -> Any:
    h = jax.nn.relu(jax.lax.conv_general_dilated(batch["x"], params["conv"], (1, 1), "SAME", dimension_numbers=NHWC))
    h = jnp.tanh(h.reshape(h.shape[0], -1) @ params["fc1"])
    return jnp.mean(jnp.logaddexp(0.0, -batch["y"] * ((h @ params["fc2"])[:, 0] + params["bias"][0])))


NHWC = ("NHWC", "HWIO", "NHWC")


def test_adams_rules_train_and_send_less() -> None:
    params, source = model()
    results: list[fm.TrainingResult] = []
    for policies in (fm.policies.adam_auto(batch=8, k=4), fm.policies.asynchronous()):
        cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), seed=0)
        trainer = fm.Trainer(loss, optax.sgd(0.2), cluster=cluster, replicas=2, policies=policies)
        results.append(trainer.fit(params, source, batch_size=16, steps=40, progress=False))
    ours, plain = results
    assert loss(ours.params, source) < 0.7 * loss(params, source)
    sent = {layer: ours.traffic[layer]["pushed_bytes"] / plain.traffic[layer]["pushed_bytes"] for layer in params}
    assert sent["conv"] == 1 / 4
    assert sent["fc1"] == pytest.approx(8 * (256 + 64) / (256 * 64))
    assert sent["fc2"] == sent["bias"] == 1


def test_a_rule_that_gives_no_policy_says_where() -> None:
    params, source = model()

    def rule(path: str, shape: tuple[int, ...]) -> Any:
        return None if path == "fc1" else fm.Policy()

    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    with pytest.raises(fm.PolicyError, match="fc1"):
        fm.Trainer(loss, optax.sgd(0.2), cluster=cluster, replicas=2, policies=rule).fit(
            params, source, batch_size=16, steps=1
        )


def test_a_method_is_a_composition_of_few_lines() -> None:
    """One that needs more has machinery of its own, which belongs to the algebra."""
    sizes = {name: len(inspect.getsourcelines(getattr(fm.policies, name))[0]) for name in fm.policies.__all__}
    assert {name: lines for name, lines in sizes.items() if lines > 30} == {}

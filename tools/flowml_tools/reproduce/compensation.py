"""Live gradient compensation: what a slow replica sends late joins the next step instead of being lost.

If the slow replica is the only one that has examples of a class, dropping what it sends biases the model against that
class.
"""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most
from flowml_tools.reproduce.learning import train

REPLICAS = 4


def run(full: bool, seed: int) -> Outcome:
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    steps = 400 if full else 80
    rng = np.random.default_rng(seed)
    label = np.repeat([0, 0, 0, 1], 64)  # the fourth replica has all examples of class 1
    x = (rng.normal(size=(256, 8)) + 0.7 * label[:, None]).astype(np.float32)
    source = {"x": x, "label": label.astype(np.float32)}

    def loss(params: Any, batch: Any) -> Any:
        logit = batch["x"] @ params["w"] + params["b"]
        return jnp.mean(jnp.logaddexp(0.0, logit) - batch["label"] * logit)

    start = {"w": jnp.zeros(8), "b": jnp.zeros(())}
    slow = fm.sim.Straggler(fm.sim.Constant(1.0), 1.2, workers=(3,))
    policies = {"all": fm.Policy(), "drop": fm.policies.quorum(0.75), "fold": fm.policies.compensate(0.75)}
    recall: dict[str, float] = {}
    curves: list[Line] = []
    for name, policy in policies.items():
        found = train(
            policy,
            REPLICAS,
            steps=steps,
            seed=seed,
            problem=(loss, start, source),
            optimizer=optax.sgd(0.5),
            batch=256,
            compute=slow,
            shuffle=False,
        )
        logit = x @ np.asarray(found.params["w"]) + float(found.params["b"])
        recall[name] = float(np.mean(logit[label == 1] > 0))
        curves.append(Line(name, [(r["seconds"], r["loss"]) for r in found.history]))
    return Outcome(
        f"{REPLICAS} replicas with 64 examples each, of which the slowest, 1.2 times as slow, has all examples of the "
        f"second class; logistic regression, {steps} steps, real arithmetic. Claimed of folding is 0.9 of the recall "
        f"of synchronous training, which is {recall['all']:.2f}.",
        (
            at_most("recall of the slow replica's class, late gradients dropped", 0.5, recall["drop"]),
            at_least("the same, late gradients folded in", 0.9 * recall["all"], recall["fold"]),
        ),
        Plot("Loss of the replicas that took part", "seconds", "loss", tuple(curves)),
    )


CLAIM = Claim(
    "Xu et al., Live Gradient Compensation for Evading Stragglers, 2020",
    "section on unbalanced data",
    "Dropping late gradients is biased against what slow replicas have; adding them one step later is not.",
    run,
)

"""Downpour SGD: replicas push every n_push and pull every n_fetch steps, without waiting; the home has Adagrad."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, near
from flowml_tools.reproduce.learning import final_loss, loss, problem, pushed, train

REPLICAS = 4


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    steps, pushes = (800, (1, 2, 5, 10, 20)) if full else (120, (1, 10))
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    slow = fm.sim.Straggler(fm.sim.LogNormal(1.0, 0.1), 5, workers=(1,))

    def fitted(policy: fm.Policy) -> Any:
        optimizer = optax.sgd(0.1)
        return train(
            policy, REPLICAS, steps=steps, seed=seed, problem=task, optimizer=optimizer, batch=64, compute=slow
        )

    results = {n: fitted(fm.policies.downpour(n, max(n // 2, 1), optax.adagrad(0.05))) for n in pushes}
    waiting = fitted(fm.Policy())
    start = float(loss(params, examples))
    ends = {n: final_loss(task, result) / start for n, result in results.items()}
    most = pushes[-1] if full else 10
    return Outcome(
        f"{REPLICAS} replicas, one of them 5 times as slow, {steps} steps of 16 examples each, n_fetch is half of "
        "n_push; a network of 32 x 64 x 8 on data of 8 classes, real arithmetic, Adagrad at the home.",
        (
            near("bytes with n_push = 1 against 10", 10, pushed(results[1]) / pushed(results[10]), 0.05, "{:.1f}"),
            at_most("worst loss of the sweep, against the first", 0.6, max(ends.values())),
            at_least(
                "speed against waiting for the slow replica",
                3.2,
                waiting.history[-1]["seconds"] / results[most].history[-1]["seconds"],
            ),
        ),
        Plot(
            "Loss of Downpour after as many steps",
            "n_push",
            "share of the first loss",
            (Line("loss", list(ends.items())),),
        ),
    )


CLAIM = Claim(
    "Dean et al., Large Scale Distributed Deep Networks, NeurIPS 2012",
    "section 4.1",
    "Replicas that push and fetch at rhythms of their own, with Adagrad at the home, learn without waiting for slow "
    "ones.",
    run,
)

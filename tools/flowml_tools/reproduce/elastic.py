"""Elastic averaging: every tau steps a worker and the centre move towards each other."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, near
from flowml_tools.reproduce.learning import final_loss, loss, problem, pushed, train

REPLICAS = 4


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    steps, rhythms = (1280, (1, 4, 16, 64)) if full else (320, (4, 16))
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    pull = 0.9 / REPLICAS
    results = {
        tau: train(
            fm.policies.elastic_averaging(tau, pull),
            REPLICAS,
            steps=steps,
            seed=seed,
            problem=task,
            optimizer=optax.sgd(0.3),
            batch=64,
            compute=fm.sim.LogNormal(1.0, 0.3),
        )
        for tau in rhythms
    }
    ends = {tau: final_loss(task, result) for tau, result in results.items()}
    start = float(loss(params, examples))
    return Outcome(
        f"{REPLICAS} replicas that do not wait for each other, {steps} steps of 16 examples each, log-normal compute "
        f"times, a network of 32 x 64 x 8 on data of 8 classes, real arithmetic; the pull is 0.9 / {REPLICAS}, as in "
        "the paper.",
        (
            near("bytes with tau = 4 against tau = 16", 4, pushed(results[4]) / pushed(results[16]), 0.05, "{:.1f}"),
            at_most("loss of the centre with tau = 16, against the first", 0.3, ends[16] / start),
            at_most("loss with tau = 16 against tau = 4", 1.05, ends[16] / ends[4]),
        ),
        Plot("Loss of the centre", "steps tau between two exchanges", "loss", (Line("loss", list(ends.items())),)),
    )


CLAIM = Claim(
    "Zhang, Choromanska and LeCun, Deep learning with Elastic Averaging SGD, NeurIPS 2015",
    "figures 1 and 2",
    "Workers that a centre pulls converge also if they exchange only every 16 steps, with as many fewer bytes.",
    run,
)

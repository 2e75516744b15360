"""Local SGD: replicas do H steps alone and then take the mean of their parameters."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, near
from flowml_tools.reproduce.learning import final_loss, loss, problem, pushed, train

REPLICAS = 4


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    steps, rhythms = (960, (1, 2, 4, 8, 16, 32)) if full else (160, (1, 8))
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    results = {
        every: train(
            fm.policies.local_sgd(every),
            REPLICAS,
            steps=steps,
            seed=seed,
            problem=task,
            optimizer=optax.sgd(0.3),
            batch=64,
        )
        for every in rhythms
    }
    ends = {every: final_loss(task, result) for every, result in results.items()}
    return Outcome(
        f"{REPLICAS} replicas, {steps} steps of 16 examples each, a network of 32 x 64 x 8 on data of 8 classes, real "
        "arithmetic.",
        (
            near("bytes with H = 1 against H = 8", 8, pushed(results[1]) / pushed(results[8]), 0.05, "{:.1f}"),
            at_most("loss with H = 8 against H = 1 after as many steps", 1.05, ends[8] / ends[1]),
        ),
        Plot("Loss of local SGD after as many steps", "local steps H", "loss", (Line("loss", list(ends.items())),)),
    )


CLAIM = Claim(
    "Stich, Local SGD Converges Fast and Communicates Little, ICLR 2019",
    "theorem 2.2",
    "Averaging every H steps sends H times fewer bytes and converges as fast as averaging in each step.",
    run,
)

"""DiLoCo: replicas do H steps alone, and an outer optimizer gets the mean of their changes."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most
from flowml_tools.reproduce.learning import final_loss, loss, problem, pushed, train


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    replicas, steps, rhythms = (8, 8000, (20, 100, 500)) if full else (2, 1000, (500,))
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    bytes_of, ends = {}, {}
    for every in (1, *rhythms):
        policy = fm.Policy() if every == 1 else fm.policies.diloco(every)
        optimizer = optax.adam(1e-3)
        result = train(policy, replicas, steps=steps, seed=seed, problem=task, optimizer=optimizer, batch=16 * replicas)
        bytes_of[every], ends[every] = pushed(result), final_loss(task, result)
    return Outcome(
        f"{replicas} replicas, {steps} steps of 16 examples each with Adam, a network of 32 x 64 x 8 on data of 8 "
        "classes, real arithmetic; outer optimizer: SGD at 0.7 with Nesterov momentum 0.9.",
        (
            at_least("bytes of synchronous SGD against H = 500", 500, bytes_of[1] / bytes_of[500], "{:.0f}"),
            at_most("loss with H = 500 against synchronous SGD", 1.05, ends[500] / ends[1]),
        ),
        Plot(
            "Loss against the bytes that replicas push",
            "bytes",
            "loss",
            (Line("DiLoCo and H = 1", sorted((bytes_of[h], ends[h]) for h in ends)),),
            log_x=True,
        ),
    )


CLAIM = Claim(
    "Douillard et al., DiLoCo, 2023",
    "figure 2 and table 2",
    "With 500 local steps replicas send 500 times fewer bytes than synchronous training, at an equal loss.",
    run,
)

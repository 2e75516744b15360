"""Backup workers: a step ends with the first n of n + b gradients."""

from __future__ import annotations

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, holds
from flowml_tools.reproduce.clocks import simulate, step_s

REPLICAS = 100


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps = 500 if full else 30
    tail = fm.sim.Pareto(scale_s=1.0, alpha=5.0)
    spares = (0, 1, 2, 4, 6, 10, 20, 30, 50) if full else (0, 2, 4, 10, 30, 50)
    times = {
        b: step_s(simulate(fm.policies.backup_workers(REPLICAS - b), REPLICAS, tail, steps=steps, seed=seed))
        for b in spares
    }
    rate = {b: (REPLICAS - b) / seconds for b, seconds in times.items()}
    best = max(rate, key=rate.__getitem__)
    return Outcome(
        f"{REPLICAS} simulated replicas, {steps} steps, compute times with a Pareto tail (at least 1 s, exponent 5).",
        (
            at_least("speed of a step with 96 + 4 against 100", 1.2, times[0] / times[4]),
            at_least("gradients a second with 96 + 4 against 100", 1.1, rate[4] / rate[0]),
            holds("the best number of backups for gradients a second is small", "2 to 20", str(best), 2 <= best <= 20),
        ),
        Plot(
            "Backup workers under a heavy tail, 100 machines",
            "backup workers b",
            "seconds a step, and gradients a second / 100",
            (
                Line("seconds a step", list(times.items())),
                Line("gradients / 100 s", [(b, r / REPLICAS) for b, r in rate.items()]),
            ),
        ),
    )


CLAIM = Claim(
    "Chen et al., Revisiting Distributed Synchronous SGD, 2016",
    "figures 3 and 4",
    "A few backup workers (96 + 4) take most of the wait for stragglers away, at the cost of their work.",
    run,
)

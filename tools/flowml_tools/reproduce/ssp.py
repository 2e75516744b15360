"""Stale synchronous parallel: a replica may be at most s clocks ahead of the slowest.

A bound of a few clocks hides the slow steps of a machine that is slow now and then. It cannot hide a machine that is
always slow, because the others reach the bound and then go at its pace.
"""

from __future__ import annotations

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most
from flowml_tools.reproduce.clocks import simulate, step_s

REPLICAS = 16


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps, bounds = (500, (0, 1, 2, 4, 8, 16)) if full else (100, (0, 2, 8))
    base = fm.sim.LogNormal(mean_s=1.0, sigma=0.1)
    settings = {
        "transient": fm.sim.Straggler(base, factor=4, share=1.0, probability=0.05),
        "persistent": fm.sim.Straggler(base, factor=4, workers=(3,)),
    }
    times = {
        kind: {
            s: step_s(simulate(fm.policies.asynchronous(staleness=s), REPLICAS, machines, steps=steps, seed=seed))
            for s in bounds
        }
        for kind, machines in settings.items()
    }
    speed = {kind: found[0] / found[8] for kind, found in times.items()}
    return Outcome(
        f"{REPLICAS} simulated replicas, {steps} steps of log-normal compute times (mean 1 s, sigma 0.1). Transient: "
        "each step is 4 times as long with a probability of 5 %. Persistent: one replica is always 4 times as slow.",
        (
            at_least("speed with s = 8 against s = 0, transient stragglers", 1.5, speed["transient"]),
            at_most("the same, one persistent straggler", 1.1, speed["persistent"]),
        ),
        Plot(
            "Time of a step under stale synchronous parallel",
            "staleness bound s",
            "seconds a step",
            tuple(Line(kind, list(found.items())) for kind, found in times.items()),
        ),
    )


CLAIM = Claim(
    "Ho et al., Stale Synchronous Parallel Parameter Server, NeurIPS 2013",
    "sections 2 and 5",
    "A staleness bound hides transient stragglers. It does not hide a persistent one, at whose pace all go in the end.",
    run,
)

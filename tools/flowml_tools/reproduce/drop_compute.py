"""DropCompute: every worker stops computing at a threshold, between two microbatches, and contributes what it has."""

from __future__ import annotations

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, holds
from flowml_tools.reproduce.clocks import simulate, step_s

MICROBATCHES, LIMIT_S = 12, 1.6


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps, workers = (100, (8, 32, 100, 200, 500)) if full else (15, (8, 32, 200))
    machines = fm.sim.LogNormal(mean_s=1.0, sigma=0.5)
    speeds, dropped = {}, 0.0
    for n in workers:
        plain, cut = (
            simulate(policy, n, machines, steps=steps, seed=seed, each=MICROBATCHES, microbatches=MICROBATCHES)
            for policy in (fm.Policy(), fm.policies.drop_compute(LIMIT_S))
        )
        dropped = cut.ledger.left_out / (cut.ledger.left_out + cut.ledger.examples)
        speeds[n] = (1 - dropped) * step_s(plain) / step_s(cut)
    grows = list(speeds.values()) == sorted(speeds.values())
    text = ", ".join(f"{speed:.2f}" for speed in speeds.values())
    return Outcome(
        f"{', '.join(map(str, workers))} simulated workers, {steps} steps of {MICROBATCHES} microbatches, log-normal "
        f"compute times of a step (mean 1 s, sigma 0.5), stopped after {LIMIT_S} s. Speed counts the examples that "
        "took part.",
        (
            holds("speed grows with the number of workers", "grows", text, grows),
            at_least(f"speed with {workers[-1]} workers against waiting for all", 1.7, speeds[workers[-1]]),
            at_most("examples left out", 0.1, dropped, "{:.1%}"),
        ),
        Plot(
            "Examples a second with DropCompute, against synchronous SGD",
            "workers",
            "speed",
            (Line("measured", list(speeds.items())),),
        ),
    )


CLAIM = Claim(
    "Giladi et al., DropCompute, NeurIPS 2023",
    "figures 1 and 5",
    "Stopping at a threshold loses a few examples and makes synchronous training faster, the more the more workers "
    "there are.",
    run,
)

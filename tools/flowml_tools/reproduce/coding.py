"""Gradient coding: the gradient of the whole batch from any n - s of n replicas."""

from __future__ import annotations

from itertools import combinations

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, holds, near
from flowml_tools.reproduce.clocks import simulate, step_s

DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0)


def run(full: bool, seed: int) -> Outcome:
    import numpy as np

    import flowml as fm
    from flowml.policy.codes import CyclicRepetition, FractionalRepetition, matrix

    replicas, cases = (18, (1, 2, 5)) if full else (12, (1, 2, 3))
    worst, tried, undecoded, loads = 0.0, 0, 0, True
    for stragglers in cases:
        for code in (FractionalRepetition(replicas, stragglers), CyclicRepetition(replicas, stragglers)):
            loads &= float(code.load) == (stragglers + 1) / replicas
            rows = matrix(code)
            for late in combinations(range(replicas), stragglers):
                found = code.decode([r for r in range(replicas) if r not in late])
                tried += 1
                if found is None:
                    undecoded += 1
                    continue
                total = sum((a * rows[r] for r, a in found.items()), np.zeros(rows.shape[1]))
                worst = max(worst, float(np.max(np.abs(total - 1))))

    def seconds(policy: fm.Policy, load: int, delay: float) -> float:
        machines = fm.sim.Straggler(fm.sim.Constant(1.0), 1 + delay / load, workers=(3,))
        return step_s(simulate(policy, replicas, machines, steps=20, seed=seed, each=replicas))

    naive = [(delay, seconds(fm.Policy(), 1, delay)) for delay in DELAYS]
    coded = [(delay, seconds(fm.policies.coded(1), 2, delay)) for delay in DELAYS]
    return Outcome(
        f"Every set of s late replicas of {replicas}, for s of {', '.join(map(str, cases))}, with the fractional and "
        "the cyclic code. Time: one replica is delayed, a replica's share of the batch takes 1 s, and a code for one "
        "straggler computes two shares.",
        (
            holds("sets of late replicas that are decoded", "all", f"{tried - undecoded} of {tried}", not undecoded),
            at_most("largest error of an entry of aB = 1", 1e-9, worst, "{:.1e}"),
            holds("load of a replica", "(s + 1) / n", "(s + 1) / n" if loads else "other", loads),
            at_most("time of a coded step with a delay of 8 s, against no delay", 1.05, coded[-1][1] / coded[0][1]),
            near("time of a plain step with a delay of 8 s, against no delay", 9.0, naive[-1][1] / naive[0][1], 0.01),
        ),
        Plot(
            f"Step time with one late replica of {replicas}",
            "delay of the straggler, s",
            "seconds a step",
            (Line("plain", naive), Line("coded, s = 1", coded)),
        ),
    )


CLAIM = Claim(
    "Tandon et al., Gradient Coding, ICML 2017",
    "theorems 2 and 3, figure 5",
    "With a load of (s + 1) / n a step is exact and does not wait, whichever s replicas are late.",
    run,
)

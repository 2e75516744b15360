"""Double buffering: replicas compute with one version of the parameters while the next one is exchanged."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, near
from flowml_tools.reproduce.clocks import simulate, step_s
from flowml_tools.reproduce.learning import final_loss, loss, problem, train

REPLICAS, COMPUTE_S, NBYTES = 4, 1.0, 4_000_000


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    steps, shares = (200, (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)) if full else (30, (0.5, 1.0, 2.0))
    compute = fm.sim.Constant(COMPUTE_S)

    def takes(policy: fm.Policy, share: float) -> float:
        """Seconds of a step where the exchange of a layer takes `share` of the computation."""
        link = fm.sim.Network(latency_s=1e-6, bytes_per_s=2 * NBYTES / (share * COMPUTE_S))
        return step_s(simulate(policy, REPLICAS, compute, link, steps=steps, seed=seed, nbytes=NBYTES))

    one, two = fm.Policy(), fm.policies.double_buffer()
    times = {share: (takes(one, share), takes(two, share)) for share in shares}
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    ends = [
        final_loss(
            task,
            train(p, REPLICAS, steps=10 * steps, seed=seed, problem=task, optimizer=optax.sgd(0.1), batch=64),
        )
        for p in (one, two)
    ]
    excess = [both - max(COMPUTE_S, alone - COMPUTE_S) for alone, both in times.values()]
    low, high = min(shares), max(shares)
    return Outcome(
        f"{REPLICAS} simulated replicas, {steps} steps of {COMPUTE_S:g} s each, one layer of 4 MB on a home, on links "
        f"with which the exchange takes {low:g} to {high:g} times as long as the computation. Loss: {10 * steps} steps "
        "of a network of 32 x 64 x 8 on data of 8 classes, real arithmetic.",
        (
            near("seconds of a step with one buffer, at equal times", 2 * COMPUTE_S, times[1.0][0], 0.02),
            near("the same with two buffers", COMPUTE_S, times[1.0][1], 0.05),
            at_most("seconds above the longer of computation and exchange", 0.05 * COMPUTE_S, max(excess)),
            at_most("loss with two buffers against one", 1.05, ends[1] / ends[0]),
        ),
        Plot(
            "Time of a step with one buffer and with two",
            "time of the exchange, in times of the computation",
            "seconds a step",
            tuple(Line(name, [(s, t[n]) for s, t in times.items()]) for n, name in enumerate(("one", "two"))),
        ),
    )


CLAIM = Claim(
    "Li et al., Pipe-SGD, NeurIPS 2018",
    "section 3.1",
    "With two buffers a step takes as long as its computation or its exchange, whichever is longer, and not as both.",
    run,
)

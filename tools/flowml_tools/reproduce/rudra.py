"""Rudra: a home applies the gradients of 1/n of the learners at a time, and divides them by their staleness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Finding, Outcome, at_least, at_most, near
from flowml_tools.reproduce.clocks import simulate, step_s
from flowml_tools.reproduce.learning import final_loss, train

if TYPE_CHECKING:
    import flowml as fm

LEARNERS, SITES = 30, 6


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps, numbers = (400, (1, 2, 4, 8, 15, 30)) if full else (60, (1, 4, 30))
    machines = fm.sim.LogNormal(mean_s=1.0, sigma=0.1)
    found = {
        n: _mean(simulate(fm.policies.softsync(n), LEARNERS, machines, steps=steps, seed=seed).staleness["layer"])
        for n in numbers
    }
    tree = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites=SITES)
    one, several = (_step(policy, seed) for policy in (fm.policies.softsync(1), fm.policies.softsync(1, topology=tree)))
    fixed, scaled = _grown(seed, scale=False), _grown(seed, scale=True)
    means: list[Finding] = [near(f"mean staleness of {n}-softsync", n, mean, 0.15) for n, mean in found.items()]
    return Outcome(
        f"{LEARNERS} simulated learners, {steps} steps of log-normal compute times (mean 1 s, sigma 0.1). Divergence: "
        "least squares in 16 dimensions by 30-softsync with 20 steps of real arithmetic, at a rate of SGD that is "
        f"stable without staleness. Tree: {SITES} servers of 5 learners each below one, a gradient of 20 MB, links of "
        "100 MB/s at whose ends messages share the rate.",
        (
            *means,
            at_least("loss with a fixed rate, against the first", 10.0, fixed, "{:.2g}"),
            at_most("loss with the rate divided by the staleness", 0.5, scaled, "{:.2g}"),
            at_least("speed of 1-softsync with a tree of servers against one", 1.5, one / several),
        ),
        Plot(
            "Mean staleness of n-softsync, 30 learners",
            "n",
            "versions since the read",
            (Line("measured", list(found.items())), Line("n", [(n, n) for n in numbers], dashed=True)),
        ),
    )


def _mean(counts: Any) -> float:
    return sum(versions * number for versions, number in counts.items()) / sum(counts.values())


def _step(policy: fm.Policy, seed: int) -> float:
    """Seconds of a step on links that one server fills."""
    import flowml as fm

    rate = 1e8
    network = fm.sim.Network(1e-3, rate, uplink_bytes_per_s=rate, downlink_bytes_per_s=rate)
    machines = fm.sim.LogNormal(mean_s=1.0, sigma=0.1)
    return step_s(simulate(policy, LEARNERS, machines, network, steps=12, seed=seed, nbytes=20_000_000))


def _grown(seed: int, *, scale: bool) -> float:
    """The last loss of 30-softsync as a share of the first."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(LEARNERS * 64, 16)).astype(np.float32)
    source = {"x": x, "y": x @ rng.normal(size=(16, 1)).astype(np.float32)}
    params = {"w": jnp.zeros((16, 1))}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    task = (loss, params, source)
    result = train(
        fm.policies.softsync(LEARNERS, scale=scale),
        LEARNERS,
        steps=20,
        seed=seed,
        problem=task,
        optimizer=optax.sgd(0.04),
        batch=LEARNERS * 16,
        compute=fm.sim.LogNormal(mean_s=1.0, sigma=0.1),
    )
    return final_loss(task, result) / float(loss(params, source))


CLAIM = Claim(
    "Gupta et al., Model Accuracy and Runtime Tradeoff in Distributed Deep Learning (Rudra), ICDM 2016",
    "figures 4 and 5",
    "n-softsync has a mean staleness of n with 30 learners; there a fixed rate diverges, and one divided by the "
    "staleness converges. Servers as a tree take the load off one.",
    run,
)

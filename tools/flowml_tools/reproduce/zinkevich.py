"""Parallel SGD with one average at the end: replicas train alone, and their mean has a smaller variance."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, near

STEPS = 60
EXAMPLES = 65_536
"""So many that replicas hardly share any: without replacement fewer would make the variance smaller than 1 / k."""


def run(full: bool, seed: int) -> Outcome:
    import numpy as np

    counts, fits = ((1, 2, 4, 8, 16, 32), 20) if full else ((1, 4, 16), 6)
    errors = {k: _errors(k, fits, seed) for k in counts}
    variance = {k: float(np.mean(found**2)) for k, found in errors.items()}
    most = counts[-1]
    share = variance[most] / variance[1]
    single = errors[1]
    inputs = np.mean(single**2), np.mean(np.mean(single, axis=0) ** 2)
    return Outcome(
        f"Least squares in 32 dimensions with noise, {STEPS} steps of 4 examples a replica at a constant rate, {fits} "
        f"fits of {', '.join(map(str, counts))} replicas, real arithmetic. Variance: mean squared distance from the "
        "optimum.",
        (
            near(f"variance with {most} replicas against one", 1 / most, share, 0.25, "{:.3f}"),
            at_least(
                f"mean loss of {fits} replicas against that of their average", fits / 2, float(inputs[0] / inputs[1])
            ),
        ),
        Plot(
            "Variance of the average of k replicas",
            "k",
            "mean squared distance",
            (
                Line("measured", list(variance.items())),
                Line("1 / k", [(k, variance[1] / k) for k in counts], dashed=True),
            ),
            log_x=True,
            log_y=True,
        ),
    )


def _errors(replicas: int, fits: int, seed: int) -> Any:
    """The distance of the parameters from the optimum, a row for each fit. The optimum is known: fits start there, so
    that what they have left is the variance of SGD."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(EXAMPLES, 32)).astype(np.float32)
    best = rng.normal(size=(32,)).astype(np.float32)
    y = (x @ best + rng.normal(size=EXAMPLES)).astype(np.float32)
    optimum = np.linalg.lstsq(x, y, rcond=None)[0]

    def loss(params: Any, batch: Any) -> Any:
        return 0.5 * jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    cluster = fm.SimulatedCluster(replicas, fm.sim.Constant(1.0), fm.sim.Network(1e-4, 1e9), seed=seed)
    policy = fm.policies.average_once() if replicas > 1 else fm.Policy()
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=replicas, policies=policy)
    source, start = {"x": x, "y": y}, {"w": jnp.asarray(optimum)}
    settings: dict[str, Any] = {"batch_size": 4 * replicas, "steps": STEPS, "progress": False}
    found = [trainer.fit(start, source, seed=seed * fits + i, **settings).params["w"] for i in range(fits)]
    return np.asarray(found) - optimum


CLAIM = Claim(
    "Zinkevich et al., Parallelized Stochastic Gradient Descent, NeurIPS 2010",
    "theorem 11",
    "The average of k replicas that trained alone has a variance k times smaller, and a smaller loss than they have.",
    run,
)

"""Asynchronous consensus ADMM: the consensus is updated at some of the reports, with a bound on how old others are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most

if TYPE_CHECKING:
    import flowml as fm
    from flowml_runtime.driver.training.result import TrainingResult

REPLICAS, EVERY, L1 = 8, 8, 0.3


def run(full: bool, seed: int) -> Outcome:
    import numpy as np

    import flowml as fm

    rounds = 120 if full else 40
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(REPLICAS * 20, 12))
    b = a @ np.array([2, 0, -1.5, 0, 0, 1, 0, 0, 0.5, 0, 0, -1]) + 0.1 * rng.normal(size=len(a))

    def objective(x: Any) -> float:
        return float(0.5 * np.mean((a @ x - b) ** 2) + L1 * np.sum(np.abs(x)))

    best = objective(_serial(a, b))
    waiting = _fit(fm.policies.admm(1.0, every=EVERY, l1=L1), a, b, rounds, seed)
    policy = fm.policies.admm(1.0, share=2, staleness=8 * EVERY, every=EVERY, l1=L1)
    alone = _fit(policy, a, b, rounds, seed)
    gaps = [objective(np.asarray(r.params["x"], np.float64)) / best - 1 for r in (waiting, alone)]
    seconds = [r.history[-1]["seconds"] for r in (waiting, alone)]
    return Outcome(
        f"A lasso of 160 examples and 12 unknowns on {REPLICAS} replicas, {rounds} reports of {EVERY} gradient steps, "
        "real arithmetic; log-normal compute times (mean 1 s, sigma 0.1), a step in 100 takes 10 times as long. "
        "Updates at 2 reports of 8, at most 8 reports of skew. Serial: 5,000 proximal gradient steps.",
        (
            at_most("objective above the serial optimum, asynchronous", 1e-3, gaps[1], "{:.1e}"),
            at_most("objective above the serial optimum, synchronous", 1e-3, gaps[0], "{:.1e}"),
            at_least("speed against synchronous ADMM for as many reports", 1.2, seconds[0] / seconds[1]),
        ),
        Plot(
            "Loss of the replicas on their own examples",
            "seconds",
            "loss",
            tuple(
                Line(name, [(r["seconds"], r["loss"]) for r in result.history[::EVERY]])
                for name, result in (("synchronous", waiting), ("asynchronous", alone))
            ),
            log_y=True,
        ),
    )


def _fit(policy: fm.Policy, a: Any, b: Any, rounds: int, seed: int) -> TrainingResult:
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    def loss(params: Any, batch: Any) -> Any:
        return 0.5 * jnp.mean((batch["a"] @ params["x"] - batch["b"]) ** 2)

    machines = fm.sim.Straggler(fm.sim.LogNormal(1.0, 0.1), 10, share=1.0, probability=0.01)
    cluster = fm.SimulatedCluster(REPLICAS, machines, fm.sim.Network(1e-3, 1e9), seed=seed)
    trainer = fm.Trainer(loss, optax.sgd(0.2), cluster=cluster, replicas=REPLICAS, policies=policy)
    source = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    params, steps = {"x": jnp.zeros(a.shape[1])}, rounds * EVERY
    return trainer.fit(params, source, batch_size=len(a), steps=steps, shuffle=False, seed=seed, progress=False)


def _serial(a: Any, b: Any) -> Any:
    """The optimum of the lasso by proximal gradient steps."""
    import numpy as np

    x = np.zeros(a.shape[1])
    rate = 1 / np.linalg.eigvalsh(a.T @ a / len(a))[-1]
    for _ in range(5000):
        step = x - rate * a.T @ (a @ x - b) / len(a)
        x = np.sign(step) * np.maximum(np.abs(step) - rate * L1, 0)
    return x


CLAIM = Claim(
    "Zhang and Kwok, Asynchronous Distributed ADMM for Consensus Optimization, ICML 2014",
    "theorem 3.1, figure 2",
    "Updating at some of the reports, with a bound on the age of the others, reaches the optimum and takes less time.",
    run,
)

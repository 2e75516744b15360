"""Sandblaster L-BFGS: a batch is cut into portions, an idle worker takes the next one, and copies end the wait."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most
from flowml_tools.reproduce.clocks import simulate, step_s

WORKERS, SLOWER = 8, 5


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps, counts = (50, (1, 2, 4, 8)) if full else (8, (1, 4))
    slow = fm.sim.Straggler(fm.sim.Constant(1.0), SLOWER, workers=(1,))

    def seconds(policy: fm.Policy) -> float:
        return step_s(simulate(policy, WORKERS, slow, steps=steps, seed=seed, each=8))

    whole = seconds(fm.Policy())
    copies = {n: seconds(fm.policies.speculate(n)) for n in counts}
    alone = {n: seconds(fm.policies.speculate(n, copies=0)) for n in counts}
    ideal = WORKERS / (WORKERS - 1 + 1 / SLOWER)
    return Outcome(
        f"{WORKERS} simulated workers, one of them {SLOWER} times as slow, a batch in 1 to {counts[-1]} portions for "
        "each worker. L-BFGS: 4 workers, one 5 times as slow, 20 steps of the whole batch in float64, against a loop "
        "of optax.",
        (
            at_most("largest difference from serial L-BFGS", 1e-6, _difference(seed), "{:.1e}"),
            at_least("speed of 4 portions with copies against waiting", 3.6, whole / copies[4]),
            at_most("time with 4 portions and copies, against perfect division", 1.25, copies[4] / ideal),
            at_least("time without copies against that with them, 1 portion", 1.8, alone[1] / copies[1]),
        ),
        Plot(
            f"A step with one of {WORKERS} workers {SLOWER} times as slow",
            "portions for each worker",
            "seconds a step",
            (
                Line("with copies", list(copies.items())),
                Line("without copies", list(alone.items())),
                Line("waiting for all", [(n, whole) for n in counts], dashed=True),
                Line("perfect division", [(n, ideal) for n in counts], dashed=True),
            ),
        ),
    )


def _difference(seed: int) -> float:
    """How far parameters of L-BFGS on portions and copies are from those of a plain loop."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 16))
    source = {"x": x, "y": np.tanh(x @ rng.normal(size=(16, 1)))}
    lbfgs = optax.chain(optax.scale_by_lbfgs(memory_size=5), optax.scale(-0.1))

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)

    with jax.enable_x64(True):
        start = {"w": jnp.asarray(0.1 * rng.normal(size=(16, 1)))}
        params: Any = start
        state = lbfgs.init(start)
        slope, update = jax.jit(jax.grad(loss)), jax.jit(lbfgs.update)
        for _ in range(20):
            updates, state = update(slope(params, source), state, params)
            params = optax.apply_updates(params, updates)
        slow = fm.sim.Straggler(fm.sim.Constant(1.0), SLOWER, workers=(1,))
        cluster = fm.SimulatedCluster(4, slow, fm.sim.Network(1e-4, 1e9), seed=seed)
        trainer = fm.Trainer(loss, lbfgs, cluster=cluster, replicas=4, policies=fm.policies.speculate(4))
        result = trainer.fit(start, source, batch_size=64, steps=20, progress=False)
        return float(jnp.max(jnp.abs(result.params["w"] - params["w"])))


CLAIM = Claim(
    "Dean et al., Large Scale Distributed Deep Networks, NeurIPS 2012",
    "section 4.2",
    "With small portions and copies of the last ones a slow worker delays L-BFGS by little, and the result is that of "
    "a serial run.",
    run,
)

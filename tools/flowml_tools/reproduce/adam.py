"""Project Adam ends a step, or an epoch, when 75 % of the replicas, or of the work, are done.

Its fully connected layers send the two factors of a gradient instead of the product, and its convolutions the sum of
several updates.
"""

from __future__ import annotations

import math
from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, near
from flowml_tools.reproduce.clocks import simulate
from flowml_tools.reproduce.learning import final_loss, loss, problem, pushed, train

REPLICAS = 30
SHARES = (0.5, 0.6, 0.75, 0.9, 1.0)
K, PUSHES, RATE = 10, 120, 0.1


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps = 1000 if full else 100
    machines = fm.sim.ShiftedExponential(1.0, 0.1)

    def seconds(policy: fm.Policy, epochs: int | None = None) -> float:
        found = simulate(policy, REPLICAS, machines, steps=steps, seed=seed, epochs=epochs).virtual_seconds
        assert found is not None
        return found / steps

    whole = seconds(fm.Policy())
    shares = SHARES[:-1] if full else SHARES[2:3]
    saved = {share: 1 - seconds(fm.policies.quorum(share)) / whole for share in shares}
    epoch = fm.policies.asynchronous(quorum=fm.Quorum(0.75, of="samples", over="epoch"))
    by_epoch = 1 - seconds(epoch, epochs=steps // 100) / seconds(fm.policies.asynchronous(), epochs=steps // 100)
    sent, plain, error = _factors(seed)
    every, serial = {k: _convolution(k, seed) for k in (1, K)}, _serial(seed)
    points = [(share, 100 * value) for share, value in {**saved, 1.0: 0.0}.items()]
    return Outcome(
        f"{REPLICAS} simulated replicas, {steps} steps of 1 + Exp(0.1) s each, epochs of 100 steps. Factors: a layer "
        "of 256 x 128, 2 replicas with 16 examples each, real arithmetic. The rule of convolutions: a network of 32 x "
        f"64 x 8, 4 replicas with {PUSHES} steps of 16 examples each, which push every {K} steps and never wait. "
        "Order statistics of such times save 18.5 % if late replicas stop at once, and 15.5 % if they finish the step "
        "that they compute, as they do here, and so begin the next one late.",
        (
            near("time saved by ending a step at 75 % of the replicas", 0.20, saved[0.75], 0.15, "{:.1%}"),
            near(
                "the same against order statistics, late steps finished", _expected(0.75), saved[0.75], 0.05, "{:.1%}"
            ),
            near("time saved by ending an epoch at 75 % of its work", 0.20, by_epoch, 0.15, "{:.1%}"),
            near("bytes of factors against those of the product", 16 * (256 + 128) / (256 * 128), sent / plain, 0.02),
            at_most("largest difference of parameters after 8 steps with factors", 1e-5, error, "{:.1e}"),
            near(f"bytes of pushing in each step against every {K}", K, every[1][1] / every[K][1], 0.05, "{:.1f}"),
            at_most(f"loss with a push every {K} steps against serial SGD", 1.05, every[K][0] / serial),
        ),
        Plot(
            "Time saved by not waiting for all of 30 replicas",
            "share of the replicas that ends a step",
            "time saved, %",
            (Line("a step", points), Line("an epoch", [(0.75, 100 * by_epoch)])),
        ),
    )


def _expected(share: float) -> float:
    """The time saved by a loop over random compute times, in which late replicas finish the step that they compute."""
    import numpy as np

    rng, steps = np.random.default_rng(0), 4000
    need, free, now = math.ceil(share * REPLICAS), np.zeros(REPLICAS), 0.0
    for _ in range(steps):
        done = np.maximum(free, now) + 1 + rng.exponential(0.1, REPLICAS)
        now = float(np.sort(done)[need - 1])
        free = done
    return 1 - now / steps / (1 + 0.1 * sum(1 / i for i in range(1, REPLICAS + 1)))


def _convolution(k: int, seed: int) -> tuple[float, int]:
    """The loss of all examples, and the bytes pushed, with the rule of convolutions."""
    import optax

    import flowml as fm

    params, examples, _ = problem(seed)
    result = train(
        fm.policies.adam_convolution(k),
        4,
        steps=PUSHES,
        seed=seed,
        problem=(loss, params, examples),
        optimizer=optax.sgd(RATE),
        batch=64,
        compute=fm.sim.LogNormal(1.0, 0.2),
    )
    return final_loss((loss, params, examples), result), pushed(result)


def _serial(seed: int) -> float:
    """The loss after as many examples on one replica."""
    import optax

    import flowml as fm

    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    result = train(fm.Policy(), 1, steps=4 * PUSHES, seed=seed, problem=task, optimizer=optax.sgd(RATE), batch=16)
    return final_loss(task, result)


def _factors(seed: int) -> tuple[float, float, float]:
    """Bytes pushed with factors and without, and how far the parameters of the two fits differ."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    rng = np.random.default_rng(seed)
    source = {"x": rng.normal(size=(256, 256)).astype(np.float32), "y": rng.normal(size=(256, 128)).astype(np.float32)}
    params = {"fc": jnp.asarray(rng.normal(size=(256, 128)) / 16, jnp.float32)}

    def squared(params: Any, batch: Any) -> Any:
        return jnp.mean((jnp.tanh(batch["x"] @ params["fc"]) - batch["y"]) ** 2)

    found: list[tuple[float, Any]] = []
    for policy in (fm.policies.factors(), fm.Policy()):
        cluster = fm.SimulatedCluster(2, fm.sim.Constant(1.0), fm.sim.Network(1e-4, 1e9), seed=seed)
        trainer = fm.Trainer(squared, optax.sgd(0.1), cluster=cluster, replicas=2, policies=policy)
        result = trainer.fit(params, source, batch_size=32, steps=8, seed=seed, progress=False)
        found.append((sum(t["pushed_bytes"] for t in result.traffic.values()), result.params["fc"]))
    (sent, ours), (plain, theirs) = found
    return sent, plain, float(jnp.max(jnp.abs(ours - theirs)))


CLAIM = Claim(
    "Chilimbi et al., Project Adam, OSDI 2014",
    "sections on slow machines and on the traffic of fully connected layers",
    "Ending at 75 % saves about 20 % of the time; a dense layer sends its factors, B (m + n) numbers instead of m n; a "
    "convolution adds its updates up and sends them now and then, without waiting.",
    run,
)

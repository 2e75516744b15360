"""Parameter Server: filters make sparse logistic regression cheap to send, and bounded delay makes it fast."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, holds
from flowml_tools.reproduce.clocks import simulate, step_s
from flowml_tools.reproduce.learning import pushed, train

FEATURES, L1 = 2000, 0.01


def run(full: bool, seed: int) -> Outcome:
    import jax.numpy as jnp
    import optax

    import flowml as fm
    from flowml.policy.filters import Filter

    steps = 300 if full else 60
    source = _examples(seed)

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(jnp.logaddexp(0.0, -batch["y"] * (batch["x"] @ params["w"])))

    def objective(params: Any) -> float:
        return float(loss(params, source) + L1 * jnp.sum(jnp.abs(params["w"])))

    task = (loss, {"w": jnp.zeros(FEATURES)}, source)
    kkt = fm.filters.kkt(L1)
    ladder: dict[str, tuple[Filter, ...]] = {
        "plain": (),
        "KKT": (kkt,),
        "and key cache": (kkt, fm.filters.key_cache()),
        "and 8 bits": (kkt, fm.filters.key_cache(), fm.filters.quantise(8)),
        "and zip": (kkt, fm.filters.key_cache(), fm.filters.quantise(8), fm.filters.compress()),
    }
    sent, ends = {}, {}
    for name, chain in ladder.items():
        policy = fm.Policy(filters=chain, apply=fm.Prox(l1=L1))
        result = train(
            policy, 4, steps=steps, seed=seed, problem=task, optimizer=optax.sgd(1.0), batch=512, shuffle=False
        )
        sent[name], ends[name] = pushed(result), objective(result.params)
    falls = all(fewer < more for more, fewer in pairwise(sent.values()))
    machines = fm.sim.LogNormal(mean_s=1.0, sigma=0.5)
    bounds = (0, 1, 2, 4, 8, 16)
    times = {
        tau: step_s(simulate(fm.policies.asynchronous(staleness=tau), 16, machines, steps=steps, seed=seed))
        for tau in (bounds if full else (0, 8))
    }
    kept = [f"{sent[name] / sent['plain']:.0%}" for name in ladder]
    return Outcome(
        f"Logistic regression with L1 on {FEATURES:,} sparse features, 512 examples, 4 replicas, {steps} steps of all "
        "examples, real arithmetic. Delay: 16 simulated replicas, log-normal compute times (mean 1 s, sigma 0.5).",
        (
            holds("each filter saves bytes", "falls", ", ".join(kept), falls),
            at_least("bytes without filters against all of them", 20, sent["plain"] / sent["and zip"], "{:.0f}"),
            at_most("objective with all filters against none", 1.01, ends["and zip"] / ends["plain"], "{:.3f}"),
            at_least("speed with a delay of 8 against 0", 1.5, times[0] / times[8]),
        ),
        Plot(
            "Time of a step against the bound of delay",
            "bound of delay, steps",
            "seconds a step",
            (Line("16 replicas", list(times.items())),),
        ),
    )


def _examples(seed: int) -> dict[str, Any]:
    """Rows with 2 % of the features, labelled by 40 of these."""
    import numpy as np

    rng = np.random.default_rng(seed)
    x = (rng.random((512, FEATURES)) < 0.02) * rng.normal(size=(512, FEATURES))
    weights = np.zeros(FEATURES)
    weights[rng.choice(FEATURES, 40, replace=False)] = 4 * rng.normal(size=40)
    return {"x": x.astype(np.float32), "y": np.sign(x @ weights + 1e-3).astype(np.float32)}


CLAIM = Claim(
    "Li et al., Scaling Distributed Machine Learning with the Parameter Server, OSDI 2014",
    "figures 10 to 13",
    "Key caching, KKT filters and compression each cut bytes at the same objective, and a bound of delay cuts the "
    "time.",
    run,
)

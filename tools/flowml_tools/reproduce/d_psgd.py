"""Decentralised parallel SGD: each replica averages with its neighbours on a ring, and no node is in the middle.

A home that all replicas send to carries n times the bytes of a replica, and a ring all-reduce has 2 (n - 1) rounds
whose latencies add up. A round of gossip is one message to each neighbour, so it wins where links are slow against the
first, or far against the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, near
from flowml_tools.reproduce.clocks import added_step_s
from flowml_tools.reproduce.learning import final_loss, loss, problem, train

if TYPE_CHECKING:
    import flowml as fm

REPLICAS, NBYTES = 112, 1_080_000
"""ResNet-20 has 0.27 million parameters."""

COUNTED = (REPLICAS + 1 - 1.25 * 2) * NBYTES / (0.25 * 0.1)
"""The rate at which 0.1 s and a layer from each replica and to one take 1.25 times as long as 0.1 s and two layers."""

METHODS = ("D-PSGD on a ring", "parameter server", "ring all-reduce")


def run(full: bool, seed: int) -> Outcome:
    steps = 20 if full else 2
    rates = (1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 1e10) if full else (1e6, 1e8, 1e10)
    delays = (1e-4, 1e-3, 5e-3, 2e-2) if full else (1e-4, 5e-3)
    by_rate = {name: {r: _seconds(name, r, 1e-4, steps, seed) for r in rates} for name in METHODS[: 3 if full else 2]}
    by_delay = {name: {d: _seconds(name, 1e9, d, steps, seed) for d in delays} for name in METHODS[::2]}
    ours, server = by_rate[METHODS[0]], by_rate[METHODS[1]]
    crossover = _crossover(steps, seed)
    slow, quick = by_delay[METHODS[2]], by_delay[METHODS[0]]
    return Outcome(
        f"{REPLICAS} simulated replicas, 1.08 MB of parameters (ResNet-20), 0.1 s of compute a step, links at whose "
        f"end messages share the rate; latency 0.1 ms for the rates, 1 GB/s for the latencies. The rate that is "
        f"claimed is counted from the bytes of both; the paper gives none. Loss: {_LOSS}",
        (
            at_least("speed against a parameter server at 1 MB/s", 10.0, server[1e6] / ours[1e6]),
            at_most("speed against a parameter server at 10 GB/s", 1.25, server[1e10] / ours[1e10]),
            near(
                "rate at which the server takes 1.25 times as long, MB/s", COUNTED / 1e6, crossover / 1e6, 0.1, "{:.0f}"
            ),
            at_least("speed against an all-reduce at 5 ms of latency", 2.0, slow[5e-3] / quick[5e-3]),
            at_most("speed against an all-reduce at 0.1 ms of latency", 1.5, slow[1e-4] / quick[1e-4]),
            at_most("loss against synchronous SGD after as many steps", 1.1, _loss_ratio(seed)),
        ),
        Plot(
            f"A step of {REPLICAS} replicas, 1.08 MB of parameters",
            "rate of a link, bytes/s",
            "seconds a step",
            tuple(Line(name, list(found.items())) for name, found in by_rate.items()),
            log_x=True,
            log_y=True,
        ),
    )


def _seconds(method: str, rate: float, latency_s: float, steps: int, seed: int) -> float:
    import flowml as fm

    policies: dict[str, fm.Policy] = dict(
        zip(METHODS, (fm.policies.gossip("ring"), fm.Policy(), fm.Policy(topology=fm.Ring())), strict=True)
    )
    network = fm.sim.Network(latency_s, rate, downlink_bytes_per_s=rate)
    machines = fm.sim.Constant(0.1)
    return added_step_s(policies[method], REPLICAS, machines, network, steps=steps, seed=seed, nbytes=NBYTES)


def _crossover(steps: int, seed: int) -> float:
    """The rate at which a step with a server takes 1.25 times as long, found by halving."""
    low, high = 1e8, 1e11
    while high / low > 1.05:
        rate = (low * high) ** 0.5
        ours, server = (_seconds(name, rate, 1e-4, steps, seed) for name in METHODS[:2])
        low, high = (rate, high) if server > 1.25 * ours else (low, rate)
    return (low * high) ** 0.5


_LOSS = "8 replicas, 100 steps of 64 examples, a network of 32 x 64 x 8 on data of 8 classes, real arithmetic."


def _loss_ratio(seed: int) -> float:
    import optax

    import flowml as fm

    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    found = [
        final_loss(task, train(policy, 8, steps=100, seed=seed, problem=task, optimizer=optax.sgd(0.3), batch=64))
        for policy in (fm.policies.gossip("ring"), fm.Policy())
    ]
    return found[0] / found[1]


CLAIM = Claim(
    "Lian et al., Can Decentralized Algorithms Outperform Centralized Algorithms?, NeurIPS 2017",
    "figures 2 and 3, up to 112 GPUs",
    "On links of low rate or high latency D-PSGD is up to ten times as fast as centralised SGD, and converges alike.",
    run,
)

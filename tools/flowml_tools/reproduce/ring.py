"""Ring all-reduce: each replica sends 2 (N - 1) / N of a gradient, however many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, near
from flowml_tools.reproduce.clocks import added_step_s
from flowml_tools.reproduce.learning import loss, problem, train

if TYPE_CHECKING:
    import flowml as fm

MEMBERS, STEPS = 8, 16
COMPUTE_S, LATENCY_S, RATE = 1e-3, 1e-5, 1e8
LARGE, SMALL = 64_000_000, 4_000_000
"""Bytes of a gradient. The theorem counts bytes alone; a small one in 256 pieces leaves room for latency."""


def run(full: bool, seed: int) -> Outcome:
    import jax
    import numpy as np
    import optax

    import flowml as fm

    replicas, steps = ((4, 16, 64, 256), 10) if full else ((4, 16, 64), 4)
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    ring, plain = (
        train(policy, MEMBERS, steps=STEPS, seed=seed, problem=task, optimizer=optax.sgd(0.3), batch=64)
        for policy in (fm.policies.ring(), fm.Policy())
    )
    sent = sum(traffic["pushed_wire_bytes"] for traffic in ring.traffic.values())
    whole = sum(array.nbytes for array in params.values())
    pairs = zip(jax.tree.leaves(ring.params), jax.tree.leaves(plain.params), strict=True)
    error = max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs)
    times = {
        name: {n: _seconds(policy, n, steps, seed, LARGE) for n in replicas}
        for name, policy in (("ring", fm.policies.ring()), ("parameter server", fm.Policy()))
    }
    last, first = replicas[-1], replicas[0]
    ours, server = times["ring"], times["parameter server"]
    small = _seconds(fm.policies.ring(), last, steps, seed, SMALL)
    messages = _ideal(last, SMALL) + 2 * (last - 1) * LATENCY_S
    ideal = 2 * (MEMBERS - 1) / MEMBERS
    return Outcome(
        f"Bytes and sums: {MEMBERS} replicas, {STEPS} steps, a network of 32 x 64 x 8, real arithmetic. Time of an "
        f"exchange: {', '.join(map(str, replicas))} simulated replicas, a gradient of 64 MB, links of 100 MB/s and "
        "10 us, at whose end messages share the rate. The latency of 2 (N - 1) messages, which the theorem leaves out, "
        f"is {2 * (last - 1) * LATENCY_S * 1e3:.1f} ms with {last} replicas: of a gradient of 4 MB they take "
        f"{small / _ideal(last, SMALL) - 1:.1%} more than its bytes.",
        (
            near("bytes that a replica sends, in gradients", ideal, sent / STEPS / MEMBERS / whole, 0.001, "{:.3f}"),
            at_most("largest difference of parameters from those of one home", 1e-6, error, "{:.1e}"),
            near(
                "time of an exchange against 2 (N - 1) / N of a gradient", 1.0, ours[last] / _ideal(last, LARGE), 0.05
            ),
            near(
                "time of 4 MB against its bytes and the latency of each message", 1.0, small / messages, 0.01, "{:.3f}"
            ),
            at_most(f"growth of the time from {first} to {last} replicas", 1.4, ours[last] / ours[first]),
            at_least(f"speed against one home with {last} replicas", last / 4, server[last] / ours[last]),
        ),
        Plot(
            "Exchange of a gradient of 64 MB",
            "replicas",
            "seconds",
            (
                *(Line(name, list(found.items())) for name, found in times.items()),
                Line("2 (N - 1) / N", [(n, _ideal(n, LARGE)) for n in replicas], dashed=True),
            ),
            log_x=True,
            log_y=True,
        ),
    )


def _ideal(replicas: int, nbytes: int) -> float:
    return 2 * (replicas - 1) / replicas * nbytes / RATE


def _seconds(policy: fm.Policy, replicas: int, steps: int, seed: int, nbytes: int) -> float:
    import flowml as fm

    network, machines = fm.sim.Network(LATENCY_S, RATE, downlink_bytes_per_s=RATE), fm.sim.Constant(COMPUTE_S)
    return added_step_s(policy, replicas, machines, network, steps=steps, seed=seed, nbytes=nbytes) - COMPUTE_S


CLAIM = Claim(
    "Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms, JPDC 2009",
    "theorem 1 and section 4",
    "Around a ring each of N replicas sends 2 (N - 1) / N of a gradient, the least possible, and the time does not "
    "grow with their number.",
    run,
)

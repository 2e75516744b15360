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
COMPUTE_S, NBYTES, RATE = 1e-3, 4_000_000, 1e8


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
        name: {n: _seconds(policy, n, steps, seed) for n in replicas}
        for name, policy in (("ring", fm.policies.ring()), ("parameter server", fm.Policy()))
    }
    last, first = replicas[-1], replicas[0]
    ours, server = times["ring"], times["parameter server"]
    ideal = 2 * (MEMBERS - 1) / MEMBERS
    return Outcome(
        f"Bytes and sums: {MEMBERS} replicas, {STEPS} steps, a network of 32 x 64 x 8, real arithmetic. Time of an "
        f"exchange: {', '.join(map(str, replicas))} simulated replicas, a gradient of 4 MB, links of 100 MB/s and 10 "
        "us, at whose end messages share the rate.",
        (
            near("bytes that a replica sends, in gradients", ideal, sent / STEPS / MEMBERS / whole, 0.001, "{:.3f}"),
            at_most("largest difference of parameters from those of one home", 1e-6, error, "{:.1e}"),
            near("time of an exchange against 2 (N - 1) / N of a gradient", 1.0, ours[last] / _ideal(last), 0.05),
            at_most(f"growth of the time from {first} to {last} replicas", 1.4, ours[last] / ours[first]),
            at_least(f"speed against one home with {last} replicas", last / 4, server[last] / ours[last]),
        ),
        Plot(
            "Exchange of a gradient of 4 MB",
            "replicas",
            "seconds",
            (
                *(Line(name, list(found.items())) for name, found in times.items()),
                Line("2 (N - 1) / N", [(n, _ideal(n)) for n in replicas], dashed=True),
            ),
            log_x=True,
            log_y=True,
        ),
    )


def _ideal(replicas: int) -> float:
    return 2 * (replicas - 1) / replicas * NBYTES / RATE


def _seconds(policy: fm.Policy, replicas: int, steps: int, seed: int) -> float:
    import flowml as fm

    network, machines = fm.sim.Network(1e-5, RATE, downlink_bytes_per_s=RATE), fm.sim.Constant(COMPUTE_S)
    return added_step_s(policy, replicas, machines, network, steps=steps, seed=seed, nbytes=NBYTES) - COMPUTE_S


CLAIM = Claim(
    "Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms, JPDC 2009",
    "theorem 1 and section 4",
    "Around a ring each of N replicas sends 2 (N - 1) / N of a gradient, the least possible, and the time does not "
    "grow with their number.",
    run,
)

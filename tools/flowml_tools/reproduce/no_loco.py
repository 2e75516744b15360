"""NoLoCo: replicas average with one other, drawn at random, instead of all."""

from __future__ import annotations

from typing import Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most
from flowml_tools.reproduce.clocks import added_step_s
from flowml_tools.reproduce.learning import final_loss, loss, problem, train

COMPUTE_S, NBYTES = 1e-3, 4_000_000


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    replicas, steps = ((16, 64, 256, 1024), 10) if full else ((16, 256), 4)
    network = fm.sim.Network(0.05, 1e7, downlink_bytes_per_s=1e7)
    machines = fm.sim.Constant(COMPUTE_S)
    policies = {
        "DiLoCo, tree all-reduce": fm.policies.diloco(1, topology=fm.Tree(fanout=2)),
        "NoLoCo, random pairs": fm.policies.no_loco(1),
    }
    times = {
        name: {
            n: added_step_s(policy, n, machines, network, steps=steps, seed=seed, nbytes=NBYTES) - COMPUTE_S
            for n in replicas
        }
        for name, policy in policies.items()
    }
    tree, pairs = times.values()
    speed = {n: tree[n] / pairs[n] for n in replicas}
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    ends = [
        final_loss(task, train(policy, 8, steps=100, seed=seed, problem=task, optimizer=optax.sgd(0.1), batch=64))
        for policy in (fm.policies.no_loco(10), fm.policies.diloco(10))
    ]
    return Outcome(
        f"{', '.join(map(str, replicas))} simulated replicas on links of 50 ms and 10 MB/s at the receiver, 4 MB of "
        "parameters, a synchronisation after each step. Loss: 8 replicas, 10 rounds of 10 steps, a network of 32 x 64 "
        "x 8, real arithmetic.",
        (
            at_least("time of a synchronisation by a tree of 256, against pairs", 10.0, speed[256]),
            at_most("growth of the time of pairs with the number of replicas", 1.1, pairs[replicas[-1]] / pairs[16]),
            at_most("loss against DiLoCo after as many steps", 1.1, ends[0] / ends[1]),
        ),
        Plot(
            "Time of one synchronisation",
            "replicas",
            "seconds",
            tuple(Line(name, list(found.items())) for name, found in times.items()),
            log_x=True,
        ),
    )


CLAIM = Claim(
    "Kolehmainen et al., NoLoCo, 2025",
    "section 5.3",
    "A synchronisation of pairs is about ten times as fast as an all-reduce for a few hundred replicas, at a similar "
    "loss.",
    run,
)

"""CodedReduce: a tree with a gradient code at each parent.

Parents add up what their children send, so that the home takes as many messages as it has children. Parameters go from
the home to every replica and not down the tree, which is not part of the paper's times; on slow links they take most of
a step.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, holds, near, out_of_reach
from flowml_tools.reproduce.clocks import simulate, step_s

if TYPE_CHECKING:
    import numpy as np

    import flowml as fm
    from flowml.policy.codes import TreeCode

TREES = ((4, 3, 1), (12, 2, 3))
NBYTES = 4_000_000
FAST, SLOW = 1e9, 1e6


def run(full: bool, seed: int) -> Outcome:
    import numpy as np

    import flowml as fm
    from flowml.policy.codes import CyclicRepetition, TreeCode

    rng = np.random.default_rng(seed)
    trees = [TreeCode(*form) for form in TREES]
    tries = 200 if full else 10
    errors = {tree.workers: max(_error(tree, rng) for _ in range(tries)) for tree in trees}
    exact = all(error <= 1e-9 for error in errors.values())
    tree, single = trees[0], CyclicRepetition(84, trees[0].tolerates)
    pauses = (0.0, 10.0, 30.0, 100.0, 300.0) if full else (0.0, 100.0)
    policies = {
        "CodedReduce": fm.policies.coded_reduce(4, 3, 1),
        "gradient coding": fm.policies.coded(20),
        "ring all-reduce": fm.Policy(topology=fm.Ring()),
    }
    times = {
        name: {pause: _seconds(policy, pause, 100 if full else 20, seed) for pause in pauses}
        for name, policy in policies.items()
    }
    ours, coded, ring = times.values()
    slow = {
        free: [_seconds(policies[name], 0.0, 20, seed, SLOW, free) for name in ("gradient coding", "CodedReduce")]
        for free in (True, False)
    }
    return Outcome(
        f"Trees of 84 (4 children, 3 levels, s = 1) and 156 replicas (12, 2, s = 3), {tries} draws of s dead children "
        "of every parent. Messages: three steps of the machines of 84 replicas, whose updates are compared with the "
        "mean over the batch. Time: 84 simulated replicas, a gradient of 4 MB on links of 1 GB/s. A replica that "
        "computes a share w of the batch takes 84 w (1 + Exp(1)) s, and one step in 200 has a pause besides, whatever "
        "w.",
        (
            holds(
                "decoded with s dead children of every parent", "exactly", f"error {max(errors.values()):.1e}", exact
            ),
            at_most("messages that the home takes in a step of 84 replicas", 4, _messages(TREES[0], seed), "{:.0f}"),
            near("load of 84 replicas", 0.0714, float(tree.load), 0.001, "{:.4f}"),
            near("load of one code that survives as many", 0.262, float(single.load), 0.001, "{:.4f}"),
            at_least("speed against gradient coding with pauses of 100 s", 1.0, coded[100.0] / ours[100.0]),
            at_least("speed against the ring with pauses of 100 s", 1.0, ring[100.0] / ours[100.0]),
            at_most("speed against the ring without pauses", 1.0, ring[0.0] / ours[0.0]),
            at_least("speed against gradient coding, links of 1 MB/s at receivers", 1.0, slow[True][0] / slow[True][1]),
            at_least("the same with the home's link of 1 MB/s besides", 1.0, slow[False][0] / slow[False][1]),
            out_of_reach("largest speed against gradient coding", "27.2 on EC2", "needs their cluster"),
            out_of_reach("largest speed against the ring", "7.0 on EC2", "needs their cluster"),
        ),
        Plot(
            "Step time of 84 replicas with pauses",
            "length of a pause, s",
            "seconds a step",
            tuple(Line(name, list(found.items())) for name, found in times.items()),
        ),
    )


def _error(tree: TreeCode, rng: np.random.Generator) -> float:
    """The largest error of an entry of aB = 1, with s dead children of every parent."""
    import numpy as np

    from flowml.policy.codes import matrix

    n, parents = tree.children, tree.workers // tree.children
    dead = {n * p + int(c) for p in range(parents) for c in rng.choice(n, tree.stragglers, replace=False)}
    found = tree.decode([r for r in range(tree.workers) if r not in dead])
    if found is None:
        return float("inf")
    rows = matrix(tree)
    return float(np.max(np.abs(sum((a * rows[r] for r, a in found.items()), np.zeros(rows.shape[1])) - 1)))


def _messages(form: tuple[int, int, int], seed: int) -> float:
    """The most contributions that the home takes in a step; infinite if what it decodes is not the mean of a batch."""
    from flowml.policy import Coded, Policy
    from flowml_runtime import wire
    from flowml_tools.faults.checker import check
    from flowml_tools.faults.history import Turn
    from flowml_tools.faults.layout import make

    children, levels, stragglers = form
    quorum = Coded(stragglers, "tree", children=children, levels=levels)
    tree = quorum.tree
    assert tree is not None
    run = make([Policy(quorum=quorum)], replicas=tree.workers, stages=1, clocks=3, seed=seed, homes_on=0)
    run.go()
    taken = Counter[int]()
    for fact in run.history.facts:
        told = getattr(fact.event, "message", None) if isinstance(fact, Turn) else None
        if isinstance(told, wire.Contribution) and tree.adder_of(told.replica, summed=told.of_site) is None:
            taken[told.clock] += 1
    return float("inf") if check(run.history) else float(max(taken.values()))


def _seconds(policy: fm.Policy, pause: float, steps: int, seed: int, rate: float = FAST, free: bool = False) -> float:
    """Virtual seconds of a step. If parameters are `free`, only the links of receivers have the rate."""
    import flowml as fm

    pauses = fm.sim.Straggler(fm.sim.Constant(1e-6), 1 + 1e6 * pause, share=1.0, probability=0.005)
    network = fm.sim.Network(1e-3, rate, uplink_bytes_per_s=None if free else rate, downlink_bytes_per_s=rate)
    machines = fm.sim.ShiftedExponential(1.0, 1.0)  # of an 84th of the batch
    found = simulate(policy, 84, machines, network, steps=steps, seed=seed, nbytes=NBYTES, each=28, delays=pauses)
    return step_s(found)


CLAIM = Claim(
    "Reisizadeh et al., CodedReduce, IEEE/ACM Transactions on Networking 2021",
    "theorem 1, section VI",
    "A tree of codes decodes exactly with a far smaller load than one code, and is up to 27.2 and 7.0 times as fast as "
    "gradient coding and ring all-reduce.",
    run,
)

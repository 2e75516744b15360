"""Measures how long the other replicas of a Downpour fit have no step after one of them is killed.

No replica waits for another there, and the one that is killed is the home of no layer, so the others should notice
nothing. The peer is the same fit without a kill. Both take the longest time between two steps in the second after the
same step. Without delays a step takes a few milliseconds, so what others do on the machine shows too.
"""

from __future__ import annotations

import time
import warnings
from itertools import pairwise
from typing import Any

from flowml_tools.bench.rows import BenchError, Goal, Peer, Row
from flowml_tools.bench.stragglers import loss, problem
from flowml_tools.bench.timing import interleave

REPLICAS, STEPS = 4, 600
VICTIM = "worker:3"
"""The two layers have their homes on the first two workers."""
WITHIN_S = 1.0


def rows(repeats: int, steps: int = STEPS) -> list[Row]:
    import flowml as fm

    with fm.Cluster.local(workers=REPLICAS) as cluster, warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FlowmlWarning)  # each loss is one
        ours, peer = interleave(
            "recovery, a replica without a home",
            [lambda: _longest(cluster, steps, kill=True), lambda: _longest(cluster, steps, kill=False)],
            repeats,
            warm_up=1,
        )
    name = "kill of a replica of downpour(2, 4): longest time without a step soon after"
    return [Row(name, "s", ours, Peer("no kill", peer), Goal("at most", 2.0))]


def _longest(cluster: Any, steps: int, *, kill: bool) -> float:
    """The longest time between two steps, in the second after a third of them."""
    import optax

    import flowml as fm

    params, examples, _ = problem(0)
    times: list[float] = []

    def note(record: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        if kill and record["step"] == steps // 3:
            cluster.end_worker(VICTIM)

    trainer = fm.Trainer(loss, optax.sgd(0.01), cluster=cluster, replicas=REPLICAS, policies=fm.policies.downpour(2, 4))
    trainer.fit(params, examples, batch_size=64, steps=steps, callbacks=[note], progress=False, on_loss="shrink")
    if kill:
        if VICTIM not in cluster.lost:
            raise BenchError(f"the fit ended before {VICTIM} was lost; give it more steps")
        cluster.bring_back(cluster.lost)
    since = [(b - times[steps // 3], b - a) for a, b in pairwise(times[steps // 3 :])]
    return max(gap for after, gap in since if after - gap < WITHIN_S)

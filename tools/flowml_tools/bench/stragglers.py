"""Measures what a quorum saves: training in which one of four replicas is five times as slow as the others.

Each replica has a worker process. Delays make steps slow: equal ones in the peer's fit, and five times as long ones for
one replica in ours, whose policy is `quorum(0.75)`. The delays are long beside what a step computes, so the cores of
this machine do not decide.

Accuracies are those of the trained parameters on examples that were held back. Both sides have the same seeds, so the
same parameters to begin with and the same order of examples. A step of the quorum uses three of its four work items.
So after as many steps it has learnt from a quarter fewer examples. The goal is about training on as many examples: the
quorum's fit has a third more steps. Seed noise is how much the accuracy of synchronous training differs from seed to
seed, as a standard deviation; more seeds do not change it, but they make the mean difference more certain.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import interleave

SUMMARY = "one of four replicas 5× slower: quorum(0.75) against no slow replica"
REPEATS = 9
REPLICAS, STEPS, FIRST = 4, 128, 8
"""The steps before the FIRST one are not measured: they start threads and fill caches."""
PAUSE_S = 0.02
SLOWER = 5
GOAL = Goal("at least", 0.95)


def rows(repeats: int | None, steps: int = STEPS) -> list[Row]:
    import flowml as fm

    count = repeats or REPEATS
    steady = dict.fromkeys((f"worker:{i}" for i in range(REPLICAS)), PAUSE_S)
    slowed = steady | {f"worker:{REPLICAS - 1}": SLOWER * PAUSE_S}
    accuracies: dict[str, list[float]] = {"steps": [], "examples": [], "synchronous": []}
    quorum = fm.policies.quorum(0.75)
    with fm.Cluster.local(workers=REPLICAS) as cluster:
        ours = Fits(cluster, quorum, slowed, steps, accuracies["steps"])
        longer = Fits(cluster, quorum, slowed, steps * REPLICAS // (REPLICAS - 1), accuracies["examples"])
        peer = Fits(cluster, fm.Policy(), steady, steps, accuracies["synchronous"])
        alike = Fits(cluster, quorum, steady, steps, [])
        waiting = Fits(cluster, fm.Policy(), slowed, max(steps // 4, FIRST + 1), [])
        fits = [ours, peer, alike, waiting, longer]
        rates = interleave("stragglers", [f.rate for f in fits], count, warm_up=1)
    name = f"steps/s, one replica {SLOWER}× slower"
    return [
        Row(f"{name}, quorum(0.75)", "1/s", rates[0], Peer("synchronous, no slow replica", rates[1]), GOAL),
        Row(f"{name}, quorum(0.75)", "1/s", rates[0], Peer("quorum(0.75), no slow replica", rates[2])),
        Row(f"{name}, synchronous", "1/s", rates[3], Peer("synchronous, no slow replica", rates[1])),
        compared("as many examples", accuracies["examples"], accuracies["synchronous"], goal=True),
        compared("as many steps", accuracies["steps"], accuracies["synchronous"]),
    ]


class Fits:
    """Fits of one trainer, each with the next seed. They append the accuracy of their parameters to a list."""

    def __init__(self, cluster: Any, policy: Any, delays: Mapping[str, float], steps: int, found: list[float]) -> None:
        import optax

        import flowml as fm

        self._trainer = fm.Trainer(
            loss, optax.adam(0.01), cluster=cluster, replicas=REPLICAS, policies=policy, delays=delays
        )
        self._steps = steps
        self._accuracies = found
        self._seed = 0

    def rate(self) -> float:
        """Train with the next seed. Returns the steps per second after the first ones."""
        self._seed += 1
        params, train, test = problem(self._seed)
        settings: dict[str, Any] = {"batch_size": 64, "steps": self._steps, "seed": self._seed, "progress": False}
        result = self._trainer.fit(params, train, **settings)
        self._accuracies.append(accuracy(result.params, test))
        ends = [record["seconds"] for record in result.history]
        return (len(ends) - FIRST) / (ends[-1] - ends[FIRST - 1])


def loss(params: Any, batch: Any) -> Any:
    import optax

    logits = logits_of(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def logits_of(params: Any, x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.tanh(x @ params["hidden"]) @ params["output"]


def problem(seed: int) -> tuple[Any, Any, Any]:
    """Parameters, and examples to train and to test, which a network with other parameters has labelled."""
    import numpy as np

    teacher, rng = np.random.default_rng(0), np.random.default_rng(seed)
    hidden, output = teacher.normal(size=(32, 16)) / 6, teacher.normal(size=(16, 8))
    x = teacher.normal(size=(5120, 32)).astype(np.float32)
    label = np.argmax(np.tanh(x @ hidden) @ output, axis=1).astype(np.int32)
    params = {"hidden": rng.normal(size=(32, 64)) / 6, "output": rng.normal(size=(64, 8)) / 8}
    examples = {"x": x, "label": label}
    train, test = ({k: v[part] for k, v in examples.items()} for part in (slice(4096), slice(4096, None)))
    return {k: v.astype(np.float32) for k, v in params.items()}, train, test


def accuracy(params: Any, test: Any) -> float:
    import numpy as np

    return float(np.mean(np.argmax(logits_of(params, test["x"]), axis=1) == test["label"]))


def compared(after: str, ours: Sequence[float], peer: Sequence[float], *, goal: bool = False) -> Row:
    """The mean accuracies of fits with the same seeds, and two standard errors of their mean difference. The goal is
    that ours is not lower by more than seed noise."""
    differences = [a - b for a, b in zip(ours, peer, strict=True)]
    noise, error = (statistics.stdev(x) if len(x) > 1 else 0.0 for x in (peer, differences))
    error *= 2 / len(ours) ** 0.5
    name = f"accuracy after {after}, {len(ours)} seeds, ± {100 * error:.2f}"
    mean = Sample((statistics.mean(ours),)), Sample((statistics.mean(peer),))
    bound = Goal("at least", -noise, of="difference") if goal else None
    return Row(name, "share", mean[0], Peer("synchronous, no slow replica", mean[1]), bound)

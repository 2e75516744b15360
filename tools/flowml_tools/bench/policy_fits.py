"""One fit of `flowml bench policies`: the model, the machines, and what is measured.

A network of two layers learns scikit-learn's digits on `REPLICAS` workers. Each step of a replica pauses for a time
that is drawn from a log-normal distribution, and one worker is four times as slow as the others. A replica of a code
computes several shares of the batch, so it pauses as much longer. On a simulated cluster the pauses are all that takes
time, except for messages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowml_tools.bench.policy_entries import BATCH, PAUSE_S, REPLICAS, Entry
from flowml_tools.bench.rows import BenchError
from flowml_tools.bench.stragglers import accuracy, loss

if TYPE_CHECKING:
    from flowml.sim import ComputeModel
    from flowml_runtime.driver.training.result import TrainingResult

TARGET, WINDOW = 0.7, 10
"""The loss to reach, as the mean of so many steps of training."""
SPREAD, FACTOR = 0.2, 4
SIZES = {"hidden": 64 * 32, "output": 32 * 10}
"""The elements of each layer."""


@dataclass(frozen=True)
class Fitted:
    """What one fit has shown. `losses` has (seconds, mean loss of the last steps) for each step, and `waits` and `lost`
    are shares of the replicas' time and of the examples that they began."""

    losses: Sequence[tuple[float, float]]
    accuracy: float
    nbytes: Mapping[str, float]
    waits: float
    lost: float
    step_s: float
    notes: tuple[str, ...] = ()

    @property
    def reached_s(self) -> float | None:
        return next((seconds for seconds, mean in self.losses if mean <= TARGET), None)


def start(kind: str) -> Any:
    """A cluster with one worker for each replica."""
    import flowml as fm

    starts: dict[str, Callable[[], Any]] = {
        "threads": lambda: fm.Cluster.threads(workers=REPLICAS),
        "processes": lambda: fm.Cluster.local(workers=REPLICAS),
        "simulated": lambda: fm.SimulatedCluster(REPLICAS, fm.sim.Constant(1e-4), fm.sim.Network(1e-4, 1e9)),
    }
    return starts[kind]()


def machines(load: float = 1.0) -> ComputeModel:
    """The seconds of a step of each worker, with a load of so many shares of the batch."""
    import flowml as fm

    return fm.sim.Straggler(fm.sim.LogNormal(load * PAUSE_S, sigma=SPREAD), factor=FACTOR, workers=(REPLICAS - 1,))


class Fits:
    """The fits of one policy on a cluster. The step is compiled once."""

    def __init__(self, cluster: Any, entry: Entry, steps: int) -> None:
        import optax

        import flowml as fm

        self._delays, self._steps = machines(entry.load), steps
        settings: dict[str, Any] = {"policies": entry.policies, "microbatches": entry.microbatches}
        self._trainer = fm.Trainer(
            loss, optax.sgd(entry.rate), cluster=cluster, replicas=REPLICAS, delays=self._delays, **settings
        )

    def fit(self, seed: int) -> Fitted:
        from flowml.errors import FlowmlWarning

        params, train, test = digits(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FlowmlWarning)
            settings: dict[str, Any] = {"batch_size": BATCH, "steps": self._steps, "seed": seed, "progress": False}
            result = self._trainer.fit(params, train, **settings)
        ledger, ends = result.ledger, [record["seconds"] for record in result.history]
        begun = sum(t.used + t.dropped + t.folded for t in ledger.replicas) * ledger.item_size
        return Fitted(
            means(result),
            accuracy(result.params, test),
            {layer: sent(result, layer) / self._steps for layer in SIZES},
            self._waits(result, seed),
            1 - ledger.examples / begun,
            (ends[-1] - ends[WINDOW - 2]) / (len(ends) - WINDOW + 1),
            tuple(dict.fromkeys(str(w.message) for w in caught)),
        )

    def _waits(self, result: TrainingResult, seed: int) -> float:
        """The share of the replicas' time in which they neither worked on a step nor had one dropped. Those that were
        given up are not reported, so the pause that they had is taken."""
        import numpy as np

        drawn = self._delays.draw(seed, np.arange(REPLICAS)[:, None], np.arange(self._steps)).mean(axis=1)
        seconds, stragglers = result.history[-1]["seconds"], result.stragglers()
        dropped = [tally.dropped * result.ledger.item_size * REPLICAS / BATCH for tally in result.ledger.replicas]
        worked = np.array(stragglers.worked_s) + drawn * dropped
        return 1 - float(np.minimum(worked, seconds).sum()) / (REPLICAS * seconds)


def digits(seed: int) -> tuple[Any, Any, Any]:
    """Parameters, and examples to train and to test."""
    import numpy as np

    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
    except ImportError:
        raise BenchError("needs scikit-learn; pip install 'flowml[examples]'") from None
    data: Any = load_digits()
    rng, order = np.random.default_rng(seed), np.random.default_rng(0).permutation(len(data.target))
    x, label = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int32)
    params = {"hidden": rng.normal(size=(64, 32)) / 8, "output": rng.normal(size=(32, 10)) / 6}
    train, test = ({"x": x[part], "label": label[part]} for part in (slice(1440), slice(1440, None)))
    return {k: v.astype(np.float32) for k, v in params.items()}, train, test


def means(result: TrainingResult) -> list[tuple[float, float]]:
    """The mean loss of the last `WINDOW` steps at the end of each, from the first with as many."""
    import numpy as np

    losses = np.array([record["loss"] for record in result.history])
    ends = [record["seconds"] for record in result.history][WINDOW - 1 :]
    return list(zip(ends, np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid").tolist(), strict=True))


def sent(result: TrainingResult, layer: str) -> float:
    """The bytes of a layer that all replicas and homes have sent. A sum of several layers is divided by their sizes."""
    total = 0.0
    for names, traffic in result.traffic.items():
        layers = names.split("+")
        if layer in layers:
            share = SIZES[layer] / sum(SIZES[name] for name in layers)
            total += share * sum(traffic[f"{kind}_wire_bytes"] for kind in ("pushed", "published", "shared"))
    return total

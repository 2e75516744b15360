"""Fits with real arithmetic under the virtual clock, and the small problem that several claims train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowml_tools.bench.stragglers import accuracy, loss, problem

if TYPE_CHECKING:
    import flowml as fm
    from flowml.sim import ComputeModel, NetworkModel
    from flowml_runtime.driver.training.result import TrainingResult

__all__ = ["accuracy", "final_loss", "loss", "problem", "pushed", "train"]


def train(
    policy: fm.Policy,
    workers: int,
    *,
    steps: int,
    seed: int,
    problem: tuple[Callable[..., Any], Any, Any],
    optimizer: Any,
    batch: int,
    compute: ComputeModel | None = None,
    network: NetworkModel | None = None,
    shuffle: bool = True,
    devices: int = 1,
) -> TrainingResult:
    """Train `(loss, parameters, source)` on simulated replicas, with real arithmetic. `devices` of each worker are so
    many replicas."""
    import flowml as fm

    cluster = fm.SimulatedCluster(
        workers // devices,
        compute or fm.sim.Constant(1.0),
        network or fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9),
        seed=seed,
        devices_per_worker=devices,
    )
    function, params, source = problem
    trainer = fm.Trainer(function, optimizer, cluster=cluster, replicas=workers, policies=policy)
    return trainer.fit(params, source, batch_size=batch, steps=steps, seed=seed, shuffle=shuffle, progress=False)


def final_loss(problem: tuple[Callable[..., Any], Any, Any], result: TrainingResult) -> float:
    """The loss of the trained parameters on all examples."""
    function, _, source = problem
    return float(function(result.params, source))


def pushed(result: TrainingResult) -> int:
    """The bytes that replicas have pushed, over all layers."""
    return sum(traffic["pushed_bytes"] for traffic in result.traffic.values())

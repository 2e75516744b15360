"""Fits that several claims share: clocks and bytes without arithmetic, for a model of which only the size matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import flowml as fm
    from flowml.sim import ComputeModel, NetworkModel
    from flowml_runtime.driver.training.result import TrainingResult


def simulate(
    policy: fm.Policy,
    workers: int,
    compute: ComputeModel,
    network: NetworkModel | None = None,
    *,
    steps: int,
    seed: int,
    nbytes: int = 4,
    each: int = 1,
    microbatches: int = 1,
    epochs: int | None = None,
    delays: ComputeModel | None = None,
) -> TrainingResult:
    """Virtual time, bytes and fates of `steps` steps on `workers` replicas, without arithmetic.

    Args:
        nbytes: the size of the one layer.
        each: the examples of a replica's step.
        epochs: divides the steps into so many epochs, for rules about epochs.
        network: by default one that takes no noticeable time.
        delays: seconds that are added to each step of a replica, whatever its load.
    """
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch * jnp.mean(params["layer"])) ** 2)  # its gradient needs the parameters

    batch = workers * each
    source = np.zeros((batch * (steps // epochs if epochs else 1), 1), np.float32)
    cluster = fm.SimulatedCluster(
        workers,
        compute,
        network or fm.sim.Network(latency_s=1e-6, bytes_per_s=1e12),
        seed=seed,
        arithmetic=False,
    )
    trainer = fm.Trainer(
        loss,
        optax.sgd(0.1),
        cluster=cluster,
        replicas=workers,
        policies=policy,
        microbatches=microbatches,
        delays=delays,
    )
    params = {"layer": jnp.zeros(nbytes // 4)}
    return trainer.fit(
        params,
        source,
        batch_size=batch,
        steps=None if epochs else steps,
        epochs=epochs,
        seed=seed,
        progress=False,
    )


def step_s(result: TrainingResult) -> float:
    """Virtual seconds of a step, without the first and the last ones, in which a fit sends parameters besides."""
    ends = [record["seconds"] for record in result.history]
    return (ends[-2] - ends[0]) / (len(ends) - 2)


def added_step_s(
    policy: fm.Policy, workers: int, compute: ComputeModel, network: NetworkModel, *, steps: int, seed: int, nbytes: int
) -> float:
    """Virtual seconds by which a fit of twice as many steps is longer, for one of these steps.

    What a fit sends at its beginning and end takes as long in both, also if it delays some replicas by several steps.
    """
    short, long = (
        simulate(policy, workers, compute, network, steps=count, seed=seed, nbytes=nbytes).virtual_seconds or 0.0
        for count in (steps, 2 * steps)
    )
    return (long - short) / steps

"""Trains on handwritten digits with eight workers: two stages, four replicas, a policy per layer, one slow replica.

The convolutions (stage 1) are pushed every 4 steps, the fully connected layers (stage 2) as factors of their
gradients, and a step is complete with three replicas of four: Quorum(0.75). A declared delay slows replica 3
on purpose. Steps do not wait for its late work, which is counted. Plain `jax.jit` training is the comparison.

    python examples/digits.py [--epochs 10] [--workers 8] [--out out]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _arguments import natural, positive
from _digits_model import BATCH_SIZE, EPOCHS, TEST, TRAIN, evaluate, init_params, load_digits, loss, make_optimizer

import flowml as fm
from flowml.data import epoch_order

REPLICAS, STAGES = 4, 2
SLOW_REPLICA, SLOWDOWN = 3, 5


def train_plain(params: Any, train: Mapping[str, Any], epochs: int, seed: int) -> tuple[Any, float]:
    """The usual training loop: one process, one jitted step. Returns parameters and seconds."""
    optimizer = make_optimizer()

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    began = time.perf_counter()
    for epoch in range(epochs):
        order = epoch_order(TRAIN, seed, epoch)
        for start in range(0, TRAIN - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            params, state = step(params, state, {name: leaf[rows] for name, leaf in train.items()})
    jax.block_until_ready(params)
    return params, time.perf_counter() - began


def policies(quorum: float) -> dict[str, fm.Policy]:
    """Convolutions push every 4 steps, fully connected layers push factors, and all layers have one quorum."""
    return {
        "conv*": fm.Policy(every=4, quorum=fm.Quorum(quorum)),
        "fc*": fm.Policy(payload=fm.Factors(), quorum=fm.Quorum(quorum)),
    }


@dataclass(frozen=True)
class Setting:
    """The settings that every run on the cluster shares."""

    cluster: fm.Cluster
    train: Mapping[str, Any]
    seed: int

    def trainer(self, quorum: float, delay_s: float = 0.0) -> fm.Trainer:
        slow = f"worker:{SLOW_REPLICA * STAGES}"
        return fm.Trainer(
            loss,
            make_optimizer(),
            cluster=self.cluster,
            replicas=REPLICAS,
            placement={"conv*": "worker:0", "fc*": "worker:1"},
            policies=policies(quorum),
            delays={slow: delay_s} if delay_s else None,
        )

    def fit(self, trainer: fm.Trainer, params: Any, **length: int) -> fm.TrainingResult:
        return trainer.fit(
            params, self.train, batch_size=BATCH_SIZE, seed=self.seed, callbacks=[show_progress], **length
        )


def show_progress(record: dict[str, Any]) -> None:
    if (record["step"] + 1) % (TRAIN // BATCH_SIZE) == 0:
        print(
            f"  epoch {record['epoch']:2d}   loss {record['loss']:.4f}   {record['replicas']} replicas in the last "
            f"step   {record['seconds']:6.1f} s",
            flush=True,
        )


def run(cluster: fm.Cluster, epochs: int, seed: int, out: Path) -> bool:
    """Run the demonstration. Returns whether the model is as accurate as expected."""
    train, test = load_digits()
    params = init_params(seed)
    print(f"1. Plain jax.jit in this process: {epochs} epochs of {TRAIN} images, batch {BATCH_SIZE}")
    plain, plain_s = train_plain(params, train, epochs, seed)
    plain_accuracy = evaluate(plain, test)
    print(f"   {plain_s:.1f} s, test accuracy {plain_accuracy:.4f} on {TEST} images\n")

    setting = Setting(cluster, train, seed)
    patient, quorum = setting.trainer(1.0), setting.trainer(0.75)
    batch = {name: jax.ShapeDtypeStruct((BATCH_SIZE, *leaf.shape[1:]), leaf.dtype) for name, leaf in train.items()}
    plan = quorum.plan(params, batch)
    out.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "txt", "html"):
        plan.render(out / f"digits.{suffix}")
    print(f"2. The plan, drawn in {out / 'digits.svg'} (also .txt and .html)")
    print("   " + plan.explain().replace("\n", "\n   ") + "\n")

    print("3. All four replicas waited for, nobody slow: one epoch to measure a step")
    setting.fit(patient, params, steps=4)
    healthy = setting.fit(patient, params, epochs=1)
    step_s = healthy.seconds / len(healthy.history)
    delay_s = (SLOWDOWN - 1) * step_s
    print(f"   {step_s * 1e3:.0f} ms a step\n")

    slow = f"worker:{SLOW_REPLICA * STAGES}"
    print(
        f"4. From here on {slow} (replica {SLOW_REPLICA}) is slowed on purpose: a declared delay of {delay_s:.2f} s in"
    )
    print(f"   each of its steps makes it {SLOWDOWN} times slower. All four waited for, one epoch:")
    waiting = setting.fit(setting.trainer(1.0, delay_s), params, epochs=1)
    print(f"   {waiting.seconds / len(waiting.history) * 1e3:.0f} ms a step\n")

    print(f"5. Quorum(0.75): a step is complete with 3 of 4 replicas. {epochs} epochs, {slow} as slow as before:")
    result = setting.fit(setting.trainer(0.75, delay_s), params, epochs=epochs)
    accuracy = evaluate(result.params, test)
    print()
    print(summary(result, accuracy, plain_accuracy, healthy, waiting))
    good = accuracy >= 0.95 and accuracy >= plain_accuracy - 0.005
    print(f"\nAccuracy at least 0.95, and at most 0.5 points below plain jit: {'yes' if good else 'NO'}")
    return good


def summary(
    result: fm.TrainingResult,
    accuracy: float,
    plain_accuracy: float,
    healthy: fm.TrainingResult,
    waiting: fm.TrainingResult,
) -> str:
    """The tables at the end."""

    def rate(run: fm.TrainingResult) -> float:
        return run.seconds / len(run.history) * 1e3

    def timing(what: str, run: fm.TrainingResult) -> str:
        return f"  {what:<38}{rate(run):7.0f} ms   {rate(run) / rate(healthy):.2f} x"

    lines = [
        "Layers, policies and bytes (pushed by all replicas, against plain gradients every step):",
        result.table(),
        "",
        "Work items:",
        str(result.ledger),
        "",
        "A step, wall time over a whole run (all on the same cores):",
        timing("nobody slow, all waited for", healthy),
        timing(f"one replica {SLOWDOWN}x slow, all waited for", waiting),
        timing(f"one replica {SLOWDOWN}x slow, Quorum(0.75)", result),
        "",
        f"Test accuracy: {accuracy:.4f}   plain jax.jit: {plain_accuracy:.4f}   "
        f"difference {100 * (accuracy - plain_accuracy):+.2f} points",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=positive, default=EPOCHS, help="epochs over the 4,000 training images")
    parser.add_argument("--seed", type=natural, default=0, help="of the initial parameters and the order of the images")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures of the plan")
    options = parser.parse_args()
    np.random.seed(options.seed)
    began = time.perf_counter()
    print(f"Starting {REPLICAS * STAGES} workers on this machine ...", flush=True)
    with fm.Cluster.local(workers=REPLICAS * STAGES) as cluster:
        good = run(cluster, options.epochs, options.seed, options.out)
    print(f"All done in {time.perf_counter() - began:.0f} s.")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Trains on handwritten digits while its own workers are killed, and ends with the usual accuracy.

Every few steps a callback kills one of the worker processes with SIGKILL. With `on_loss="replace"` the worker is
started again, and the fit goes on from the newest snapshot in the memory of the driver. The steps after it are done
again, from the same work items, so the parameters at the end are the same bits as without a kill. With
`on_loss="shrink"` the fit goes on without the replica, as long as two are left.

    python examples/survive.py [--epochs 10] [--kills 6] [--on-loss replace] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _arguments import natural, positive
from _digits_model import BATCH_SIZE, EPOCHS, TRAIN, evaluate, init_params, load_digits, loss, make_optimizer

import flowml as fm

WORKERS = 4


def killer(cluster: fm.Cluster, steps: set[int], seed: int) -> Callable[[dict[str, Any]], None]:
    """A callback that kills a random worker at each of these steps."""
    draws = random.Random(seed)

    def kill(record: dict[str, Any]) -> None:
        if record["step"] in steps and len(cluster.pids) > 2:
            worker = draws.choice(sorted(cluster.pids))
            print(f"step {record['step']:4d}: kill -9 {worker}")
            os.kill(cluster.pids[worker], signal.SIGKILL)

    return kill


def train(on_loss: Any, epochs: int, kills: int, seed: int) -> fm.TrainingResult:
    """Train, with so many kills spread over the fit."""
    digits, _ = load_digits()
    total = epochs * (TRAIN // BATCH_SIZE)
    steps = {(number + 1) * total // (kills + 1) for number in range(kills)}
    with fm.Cluster.local(workers=WORKERS) as cluster:
        trainer = fm.Trainer(loss, make_optimizer(), cluster=cluster, replicas=WORKERS)
        callbacks = [killer(cluster, steps, seed)]
        options: dict[str, Any] = {"batch_size": BATCH_SIZE, "epochs": epochs, "seed": seed, "on_loss": on_loss}
        return trainer.fit(init_params(seed), digits, callbacks=callbacks, progress=False, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    parser.add_argument("--kills", type=natural, default=6, help="how many workers to kill")
    parser.add_argument("--on-loss", choices=("replace", "shrink"), default="replace")
    parser.add_argument("--seed", type=natural, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore", fm.FlowmlWarning)  # each loss is also in result.losses
    _, test = load_digits()
    survived = train(args.on_loss, args.epochs, args.kills, args.seed)
    for lost in survived.losses:
        names = " and ".join(lost.workers)
        print(f"{names}, lost at step {lost.step}: on from step {lost.resumed_at} after {lost.seconds:.2f} s")
    ledger = survived.ledger
    print(f"losses: {len(survived.losses)}; accuracy: {evaluate(survived.params, test):.1%}")
    print(f"items: {ledger.used} used, {ledger.dropped} dropped, {ledger.unseen} unseen, {ledger.outstanding} open")
    if args.on_loss == "replace":
        whole = train("raise", args.epochs, 0, args.seed)
        pairs = zip(jax.tree.leaves(survived.params), jax.tree.leaves(whole.params), strict=True)
        same = all(np.array_equal(mine, other) for mine, other in pairs)
        print(f"accuracy without a kill: {evaluate(whole.params, test):.1%}; the same bits: {same}")


if __name__ == "__main__":
    main()

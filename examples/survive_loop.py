"""Trains on digits in a loop of its own whose state stays on the workers, kills workers, and goes on by itself.

The state is saved every few steps with `fm.save`. The first call that misses a lost worker raises
`WorkerLostError`. The next call starts the worker again, because the placement names it, and takes the saved state in
place of the lost one.
The steps since the save are lost: the loop goes on until its state has counted enough of them.

    python examples/survive_loop.py [--steps 200] [--kills 3] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import warnings
from typing import Any

import jax
import numpy as np
import optax
from _arguments import natural, positive
from _digits_model import BATCH_SIZE, TRAIN, evaluate, init_params, load_digits, loss, make_optimizer

import flowml as fm

EVERY = 10
"""Steps between two saves."""
PLACE = {"conv*": "worker:0", "fc*": "worker:1"}
OPTIMIZER = make_optimizer()


def train_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """One step: the new state, which stays on the workers, and what comes here."""
    params, moments, count = state
    value, gradients = jax.value_and_grad(loss)(params, batch)
    updates, moments = OPTIMIZER.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments, count + 1), {"loss": value, "step": count + 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--kills", type=natural, default=3, help="how many workers to kill")
    parser.add_argument("--seed", type=natural, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore", fm.FlowmlWarning)  # the loop prints what happens
    digits, test = load_digits()
    draws, rng = random.Random(args.seed), np.random.default_rng(args.seed)
    kills = [(number + 1) * args.steps // (args.kills + 1) for number in range(args.kills)]
    params = init_params(args.seed)
    state: Any = (params, OPTIMIZER.init(params), np.int32(0))
    done = 0
    with fm.Cluster.local(workers=2) as cluster, tempfile.TemporaryDirectory() as path:
        step = fm.dataflow(train_step, cluster=cluster, placement=PLACE, keep=0, donate_argnums=0)
        while done < args.steps:
            rows = rng.choice(TRAIN, BATCH_SIZE, replace=False)
            if kills and done >= kills[0]:
                worker = draws.choice(sorted(cluster.pids))
                print(f"step {kills.pop(0)}: kill -9 {worker}")
                os.kill(cluster.pids[worker], signal.SIGKILL)
            try:
                state, metrics = step(state, {name: array[rows] for name, array in digits.items()})
            except fm.WorkerLostError as error:
                print(f"  {error}")
                continue
            before, done = done, int(metrics["step"])
            if done <= before:
                print(f"  on from step {done - 1}")
            if done % EVERY == 0:
                fm.save(state, path)
        final = jax.tree.map(lambda leaf: leaf.fetch(), state[0])
    print(f"{done} steps; accuracy: {evaluate(final, test):.1%}")


if __name__ == "__main__":
    main()

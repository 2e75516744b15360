"""Runs and then trains a language model in a pipeline of two workers.

The transformer of `_language_model.py` is cut where the two stages cost the same. Its predictions are compared
with jax.jit. Then both workers train it with the schedule one forward, one backward (1F1B), on the source text
of Python's standard library.

    python examples/pipeline.py [--steps 150]
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import positive
from _language_model import init_params, load_text, logits, loss

import flowml as fm

BATCH_SIZE, MICROBATCHES, HELD_OUT = 32, 4, 256


def predict(cluster: fm.Cluster, params: Any, text: Any) -> None:
    """Run the forward pass on two workers and with jax.jit."""
    f = fm.dataflow(logits, cluster=cluster, placement=fm.Pipeline(stages=2))
    difference = jnp.abs(f(params, text) - jax.jit(logits)(params, text)).max()
    print(f"1. Predictions of {len(text)} texts: largest difference to jax.jit {difference:.1e}\n")


def show_progress(record: dict[str, Any]) -> None:
    if (record["step"] + 1) % 25 == 0:
        bits = record["loss"] / math.log(2)
        print(f"   step {record['step'] + 1:4d}   {bits:.2f} bits a byte   {record['seconds']:5.1f} s", flush=True)


def train(cluster: fm.Cluster, params: Any, windows: Any, steps: int) -> fm.TrainingResult:
    trainer = fm.Trainer(
        loss,
        optax.adam(3e-3),
        cluster=cluster,
        replicas=1,
        placement=fm.Pipeline(stages=2),
        microbatches=MICROBATCHES,
        schedule="1f1b",
    )
    print("2. The plan of a training step\n")
    print(trainer.plan(params, {"text": windows[:BATCH_SIZE]}).explain())
    print(f"3. Training on {windows.size:,} bytes, {BATCH_SIZE} texts a step in {MICROBATCHES} microbatches")
    source = {"text": windows}
    return trainer.fit(params, source, batch_size=BATCH_SIZE, steps=steps, callbacks=[show_progress], progress=False)


def main(steps: int) -> int:
    windows = load_text()
    order = np.random.default_rng(0).permutation(len(windows))
    held_out, seen = windows[order[:HELD_OUT]], windows[order[HELD_OUT:]]
    params = init_params()
    with fm.Cluster.local(workers=2) as cluster:
        predict(cluster, params, held_out[:8, :-1])
        began = time.perf_counter()
        result = train(cluster, params, seen, steps)
        seconds = time.perf_counter() - began
    before, after = (float(jax.jit(loss)(p, {"text": held_out})) / math.log(2) for p in (params, result.params))
    print(f"\nheld-out text: {before:.2f} bits a byte before, {after:.2f} after {steps} steps in {seconds:.0f} s")
    return 0 if after < before else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=positive, default=150, help="training steps (default: 150)")
    raise SystemExit(main(parser.parse_args().steps))

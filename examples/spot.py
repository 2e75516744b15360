"""Trains in virtual time on spot machines, which a cloud takes back and returns.

A record says how many machines there were in each interval. In each interval the model trains on those that are up, as
many replicas as machines, and goes on from the parameters and optimizer state of the interval before. A change of
machines costs the time of a restart. The comparison is a fixed number of machines that are never taken away.

All this is simulated. Then three processes of this machine train with the same times of steps. One is killed in the
middle of a fit, and the other two go on. What a step and the loss of a worker take there is printed beside the model.

    python examples/spot.py [--trace RECORD.json] [--interval 10]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import positive, seconds

import flowml as fm

RECORD = {"metadata": {"gap_seconds": 300}, "data": [5, 16, 16, 8, 8, 0, 16, 16, 11, 11, 16, 16]}
"""Twelve intervals like those that Wu et al. recorded in a region of AWS (Can't Be Late, NSDI 2024)."""

COMPUTE = fm.sim.LogNormal(mean_s=0.2, sigma=0.2)
NETWORK = fm.sim.Network(latency_s=5e-4, bytes_per_s=1.25e9, downlink_bytes_per_s=1.25e9)
RESTART_S = 2.0
TOLERANCE = 0.15
"""By how much a real step may take longer than a simulated one."""
EXAMPLES_EACH = 8
"""Examples of one step of one replica."""


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(batch["x"] @ params["hidden"]) @ params["output"] - batch["y"]) ** 2)


def problem() -> tuple[Any, Mapping[str, np.ndarray]]:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"hidden": jax.random.normal(keys[0], (32, 128)) / 6, "output": jax.random.normal(keys[1], (128, 4)) / 11}
    x = np.asarray(jax.random.normal(keys[2], (4096, 32)))
    return params, {"x": x, "y": np.tanh(x @ np.asarray(jax.random.normal(keys[3], (32, 4))) / 6)}


class Run:
    """Training that goes on where it stopped, on another number of machines."""

    def __init__(self) -> None:
        self.params, self.source = problem()
        self.opt_state: Any = None
        self.examples = 0
        self.trainers: dict[int, fm.Trainer] = {}

    def train(self, machines: int, seconds: float) -> None:
        """Train as many steps as fit into the time, judging by the first steps with this many machines."""
        trainer = self.trainers.setdefault(machines, self._trainer(machines))
        options = {"batch_size": EXAMPLES_EACH * machines, "opt_state": self.opt_state, "progress": False}
        probe = trainer.fit(self.params, self.source, steps=4, **options)
        steps = max(1, int(seconds / (probe.seconds / 4)))
        result = trainer.fit(self.params, self.source, steps=steps, seed=self.examples, **options)
        self.params, self.opt_state = result.params, result.opt_state
        self.examples += EXAMPLES_EACH * machines * steps

    @staticmethod
    def _trainer(machines: int) -> fm.Trainer:
        return Run.trainer_on(fm.SimulatedCluster(machines, COMPUTE, NETWORK), machines)

    @staticmethod
    def trainer_on(cluster: Any, machines: int) -> fm.Trainer:
        return fm.Trainer(loss, optax.adam(1e-2), cluster=cluster, replicas=machines, policies=fm.policies.all_reduce())


def on_spot_machines(churn: fm.sim.Churn, machines: int, intervals: int, interval_s: float) -> Run:
    run, before = Run(), 0
    for interval in range(intervals):
        up = len(churn.up(interval * interval_s, machines))
        lost_s = RESTART_S if up != before and run.examples else 0.0
        if up and interval_s > lost_s:
            run.train(up, interval_s - lost_s)
        print(f"  {interval * interval_s:6.0f} s {up:3} machines {run.examples:8} examples, loss {value(run):.4f}")
        before = up
    return run


def value(run: Run) -> float:
    return float(loss(run.params, run.source))


def step_s(cluster: Any, machines: int) -> float:
    """The time of a step. Real and simulated workers pause as the model says."""
    trainer = fm.Trainer(
        loss, optax.adam(1e-2), cluster=cluster, replicas=machines, policies=fm.policies.all_reduce(), delays=COMPUTE
    )
    params, source = problem()
    result = trainer.fit(params, source, batch_size=EXAMPLES_EACH * machines, steps=12, progress=False)
    ends = [record["seconds"] for record in result.history]
    return (ends[-1] - ends[1]) / (len(ends) - 2)


def lose_a_machine(cluster: fm.Cluster, machines: int) -> float:
    """Kill the last worker in the middle of a fit. Returns after how many seconds its end is noticed."""
    killed: list[float] = []

    def kill(record: Mapping[str, Any]) -> None:
        if record["step"] == 3:
            os.kill(cluster.pids[f"worker:{machines - 1}"], signal.SIGKILL)
            killed.append(time.monotonic())

    trainer = Run.trainer_on(cluster, machines)
    params, source = problem()
    try:
        trainer.fit(params, source, batch_size=EXAMPLES_EACH * machines, steps=1000, callbacks=[kill], progress=False)
    except fm.WorkerLostError as error:
        print(f"  {error}")
    return time.monotonic() - killed[0]


def for_real(machines: int = 3) -> None:
    print(f"{machines} processes of this machine, of which one is killed")
    with fm.Cluster.local(workers=machines) as cluster:
        for up in (machines, machines - 1):
            model = step_s(fm.SimulatedCluster(up, fm.sim.Constant(0.0), NETWORK), up)
            real = step_s(cluster, up)
            within = "within" if abs(real / model - 1) <= TOLERANCE else "beyond"
            print(f"  {up} machines: {model:.3f} s a step simulated, {real:.3f} s real: {within} {TOLERANCE:.0%}")
            if up == machines:
                lost_s = lose_a_machine(cluster, machines)
                began = time.monotonic()
        restart_s = lost_s + time.monotonic() - began - 12 * real
    print(f"  the loss and the restart took {restart_s:.1f} s; the simulation takes {RESTART_S:g} s for both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", metavar="RECORD.json", help="a record of spot machines (default: one of an hour)")
    parser.add_argument("--counts", choices=("available", "preempted"), default="available", help="what it counts")
    parser.add_argument("--interval", type=seconds, default=10.0, help="virtual seconds of an interval (default: 10)")
    parser.add_argument("--intervals", type=positive, default=12, help="how many intervals to train (default: 12)")
    arguments = parser.parse_args()
    given = arguments.trace or RECORD
    try:
        churn = fm.sim.Churn.from_spot(given, counts=arguments.counts, gap_s=arguments.interval)  # checks the record
    except fm.FlowmlError as error:
        parser.error(str(error))
    machines = max((json.loads(Path(given).read_text()) if arguments.trace else RECORD)["data"])
    print(f"up to {machines} spot machines")
    spot = on_spot_machines(churn, machines, arguments.intervals, arguments.interval)
    fixed = Run()
    fixed.train(machines // 2, arguments.intervals * arguments.interval)
    print(f"{machines // 2} machines all the time: {fixed.examples} examples, loss {value(fixed):.4f}")
    print(f"examples on spot machines: {spot.examples / fixed.examples:.2f} times as many")
    for_real()


if __name__ == "__main__":
    main()

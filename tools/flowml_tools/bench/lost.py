"""Measures what the loss of a coordinator and of a driver costs a fit on workers that outlive both.

The coordinator is on the path of no step. So its kill should cost no time: the longest time between two steps soon
after it, beside that of a fit without a kill. Its successor is there when another program can join.

A driver that is killed is started again with the same directory, as a supervisor does: a Python process that imports
JAX, connects and compiles. Ours goes on from what the workers keep, and the peer from the newest checkpoint on the
disk, on workers that keep nothing. The time is from the kill to the first step that the driver before had not seen. The
peer writes a checkpoint every few steps; if it wrote one every ten minutes, it would do up to ten minutes again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from typing import Any

from flowml_tools.bench.rows import BenchError, Goal, Peer, Row, Sample
from flowml_tools.bench.stragglers import loss, problem
from flowml_tools.bench.timing import interleave

REPLICAS = 4
PAUSE_S = 0.02
EVERY_STEPS = 10
"""Between two checkpoints of the peer."""
SOON = 25
"""How many steps after the kill of the coordinator are looked at."""
TAKEOVER_S = 10.0
ORPHAN_S = 60.0
STEPS = 100
_SCRIPT = "import sys; from flowml_tools.bench.lost import drive; drive(*sys.argv[1:])"
Callback = Callable[[dict[str, Any]], None]


def rows(repeats: int, steps: int = STEPS) -> list[Row]:
    return [*_coordinator(repeats, steps), *_driver(repeats, steps)]


def train(cluster: Any, steps: int, callback: Callback, **options: Any) -> None:
    """The fit of each measurement."""
    import optax

    import flowml as fm

    params, examples, _ = problem(0)
    delays = {f"worker:{i}": PAUSE_S for i in range(REPLICAS)}
    trainer = fm.Trainer(loss, optax.adam(0.01), cluster=cluster, replicas=REPLICAS, delays=delays)
    trainer.fit(params, examples, batch_size=64, steps=steps, callbacks=[callback], progress=False, **options)


def _coordinator(repeats: int, steps: int) -> list[Row]:
    import flowml as fm
    from flowml_runtime.launch.launched import LaunchedCluster

    takeovers: list[float] = []
    with (
        closing(LaunchedCluster(workers=REPLICAS, state="")) as launched,
        fm.Cluster.connect(launched.address, launched.token) as cluster,
    ):

        def end() -> None:
            launched.end_coordinator()
            takeovers.append(_until_joined(launched.address, launched.token))

        def longest_step(kill: bool) -> float:
            times: list[float] = []
            killer = threading.Thread(target=end)

            def note(record: dict[str, Any]) -> None:
                times.append(time.perf_counter())
                if kill and record["step"] == steps // 2:
                    killer.start()

            train(cluster, steps, note, on_loss="replace")
            if kill:
                killer.join()
            return max(b - a for a, b in pairwise(times[steps // 2 : steps // 2 + SOON]))

        ours, peer = interleave(
            "recovery, coordinator", [lambda: longest_step(True), lambda: longest_step(False)], repeats, warm_up=1
        )
    name = "kill of the coordinator"
    return [
        Row(f"{name}: longest step soon after", "s", ours, Peer("no kill", peer)),
        Row(
            f"{name}: until others can join",
            "s",
            Sample(tuple(takeovers)),
            Peer("no peer"),
            Goal("at most", TAKEOVER_S, "value"),
        ),
    ]


def _until_joined(address: str, token: str) -> float:
    """The seconds until a program can join a cluster."""
    import flowml as fm

    began = time.perf_counter()
    while True:
        try:
            with fm.Cluster.connect(address, token):
                return time.perf_counter() - began
        except fm.ClusterError:
            if time.perf_counter() - began > TAKEOVER_S:
                raise


def _driver(repeats: int, steps: int) -> list[Row]:
    from flowml_runtime.launch.launched import LaunchedCluster

    with (
        closing(LaunchedCluster(workers=REPLICAS, orphan_s=ORPHAN_S)) as keeping,
        closing(LaunchedCluster(workers=REPLICAS, orphan_s=0.0)) as forgetting,
    ):
        probes = [
            lambda: _driven_again(keeping, steps, 10 * steps),
            lambda: _driven_again(forgetting, steps, EVERY_STEPS),
        ]
        ours, peer = interleave("recovery, driver", probes, repeats, warm_up=0)
    return [Row("kill of the driver: until the next new step", "s", ours, Peer("restart from checkpoint", peer))]


def _driven_again(launched: Any, steps: int, every_steps: int) -> float:
    """The seconds from the kill of a driver in the middle of its fit to the first new step of the next one."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [launched.address, folder, str(steps), str(every_steps)]
        with _Driver(arguments, launched.token) as first:
            last = next(step for step in first.steps() if step >= steps // 2)
            began = time.perf_counter()
            first.process.send_signal(signal.SIGKILL)
            last = max([last, *first.steps()])
        with _Driver(arguments, launched.token) as second:
            if any(step > last for step in second.steps()):
                return time.perf_counter() - began
    raise BenchError("the driver that was started again has made no new step")


class _Driver:
    """A process that trains, and says which steps it has seen."""

    def __init__(self, arguments: list[str], token: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(f"{token}\n")
        self.process.stdin.flush()

    def steps(self) -> Any:
        """The steps, as it says them, until it ends."""
        assert self.process.stdout is not None
        return (int(line) for line in self.process.stdout)

    def __enter__(self) -> _Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def drive(address: str, folder: str, steps: str, every_steps: str) -> None:
    """What a driver's process does. The token comes on stdin: arguments can be read by others."""
    import flowml as fm

    token = sys.stdin.readline().strip()
    checkpoint = fm.Checkpoint(folder, every_steps=int(every_steps))
    with fm.Cluster.connect(address, token) as cluster:
        train(
            cluster, int(steps), lambda record: print(record["step"], flush=True), checkpoint=checkpoint, resume="auto"
        )

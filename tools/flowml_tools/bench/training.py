"""Measures a data parallel training step of a transformer on two one-core workers against JAX on the same cores.

All three train `transformer` with Adam on global batches of 16 texts of 128 bytes:

* ours: `fm.Trainer(replicas=2)` on `Cluster.local(workers=2)`, 8 texts a worker; timed by the records of `fit`;
* JAX + gloo: two processes on the same cores, one mesh, the batch sharded, gradients summed by XLA over gloo;
* one process: `jax.jit` with XLA's threads on all cores and the whole batch.

Two more rows compare two of our topologies, all-reduce and parameter server: for this model, which spends its time on
products, and for eight small layers, which spend it on messages.

Every measurement starts from the same parameters, and its first step is not timed. So the last losses of all three must
agree in every round; otherwise they did not compute the same thing. The processes that are not measured wait for their
next order. The last row is a throughput goal: with equal global batches, 1.1 times the rate is 1/1.1 of the time.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from flowml_tools.bench.peers import Process, peer
from flowml_tools.bench.rows import BenchError, Goal, Peer, Row
from flowml_tools.bench.timing import Probe, interleave, tell

if TYPE_CHECKING:
    import flowml as fm
    from flowml_runtime.driver.training.result import TrainingResult

SUMMARY = "a data parallel training step on two workers; against JAX + gloo, one jit process on all cores"
REPEATS = 7
STEPS = 3
"""The number of timed steps in a measurement. A step takes about a second."""

SMALL_STEPS = 50
"""The same for the model whose steps take milliseconds."""

LOSS_TOLERANCE = 2e-3
"""Relative. A sum over two halves of a batch rounds differently from one over all. Adam divides by small numbers."""


class Losses:
    """The loss of each side after the same steps. Raises BenchError as soon as two differ."""

    def __init__(self) -> None:
        self._first: tuple[str, float] | None = None

    def check(self, who: str, loss: float) -> None:
        name, expected = self._first = self._first or (who, loss)
        if not math.isclose(loss, expected, rel_tol=LOSS_TOLERANCE):
            raise BenchError(
                f"after {STEPS + 1} steps from the same parameters {name} has loss {expected:.6f}, but {who} {loss:.6f}"
            )


def rows(repeats: int | None) -> list[Row]:
    import flowml as fm
    from flowml_runtime.environment.machine import cores, share_cores
    from flowml_tools.bench import transformer

    tell("training: starting two workers and the peers")
    shares, losses = share_cores(cores(), 2), Losses()
    with ExitStack() as stack:
        address = f"127.0.0.1:{_free_port()}"
        pair = [stack.enter_context(peer("train", str(i), "2", address, cores=own)) for i, own in enumerate(shares)]
        single = stack.enter_context(peer("train", "0", "1", "", cores=cores()))
        for process in (*pair, single):
            process.read()
        theirs = [_together(pair, "JAX + gloo", losses), _together([single], "jax.jit", losses)]
        cluster = stack.enter_context(fm.Cluster.local(workers=2))
        ours = [_transformer(cluster, topology, losses) for topology in (fm.ParameterServer(), fm.AllReduce())]
        samples = interleave("training", [ours[0], *theirs, ours[1]], repeats or REPEATS, warm_up=1)
        small = [_layers(cluster, topology, Losses()) for topology in (fm.AllReduce(), fm.ParameterServer())]
        reduced, served = interleave("training: small layers", small, repeats or REPEATS, warm_up=1)
    name, server = "step of 16 × 128 bytes, Adam", "parameter server"
    return [
        Row(name, "s", samples[0], Peer("JAX + gloo, two pinned processes", samples[1]), Goal("at most", 0.85)),
        Row(name, "s", samples[0], Peer("jax.jit, one process on all cores", samples[2]), Goal("at most", 1 / 1.1)),
        Row("the same by all-reduce", "s", samples[3], Peer(server, samples[0])),
        Row(f"{transformer.LAYERS} layers of 64 KiB by all-reduce", "s", reduced, Peer(server, served)),
    ]


def _transformer(cluster: fm.Cluster, topology: Any, losses: Losses) -> Probe:
    import flowml as fm
    from flowml_tools.bench import transformer

    policies = {"*": fm.Policy(topology=topology)}
    trainer = fm.Trainer(transformer.loss, transformer.optimizer(), cluster=cluster, replicas=2, policies=policies)
    return timed_fit("flowml", trainer, losses.check)


def timed_fit(who: str, trainer: fm.Trainer, check: Callable[[str, float], None]) -> Probe:
    """A probe for the seconds of a step, from the end of the first step of a fit to that of its last."""
    from flowml_tools.bench import transformer

    params, texts = transformer.init_params(), transformer.texts()

    def probe() -> float:
        result = trainer.fit(
            params, texts, batch_size=transformer.BATCH, steps=STEPS + 1, shuffle=False, progress=False
        )
        check(who, result.history[-1]["loss"])
        return _seconds_a_step(result)

    return probe


def _layers(cluster: fm.Cluster, topology: Any, losses: Losses) -> Probe:
    import flowml as fm
    from flowml_tools.bench import transformer

    policy = fm.Policy(topology=topology)
    trainer = fm.Trainer(
        transformer.layers_loss, transformer.layers_optimizer(), cluster=cluster, replicas=2, policies={"*": policy}
    )
    params, rows = transformer.init_layers(), transformer.rows()

    def probe() -> float:
        result = trainer.fit(
            params, rows, batch_size=transformer.BATCH, steps=SMALL_STEPS + 1, shuffle=False, progress=False
        )
        losses.check("flowml", result.history[-1]["loss"])
        return _seconds_a_step(result)

    return probe


def _seconds_a_step(result: TrainingResult) -> float:
    first, last = result.history[0], result.history[-1]
    return (last["seconds"] - first["seconds"]) / (len(result.history) - 1)


def _together(processes: list[Process], who: str, losses: Losses) -> Probe:
    """A probe for the seconds of a step that these processes make together."""

    def probe() -> float:
        for process in processes:
            process.give(str(STEPS))
        answers = [tuple(map(float, process.read().split())) for process in processes]
        for _, loss in answers:
            losses.check(who, loss)
        return max(seconds for seconds, _ in answers)

    return probe


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]

"""Measures a pipeline of two stages against the bound of its schedule.

With M microbatches and P stages of equal length, every stage is idle for P - 1 of M + P - 1 turns. So a pipeline
without other losses is busy for M / (M + P - 1) of a step. The bound is computed from measured stages:

    bound = (longest stage) x (M + P - 1) / M + (longest update)

A stage's time is that of all its tasks in one step (forward, backward and sums of 8 microbatches, in the order of the
1F1B schedule). It is measured for one stage at a time, in a separate process pinned to a core, which already has the
arrays of the other stage. The update is that of the stores on the stage's device, after all gradients are there. The
pipeline is a fit of `fm.Trainer(placement=fm.Pipeline(stages=2), microbatches=8, schedule="1f1b")` on two one-core
workers, with the same plan. It may take 1/0.95 of the bound. If stages differ in length, all count like the longest,
because that one limits the schedule. How the model is cut is not measured here.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from flowml_tools.bench.peers import Process, peer
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import interleave, tell
from flowml_tools.bench.training import Losses, timed_fit

SUMMARY = "a step of a 2-stage pipeline with 8 microbatches; against its schedule's bound from measured stage times"
REPEATS = 7
STAGES, MICROBATCHES = 2, 8


def rows(repeats: int | None) -> list[Row]:
    import flowml as fm
    from flowml_runtime.environment.machine import cores, share_cores
    from flowml_tools.bench import transformer

    tell("pipeline: starting two workers and the stages alone")
    with ExitStack() as stack:
        cluster = stack.enter_context(fm.Cluster.local(workers=STAGES))
        trainer = fm.Trainer(
            transformer.loss,
            transformer.optimizer(),
            cluster=cluster,
            placement=fm.Pipeline(stages=STAGES),
            microbatches=MICROBATCHES,
            schedule="1f1b",
        )
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "plan"
        trainer.plan(transformer.init_params(), transformer.batch(0)).save(path)
        shares = share_cores(cores(), STAGES)
        stages = [stack.enter_context(peer("stage", str(path), str(i), cores=own)) for i, own in enumerate(shares)]
        for process in stages:
            process.read()
        probes = [timed_fit("flowml", trainer, Losses().check), lambda: _bound(stages)]
        ours, bounds = interleave("pipeline", probes, repeats or REPEATS, warm_up=1)
    return [row(ours, bounds)]


def row(ours: Sample, bounds: Sample) -> Row:
    name = f"step, {STAGES} stages, {MICROBATCHES} microbatches, 1F1B"
    return Row(name, "s", ours, Peer("bound from measured stages", bounds), Goal("at most", 1 / 0.95))


def _bound(stages: list[Process]) -> float:
    return bound([stage_seconds(process.ask("step")) for process in stages])


def stage_seconds(answer: str) -> tuple[float, float]:
    """(tasks of a step, update) in seconds, from the answer of a `stage` peer."""
    work, update = map(float, answer.split())
    return work, update


def bound(stages: list[tuple[float, float]]) -> float:
    """The least seconds of a step with stages of these (tasks, update) seconds."""
    turns = (MICROBATCHES + len(stages) - 1) / MICROBATCHES
    return max(work for work, _ in stages) * turns + max(update for _, update in stages)

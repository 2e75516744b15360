"""Whole fits whose workers leave, are lost and come back at random, under virtual time.

A seed determines the policy, the machines, when which worker goes and comes, with and without notice, a bad network,
and what the fit does about it, with copies on other workers or without. The driver, the membership and the machines
are those of real fits. Invariants of the ledger are checked by the fit itself. At its end each step must have a record,
callbacks must have seen each once, no item may be outstanding, and where nothing is dropped the used items must be
those of the replicas in the records.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from flowml import policies as named
from flowml import sim
from flowml.errors import FlowmlWarning, UnsupportedError, WorkerLostError
from flowml.policy import Policy
from flowml.sim.churn import Counts
from flowml_runtime.sim.cluster import SimulatedCluster
from flowml_runtime.trainer import Trainer

STEP_S = 0.1
_SOURCE = {"x": np.zeros((240, 4), np.float32)}
_PARAMS = {"a": {"w": jnp.zeros((4, 3))}, "b": {"w": jnp.zeros((3, 2))}}


@dataclass(frozen=True)
class MembersCase:
    """One fit. `repr` of it is what a report shows."""

    seed: int
    policy: str
    replicas: int
    steps: int
    churn: sim.Churn
    faults: tuple[sim.Fault, ...]
    how: Mapping[str, Any]

    @staticmethod
    def of(seed: int) -> MembersCase:
        """The case of a seed."""
        rng = random.Random(seed)
        replicas, steps = rng.randint(2, 6), rng.randint(20, 70)
        ends = steps * STEP_S
        changes: list[tuple[float, int, bool]] = []
        for worker in rng.sample(range(replicas), rng.randint(1, max(1, replicas - 1))):
            at, up = rng.random() * ends / 2, True
            for _ in range(rng.randint(1, 4)):
                up = not up
                changes.append((at, worker, up))
                at += 0.05 + rng.random() * ends / 3
        about = {"notice_s": rng.choice([0.0, 0.2, 1.0]), "start_s": rng.choice([0.0, 0.3])}
        churn = sim.Churn(changes, **about, pause_s=rng.choice([0.0, 0.05]))
        how = rng.choice(
            [{"replicas": "elastic"}, {"replicas": "elastic"}, {"on_loss": "shrink"}, {"on_loss": "replace"}]
        )
        policy = rng.choice(sorted(_policies(replicas)))
        faults = tuple(_faults(rng, replicas, ends))
        if "replicas" not in how and rng.random() < 0.25:
            how = {**how, "replicate": rng.randint(1, replicas - 1)}
        return MembersCase(seed, policy, replicas, steps, churn, faults, how)

    @staticmethod
    def spot(seed: int, record: Path | Mapping[str, Any], counts: Counts = "available") -> MembersCase:
        """The case of a seed, on machines that go and come as in a part of a record of spot machines. An interval of
        the record takes as long as a few steps."""
        case, rng = MembersCase.of(seed), random.Random(f"spot {seed}")
        gap_s = rng.choice([3, 10]) * STEP_S
        whole = sim.Churn.from_spot(record, counts=counts, gap_s=gap_s, seed=seed)
        changes = [change for change in whole.changes if change[1] < case.replicas]
        whole = replace(case.churn, changes=changes)
        starts = [time_s + gap_s * rng.uniform(-3, 0) for time_s, *_ in changes]
        rng.shuffle(starts)
        parts = (whole.window(max(at, 0.0), at + 3 * case.steps * STEP_S) for at in starts)
        least = 1 if "replicas" in case.how else case.replicas  # with which a fit begins
        return replace(case, churn=next((p for p in parts if len(p.up(0.0, case.replicas)) >= least), case.churn))

    def run(self) -> str:
        """Run the fit. Returns what it broke; "" if nothing. A fit may end for want of workers."""
        seen: list[int] = []
        models = sim.LogNormal(STEP_S, 0.3), sim.Network(1e-3, 1e8)
        cluster = SimulatedCluster(
            self.replicas,
            *models,
            seed=self.seed,
            arithmetic="replicate" in self.how,
            faults=(self.churn, *self.faults),
        )
        policy = _policies(self.replicas)[self.policy]
        trainer = Trainer(_loss, optax.sgd(0.1), cluster=cluster, replicas=self.replicas, policies=policy)
        about: dict[str, Any] = {"batch_size": 4 * self.replicas, "steps": self.steps, "progress": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FlowmlWarning)
                found = trainer.fit(_PARAMS, _SOURCE, callbacks=[lambda r: seen.append(r["step"])], **about, **self.how)
        except (WorkerLostError, UnsupportedError):
            return ""
        except Exception as error:  # a fault that is looked for may show as any error
            if "the code cannot decode a batch" in str(error):  # too few machines are there when the fit begins
                return ""
            return f"{type(error).__name__}: {error}"
        steps = [record["step"] for record in found.history]
        if steps != list(range(self.steps)) or sorted(seen) != steps:
            return f"records of steps {steps}, and callbacks saw {seen}"
        if found.ledger.outstanding:
            return f"{found.ledger.outstanding} items are outstanding"
        counted = sum(record["replicas"] for record in found.history)
        if self.policy in ("synchronous", "all_reduce", "ring") and found.ledger.used != counted:
            return f"{found.ledger.used} items were used, and the records have {counted}"
        return ""


def broken(seeds: Sequence[int]) -> Iterator[tuple[MembersCase, str]]:
    """The cases of these seeds that break something, and what."""
    for case in map(MembersCase.of, seeds):
        if wrong := case.run():
            yield case, wrong


def _loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["a"]["w"] @ params["b"]["w"]) ** 2)


def _policies(replicas: int) -> dict[str, Policy]:
    found = {
        "synchronous": named.synchronous(),
        "all_reduce": named.all_reduce(),
        "ring": named.ring(),
        "quorum": named.quorum(0.75),
        "folding": named.quorum(0.5, late="fold"),
        "requeueing": named.quorum(0.5, late="requeue"),
        "deadline": named.deadline(0.75),
        "asynchronous": named.asynchronous(),
        "bounded": named.asynchronous(2),
        "softsync": named.softsync(2),
        "local_sgd": named.local_sgd(3),
        "diloco": named.diloco(4),
        "decoupled_diloco": named.decoupled_diloco(4, 0.5),
        "gossip": named.gossip("complete"),
        "speculate": named.speculate(2),
    }
    return found | ({"coded": named.coded(1)} if replicas % 2 == 0 else {})


def _faults(rng: random.Random, replicas: int, ends: float) -> Iterator[sim.Fault]:
    """Of the network."""
    if rng.random() < 0.3:
        yield sim.Disorder(delay_s=0.02, lost=rng.choice([0.0, 0.05]), repeated=rng.choice([0.0, 0.1]))
    if rng.random() < 0.2:
        start = rng.random() * ends
        yield sim.Partition([rng.randrange(replicas)], start, start + rng.random())

"""Gives replicas a place in a snapshot that has nothing of them, because they were silent when it was taken.

They begin at the clock at which the others stand. What replicas keep of their own begins anew: they take the global
parameters, their sums and steps are empty, and their optimizer state is that of the first replica, as at the beginning.
Unlike in another form (`reshaping`), all that the others keep goes on, and the ledger is the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import msgspec

from flowml.plan import Training
from flowml_runtime import wire
from flowml_runtime.driver.training.reshaping import committed_before
from flowml_runtime.driver.training.snapshots import Snapshot
from flowml_runtime.protocol.training.terms import Terms


def with_newcomers(snapshot: Snapshot, replicas: Collection[int], training: Training, total: int) -> Snapshot:
    """The snapshot, of replicas with common clocks, with these ones too."""
    terms, stopped = Terms.of(training, total), snapshot.content.stopped
    clock = max(stopped.clocks)
    committed = tuple(committed_before(terms, group, clock) for group in terms.groups)
    come = (wire.StageState(r, s, clock - 1, committed) for r in replicas for s in range(terms.stages))
    stages = tuple(sorted((*stopped.stages, *come), key=lambda stage: (stage.replica, stage.stage)))
    stopped = msgspec.structs.replace(stopped, stages=stages)
    return replace(snapshot, content=msgspec.structs.replace(snapshot.content, stopped=stopped))

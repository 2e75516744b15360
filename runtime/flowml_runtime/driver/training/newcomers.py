"""Makes a snapshot whole that has nothing of some replicas, because they were silent when it was taken.

They begin at the clock at which the others stand, or after the newest of theirs that a home has. What replicas keep of
their own begins anew: they take the global parameters, their sums and steps are empty, and their optimizer state is
that of the first replica, as at the beginning.
Unlike in another form (`reshaping`), all that the others keep goes on, and the ledger is the same.

What others remember of them begins anew too: a home forgets what the filters of their pushes have sent, and no reader
of a home remembers what the filters of published versions have sent, because a newcomer does not. The state of the
model at a newcomer is that of the others, joined, and of what the silent replica had at the snapshot before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import msgspec

from flowml.plan import Training
from flowml_runtime import wire
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.reshaping import committed_before
from flowml_runtime.driver.training.snapshots import Buffers, Snapshot
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.worker.training.resident import of_home, of_stage, states_of

REPLICA = 2
"""The place of the replica in the names of what a home's decoder remembers: part, array, replica, incarnation."""


def forgotten(buffers: Buffers, replicas: Collection[int], training: Training) -> Buffers:
    """What workers keep, without what they remember of these replicas."""
    found = {owner: kept for owner, kept in buffers.items() if not owner.startswith("reader/")}
    for store in training.stores:
        decoder, public = of_home(store.name, "decoder"), of_home(store.name, "public")
        if decoder in found:
            gone = {key for key in states_of(found[decoder], "push") if key[REPLICA] in replicas}
            names = tuple(f"push/{'.'.join(map(str, key))}/" for key in gone)
            found[decoder] = {name: array for name, array in found[decoder].items() if not name.startswith(names)}
        if public in found:
            found[public] = {name: a for name, a in found[public].items() if not name.startswith("filter/")}
    return found


def with_newcomers(
    snapshot: Snapshot, replicas: Collection[int], training: Training, total: int, model: Model
) -> Snapshot:
    """The snapshot with these replicas too, with the state of this model, if any."""
    terms, content = Terms.of(training, total), snapshot.content
    clocks = content.stopped.clocks
    committed = tuple(committed_before(terms, group, max(clocks)) for group in terms.groups)
    own = replicas if content.stopped.stages else ()  # with portions no replica has a state of its own
    come = (wire.StageState(r, s, clocks[r] - 1, committed) for r in own for s in range(terms.stages))
    stages = tuple(sorted((*content.stopped.stages, *come), key=lambda stage: (stage.replica, stage.stage)))
    owners, arrays = dict(content.owners), dict(snapshot.arrays)
    first = next((r for r in range(len(model.replicas)) if r not in replicas and r not in training.lost), 0)
    for r in replicas:
        for stage in sorted({leaf.stage for leaf in training.state}):
            mine = [model.replicas[first][i] for i, leaf in enumerate(training.state) if leaf.stage == stage]
            owner = of_stage(r, stage, "model", "state")
            owners[owner] = tuple(f"leaf/{i}" for i in range(len(mine)))
            arrays.update({f"{owner}/leaf/{i}": array for i, array in enumerate(mine)})
    stopped = msgspec.structs.replace(content.stopped, stages=stages)
    return replace(snapshot, content=msgspec.structs.replace(content, stopped=stopped, owners=owners), arrays=arrays)

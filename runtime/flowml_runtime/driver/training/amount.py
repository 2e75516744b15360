"""Says how much work a fit has, in the items of its plan or of one with another number of replicas."""

from __future__ import annotations

from dataclasses import replace

from flowml.plan import Training
from flowml.splits import Shards, Shuffle
from flowml.training.pieces import short_items, short_parts
from flowml_runtime.driver.training.tables import group_names, ungrouped
from flowml_runtime.protocol.training.ledger import Work
from flowml_runtime.protocol.training.terms import Terms


def work_of(
    training: Training, terms: Terms, examples: int, batch_size: int, rest: int, shuffle: Shuffle = True
) -> Work:
    """The work of a fit of this plan over a source of so many examples. `rest` is the size of the short batch at the
    end of each epoch, if it is used."""
    replicas = len(training.replicas)
    short = short_items(rest, training) if rest else ()
    return Work(
        replicas=replicas,
        items_per_epoch=examples // batch_size * training.items + len(short),
        item_size=training.item_size,
        total_clocks=terms.total_clocks,
        aligned=terms.aligned,
        coded=training.code is not None,
        microbatches=training.microbatches,
        groups=tuple(group_names(training, terms)),
        ungrouped=ungrouped(training, terms),
        portions=training.items // replicas,
        epoch_share=training.stores[0].policy.epoch_share or 1.0,
        short=short,
        requeues=training.stores[0].policy.late.requeues,
        copies=training.speculation.copies if training.speculation else None,
        sharded=isinstance(shuffle, Shards) and not terms.aligned,
    )


def with_replicas(work: Work, replicas: int, microbatches: int, examples: int, batch_size: int, rest: int) -> Work:
    """The same work for another number of replicas and microbatches."""
    short = short_parts(rest, replicas, microbatches) if rest else ()
    return replace(
        work,
        replicas=replicas,
        items_per_epoch=examples // batch_size * replicas + len(short),
        item_size=batch_size // replicas,
        microbatches=microbatches,
        short=short,
    )

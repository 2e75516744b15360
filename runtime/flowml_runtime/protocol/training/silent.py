"""Says when a snapshot is taken without replicas that are silent, and what became of their work items.

A replica that holds a snapshot up is silent until it is heard of. A snapshot of the others is a cut through the run
without it: all others stand before one clock, everything that they have sent is applied, and every decision about
earlier clocks is made. It is of use if the silent replica is lost in the end, and for nothing else:

* What the silent one keeps of its own is not in it. The next run begins without the replica, or with a newcomer that
  has the global parameters, nothing in its sums, and no steps since the last push. Parameters of its own from an
  earlier snapshot would be a mixture: homes may have applied steps that they still owe.
* The items that it had begun get the fates that decisions prove (`untold`), as at the end of a run. What it has sent
  and no decision contains is left out, and dropped. Items behind the clock at which others stand were never granted.

The cut is whole without it if homes change only with decisions (`goes_without`), and if the workers of
the silent replicas keep nothing for others (`apart`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from flowml.policy import Coded, Consensus, Gossip, Speculate
from flowml.policy.apply import base_of
from flowml_runtime.protocol.training.accounts import joined
from flowml_runtime.protocol.training.ledger import Ledger, LedgerState, Settled
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.terms import StoreTerms, Terms
from flowml_runtime.protocol.training.untold import Untold
from flowml_runtime.protocol.training.work import Work


def goes_without(terms: Terms) -> bool:
    """Whether others may go on without a silent replica, and all that it has sent is in decisions or left out.

    Not where filters at a home remember what each replica has sent, where replicas have state of the model that is
    joined in the result, or where replicas exchange values among each other.
    """

    def alone(store: StoreTerms) -> bool:
        policy = store.policy
        among = store.collective or store.shared or bool(store.sites) or isinstance(policy.remote, Gossip)
        remembers = bool(policy.filters or policy.pull_filters) or isinstance(base_of(policy.apply), Consensus)
        return store.decided and not among and not remembers and not isinstance(policy.quorum, Coded | Speculate)

    return terms.aligned and terms.drops and not terms.stateful and terms.cut is None and all(map(alone, terms.stores))


def apart(replicas: Collection[int], places: Places) -> frozenset[str]:
    """The workers of these replicas, if they are the home of nothing and run no other replica; else none."""
    workers = frozenset(worker for replica in replicas for worker in places.stages[replica])
    others = {replica for worker in workers for replica, _ in places.stages_on(worker)}.difference(replicas)
    return frozenset() if others or any(map(places.stores_on, workers)) else workers


def without(
    state: LedgerState, work: Work, clocks: Sequence[int], replicas: Iterable[int], known: Untold
) -> LedgerState | None:
    """The accounts at a snapshot that is taken without these replicas, as if they were lost. None if decisions do not
    say of each item whether it counts: that of a step which a replica may have skipped before a push that counts."""
    ledger = Ledger(work)
    ledger.restore(state, clocks)
    for replica in replicas:
        held = ledger.held(replica)
        if not known.is_sure(replica, held):
            return None
        for (missing, left_out, late), fates in joined(known.fates(replica, held)):
            ledger.step(Settled(replica, tuple(fates), missing, left_out, late))
        for _, _, item in ledger.held(replica):
            ledger.step(Settled(replica, ((item, "dropped"),)))
    ledger.validate()
    return ledger.kept(clocks)

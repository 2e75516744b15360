"""Says when a snapshot is taken without replicas that are silent, and what became of their work items.

A replica that holds a snapshot up is silent until it is heard of. A snapshot of the others is a cut through the run
without it: all others stand before one clock, everything that they have sent is applied, and every decision about
earlier clocks is made. It is of use if the silent replica is lost in the end, and for nothing else:

* What the silent one keeps of its own is not in it. The next run begins without the replica, or with a newcomer that
  has the global parameters, nothing in its sums, and no steps since the last push. Parameters of its own from an
  earlier snapshot would be a mixture: homes may have applied steps that they still owe.
* The items that it had begun get the fates that decisions prove (`untold`), as at the end of a run. What it has sent
  and no decision contains is left out, and dropped. Items behind the clock at which others stand were never granted.

Where no replica waits for another there are no decisions. Each store then says at the cut which clock of the silent
replica it has, and its items get the fates of those of a replica without which a run goes on (`departed`).

The cut is whole without it if homes change only with decisions, or with each contribution alone (`goes_without`), and
if the workers of the silent replicas keep nothing for others (`apart`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from msgspec.structs import replace

from flowml.policy import Consensus, Gossip
from flowml.policy.apply import base_of
from flowml_runtime.protocol.training.accounts import joined
from flowml_runtime.protocol.training.departed import applies_alone
from flowml_runtime.protocol.training.ledger import Ledger, LedgerState, Settled
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.untold import Untold
from flowml_runtime.protocol.training.work import Work


def goes_without(terms: Terms) -> bool:
    """Whether others may go on without a silent replica, and it is known what of it counts: all that it has sent is in
    decisions or left out, or each store says how much of it is applied there.

    Not where a home keeps what each replica has told last, or where replicas exchange values among each other, other
    than by a leader that decides about its site.
    """

    def alone(store: StoreTerms) -> bool:
        policy = store.policy
        sums = bool(store.sites) and (not store.relayed or store.sites_decide)
        among = store.collective or store.shared or sums or isinstance(policy.remote, Gossip)
        remembers = isinstance(base_of(policy.apply), Consensus)
        return store.decided and not among and not remembers and store.tree is None

    if applies_alone(terms):
        return True
    goes_on = terms.drops or terms.speculation is not None
    return terms.aligned and goes_on and terms.cut is None and all(map(alone, terms.stores))


def apart(replicas: Iterable[int], terms: Terms, places: Places) -> frozenset[int]:
    """These replicas, and all that have a stage on a worker of theirs; none if one of these workers is a home, or one
    of the replicas leads a site."""
    found, new = frozenset[int](), frozenset(replicas)
    workers = frozenset[str]()
    while new:
        found |= new
        workers = frozenset(worker for replica in found for worker in places.stages[replica])
        new = frozenset(replica for worker in workers for replica, _ in places.stages_on(worker)) - found
    leads = any(site[0] in found for store in terms.stores for site in store.sites)
    return frozenset() if leads or any(map(places.stores_on, workers)) else found


def without(
    state: LedgerState, work: Work, clocks: Sequence[int], replicas: Collection[int], known: Untold
) -> LedgerState | None:
    """The accounts at a snapshot that is taken without these replicas, as if they were lost. None if decisions do not
    say of each item whether it counts: that of a step which a replica may have skipped before a push that counts.

    With a code each item of a batch that is over counts, whoever has it. So does a portion of such a batch: if others
    have not told it, what the silent replica has sent counts.
    """
    ledger = Ledger(work)
    ledger.restore(state, clocks)
    for replica in replicas:
        held = ledger.held(replica)
        if work.coded or work.copies is not None:
            for _, _, item in held:
                ledger.step(Settled(replica, ((item, "duplicate" if ledger.is_over(item) else "used"),)))
            continue
        if not known.is_sure(replica, held):
            return None
        for (missing, left_out, late), fates in joined(known.fates(replica, held)):
            ledger.step(Settled(replica, tuple(fates), missing, left_out, late))
        for _, _, item in ledger.held(replica):
            ledger.step(Settled(replica, ((item, "dropped"),)))
    for one in state.owed:
        if one.replica in replicas:
            ledger.note_partly(one.lacking, one.lost)
    ledger.validate()
    return replace(ledger.kept(clocks), owed=tuple(one for one in state.owed if one.replica not in replicas))

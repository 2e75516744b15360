"""What stores must contain at the end of a history: each work item as often as the ledger says, whatever its way.

items       a store contains each item that its group used once, and no other; a cut one with its microbatches, and one
            that a site folds in late as small as its decay makes it
codes       what a home decodes is the mean over the whole batch, each partition of it once
copies      all homes of a store make equal values of each version
gossip      the mean over replicas contains each item once, and mirrors are equal at the end
feedback    what filters have sent and what they still keep is what they were given
published   what readers hold comes nearer to what the home has with each version that filters make smaller
shared      each update of shared parameters is made and counted once
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from flowml.policy import Coded, Consensus, Gossip, Mix
from flowml.policy.apply import base_of
from flowml_runtime.protocol.training import actions
from flowml_tools.faults.history import Encoded, Gave, Kept, Made, Matrix
from flowml_tools.faults.timeline import Timeline

_CLOSE = 1e-9
CHOOSING = ("top_k", "random_k", "significance")
"""The filters that send some coordinates as they are."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a work item, and the replica and the clock of the step that computed it."""

    name: str
    replica: int
    clock: int
    missing: tuple[int, ...] = ()
    """The groups without it."""
    left_out: int = 0
    """The number of its microbatches that were not computed."""


Fates = Mapping[int, Fate]
"""By item."""


def contents(seen: Timeline, fates: Fates) -> Iterator[str]:
    yield from _names(seen, fates)
    for store, terms in enumerate(seen.terms.stores):
        if isinstance(terms.policy.quorum, Coded):
            yield from _decoded(seen, store)
        elif isinstance(terms.policy.remote, Gossip):
            yield from _gossiped(seen, store, fates)
        elif adds_up(seen, store):
            yield from _items(seen, store, fates)
            yield from _weights(seen, store)
        if terms.collective:
            yield from _copies(seen, store)
        if terms.policy.home_filters:
            yield from _fed_back(seen, store)
        if terms.policy.pull_filters:
            yield from _published(seen, store)
        if terms.shared:
            yield from _updated(seen, store)


def adds_up(seen: Timeline, store: int) -> bool:
    """Whether a payload is a sum of gradients, and of no parameters that other rules have changed."""
    policy = seen.terms.stores[store].policy
    if not policy.local:
        return True
    mixed = isinstance(base_of(policy.apply), Mix | Consensus) or getattr(policy.payload, "alpha", 0.0)
    return not mixed and not policy.every.delay


def amounts(payload: int | Matrix, least: float = _CLOSE) -> dict[int, float]:
    """How much of each item is in a payload, of those of which there is more than `least`."""
    if isinstance(payload, int):
        return {q: float(int(d, 16)) for q, d in enumerate(reversed(f"{payload:x}")) if d != "0"}
    flat = payload.reshape(-1)
    return {int(q): float(flat[q]) for q in np.flatnonzero(np.abs(flat) > least)}


def _due(seen: Timeline, store: int, fates: Fates) -> Fates:
    """The items that must be in a store."""
    group = seen.terms.group_of.get(store, -1)
    return {
        q: f
        for q, f in fates.items()
        if f.name in ("used", "folded") and group not in f.missing and _is_known(seen, store, f)
        if f.replica not in seen.left_out or f.clock < seen.left_out[f.replica][store]
    }


def _is_known(seen: Timeline, store: int, fate: Fate) -> bool:
    """Whether the ledger must know if a store has an item. What a lost replica sent last to a store without decisions
    may have been in vain, unless the run went on without it for good, and nobody says how much it had computed of a cut
    step, or which steps it had skipped before a push of several."""
    terms = seen.terms
    if fate.replica in seen.left_out:
        return True
    skips = any(group.drops and group.every.push > 1 for group in terms.groups)
    return fate.replica not in seen.lost or (store in terms.group_of and terms.cut is None and not skips)


def _names(seen: Timeline, fates: Fates) -> Iterator[str]:
    """An item is used if some store contains it in time, and folded if stores contain it in later clocks only."""
    terms = seen.terms
    stores = range(len(terms.stores))
    plain = all(adds_up(seen, n) and not isinstance(terms.stores[n].policy.remote, Gossip) for n in stores)
    if not plain or seen.coded or terms.speculation or any(s.sites or s.shared for s in terms.stores) or not seen.made:
        return
    found: defaultdict[int, set[str]] = defaultdict(set)
    for store in stores:
        group = terms.group_of.get(store)
        late = {key for c in seen.commits[group] for key in c.message.folded} if group is not None else set[Any]()
        for key, payload in payloads(seen, seen.places.homes[store][0], store):
            for q in amounts(payload):
                found[q].add("folded" if key in late else "used")
    for q, fate in fates.items():
        due = "used" if "used" in found[q] else "folded" if found[q] else "neither used nor folded"
        told = fate.name if fate.name in ("used", "folded") else "neither used nor folded"
        known = all(_is_known(seen, n, fate) for n in stores)
        if due != told and known and fate.left_out < terms.microbatches:
            yield f"item {q} is {fate.name} at replica {fate.replica}, and stores have it {due}"


def _shares(seen: Timeline, store: int, due: Fates) -> dict[int, float]:
    """How much of each item is in the change of the parameters of its replica, or of its site, that update themselves.

    Their step takes the mean over the gradients in it: those of all replicas of a site, or what a site that decides
    alone has in its sum.
    """
    whole, inside = seen.terms.microbatches, seen.shares_inside(store)
    if seen.terms.stores[store].sites_decide:
        each = {q: inside.get((f.replica, f.clock), 0.0) for q, f in due.items()}
    else:
        each = {q: 1 / (whole * len(seen.site_of(store, f.replica))) for q, f in due.items()}
    return {q: (whole - due[q].left_out) * share for q, share in each.items()}


def _decays(seen: Timeline, store: int, due: Fates) -> dict[int, float]:
    """What each item is multiplied by in the sum of its site, which its push is a part of."""
    inside = seen.decays_inside(store)
    pushes: defaultdict[int, list[int]] = defaultdict(list)
    for replica, clock in sorted(inside):
        pushes[replica].append(clock)

    def decay(fate: Fate) -> float:
        push = next((clock for clock in pushes[fate.replica] if clock >= fate.clock), -1)
        return inside.get((fate.replica, push), 0.0)

    return {q: decay(f) for q, f in due.items()}


def _items(seen: Timeline, store: int, fates: Fates) -> Iterator[str]:
    """The items in a store are those that its group used. What a lost replica said last may have been in vain."""
    if not seen.made and seen.whole:
        return  # a real run notes no values
    exact, policy = any(m.value is not None for m in seen.made), seen.terms.stores[store].policy
    whole = seen.terms.microbatches if exact else 1
    due = _due(seen, store, fates)
    if policy.local:
        shares = _shares(seen, store, due)
    else:
        shares = {q: float(whole - f.left_out) if exact else 1.0 for q, f in due.items()}
        if seen.folds_inside(store):
            shares = {q: shares[q] * decay for q, decay in _decays(seen, store, due).items()}
    for home in seen.places.homes[store]:
        total: defaultdict[int, float] = defaultdict(float)
        for _, payload in payloads(seen, home, store):
            for q, amount in amounts(payload, least=0.0).items():
                total[q] += amount
        found = {q for q, amount in total.items() if abs(amount) > _CLOSE * abs(shares.get(q, 0.0))}
        for q in sorted(found & due.keys()):
            if not math.isclose(total[q], shares[q], rel_tol=_CLOSE):
                yield f"item {q} is {total[q]:g} times in store {store} at {home}, in place of {shares[q]:g}"
        unknown = {q for q, f in fates.items() if not _is_known(seen, store, f)}
        lacks, more = sorted(due.keys() - found), sorted(found - due.keys() - unknown)
        if lacks or more:
            yield f"store {store} at {home} lacks items {lacks} and has items {more} that do not count"


def _weights(seen: Timeline, store: int) -> Iterator[str]:
    """A contribution weighs as many microbatches as it contains."""
    terms, home = seen.terms.stores[store], seen.places.homes[store][0]
    if terms.policy.local or terms.policy.filters or terms.collective or seen.folds_inside(store):
        return
    made = [m for m in seen.made if m.store == store and m.value is not None]
    for version, apply in zip(made, seen.applies.get((home, store), ()), strict=False):
        for key, (*_, payload) in zip(apply.keys, version.contributions, strict=True):
            weight, amount = seen.weight(home, store, *key), sum(amounts(payload).values())
            if abs(weight - amount) > _CLOSE:
                yield f"what replica {key[0]} gives store {store} at clock {key[1]} weighs {weight} and has {amount:g}"


def payloads(seen: Timeline, home: str, store: int) -> Iterator[tuple[tuple[int, int], int | Matrix]]:
    """What the contributions in a store at one home were before filters, and of own parameters their change, with
    their replicas and clocks."""
    terms = seen.terms.stores[store]
    made = [m for m in seen.made if (m.home, m.store) == (home, store)]
    if not terms.policy.local and not terms.policy.filters:
        keys = [a.keys for a in seen.applies.get((home, store), ())]
        for number, version in enumerate(made):  # updates of shared parameters are no applies
            mine = keys[number] if number < len(keys) else [(-1, -1)] * len(version.contributions)
            yield from ((key, payload) for key, (*_, payload) in zip(mine, version.contributions, strict=True))
        return
    kinds = Gave if terms.policy.local or terms.policy.summed_filters else Encoded
    given = {
        (f.replica, f.clock): f.content if isinstance(f, Gave) else f.given
        for f in seen.facts
        if isinstance(f, kinds) and f.store == store and (isinstance(f, Gave) or f.part == 0)
    }
    senders = terms.senders(seen.terms.replicas) if terms.collective else ()
    for apply in seen.applies.get((home, store), ()):
        for replica, clock in apply.keys:  # a sum over replicas stands for all
            keys = [(r, clock) for r in senders or (replica,)]
            yield from ((key, given[key]) for key in keys if not senders or key in given)


def _decoded(seen: Timeline, store: int) -> Iterator[str]:
    """Each version is the mean over the partitions of one batch."""
    quorum, home = seen.terms.stores[store].policy.quorum, seen.places.homes[store][0]
    assert isinstance(quorum, Coded)
    count = quorum.among(seen.terms.replicas).partitions
    made = [m for m in seen.made if m.store == store]
    applies = seen.applies.get((home, store), [])
    batches: Counter[int] = Counter()
    for version, apply in zip(made, applies, strict=False):
        total = sum(f * np.asarray(p) for (*_, p), f in zip(version.contributions, apply.factors, strict=True))
        shares = amounts(np.asarray(total))
        found = {q // count for q in shares}
        if len(found) != 1 or len(shares) != count or any(abs(x - 1 / count) > _CLOSE * 1e3 for x in shares.values()):
            yield f"version {version.version} of store {store} decodes {shares} in place of 1/{count} of each partition"
        batches.update(found)
    twice = [b for b, n in batches.items() if n > 1]
    if twice:
        yield f"store {store} decodes batch {twice[0]} twice"
    clocks = len(seen.commits[seen.terms.group_of[store]])
    if seen.whole and made and len(made) != clocks:
        yield f"store {store} decodes {len(made)} of {clocks} batches"


def _gossiped(seen: Timeline, store: int, fates: Fates) -> Iterator[str]:
    """The home gets the parameters of all senders at the end: together they contain each item once."""
    home, policy = seen.places.homes[store][0], seen.terms.stores[store].policy
    made = [m for m in seen.made if m.store == store]
    if not seen.whole or not made:
        return
    sent = [np.asarray(p) for *_, p in made[-1].contributions]
    senders = seen.terms.stores[store].senders(seen.terms.replicas)
    if len(made) != 1 or len(sent) != len(senders):
        yield f"store {store} at {home} ends with {len(made)} versions, the last from {len(sent)} of {len(senders)}"
    due, found = np.zeros(sent[0].size), np.sum(sent, axis=0).reshape(-1)
    counted = _due(seen, store, fates)
    for q, share in _shares(seen, store, counted).items():
        due[q] = -share
        if policy.mirrored and policy.apply.averages:
            due[q] *= len(seen.site_of(store, counted[q].replica)) / seen.terms.replicas
    if policy.mirrored:
        apart = [r for r, (a, b) in enumerate(pairwise(sent), 1) if not np.allclose(a, b, atol=1e-6)]
        if apart:
            yield f"the mirrors {apart[0] - 1} and {apart[0]} of store {store} end with different parameters"
        found = sent[0].reshape(-1)
    wrong = np.flatnonzero(np.abs(found - due) > 1e-6)
    if wrong.size:
        q = int(wrong[0])
        what = "a mirror" if policy.mirrored else "the sum over replicas"
        yield f"{what} of store {store} has {-found[q]:g} of item {q}, in place of {-due[q]:g}"


def _copies(seen: Timeline, store: int) -> Iterator[str]:
    first: dict[int, Made] = {}
    for made in seen.made:
        if made.store == store and made.value is not None:
            other = first.setdefault(made.version, made)
            if other.value is not None and not np.array_equal(made.value, other.value):
                yield f"version {made.version} of store {store} at {made.home} is not that at {other.home}"


def _fed_back(seen: Timeline, store: int) -> Iterator[str]:
    """What is sent and what is kept add up to what was given, of the pushes that count."""
    filters, home = seen.terms.stores[store].policy.home_filters, seen.places.homes[store][0]
    coded = [f for f in seen.facts if isinstance(f, Encoded) and f.store == store]
    if all(f.lossless for f in filters):
        yield from (
            f"lossless filters change what replica {f.replica} pushes to store {store} at clock {f.clock}"
            for f in coded
            if not np.array_equal(f.given, f.got)
        )
    if not seen.whole or seen.lost or not any(f.feedback == 1 for f in filters):
        return
    group = seen.terms.group_of.get(store)
    if group is not None and seen.terms.groups[group].folds:  # a late push is never taken back, even if the run ends
        counted = {(f.replica, f.clock) for f in coded}
    else:
        counted = {key for apply in seen.applies.get((home, store), ()) for key in apply.keys}
    due: dict[tuple[int, int], Matrix] = {}
    for f in coded:
        if (f.replica, f.clock) in counted:
            due[f.part, f.replica] = due.get((f.part, f.replica), 0.0) + f.given - f.got  # pyright: ignore
    kept = {(f.part, f.replica): f.residual for f in seen.facts if isinstance(f, Kept) and f.store == store}
    newest = {(f.part, f.replica): f.clock for f in coded}
    for (part, replica), residual in due.items():
        if (replica, newest[part, replica]) not in counted:
            continue  # its fate may be known only after the stage has told what it keeps
        left = kept.get((part, replica), np.zeros_like(residual))
        if not np.allclose(left, residual, atol=1e-6):
            lost = float(np.abs(left - residual).max())
            yield f"the error feedback of replica {replica} for part {part} of store {store} has lost {lost:g}"


def _published(seen: Timeline, store: int) -> Iterator[str]:
    """A version that is published through filters changes what readers hold towards what the home has: filters that
    choose coordinates make those equal and leave the others, and all others come no further away."""
    filters, values = seen.terms.stores[store].policy.pull_filters, seen.values.get(store, [])
    exact = all(f.lossless for f in filters)
    chooses = all(f.lossless or f.call in CHOOSING for f in filters)
    held = np.zeros_like(values[0]) if values else None
    for shown in (f for f in seen.shown if f.store == store and 0 < f.version < len(values)):
        assert held is not None
        value = values[shown.version]
        sent = ~np.isclose(shown.value, held, rtol=0, atol=_CLOSE)
        wrong = not np.allclose(shown.value, value, rtol=0, atol=_CLOSE) if exact else False
        if chooses and not wrong:
            wrong = not np.allclose(shown.value[sent], value[sent], rtol=0, atol=1e-6)
        if wrong or np.linalg.norm(shown.value - value) > np.linalg.norm(held - value) + 1e-6:
            yield f"readers of version {shown.version} of store {store} hold other values than its filters make of it"
        held = shown.value


def _updated(seen: Timeline, store: int) -> Iterator[str]:
    """Each update of shared parameters makes one version, and their home counts each once."""
    made = [m.version for m in seen.made if m.store == store]
    if made != list(range(1, len(made) + 1)):
        yield f"the updates of shared store {store} make versions {made}"
    told = [e for t in seen.turns if isinstance(e := t.event, actions.Updated) and e.store == store]
    keys = Counter((e.replica, e.clock) for e in told)
    twice = [k for k, n in keys.items() if n > 1]
    if twice:
        yield f"replica {twice[0][0]} updates shared store {store} twice at clock {twice[0][1]}"
    if seen.whole and made and sum(e.applied for e in told) != len(made):
        yield f"the home of shared store {store} counts {sum(e.applied for e in told)} updates of {len(made)}"

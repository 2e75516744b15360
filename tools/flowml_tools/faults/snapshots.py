"""Checks the snapshots of a history: each is one cut through the run, and no mixture of versions.

The clocks at which the replicas have stopped say what a snapshot must contain: each contribution of an earlier clock
is in the version of its store, or waits, or is never applied; and none of a later clock is there. All stages, homes
and copies stand at this cut, and the values are those of these versions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_tools.faults.contents import adds_up, amounts, payloads
from flowml_tools.faults.history import DRIVER, Saved, Turn
from flowml_tools.faults.timeline import Timeline


def snapshots(seen: Timeline) -> Iterator[str]:
    places = [(place, fact) for place, fact in enumerate(seen.facts) if isinstance(fact, Saved)]
    for number, (place, saved) in enumerate(places):
        where = f"snapshot {number}"
        yield from _stages(seen, saved, where)
        yield from _decided(seen, saved, place, where)
        yield from _stores(seen, saved, place, where)
        yield from _partial(seen, saved, place, where)
    if seen.whole and seen.rhythm is not None and not seen.lost:
        yield from _rhythm(seen, [saved for _, saved in places])


def _rhythm(seen: Timeline, saved: list[Saved]) -> Iterator[str]:
    """One at the end, and one at each clock that the rhythm says, if there are common clocks and none is late."""
    assert seen.rhythm is not None
    if [one.last for one in saved].count(True) != 1 or not saved[-1].last:
        yield f"of {len(saved)} snapshots there is not exactly the last one at the end"
    if not seen.terms.aligned:
        return
    taken = {max(one.stopped.clocks) for one in saved}
    due = {c for n in (seen.rhythm.every, seen.rhythm.also) if n for c in range(n, seen.terms.total_clocks, n)}
    due = {c for c in due if not any(start <= c < end for start, end in _withdrawn(seen))}
    if not due <= taken:
        yield f"snapshots are due before clocks {sorted(due)}, and there are those before {sorted(taken)}"


def _withdrawn(seen: Timeline) -> list[tuple[int, float]]:
    """From which clock to which the rhythm stood still: after each snapshot that was withdrawn until the next Hold."""
    found: list[tuple[int, float]] = []
    stop, since = 0, None
    for fact in seen.facts:
        if not isinstance(fact, Turn) or fact.who != DRIVER:
            continue
        for message in (action.message for action in fact.wanted if isinstance(action, actions.Send)):
            if isinstance(message, wire.StartTraining):
                stop = message.hold
            elif isinstance(message, wire.Hold) and message.replica is None:
                found += [(since, message.clock)] if since is not None else []
                since = stop if isinstance(fact.event, driver.Withdraw) else None
                stop = message.clock
    return [*found, *([(since, math.inf)] if since is not None else [])]


def _stages(seen: Timeline, saved: Saved, where: str) -> Iterator[str]:
    clocks = saved.stopped.clocks
    for stage in saved.stopped.stages:
        if stage.begun + 1 != clocks[stage.replica]:
            who = f"stage {stage.stage} of replica {stage.replica}"
            yield f"{where} has {who} after clock {stage.begun}, and the replica before clock {clocks[stage.replica]}"


def _decided(seen: Timeline, saved: Saved, place: int, where: str) -> Iterator[str]:
    """Every stage knows of all decisions that are made. A replica stands before others only if it skips what they have
    done, if they have common clocks."""
    clocks = saved.stopped.clocks
    for group in seen.terms.groups:
        commits = [c.message for c in seen.commits[group.number] if c.place < place]
        made = [commit.clock for commit in commits]
        for replica, clock in enumerate(clocks if seen.terms.aligned and not group.sites else ()):
            skipped = [c.clock for c in commits if c.clock >= clock and replica not in c.excluded]
            if skipped:
                yield f"{where} has replica {replica} before clock {clock}, which is in decisions {skipped}"
        for stage in saved.stopped.stages:
            if not group.relayed and stage.committed[group.number] != max(made, default=-1):
                known = stage.committed[group.number]
                yield f"{where} has replica {stage.replica} at decision {known} of group {group.number}, not {made}"


def _stores(seen: Timeline, saved: Saved, place: int, where: str) -> Iterator[str]:
    kept = {state.store: state for state in saved.stopped.stores}
    if sorted(kept) != list(range(len(seen.terms.stores))):
        yield f"{where} has stores {sorted(kept)}"
        return
    for store, state in kept.items():
        if seen.terms.stores[store].shared:
            continue
        for home in seen.places.homes[store]:
            made = [apply for apply in seen.applies.get((home, store), ()) if apply.place < place]
            late = {replica for apply in made[state.version :] for replica, _ in apply.keys}
            if len(made) < state.version or not late <= set(saved.without):
                yield f"{where} has version {state.version} of store {store}, and {home} has made {len(made)}"
        yield from _cut(seen, saved, store, place, where)
        yield from _value(seen, saved, store, state.version, where)


def _cut(seen: Timeline, saved: Saved, store: int, place: int, where: str) -> Iterator[str]:
    """What is in the version of a store is what its replicas have sent before they stopped."""
    terms, clocks = seen.terms.stores[store], saved.stopped.clocks
    waiting = {
        (w.replica, w.clock) for w in saved.stopped.waiting if w.store == store and (w.of_site or not terms.relayed)
    }
    version = next(state.version for state in saved.stopped.stores if state.store == store)
    for number, apply in enumerate(seen.applies.get((seen.places.homes[store][0], store), ())):
        for replica, clock in apply.keys:
            site = seen.site_of(store, replica)
            if replica in seen.left_out:
                continue  # its clock is that of others
            if replica in saved.without and number >= version:
                continue  # it was late, and is left out
            whole = terms.collective or seen.terms.speculation is not None
            next_clock = max(clocks) if whole else max(clocks[r] for r in site)
            who = f"the contribution of replica {replica} at clock {clock} to store {store}"
            if apply.place < place and clock >= next_clock:
                yield f"{where} has {who}, which is before clock {next_clock}"
            elif apply.place < place and (replica, clock) in waiting:
                yield f"{where} has {who} twice: it also waits"
            elif apply.place > place and clock < next_clock and (replica, clock) not in waiting and not terms.relayed:
                yield f"{where} lacks {who}"


def _partial(seen: Timeline, saved: Saved, place: int, where: str) -> Iterator[str]:
    """The ledger of a snapshot without silent replicas says of their items what is in the versions."""
    ledger = saved.ledger
    if ledger is None:
        return
    held = [item.sequence for replica, _, item in ledger.outstanding if replica in saved.without]
    if held:
        yield f"{where} is without replicas {saved.without}, which have items {held} there"
    if not seen.made or not all(adds_up(seen, store) for store in range(len(seen.terms.stores))):
        return
    found: defaultdict[int, set[str]] = defaultdict(set)
    versions = {state.store: state.version for state in saved.stopped.stores}
    for store in range(len(seen.terms.stores)):
        home, group = seen.places.homes[store][0], seen.terms.group_of.get(store)
        before = {key for apply in seen.applies.get((home, store), ())[: versions[store]] for key in apply.keys}
        late = {key for c in seen.commits[group] for key in c.message.folded} if group is not None else set[Any]()
        for key, payload in payloads(seen, home, store):
            for q in amounts(payload) if key in before else ():
                found[q].add("folded" if key in late else "used")
    over = {first + i: fate for first, number, fate in ledger.over for i in range(number)}
    same = any(store.sites for store in seen.terms.stores)  # what a site folds in is in its sum as all else
    for q, holder in _holders(seen, place).items():
        fate = over.get(q, "nothing")
        told = fate if fate in ("used", "folded") else "neither"
        there = "used" if "used" in found[q] else "folded" if found[q] else "neither"
        if same:
            told, there = ("used" if what != "neither" else what for what in (told, there))
        if holder in saved.without and there != told:
            yield f"{where} says that item {q} of the silent replica {holder} is {fate}, and stores have it {there}"


def _holders(seen: Timeline, place: int) -> dict[int, int]:
    """The replica that got each item last, before a place."""
    found: dict[int, int] = {}
    for fact in seen.facts[:place]:
        if isinstance(fact, Turn) and fact.who == DRIVER:
            for action in fact.wanted:
                if isinstance(action, actions.Send) and isinstance(action.message, wire.Grant):
                    found.update((item.sequence, action.message.replica) for _, item in action.message.items)
    return found


def _value(seen: Timeline, saved: Saved, store: int, version: int, where: str) -> Iterator[str]:
    for value in saved.buffers.get(f"home/{store}/values", {}).values():
        known = seen.values.get(store, ())
        if version and (version >= len(known) or not np.array_equal(known[version], value)):
            yield f"{where} has a value of store {store} that is not that of version {version}"

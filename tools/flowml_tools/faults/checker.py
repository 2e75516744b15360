"""Checks a history against the promises of training, without the machines that made it.

    decisions   each due clock of each group has one decision, in order, about exactly the replicas that had arrived,
                and only once the quorum was reached; each late contribution that is kept joins the next decision
    sites       the sum of a site with a quorum is made once the quorum is reached, and each contribution is in one sum
    applies     each version follows the one before, from exactly the contributions that the decisions name, or that
                arrived; none is applied twice or lost; the coefficients are those of the policy; copies are equal
    reads       no step reads, and no contribution is based on, a version older than the staleness bound allows, as far
                as that was pushed before the version was taken, or one without the own contributions of the steps
                before the take where those are applied at once; steps between two takes read the same version
    sites' own  the replicas of a site that has parameters of its own compute each step with the same ones
    publications  versions and floors that a home publishes, and versions that a worker reads, never go back
    answers     a home whose readers take only after some of their pushes publishes to a replica when it has such a
                push, and else nothing but the first version
    payloads    each payload is applied, read, or freed, once
    items       the ledger adds up, and a store contains each item that its group used once, and no other
    snapshots   each is one cut through the run, as `snapshots` says
    bytes       workers report the bytes that they have sent

Every rule computes what must hold from the policy, in the plainest way, and not as the machines do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from flowml.policy import UNBOUNDED, Coded, Consensus, Deadline, Gossip, Mix, Policy, Quorum, Sum, window
from flowml.policy.apply import base_of, scales
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.snapshot import Save
from flowml_runtime.protocol.training.terms import Group
from flowml_tools.faults.history import History, Holds, Matrix, Read, Sent, Turn
from flowml_tools.faults.items import items
from flowml_tools.faults.snapshots import snapshots
from flowml_tools.faults.timeline import Commit, Timeline

_CLOSE = 1e-9


def check(history: History) -> list[str]:
    """The violations in a history, as sentences. A run that was interrupted is checked as far as it came."""
    seen = Timeline.of(history)
    rules = (_decisions, _sites, _alone, _applies, _reads, _held, _publications, _answers)
    rules = (*rules, _payloads, items, snapshots, _bytes)
    return [text for rule in rules for text in rule(seen)]


def _decisions(seen: Timeline) -> Iterator[str]:
    terms = seen.terms
    for group in terms.groups:
        if group.final:
            continue
        due = [c for c in range(terms.total_clocks) if group.every.due(c, terms.last_clock)]
        commits = seen.commits[group.number]
        clocks = [c.message.clock for c in commits]
        if clocks != (due if seen.whole else due[: len(clocks)]):
            yield f"group {group.number} has decided clocks {clocks}, and {due} are due"
        began = seen.began.get(seen.leader(group), 0.0)
        owed: set[tuple[int, int]] = set()
        for commit in commits:
            yield from _decision(seen, group, commit, began)
            began = commit.at
            if group.folds:
                ready = {k for k in owed if seen.has_arrived(group, *k, commit.place)}
                if set(commit.message.folded) != ready:
                    missing = sorted(ready.symmetric_difference(commit.message.folded))
                    yield f"clock {commit.message.clock} of group {group.number} is wrong about late work {missing}"
                owed = {(r, c) for r, c in owed - ready if not any(r == q and c <= d for q, d in ready)}
                owed |= {(r, commit.message.clock) for r in commit.message.excluded}
            elif commit.message.folded:
                yield f"group {group.number} folds work in, which its policy does not allow"


def _decision(seen: Timeline, group: Group, commit: Commit, began: float) -> Iterator[str]:
    message, place, quorum = commit.message, commit.place, group.quorum
    everyone = group.senders
    there = [r for r in everyone if seen.has_arrived(group, r, message.clock, place)]
    where = f"clock {message.clock} of group {group.number}"
    if tuple(r for r in message.excluded if r in everyone) != tuple(r for r in everyone if r not in there):
        yield f"{where} is committed without {message.excluded}, and with {there} arrived"
    gone = seen.gone_at(seen.leader(group), place, sites=group.relayed)
    if not there:
        yield f"{where} is committed with nothing"
    elif isinstance(quorum, Quorum) and commit.at > began + quorum.limit_s + _CLOSE:
        yield f"{where} is committed {commit.at - began:g} s after the one before, past the limit of {quorum}"
    elif any(r not in there and r not in gone for r in everyone) and not _reached(seen, group, commit, there, began):
        yield f"{where} is committed with {there} before its quorum {group.quorum}"


def _reached(seen: Timeline, group: Group, commit: Commit, there: list[int], began: float) -> bool:
    quorum, terms = group.quorum, seen.terms
    if isinstance(quorum, Coded):
        return bool(commit.message.coefficients)
    if isinstance(quorum, Deadline):
        if commit.at >= began + quorum.limit_s - _CLOSE:
            return True
    elif isinstance(quorum, Quorum) and quorum.of == "samples":
        steps = commit.message.clock - window(commit.message.clock, group.every.push, group.every.offset) + 1
        full = len(group.senders) * steps * terms.microbatches
        weight = sum(seen.arrival_weight(group, r, commit.message.clock) for r in there)
        share = quorum.count_or_fraction
        return weight * terms.rows >= (share if quorum.counted else share * full * terms.rows) - _CLOSE
    return len(there) >= quorum.need(len(group.senders))


def unmet(seen: Timeline, now: float) -> Iterator[str]:
    """The leaders of the groups and sites whose quorum has a limit that is over."""
    for group in seen.terms.groups:
        yield from _unmet_inside(seen, group, now)
        quorum = group.quorum
        if not isinstance(quorum, Quorum) or group.final:
            continue
        leader, commits = seen.leader(group), seen.commits[group.number]
        began = commits[-1].at if commits else seen.began.get(leader, math.inf)
        due = [c for c in range(seen.terms.total_clocks) if group.every.due(c, seen.terms.last_clock)]
        if now >= began + quorum.limit_s - _CLOSE and len(commits) < len(due):
            there = [r for r in group.senders if seen.has_arrived(group, r, due[len(commits)], len(seen.facts))]
            if quorum.of != "replicas" or len(there) < quorum.need(len(group.senders)):
                yield leader


def _unmet_inside(seen: Timeline, group: Group, now: float) -> Iterator[str]:
    quorum = group.site_quorum
    for site in group.sites if isinstance(quorum, Quorum) and quorum.of == "replicas" else ():
        assert isinstance(quorum, Quorum)
        newest, began = seen.site_decided(group, site[0], len(seen.facts))
        later = (c for c in range(newest + 1, seen.terms.total_clocks) if group.every.due(c, seen.terms.last_clock))
        there = [len(seen.there(group.stores[0], site[0], clock)) for clock in later]
        if now >= began + quorum.limit_s - _CLOSE and there and there[0] < quorum.need(len(site)):
            yield seen.places.relay(site)


def _sites(seen: Timeline) -> Iterator[str]:
    for (store, leader), sums in seen.site_sums.items():
        group = seen.terms.groups[seen.terms.group_of[store]]
        where, quorum = f"the sum of store {store} of the site of replica {leader}", group.site_quorum
        site = seen.site_of(store, leader)
        keys = Counter(key for made in sums for key in made.keys)
        twice = [key for key, n in keys.items() if n > 1]
        if twice:
            yield f"{where} has the contribution of {_named(twice[0])} twice"
        gave_up = {c.message.clock: c.place for c in seen.commits[group.number] if leader in c.message.excluded}
        for made in sums:
            if group.folds and not made.keys and gave_up.get(made.clock, made.place) < made.place:
                continue  # the others have gone on without the site, which says that all of the clock is late
            late = [key for key in made.keys if key[1] != made.clock]
            if late and not group.folds:
                yield f"{where} at clock {made.clock} has the late contribution of {_named(late[0])}"
            lacks = made.there - {r for r, c in made.keys if c == made.clock}
            if lacks:
                yield f"{where} at clock {made.clock} lacks replicas {sorted(lacks)}, which were there"
            gone = seen.gone_at(made.who, made.place)
            if not isinstance(quorum, Quorum) or quorum.of != "replicas":
                continue
            fact, (_, began) = seen.facts[made.place], seen.site_decided(group, leader, made.place)
            if isinstance(fact, Turn) and fact.at > began + quorum.limit_s + _CLOSE:
                yield f"{where} at clock {made.clock} is made {fact.at - began:g} s after the one before: {quorum}"
            if len(made.there) < min(quorum.need(len(site)), len({*site} - gone)):
                yield f"{where} at clock {made.clock} has {sorted(made.there)} before its quorum {quorum}"


def _alone(seen: Timeline) -> Iterator[str]:
    """Each site that decides alone decides the clocks in order, and its sums contain what the decisions name."""
    for group in seen.terms.final:
        due = [c for c in range(seen.terms.total_clocks) if group.every.due(c, seen.terms.last_clock)]
        for number, site in enumerate(group.sites):
            decided = seen.site_commits.get((group.number, number), {})
            where = f"the site of replica {site[0]} for group {group.number}"
            if list(decided) != due[: len(decided)]:
                yield f"{where} has decided clocks {list(decided)}, and {due} are due"
            for store in group.stores:
                sums = seen.inner_sums[store, site[0]]
                keys = Counter(key for made in sums for key in made.keys)
                twice = [key for key, n in keys.items() if n > 1]
                if twice:
                    yield f"{where} has the contribution of {_named(twice[0])} twice"
                for made in sums:
                    told = decided[made.clock]
                    named = {(r, made.clock) for r in site if r not in told.excluded} | {*told.folded}
                    lacks = [key for key in named - {*made.keys} if seen.weight_inside(store, key)]
                    if lacks or not {*made.keys} <= named:
                        yield f"{where} at clock {made.clock} has {made.keys} in store {store}, not {sorted(named)}"
                    elif made.keys and made.weight != (right := seen.sum_weight(store, made)):
                        yield f"{where} at clock {made.clock} divides by {made.weight} in store {store}, not by {right}"


Chosen = tuple[int, int, float]
"""(replica, clock, coefficient)"""


def _applies(seen: Timeline) -> Iterator[str]:
    for store, terms in enumerate(seen.terms.stores):
        for home in seen.places.homes[store]:
            made = seen.applies.get((home, store), [])
            for number, apply in enumerate(made):
                if apply.action.version != number + 1:
                    yield f"store {store} at {home} makes version {apply.action.version} after version {number}"
            found = [[(*k, f) for k, f in zip(a.keys, a.factors, strict=True)] for a in made]
            keys = Counter(k for a in made for k in a.keys)
            twice = [k for k, n in keys.items() if n > 1]
            if twice:
                yield f"store {store} at {home} applies the contribution of {_named(twice[0])} twice"
            if terms.decided and not isinstance(terms.policy.quorum, Coded):
                yield from _compared(seen, home, store, found, seen.expected(home, store))
            elif terms.collective:
                yield from _compared(seen, home, store, found, _sums(seen, home, store))
            elif not terms.clocked:
                yield from _arrivals(seen, home, store)
            for apply in made:
                yield from _stale(seen, home, store, apply.action, apply.keys)


def _compared(
    seen: Timeline, home: str, store: int, found: list[list[Chosen]], expected: list[list[Chosen]]
) -> Iterator[str]:
    where = f"store {store} at {home}"
    if len(found) > len(expected) or (seen.whole and len(found) < len(expected)):
        yield f"{where} has {len(found)} versions, and {len(expected)} are due"
    for version, (mine, due) in enumerate(zip(found, expected, strict=False), 1):
        if [m[:2] for m in mine] != [d[:2] for d in due]:
            yield f"version {version} of {where} is made of {_list(mine)} in place of {_list(due)}"
        elif not all(math.isclose(m[2], d[2], rel_tol=_CLOSE) for m, d in zip(mine, due, strict=True)):
            weights = [round(m[2], 6) for m in mine], [round(d[2], 6) for d in due]
            yield f"version {version} of {where} has coefficients {weights[0]} in place of {weights[1]}"


def _sums(seen: Timeline, home: str, store: int) -> list[list[Chosen]]:
    """Each clock at which a sum over all replicas is due is one version. Of own parameters, or their changes, each
    counts as much."""
    terms, policy = seen.terms, seen.terms.stores[store].policy
    senders = len(set(terms.stores[store].senders(terms.replicas)) - seen.lost)
    clocks = [c for c in range(terms.total_clocks) if policy.every.due(c, terms.last_clock)]
    weights = [seen.weight(home, store, 0, c) for c in clocks]
    sums = not policy.apply.averages if policy.local else isinstance(base_of(policy.apply), Sum)
    alone, mean = (1.0, 1 / senders) if policy.local else (1 / terms.microbatches, None)
    return [
        [(0, clock, alone if sums else mean or 1 / weight)]
        for clock, weight in zip(clocks, weights, strict=True)
        if weight
    ]


def _arrivals(seen: Timeline, home: str, store: int) -> Iterator[str]:
    """Contributions that are applied as they arrive: each once, in batches, with the mean or sum of the batch."""
    terms, policy = seen.terms, seen.terms.stores[store].policy
    where = f"store {store} at {home}"
    made = seen.applies.get((home, store), [])
    applied = {k for a in made for k in a.keys}
    for replica, clock in seen.complete(home, store):
        if seen.whole and (replica, clock) not in applied and replica not in seen.lost:
            yield f"{where} has lost the contribution of {_named((replica, clock))}"
    senders = terms.stores[store].senders(terms.replicas)
    for apply in made:
        need = policy.quorum.need(len(set(senders) - seen.lost_to(home, apply.place)))
        weights = [seen.weight(home, store, *k) for k in apply.keys]
        due = seen.coefficients(store, weights, max(need - len(weights), 0) * max(weights))
        if not all(math.isclose(f, d, rel_tol=_CLOSE) for f, d in zip(apply.factors, due, strict=True)):
            yield f"version {apply.action.version} of {where} has coefficients {apply.factors} in place of {due}"
        leaving = seen.leaving_at(home, apply.place)
        there, others = {replica for replica, _ in apply.keys}, set(senders) - leaving
        few = len(apply.keys) < need and not others <= there and not leaving & there
        few = few and apply.place < seen.flushed.get(home, len(seen.facts))
        if isinstance(base_of(policy.apply), Consensus) and apply.place == made[0].place:
            continue  # the first update has a report of each, and applies all that have come
        if policy.staleness == UNBOUNDED and few:
            yield f"version {apply.action.version} of {where} is made of {len(apply.keys)} contributions before {need}"


def _stale(
    seen: Timeline, home: str, store: int, action: actions.Apply, keys: tuple[tuple[int, int], ...]
) -> Iterator[str]:
    if scales(seen.terms.stores[store].policy.apply):
        due = tuple(action.version - 1 - seen.base(home, store, *k) for k in keys)
        if action.staleness != due:
            yield f"version {action.version} of store {store} is told of staleness {action.staleness}, and it is {due}"


def _reads(seen: Timeline) -> Iterator[str]:
    takes: dict[tuple[int, int, int], int] = {}
    for fact in seen.facts:
        if isinstance(fact, Read) and not seen.follows(fact.store, fact.replica):
            version = fact.version if fact.value is None else _version(seen, fact, fact.value)
            if version is None:
                where = f"replica {fact.replica} at clock {fact.clock}"
                yield f"{where} reads of store {fact.store} what is no version of it"
            else:
                yield from _read(seen, fact.store, fact.replica, fact.clock, version, "reads")
                take = fact.store, fact.replica, seen.taken(fact.store, fact.clock)
                one = seen.holds(fact.store) and len(seen.terms.stores[fact.store].stages) == 1  # stages take each
                if one and takes.setdefault(take, version) != version:
                    where = f"replica {fact.replica} at clock {fact.clock}"
                    yield f"{where} reads version {version} of store {fact.store}, and has taken {takes[take]}"
    for store, terms in enumerate(seen.terms.stores):
        every = terms.policy.every
        if terms.collective or (terms.policy.local and (every.delay or every.pull != every.push)):
            continue
        if seen.folds_inside(store):
            continue  # the sum of a site is based on what the oldest of its contributions is
        for replica, clock in seen.complete(seen.places.homes[store][0], store):
            for base in seen.bases(seen.places.homes[store][0], store, replica, clock):
                yield from _read(seen, store, replica, clock, base, "contributes from")


def _held(seen: Timeline) -> Iterator[str]:
    """The replicas of a site compute each step with the same parameters, which are its own."""
    first: dict[tuple[int, int, int], Holds] = {}
    for fact in seen.facts:
        if isinstance(fact, Holds):
            leader = seen.site_of(fact.store, fact.replica)[0]
            other = first.setdefault((fact.store, leader, fact.clock), fact)
            if not np.array_equal(fact.value, other.value):
                who = f"replicas {other.replica} and {fact.replica} of one site"
                yield f"{who} compute with different parameters of store {fact.store} at clock {fact.clock}"


def _version(seen: Timeline, read: Read, value: Matrix) -> int | None:
    """The version that has the value of a read. The replicas of a site do not know its number."""
    values = seen.read_values.get(read.store, ())
    if not values:
        return None if np.any(value) else 0
    knows = seen.site_of(read.store, read.replica)[0] == read.replica or seen.terms.stores[read.store].collective
    if knows:
        same = read.version < len(values) and np.array_equal(values[read.version], value)
        return read.version if same else None
    return next((v for v in reversed(range(len(values))) if np.array_equal(values[v], value)), None)


def _read(seen: Timeline, store: int, replica: int, clock: int, version: int, what: str) -> Iterator[str]:
    terms, policy = seen.terms.stores[store], seen.terms.stores[store].policy
    if isinstance(policy.remote, Gossip):
        return  # replicas read the first version only
    own = _pushed_before(policy, clock - policy.every.delay)
    taken = _pushed_before(policy, seen.taken(store, clock) - policy.every.delay)
    before = min(own - policy.staleness, taken)  # a version has nothing that is pushed after it was taken
    where = f"replica {replica} at clock {clock} {what} version {version} of store {store}"
    if terms.decided or terms.collective:
        least = seen.version_before(store, int(before)) if policy.staleness < UNBOUNDED else 0
        if version < least:
            yield f"{where}, and staleness {policy.staleness} allows {least} at the oldest"
        return
    inside = seen.inside(store, version)
    waits = isinstance(base_of(policy.apply), Consensus) and version == 0  # the first update has a report of each
    at_once = policy.quorum.need(len(terms.senders(seen.terms.replicas))) == 1 and not waits
    sender = seen.site_of(store, replica)[0]
    for who, sent in seen.complete(seen.places.homes[store][0], store):
        if (who, sent) in inside or who in seen.lost:
            continue
        if sent < before:
            yield f"{where}, which lacks what {_named((who, sent))} sent, within staleness {policy.staleness}"
        elif who == sender and sent < taken and at_once:
            yield f"{where}, which lacks its own contribution of clock {sent}"


def _pushed_before(policy: Policy, clock: int) -> int:
    """The steps that a replica has pushed before step `clock`."""
    return window(max(clock, 0), policy.every.push, policy.every.offset)


def _publications(seen: Timeline) -> Iterator[str]:
    newest: dict[tuple[str, int], tuple[int, int]] = {}
    shown: dict[tuple[str, int], int] = {}
    made: Counter[tuple[str, int]] = Counter()
    for turn in seen.turns:
        if isinstance(turn.event, actions.Updated):
            made[turn.who, turn.event.store] += turn.event.applied
        for action in turn.wanted:
            match action:
                case actions.Apply(store):
                    made[turn.who, store] += 1
                case actions.Publish(store, version, floor):
                    key = turn.who, store
                    before = newest.get(key, (0, 0))
                    if version < before[0] or floor < before[1]:
                        yield f"{turn.who} publishes version {version} of store {store}, floor {floor}, after {before}"
                    if version != made[key]:
                        yield f"{turn.who} publishes version {version} of store {store}, and has made {made[key]}"
                    newest[key] = version, floor
                case actions.Show(store, version):
                    if version < shown.get((turn.who, store), 0):
                        yield f"{turn.who} reads version {version} of store {store} after a newer one"
                    shown[turn.who, store] = version
                case _:
                    pass


def _takes_after_push(seen: Timeline, store: int) -> bool:
    """Whether replicas take a store only after some of their pushes, and nothing about it depends on others."""
    terms, policy = seen.terms.stores[store], seen.terms.stores[store].policy
    if terms.clocked or terms.shared or terms.sites or policy.staleness < UNBOUNDED or seen.terms.drops:
        return False
    if isinstance(base_of(policy.apply), Mix | Consensus) or not all(f.lossless for f in policy.pull_filters):
        return False
    push, pull, delay = policy.every.push, policy.every.pull or policy.every.push, policy.every.delay
    return pull > 1 and pull in range(push, pull + 1, push) and delay == 0


def _answers(seen: Timeline) -> Iterator[str]:
    for store in range(len(seen.terms.stores)):
        if not _takes_after_push(seen, store):
            continue
        home, taken = seen.places.homes[store][0], seen.terms.stores[store].policy.every.taken
        answered: set[tuple[int, int]] = set()
        loaded = False
        for turn in (turn for turn in seen.turns if turn.who == home):
            told = turn.event.message if isinstance(turn.event, actions.Received) else None
            loads = isinstance(told, wire.StoreValue) and told.store == store
            key = (told.replica, told.clock) if isinstance(told, wire.Contribution) and told.store == store else None
            if key and not loaded:
                answered.add(key)  # the first version has it, or comes after it
            loaded = loaded or loads
            for action in turn.wanted:
                if not isinstance(action, actions.Publish) or action.store != store:
                    continue
                what = f"{home} publishes version {action.version} of store {store} to {action.to}"
                if not action.value:
                    yield f"{what} without its value"
                elif key is None and not loads:
                    yield f"{what}, and none of them has just pushed"
                elif key is not None and taken(key[1] + 1) != key[1] + 1:
                    yield f"{what}, and {_named(key)} does not take then"
                elif key is not None and not {*action.to} <= {*seen.places.stages[key[0]]}:
                    yield f"{what} when {_named(key)} has pushed"
                elif key is not None:
                    answered.add(key)
        for key in seen.complete(home, store):
            if seen.whole and taken(key[1] + 1) == key[1] + 1 and key not in answered and key[0] not in seen.lost:
                yield f"{home} does not answer the push of {_named(key)} to store {store}, after which it takes"


def _payloads(seen: Timeline) -> Iterator[str]:
    given: Counter[tuple[str, int]] = Counter()
    ended: Counter[tuple[str, int]] = Counter()
    for turn in seen.turns:
        if isinstance(turn.event, actions.Received) and turn.event.handle is not None:
            given[turn.who, turn.event.handle] += 1
        for action in turn.wanted:
            match action:
                case actions.Apply(contributions=contributions) | actions.Forward(contributions=contributions):
                    ended.update((turn.who, h) for handles, _ in contributions for h in handles)
                case actions.Show(handle=h) | actions.Load(handle=h) | actions.Release(handle=h):
                    ended[turn.who, h] += 1
                case (
                    actions.Hand(handle=h) | driver.Keep(handle=h) | driver.Note(handle=h) | driver.KeepState(handle=h)
                ):
                    if h is not None:
                        ended[turn.who, h] += 1
                case Save(buffers=buffers):
                    ended.update((turn.who, h) for _, _, h in buffers if h is not None)
                case _:
                    pass
    for (who, handle), times in ended.items():
        if times > given[who, handle]:
            yield f"{who} names payload {handle} {times} times"
    dead = seen.crashed | {w for r in seen.lost for w in seen.places.stages[r]}
    left = [k for k in given if seen.whole and not ended[k] and k[0] not in dead]
    if left:
        yield f"{left[0][0]} never names payload {left[0][1]}, and {len(left) - 1} others are left too"


def _bytes(seen: Timeline) -> Iterator[str]:
    if not seen.whole or seen.lost or not seen.counted:
        return
    for store in range(len(seen.terms.stores)):
        sent = [f for f in seen.facts if isinstance(f, Sent) and f.store == store]
        real = sum(f.nbytes for f in sent if not f.published), sum(f.nbytes for f in sent if f.published)
        told = seen.traffic.get(store, (0, 0))
        if seen.terms.stores[store].relayed and told[0] == real[0] and told[1] <= real[1]:
            continue  # a leader that has left still passes the last versions on
        if told != real and (not seen.terms.stores[store].sites or sum(told) != sum(real)):
            yield f"workers report {told} bytes of gradients and parameters of store {store}, and sent {real}"


def _named(key: tuple[int, int]) -> str:
    return f"replica {key[0]} at clock {key[1]}"


def _list(chosen: list[Chosen]) -> str:
    return ", ".join(f"replica {r} at clock {c}" for r, c, _ in chosen) or "nothing"

"""Says when the machines of one worker rest for a snapshot, and what they tell then.

All replicas have stopped. The machines rest when everything is decided that the replicas have sent, and is applied or
waits for a later clock. What waits is told as the contributions that it is. A run that goes on gets these again, as
messages, before it decides anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Export
from flowml_runtime.protocol.training.clocks import contained
from flowml_runtime.protocol.training.home import Home
from flowml_runtime.protocol.training.portions import Portions
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.site import Site
from flowml_runtime.protocol.training.terms import Terms

Stage = Replica | Portions


def stages_rest(stages: Mapping[tuple[int, int], Stage], asked: wire.Export) -> bool:
    """Whether nothing runs on the stages of a worker, and all is decided that they have computed."""
    newest = max(asked.clocks)
    return all(machine.rests(asked.clocks[at[0]], newest) for at, machine in stages.items())


def all_rest(stages: Mapping[tuple[int, int], Stage], sites: Iterable[Site], home: Home, asked: wire.Export) -> bool:
    """Whether the machines of a worker rest."""
    there = all(site.rests(asked.clocks, asked.pushed) for site in sites) and home.rests(asked.clocks, asked.pushed)
    return there and stages_rest(stages, asked)


def knows_all(terms: Terms, read: Iterable[int], shown: Sequence[tuple[int, int]], asked: wire.Export) -> bool:
    """Whether the stores that are `read` here have shown everything that replicas have sent: (version, floor)."""
    newest = max(asked.clocks)
    for store in read:
        if terms.stores[store].clocked:
            floor = contained(terms, terms.stores[store].policy.every, newest)
            if shown[store][1] < floor:
                return False
    return True


def export(
    stages: Iterable[Stage], home: Home, mine: Iterable[int], sites: Iterable[Site], asked: wire.Export, cause: int
) -> Export:
    """Where the machines of a worker stand, which rest. `mine` are the stores of which it has the first copy."""
    stores, led = tuple(mine), tuple(sites)
    waiting = [*(w for store in stores for w in home.waiting(store)), *(w for site in led for w in site.waiting())]
    return Export(
        tuple(machine.kept() for machine in stages if isinstance(machine, Replica)),
        tuple(home.kept(store, asked.pushed) for store in stores),
        asked.clocks,
        cause,
        tuple(site.kept() for site in led),
        tuple(waiting),
        asked.number,
        asked.whole,
        asked.copied,
        asked.complete,
        asked.folder,
        asked.token,
    )

"""Runs with snapshots in any order of messages: each ends, also from its last snapshot, and uses each item once.

A walk draws one command after the other: a step pushes or ends, if it may read, a link is held or freed, the driver
wants a snapshot or gives one up for now, or the run begins anew from the newest one.
"""

from __future__ import annotations

import random

import pytest

from tests.protocol.scenarios import Scenario

RUNS = (
    "replicas=2 clocks=4 stores=async save=0",
    "replicas=3 clocks=4 stores=async(1) save=0",
    "replicas=2 clocks=4 stores=async(2),async save=0",
    "replicas=2 clocks=6 stores=quorum(1) save=3",
    "replicas=3 clocks=6 stores=every(2),async(1) save=4",
    "replicas=3 clocks=6 stores=fold(1) save=2",
    "replicas=3 clocks=6 stores=fold(2;2),fold(2;2) save=3",
    "replicas=3 clocks=6 stores=fold(1),quorum(2) save=3",
    "replicas=3 clocks=4 stores=softsync(2) save=0",
    "replicas=3 clocks=6 stores=softsync(3),fold(1) save=2",
)
SEEDS = 60


def able(scenario: Scenario) -> list[str]:
    """The commands with which steps may go on."""
    found: list[str] = []
    for (replica, stage), running in scenario.running.items():
        machine = scenario.workers[scenario.places.stages[replica][stage]].stage((replica, stage))
        stores = range(len(scenario.terms.stores))
        if running.pushed:
            found.append(f"leave {replica}")
        elif all(machine.may_read(store, running.start.clock) for store in stores):
            found += [f"push {replica}", f"finish {replica}"]
    return found


def walk(run: str, rng: random.Random) -> Scenario:
    scenario = Scenario()
    scenario.do(f"run {run}")
    names = [*scenario.workers, "driver"]
    for _ in range(80):
        held = [f"free {a} {b}" for a, b in sorted(scenario.held)]
        drawn = [f"hold {a} {b}" for a in names for b in names if rng.random() < 0.05]
        anew = ["resume"] if scenario.saved and rng.random() < 0.05 else []
        commands = anew or [*able(scenario), *held, *drawn, *(["pause"] if rng.random() < 0.3 else [])]
        commands += ["withdraw"] if scenario.driver.heard and rng.random() < 0.3 else []
        if scenario.driver.over:
            break
        if commands:
            scenario.do(rng.choice(commands))
            scenario.validate()
    for a, b in sorted(scenario.held):
        scenario.do(f"free {a} {b}")
    return scenario


@pytest.mark.parametrize("run", RUNS)
def test_a_run_with_snapshots_ends_and_uses_each_item(run: str) -> None:
    waited = False
    for seed in range(SEEDS):
        scenario = walk(run, random.Random(seed))
        while not scenario.driver.over:
            commands = able(scenario)
            assert commands, f"seed {seed}: no step may go on, and the run is not over"
            scenario.do(commands[-1])
        scenario.validate()
        ledger = scenario.driver.ledger.summary()
        items = ledger.used + ledger.dropped + ledger.folded + ledger.unseen
        assert items == scenario.work.total_items or scenario.terms.aligned, f"seed {seed}"
        assert scenario.terms.aligned or ledger.used == items, f"seed {seed}: {ledger}"
        waited |= scenario.waited
        if run.count("(") == run.count("fold(") and scenario.terms.stores[0].every == 1:
            assert set(scenario.applied.values()) == {ledger.used + ledger.folded}, f"seed {seed}: {ledger}"
        for store, terms in enumerate(scenario.terms.stores):
            assert terms.clocked or scenario.applied[store] == ledger.used, f"seed {seed}: {scenario.applied}"
    assert waited == ("fold" in run or "softsync" in run)

"""Thousands of random runs with faults keep every promise, and each planted bug is found by few of them."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys

import pytest

from flowml.policy import Policy
from flowml_runtime.protocol.errors import InvariantError
from flowml_tools.faults.campaign import campaign, check_rest, run
from flowml_tools.faults.cases import Case
from flowml_tools.faults.checker import check
from flowml_tools.faults.coverage import FAULTS, Coverage
from flowml_tools.faults.layout import make
from tests.conftest import SEED
from tests.sim.bugs import BUGS, planted

SEEDS = 10_000
TIME_S = 75.0
"""The time for them all. A machine that has two idle cores takes less."""
WITHIN = 1000
"""The seeds within which a bug is found."""
FINDS = {
    "folded items are counted as used": 37,
    "a push of own parameters is left out": 263,
    "a stage retires while a sum is under way": 38,
    "a step contributes to the fit after its own": 188,
    "each copy of a portion counts": 89,
    "a cut step weighs as a whole one": 131,
    "mirrors end without what filters still keep": 288,
    "differences of versions are published": 559,
    "each push is answered with a version": 39,
    "all get the answer to a push of one": 39,
    "a site is summed before its quorum": 155,
    "a site waits past its limit": 777,
    "a late contribution to a site is lost": 138,
    "a late contribution to a site does not decay": 425,
    "the step of a site is divided by all of its replicas": 288,
    "a snapshot is taken before all is applied": 37,
    "a snapshot without a silent replica drops all of its items": 861,
    "a replica stops for a hold that is over": 108,
    "who had stopped for a withdrawn snapshot counts": 53,
    "a snapshot is withdrawn without a new hold": 53,
    "a shared update is not counted": 70,
}
"""Bug -> a seed that finds it, for those that early ones do not: it is run first, and the others if it does not."""


def flowml(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowml_tools.main", "faults", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=115, check=False)


def test_ten_thousand_random_runs_with_faults_keep_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    first = SEED % 10**6 * SEEDS  # the same ones in every run, unless FLOWML_TEST_SEED is given
    limits = ("--first", str(first), "--seeds", str(SEEDS), "--jobs", str(min(2, os.cpu_count() or 1)))
    ended = flowml(*limits, "--time", str(TIME_S))
    with capsys.disabled():
        print(f"\n{ended.stdout.splitlines()[-1] if ended.stdout else ''} (seeds from {first})")
    assert ended.returncode == 0, f"{ended.stdout[-20_000:]}\n{ended.stderr[-2000:]}"
    assert int(ended.stdout.split()[0]) >= 100  # also where other programs take the cores


def is_crash(broken: str) -> bool:
    """Whether an error of Python (KeyError, TypeError, …) says what broke, which names no promise."""
    name = broken.removeprefix("the history cannot be checked: ").partition(":")[0]
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, BaseException)


def test_errors_of_python_are_crashes_and_broken_promises_are_not() -> None:
    assert all(map(is_crash, ("KeyError: 14", "the history cannot be checked: IndexError: 3", "AttributeError: x")))
    assert not any(
        map(is_crash, ("InvariantError: a rule of the protocol does not hold", "clock 3 of group 0 is wrong"))
    )


def test_what_is_used_twice_is_named() -> None:
    with planted("late work is folded in twice"):
        found = next(f for _, f in campaign(range(WITHIN)) if f is not None)
    assert any(
        re.search(r"Contribution \(replica \d+, store \d+, clock \d+\) at .* is used again", v)
        for v in found.violations
    )


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    seeds = (FINDS.get(bug, 0), *range(WITHIN))
    assert seeds[0] < WITHIN
    with planted(bug):
        found = next((f for _, f in campaign(seeds) if f is not None), None)
    assert found is not None
    assert found.violations
    assert not [broken for broken in found.violations if is_crash(broken)], "it is found by a rule and not by a crash"
    assert run(found.case) is None, "without the bug the same case keeps every promise"


def test_every_knob_meets_every_kind_of_fault() -> None:
    """Sound pairs only: no replica is lost where that ends a fit, and shared memory has one worker."""
    covered = Coverage.of(map(Case.of, range(1500)))
    assert set(FAULTS) == {kind for _, kind in covered.counts}
    knobs = {name.partition(" ")[0] for name in covered.values}
    assert knobs == {"topology", "staleness", "quorum", "late", "every", "payload", "filter", "apply"}
    for kind in ("reordered", "lost", "repeated", "parted", "straggler", "worker crashed", "driver ended"):
        alone = {("topology sharedmemory", "worker crashed"), ("topology sharedmemory", "parted")}
        missed = [name for name, zero in covered.zeroes() if zero == kind and (name, kind) not in alone]
        common = [name for name in missed if sum(covered.counts[name, k] for k in FAULTS) > 100]
        assert not common, f"{common} never met {kind}"
    assert "pairs have not met" in covered.table()


def test_a_seed_repeats_to_the_event() -> None:
    for seed in range(20):
        first, second = Case.of(seed).world(), Case.of(seed).world()
        for world in (first, second):
            world.go()
        assert first.clock.trace_hash == second.clock.trace_hash
        assert first.history.story() == second.history.story()


def test_a_finding_says_what_broke_and_how_to_see_it_again() -> None:
    with planted("a late contribution is forgotten"):
        found = next(f for _, f in campaign(range(WITHIN)) if f is not None)
        again = run(Case.of(found.case.seed))
    assert again == found
    first, *rest = found.report(events=5).splitlines()
    assert first == (
        f"seed {found.case.seed} breaks a promise; run it again with: flowml faults --seed {found.case.seed}"
    )
    assert rest[-6] == "last events:"
    assert all(" s  worker:" in line or " s  driver " in line for line in rest[-5:])
    assert any("is wrong about late work" in line for line in rest)


def test_what_a_living_worker_keeps_is_found_and_not_what_a_dead_one_had() -> None:
    world = make([Policy()], replicas=3, clocks=12)
    world.crash(0, when=20.0)
    world.go()
    check_rest(world)
    handles = {who: handle for who, handle, _ in world.history.given()}
    world.simulation.payloads[handles[world.worker(0)]] = 1
    check_rest(world)
    alive = world.worker(1)
    world.simulation.payloads[handles[alive]] = 1
    with pytest.raises(InvariantError, match=f"workers keep payloads: .*{alive}"):
        check_rest(world)


def test_a_campaign_that_the_time_ends_says_how_many_seeds_it_has_done() -> None:
    ended = flowml("--seeds", "100000", "--time", "1", "--jobs", "1")
    assert ended.returncode == 0, ended.stderr
    done = int(ended.stdout.split()[0])
    assert ended.stdout.startswith(f"{done} seeds of 100000, which the time did not allow, in ")


def test_the_command_repeats_one_seed() -> None:
    ended = flowml("--seed", "12", "--events", "3")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "seed 12 keeps every promise; run it again with: flowml faults --seed 12"
    assert lines[-4] == "last events:"
    assert ended.stdout == flowml("--seed", "12", "--events", "3").stdout


@pytest.mark.parametrize("arguments", [("--seed", "-1"), ("--first", "x"), ("--seeds", "0"), ("--time", "0")])
def test_a_wrong_call_is_one_line(arguments: tuple[str, ...]) -> None:
    ended = flowml(*arguments)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_a_history_that_was_changed_is_found_out() -> None:
    """The checker sees what no machine reports: a fact that is missing, or there twice."""
    world = make([Policy(), Policy(every=2)], replicas=3, clocks=6)
    world.go()
    assert check(world.history) == []
    facts = world.history.facts
    made = [f for f in facts if type(f).__name__ == "Made"]
    sent = [f for f in facts if type(f).__name__ == "Sent"]
    for changed, text in (
        ([f for f in facts if f is not made[0]], "lacks items"),
        ([*facts, made[0]], "2 times in store"),
        ([f for f in facts if f is not sent[0]], "bytes of gradients"),
    ):
        world.history.facts = changed
        assert any(text in v for v in check(world.history)), text

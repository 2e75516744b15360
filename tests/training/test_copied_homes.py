"""With copies of each worker's state on others, a lost home goes on from the last acknowledged step: no step is done
again that callbacks have seen, whatever the point at which its process is killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import flowml as fm
from flowml_runtime.transport.ending import Ending
from tests.conftest import wait_until
from tests.training.reference import assert_same
from tests.training.test_kills import check, count, doom, points
from tests.training.test_lost_and_replaced import EXACT, POLICIES, REPLICAS, STEPS, fit, killing

SAFE: dict[str, Any] = {"on_loss": "replace", "replicate": 1}
AT_EACH_CLOCK = ("synchronous", "sums")
"""Those with copies after every step. Others have them after each push, or when there is time."""
POINTS = points("""
    before after send Copy 5
    after take Copy 6
    before send Copied 6
    soon take Contribution 25
    after soon send Published 14
    before after take Export 8
    after send Arrived 22
    soon take Commit 6
""")
ALL = "FLOWML_KILLS" in os.environ


@pytest.fixture(scope="module")
def whole(processes: fm.Cluster) -> dict[str, fm.TrainingResult]:
    return {policy: fit(processes, policy) for policy in ("synchronous", "DiLoCo")}


def assert_no_step_again(found: fm.TrainingResult, seen: list[dict[str, Any]]) -> None:
    """What callbacks have seen stands in the history: a step that is done again has another record."""
    assert [record["step"] for record in seen] == list(range(STEPS))
    again = [told["step"] for told, kept in zip(seen, found.history, strict=True) if told is not kept]
    assert again == []


@pytest.mark.parametrize("at", POINTS if ALL else POINTS[::3], ids=str)
@pytest.mark.filterwarnings("ignore:worker.. was lost")
def test_a_home_that_is_killed_loses_no_acknowledged_step(
    processes: fm.Cluster, whole: dict[str, fm.TrainingResult], at: Ending, tmp_path: Path
) -> None:
    doom(processes, "worker:1", at)
    pid, seen = processes.pids["worker:1"], list[dict[str, Any]]()
    found = fit(processes, "synchronous", tmp_path, callbacks=[seen.append], **SAFE)
    assert processes.pids["worker:1"] != pid, f"it has not come to the point {at}"
    (loss,) = found.losses
    assert loss.step - 1 <= loss.resumed_at <= loss.step, "only the step that was under way is done again"
    assert_no_step_again(found, seen)
    check(found, "synchronous", tmp_path, whole)


@pytest.mark.filterwarnings("ignore:worker")
@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_goes_on_after_two_kills(processes: fm.Cluster, policy: str) -> None:
    seen: list[dict[str, Any]] = []
    at = {12: "worker:0", 27: "worker:2"}
    # Where there are copies when there is time, records come late: the workers may be killed after the last step.
    slow = {f"worker:{number}": 0.01 if policy in AT_EACH_CLOCK else 0.1 for number in range(REPLICAS)}
    found = fit(processes, policy, callbacks=[seen.append, killing(processes, at, [])], delays=slow, **SAFE)
    assert_no_step_again(found, seen)
    assert found.ledger.outstanding == 0
    if policy in EXACT:
        assert_same(found.params, fit(processes, policy).params)
    if policy in AT_EACH_CLOCK:
        assert found.losses
        assert all(loss.step - 1 <= loss.resumed_at for loss in found.losses)


@pytest.mark.filterwarnings("ignore:worker.. was lost")
def test_what_was_applied_on_arrival_is_applied_once(processes: fm.Cluster, tmp_path: Path) -> None:
    doom(processes, "worker:1", Ending("after", "send", "Applied", 30))
    found = count(processes, "asynchronous", tmp_path, **SAFE)
    assert [loss.workers for loss in found.losses] == [("worker:1",)]
    check(found, "asynchronous", tmp_path, {})


def test_a_pipeline_with_state_of_its_own_goes_on(threads: fm.Cluster) -> None:
    layout: dict[str, Any] = {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2}
    seen: list[dict[str, Any]] = []
    callbacks = [seen.append, killing(threads, {12: "worker:3", 20: "worker:0"}, [])]
    with pytest.warns(fm.FlowmlWarning, match=r"worker:\d (was|were|and) "):
        found = fit(threads, "DiLoCo", callbacks=callbacks, **layout, **SAFE)
    assert_no_step_again(found, seen)
    assert_same(found.params, fit(threads, "DiLoCo", **layout).params)


def test_fewer_replicas_go_on_from_the_copies(threads: fm.Cluster) -> None:
    seen: list[dict[str, Any]] = []
    try:
        callbacks = [seen.append, killing(threads, {12: "worker:0"}, [])]
        with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"):
            found = fit(threads, "synchronous", callbacks=callbacks, on_loss="shrink", replicate=2)
    finally:
        threads.bring_back(threads.lost)
    (loss,) = found.losses
    assert loss.step - 1 <= loss.resumed_at
    assert_no_step_again(found, seen)
    assert found.ledger.used == 4 * loss.resumed_at + 3 * (STEPS - loss.resumed_at)


def test_if_the_copies_are_lost_too_the_snapshot_in_memory_is_left(threads: fm.Cluster) -> None:
    """A fit survives the loss of more workers than there are copies; it goes back further then."""

    def end(record: dict[str, Any]) -> None:
        if record["step"] == 20 and not threads.lost:
            for worker in ("worker:0", "worker:1", "worker:2"):
                threads.end_worker(worker)
            wait_until(lambda: len(threads.lost) == 3, "all losses are known")

    with pytest.warns(fm.FlowmlWarning, match=r"(was|were) lost at step"):
        found = fit(threads, "synchronous", callbacks=[end], **SAFE)
    assert_same(found.params, fit(threads, "synchronous").params)
    assert found.losses[0].resumed_at <= 21


def test_arguments_that_make_no_sense_are_refused(threads: fm.Cluster) -> None:
    with pytest.raises(ValueError, match=r"replicate=4: .* need 5 workers, and the cluster has 4; give replicate=3"):
        fit(threads, "synchronous", on_loss="replace", replicate=4)
    with pytest.raises(ValueError, match="give on_loss='replace' or 'shrink' too"):
        fit(threads, "synchronous", replicate=1)
    with pytest.raises(ValueError, match="replicate"):
        fit(threads, "synchronous", on_loss="replace", replicate=-1)

"""Fits that go on after the loss of workers: every item has one fate, and synchronous fits end with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
from flowml.errors import WorkerLostError
from tests.conftest import wait_until
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

STEPS, EVERY = 40, 5
REPLICAS = 4
POLICIES: dict[str, Any] = {
    "synchronous": None,
    "quorum": fm.policies.quorum(0.75),
    "bounded": fm.policies.asynchronous(staleness=4),
    "asynchronous": fm.policies.asynchronous(),
    "DiLoCo": fm.policies.diloco(4),
    "Downpour": fm.policies.downpour(2, 4, optax.adagrad(0.05)),
    "sums": fm.policies.all_reduce(),
    "gossip": fm.policies.gossip(),
}
EXACT = {"synchronous", "DiLoCo", "sums"}
"""Those whose result does not depend on who is faster."""
UNALIGNED = {"bounded", "asynchronous", "Downpour"}
"""Those whose replicas share no clocks, so that snapshots are not at fixed steps."""


def fit(cluster: fm.Cluster, policy: str, path: Path | None = None, **options: Any) -> fm.TrainingResult:
    layout = {key: options.pop(key) for key in ("placement", "replicas", "microbatches", "delays") if key in options}
    source = options.pop("source", None)
    trainer = fm.Trainer(
        mlp_loss,
        options.pop("optimizer", None) or optax.adam(1e-2),
        cluster=cluster,
        policies=POLICIES[policy],
        **{"replicas": REPLICAS, **layout},
    )
    if path is not None:
        options["checkpoint"] = fm.Checkpoint(path, every_steps=EVERY)
    return trainer.fit(
        mlp(),
        data() if source is None else source,
        **{"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **options},
    )


def killing(cluster: fm.Cluster, at: dict[int, str], seen: list[int]) -> Callable[[dict[str, Any]], None]:
    """A callback that kills workers at steps, once each, and notes the steps that it sees."""

    def callback(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        worker = at.pop(record["step"], None)
        if worker is not None and worker in cluster.pids:
            os.kill(cluster.pids[worker], signal.SIGKILL)
        elif worker is not None:
            cluster.end_worker(worker)

    return callback


def assert_survives(cluster: fm.Cluster, policy: str, path: Path, at: dict[int, str], **options: Any) -> None:
    seen: list[int] = []
    steps = sorted(at)
    victims = tuple(at[step] for step in steps)
    callbacks = [killing(cluster, at, seen)]
    with pytest.warns(fm.FlowmlWarning, match=r"was lost at step \d+ .* goes on from step"):
        found = fit(cluster, policy, path, callbacks=callbacks, on_loss="replace", **options)
    assert seen == list(range(STEPS)), "callbacks see each step once"
    assert [record["step"] for record in found.history] == list(range(STEPS))
    assert [loss.workers for loss in found.losses] == [(victim,) for victim in victims]
    for step, loss in zip(steps, found.losses, strict=True):
        assert loss.step >= step
        least = 1 if policy in UNALIGNED else step - step % EVERY
        assert least <= loss.resumed_at <= loss.step, "it does not go back further than the snapshot"
    ledger = found.ledger
    given = ledger.used + ledger.dropped + ledger.folded
    assert given + ledger.unseen == STEPS * REPLICAS
    assert ledger.outstanding == 0
    assert fm.restore(path).step == STEPS
    if policy in EXACT:
        whole = fit(cluster, policy, **options)
        assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
        assert [r["loss"] for r in found.history] == [r["loss"] for r in whole.history]
        assert found.ledger == whole.ledger
    if policy != "quorum":
        assert ledger.used == STEPS * REPLICAS


@pytest.mark.parametrize("policy", POLICIES)
def test_a_killed_process_is_replaced(processes: fm.Cluster, policy: str, tmp_path: Path) -> None:
    assert_survives(processes, policy, tmp_path, {12: "worker:0", 27: "worker:2"})


@pytest.mark.parametrize("policy", ["synchronous", "quorum"])
def test_a_worker_in_this_process_is_replaced(threads: fm.Cluster, policy: str, tmp_path: Path) -> None:
    assert_survives(threads, policy, tmp_path, {12: "worker:0", 27: "worker:2"})


def test_a_stage_of_a_pipeline_is_replaced(processes: fm.Cluster, tmp_path: Path) -> None:
    layout = {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2}
    seen: list[int] = []
    callbacks = [killing(processes, {12: "worker:3"}, seen)]
    with pytest.warns(fm.FlowmlWarning, match=r"worker:3 was lost"):
        found = fit(processes, "synchronous", tmp_path, callbacks=callbacks, on_loss="replace", **layout)
    whole = fit(processes, "synchronous", **layout)
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
    assert found.ledger == whole.ledger


def test_without_a_checkpoint_the_driver_keeps_what_is_needed(processes: fm.Cluster) -> None:
    callbacks = [killing(processes, {20: "worker:1"}, [])]
    with pytest.warns(fm.FlowmlWarning, match=r"worker:1 was lost"):
        found = fit(processes, "synchronous", callbacks=callbacks, on_loss="replace")
    assert_same(found.params, fit(processes, "synchronous").params)


COUPLED = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(1e-2))
"""Homes of several workers exchange values before each update."""


def test_homes_that_exchange_values_are_replaced(threads: fm.Cluster, tmp_path: Path) -> None:
    assert_survives(threads, "synchronous", tmp_path, {12: "worker:0", 27: "worker:2"}, optimizer=COUPLED)


def test_homes_that_exchange_values_move(threads: fm.Cluster) -> None:
    callbacks = [killing(threads, {12: "worker:0"}, [])]
    try:
        with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"):
            found = fit(threads, "synchronous", callbacks=callbacks, on_loss="shrink", optimizer=COUPLED)
    finally:
        threads.bring_back(threads.lost)
    resumed_at = found.losses[0].resumed_at
    assert found.ledger.used == 4 * resumed_at + 3 * (STEPS - resumed_at)
    assert found.history[-1]["loss"] < found.history[0]["loss"]


class Ends:
    """Ends a worker whenever one example is read, as a step that needs too much memory would."""

    def __init__(self, cluster: fm.Cluster) -> None:
        self._cluster, self._rows = cluster, data()
        self.ended = 0

    def __len__(self) -> int:
        return len(self._rows["x"])

    def __getitem__(self, index: Any) -> Any:
        if len(self) // 2 in index:
            self.ended += 1
            self._cluster.end_worker("worker:1")
        return {name: rows[index] for name, rows in self._rows.items()}


@pytest.mark.filterwarnings("ignore:worker.1 was lost")
def test_a_step_that_ends_its_worker_each_time_ends_the_fit(threads: fm.Cluster) -> None:
    source = Ends(threads)
    try:
        with pytest.raises(WorkerLostError, match=r"lost 11 times without a new step in between.*memory"):
            fit(threads, "synchronous", source=source, shuffle=False, on_loss="replace")
    finally:
        threads.bring_back(threads.lost)
    assert source.ended >= 11


@pytest.mark.parametrize("policy", ["synchronous", "quorum", "bounded", "DiLoCo", "Downpour", "sums", "gossip"])
def test_a_fit_goes_on_with_fewer_replicas(processes: fm.Cluster, policy: str, tmp_path: Path) -> None:
    seen: list[int] = []
    try:
        callbacks = [killing(processes, {12: "worker:0", 27: "worker:2"}, seen)]
        with pytest.warns(fm.FlowmlWarning, match=r"left out with (its|their) replicas?; the fit goes on from step"):
            found = fit(processes, policy, tmp_path, callbacks=callbacks, on_loss="shrink")
        assert {d.worker for d in processes.devices} == {"worker:1", "worker:3"}
        restored = fm.restore(tmp_path)
    finally:
        processes.bring_back(processes.lost)
    assert seen == [record["step"] for record in found.history] == list(range(STEPS))
    assert [loss.workers for loss in found.losses] == [("worker:0",), ("worker:2",)]
    ledger = found.ledger
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == STEPS * REPLICAS
    assert ledger.outstanding == 0
    if policy in UNALIGNED:
        assert ledger.used == STEPS * REPLICAS, "the others take the items of the lost replicas"
    else:
        assert [found.history[step]["replicas"] for step in (0, STEPS - 1)] == [3 if policy == "quorum" else 4, 2]
        resumed_at = [loss.resumed_at for loss in found.losses]
        steps = [resumed_at[0], resumed_at[1] - resumed_at[0], STEPS - resumed_at[1]]
        if policy != "quorum":
            assert ledger.used + ledger.dropped == 4 * steps[0] + 3 * steps[1] + 2 * steps[2]
            each = {"DiLoCo": 4, "gossip": STEPS}.get(policy, 1)
            unsent = sum(step % each for step in resumed_at)
            assert ledger.dropped == unsent, "what a lost replica had not sent when the snapshot was taken"
    assert restored.step == STEPS
    assert_same(restored.params, found.params)
    if policy not in UNALIGNED:
        blamed = {s.replica for s in found.stragglers() if s.left_out and s.replica in (0, 2)}
        assert not blamed, "lost replicas are not late"
    if policy != "DiLoCo":  # which learns slowly at first, whole or not
        assert found.history[-1]["loss"] < found.history[0]["loss"] / 2


def test_a_pipeline_shrinks_by_whole_replicas(processes: fm.Cluster, tmp_path: Path) -> None:
    layout = {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2}
    try:
        callbacks = [killing(processes, {12: "worker:1"}, [])]
        with pytest.warns(fm.FlowmlWarning, match=r"worker:1 was lost"):
            found = fit(processes, "synchronous", tmp_path, callbacks=callbacks, on_loss="shrink", **layout)
    finally:
        processes.bring_back(processes.lost)
    assert [found.history[step]["replicas"] for step in (0, STEPS - 1)] == [2, 1]
    assert found.ledger.used == 2 * found.losses[0].resumed_at + STEPS - found.losses[0].resumed_at


TOO_FEW = (
    r"during training at step \d+: [^;]*\. 2 of 4 replicas are left, and the fit needs 3 \(min_replicas=\); "
    r"give on_loss='replace', or a smaller min_replicas$"
)


def test_too_few_replicas_end_the_fit(threads: fm.Cluster) -> None:
    callbacks = [killing(threads, {5: "worker:0", 8: "worker:2"}, [])]
    try:
        with (
            pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"),
            pytest.raises(WorkerLostError, match=TOO_FEW),
        ):
            fit(threads, "synchronous", callbacks=callbacks, on_loss="shrink", min_replicas=3)
    finally:
        threads.bring_back(threads.lost)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (None, r": [^;]*; worker:\d was lost too\. 2 of 4 replicas are left, and the fit needs 3 \(min_replicas=\)"),
        (fm.Policy(quorum=fm.Quorum(3)), r": [^;]*; worker:\d was lost too\. 2 of 4 replicas are left, too few for"),
    ],
    ids=["min_replicas", "count"],
)
def test_all_workers_are_named_that_are_lost_at_once(threads: fm.Cluster, policy: Any, words: str) -> None:
    def end(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            for worker in ("worker:1", "worker:2"):
                threads.end_worker(worker)
            wait_until(lambda: len(threads.devices) == REPLICAS - 2, "both are known to be lost")

    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads, replicas=REPLICAS, policies=policy)
    least = 3 if policy is None else 1
    about: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False, "min_replicas": least}
    try:
        with pytest.raises(WorkerLostError, match=words) as raised:
            trainer.fit(mlp(), data(), on_loss="shrink", callbacks=[end], **about)
    finally:
        threads.bring_back(threads.lost)
    assert all(worker in str(raised.value) for worker in ("worker:1", "worker:2"))


COUNTS = {
    "drop": fm.Quorum(3),
    "fold": fm.Quorum(3, late="fold", limit_s=60.0),
    "samples": fm.Quorum(3 * BATCH // REPLICAS, of="samples"),
}


@pytest.mark.parametrize("quorum", COUNTS.values(), ids=COUNTS)
def test_a_count_that_too_few_replicas_cannot_meet_ends_the_fit(threads: fm.Cluster, quorum: fm.Quorum) -> None:
    """It names the worker and what to give, at once, where the clock would wait for ever."""
    callbacks = [killing(threads, {5: "worker:0", 8: "worker:2"}, [])]
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=threads, replicas=REPLICAS, policies=fm.Policy(quorum=quorum)
    )
    about: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False}
    most = 2 * (BATCH // REPLICAS if quorum.of == "samples" else 1)
    words = rf"worker:2 was lost.* 2 of 4 .*, too few for Quorum\(\d.*on_loss='replace', or a count of at most {most}"
    try:
        with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"), pytest.raises(WorkerLostError, match=words):
            trainer.fit(mlp(), data(), on_loss="shrink", callbacks=callbacks, **about)
    finally:
        threads.bring_back(threads.lost)


def test_a_deadline_goes_on_with_those_that_are_left(threads: fm.Cluster) -> None:
    policy = fm.Policy(quorum=fm.Deadline(3, limit_s=0.05))
    callbacks = [killing(threads, {5: "worker:0", 8: "worker:2"}, [])]
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads, replicas=REPLICAS, policies=policy)
    about: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False}
    try:
        with pytest.warns(fm.FlowmlWarning, match=r"worker:\d was lost"):
            found = trainer.fit(mlp(), data(), on_loss="shrink", callbacks=callbacks, **about)
    finally:
        threads.bring_back(threads.lost)
    assert len(found.history) == STEPS


def test_workers_that_were_lost_before_are_replaced_first(threads: fm.Cluster) -> None:
    threads.end_worker("worker:1")
    wait_until(lambda: threads.lost == ("worker:1",), "the loss is known")
    assert fit(threads, "synchronous", on_loss="replace").losses == ()
    assert len(threads.devices) == REPLICAS


def test_what_cannot_be(threads: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="on_loss"):
        fit(threads, "synchronous", on_loss="ignore")
    with pytest.raises(ValueError, match=r"min_replicas is for .* or on_loss='shrink'"):
        fit(threads, "synchronous", on_loss="replace", min_replicas=2)
    with pytest.raises(ValueError, match="min_replicas=5 can never be met: the Trainer has 4 replicas"):
        fit(threads, "synchronous", on_loss="shrink", min_replicas=5)
    with pytest.raises(
        ValueError, match=r"min_replicas=2 cannot hold: with so few replicas .*Quorum\(4\) asks for more"
    ):
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads, replicas=REPLICAS, policies=fm.policies.quorum(4)).fit(
            mlp(), data(), batch_size=BATCH, steps=1, on_loss="shrink", min_replicas=2
        )
    limited = fm.Policy(quorum=fm.Deadline(4, limit_s=60.0))
    found = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads, replicas=REPLICAS, policies=limited).fit(
        mlp(), data(), batch_size=BATCH, steps=1, on_loss="shrink", min_replicas=2, progress=False
    )
    assert len(found.history) == 1, "a limit lets fewer replicas than the quorum complete a step"
    for use in (threads.end_worker, threads.start_worker, threads.bring_back):
        with pytest.raises(fm.ClusterError, match="'worker:9' is not in the cluster, whose workers are worker:0, "):
            use("worker:9")


@pytest.mark.filterwarnings("ignore:the checkpoint")
@pytest.mark.parametrize("policy", ["synchronous", "sums", "gossip", "DiLoCo"])
def test_a_checkpoint_of_fewer_replicas_goes_on_with_all(threads: fm.Cluster, policy: str, tmp_path: Path) -> None:
    """The replicas that were lost have no place in it, and begin with what the others have."""
    callbacks = [killing(threads, {8: "worker:0"}, [])]
    try:
        with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"):
            shrunk = fit(threads, policy, tmp_path, callbacks=callbacks, on_loss="shrink", steps=20)
    finally:
        threads.bring_back(threads.lost)
    found = fit(threads, policy, tmp_path, resume="auto")
    assert (found.resumed_at, len(found.history)) == (20, STEPS - 20)
    assert found.history[-1]["replicas"] == REPLICAS
    assert found.history[0]["loss"] < shrunk.history[0]["loss"]
    assert found.ledger.outstanding == 0

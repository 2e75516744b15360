"""A fit goes on from a checkpoint with other replicas, stages, microbatches, placement or workers."""

from __future__ import annotations

import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.environment import checkpoints
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_checkpoints import ASYNCHRONOUS, POLICIES, STEPS, STOP, Stopped

Form = tuple[int, int, int]
"""(replicas, stages, microbatches)"""
FIRST: Form = (2, 1, 1)
EXACT: dict[str, tuple[Any, Form, tuple[Form, ...]]] = {
    "parameter server": (None, FIRST, ((1, 1, 1), (3, 1, 2), (1, 2, 3))),
    "all-reduce": (fm.policies.all_reduce(), FIRST, ((4, 1, 1), (2, 2, 2))),
    "every": (
        {"fc0*": fm.policies.every(3), "*": fm.Policy()},
        (2, 1, 2),
        ((4, 1, 2), (1, 1, 2), (2, 1, 1), (2, 2, 3), (4, 1, 3)),
    ),
    "every layer": (fm.policies.every(3), FIRST, ((1, 1, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1))),
    "every layer, one replica": (fm.policies.every(3), (1, 1, 1), ((2, 2, 1), (2, 1, 1), (1, 2, 2))),
    "coded": (fm.policies.coded(1), (4, 1, 1), ((2, 1, 1),)),
}
"""Policies with which a step is a mean over the batch, however it is divided: the form that is stopped, and others."""


def fit(cluster: fm.Cluster, form: Form, policies: Any, placement: Any = None, **more: Any) -> fm.TrainingResult:
    replicas, stages, microbatches = form
    trainer = fm.Trainer(
        mlp_loss,
        optax.adam(1e-2),
        cluster=cluster,
        replicas=replicas,
        microbatches=microbatches,
        placement=placement or (fm.Pipeline(stages=stages) if stages > 1 else "auto"),
        policies=policies,
    )
    options: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **more}
    return trainer.fit(mlp(), data(), **options)


def stopped(cluster: fm.Cluster, path: Path, form: Form, policies: Any, placement: Any = None) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["step"] >= STOP:
            raise Stopped

    with pytest.raises(Stopped):
        checkpoint = fm.Checkpoint(path, every_steps=STOP)
        fit(cluster, form, policies, placement, checkpoint=checkpoint, callbacks=[stop])


def copied(path: Path, form: Form) -> Path:
    """A copy of a directory of checkpoints, for a fit in this form."""
    target = path.with_name("-".join(map(str, form)))
    shutil.copytree(path, target)
    return target


def resumed(
    cluster: fm.Cluster, path: Path, form: Form, policies: Any, placement: Any = None, **more: Any
) -> fm.TrainingResult:
    checkpoint = fm.Checkpoint(path, every_steps=STOP)
    return fit(cluster, form, policies, placement, checkpoint=checkpoint, resume="auto", **more)


def assert_close(found: fm.TrainingResult, expected: fm.TrainingResult) -> None:
    for a, b in zip(
        jax.tree.leaves((found.params, found.opt_state)),
        jax.tree.leaves((expected.params, expected.opt_state)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def assert_adds_up(result: fm.TrainingResult, replicas: int) -> None:
    ledger = result.ledger
    assert [r["step"] for r in result.history] == list(range(STOP, STEPS))
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == STEPS * replicas
    assert sum(r.used for r in ledger.replicas) == ledger.used


@pytest.mark.parametrize("name", EXACT)
def test_a_mean_over_the_batch_goes_on_in_any_form(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    policies, first, forms = EXACT[name]
    whole = fit(threads_cluster, first, policies)
    stopped(threads_cluster, tmp_path / "first", first, policies)
    for form in forms:
        path = copied(tmp_path / "first", form)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = resumed(threads_cluster, path, form, policies)
        assert_close(found, whole)
        assert_adds_up(found, form[0])
        assert found.ledger.seen == whole.ledger.seen


def test_other_workers_and_another_number_of_them(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    whole = fit(threads_cluster, FIRST, None)
    there, here = ({"fc0": f"worker:{w}", "*": f"worker:{1 - w}"} for w in (0, 1))
    stopped(threads_cluster, tmp_path / "first", (2, 2, 1), None, there)
    path = copied(tmp_path / "first", (2, 2, 1))
    assert_close(resumed(threads_cluster, path, (2, 2, 1), None, here), whole)
    with fm.Cluster.threads(workers=1) as alone:
        assert_close(resumed(alone, copied(tmp_path / "first", (1, 1, 1)), (1, 1, 1), None), whole)


def test_what_a_resumed_fit_writes_goes_on_too(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    policies = EXACT["every"][0]
    whole = fit(threads_cluster, FIRST, policies)
    stopped(threads_cluster, tmp_path, FIRST, policies)
    resumed(threads_cluster, tmp_path, (4, 1, 1), policies, steps=STOP + 1)
    found = resumed(threads_cluster, tmp_path, FIRST, policies)
    assert len(found.history) == STEPS - STOP - 1
    assert found.ledger.used == whole.ledger.used and found.ledger.seen == whole.ledger.seen


LEFT_OUT: dict[str, str] = {
    "residuals": "without what the filters remember of fc0. Param",
    "significance and duals": "changes that were not sent of fc0",
    "own parameters": "",
    "fragments": "",
    "gossip and copies": "copies of neighbours",
}
"""Policies with buffers for each replica -> what a fit with other replicas does without."""


@pytest.mark.filterwarnings("ignore:mlp_loss is not convex", "ignore:.*all replicas are in one site")
@pytest.mark.parametrize("name", LEFT_OUT)
def test_buffers_of_replicas_go_on_with_other_replicas(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    policies = POLICIES[name]
    whole = fit(threads_cluster, FIRST, policies)
    stopped(threads_cluster, tmp_path, FIRST, policies)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = resumed(threads_cluster, tmp_path, (3, 1, 1), policies)
    told = " ".join(str(w.message) for w in caught if "was written by" in str(w.message))
    assert LEFT_OUT[name] in told and bool(LEFT_OUT[name]) == bool(told)
    assert_adds_up(found, 3)
    assert found.history[-1]["loss"] < 1.3 * whole.history[-1]["loss"]


@pytest.mark.parametrize("name", ["residuals", "own parameters", "gossip and copies", "sums"])
def test_the_same_replicas_go_on_elsewhere_as_if_they_had_not_moved(
    threads_cluster: fm.Cluster, tmp_path: Path, name: str
) -> None:
    """With two stages in place of one, and with the layers on other workers."""
    policies = POLICIES[name]
    whole = fit(threads_cluster, FIRST, policies)
    stopped(threads_cluster, tmp_path, FIRST, policies)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resumed(threads_cluster, tmp_path, (2, 2, 1), policies)
    assert_close(found, whole)
    assert found.ledger == whole.ledger


ADDING: dict[str, Any] = {
    "gradients": fm.Policy(every=3, apply="sum"),
    "changes": fm.Policy(every=3, payload=fm.Delta(), apply="sum"),
}


def count(
    cluster: Any, path: Path, form: Form, policies: Any, every: int, examples: int, delays: Any = None, **more: Any
) -> fm.TrainingResult:
    """A fit of one epoch in which each step of a replica adds 1 to the sum of all parameters. A checkpoint every so
    many steps is kept."""
    trainer = fm.Trainer(
        lambda params, batch: -jnp.mean(batch @ params["w"]),
        optax.sgd(1.0),
        cluster=cluster,
        replicas=form[0],
        microbatches=form[2],
        policies=policies,
        delays=delays,
    )
    params, source = {"w": np.zeros(examples, np.float32)}, np.eye(examples, dtype=np.float32)
    checkpoint = fm.Checkpoint(path, every_steps=every, keep=examples)
    options: dict[str, Any] = {"batch_size": 4, "epochs": 1, "progress": False, "checkpoint": checkpoint, **more}
    return trainer.fit(params, source, **options)


@pytest.mark.parametrize("forms", [((4, 1, 1), (2, 1, 1)), ((2, 1, 1), (4, 1, 1)), ((4, 1, 1), (2, 1, 2))], ids=str)
@pytest.mark.parametrize("name", ADDING)
def test_what_waits_is_added_up_once_by_other_replicas(
    threads_cluster: fm.Cluster, tmp_path: Path, name: str, forms: tuple[Form, Form]
) -> None:
    about: Any = (ADDING[name], STOP, 4 * STEPS)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] >= STOP:
            raise Stopped

    with pytest.raises(Stopped):
        count(threads_cluster, tmp_path, forms[0], *about, callbacks=[stop])
    assert fm.restore(tmp_path).step % 3, "something waits"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = count(threads_cluster, tmp_path, forms[1], *about, resume="auto")
    steps = STOP * forms[0][0] + (STEPS - STOP) * forms[1][0]
    assert found.params["w"].sum() == pytest.approx(steps)


@pytest.mark.parametrize("every", [3, 4])
@pytest.mark.parametrize(("before", "now", "snapshots"), [(2, 4, (2, 4, 6, 8, 10, 12, 14)), (4, 2, (2, 6, 10, 14))])
def test_local_steps_of_each_replica_wait_for_others(
    tmp_path: Path, every: int, before: int, now: int, snapshots: tuple[int, ...]
) -> None:
    """Without common clocks: some have just pushed, and others have not."""
    steps = 16

    def simulated(replicas: int, path: Path, **more: Any) -> fm.TrainingResult:
        cluster = fm.SimulatedCluster(4, fm.sim.Constant(0.01), fm.sim.Network(1e-3, 1e9))
        delays = {f"worker:{w}": 0.003 * w for w in range(replicas)}
        policies = fm.policies.downpour(every, every)
        return count(cluster, path, (replicas, 1, 1), policies, 1, 4 * steps, delays, **more)

    simulated(before, tmp_path / "all")
    for step in snapshots:
        name = f"step-{step:012d}"
        shutil.copytree(tmp_path / "all" / name, tmp_path / f"{step}" / name)
        found = simulated(now, tmp_path / f"{step}", resume="auto")
        assert found.params["w"].sum() == before * step + now * (steps - step)


def test_residuals_go_on_with_other_microbatches(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    policies = fm.Policy(filters=(fm.filters.top_k(0.25).with_error_feedback(),))
    whole = fit(threads_cluster, FIRST, policies)
    stopped(threads_cluster, tmp_path, FIRST, policies)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resumed(threads_cluster, tmp_path, (2, 1, 2), policies)
    assert_close(found, whole)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_without_common_clocks_the_items_are_counted_anew(
    threads_cluster: fm.Cluster, tmp_path: Path, name: str
) -> None:
    steps, policies = 96, ASYNCHRONOUS[name]
    checkpoint = fm.Checkpoint(tmp_path, every_steps=4)

    def stop(_: dict[str, Any]) -> None:
        if checkpoints.snapshots(tmp_path):
            raise Stopped
        threading.Event().wait(0.02)  # the disk may be slow, and the replicas wait for their next items

    with pytest.raises(Stopped):
        fit(threads_cluster, FIRST, policies, steps=steps, checkpoint=checkpoint, callbacks=[stop])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit(threads_cluster, (4, 1, 1), policies, steps=steps, checkpoint=checkpoint, resume="auto")
    ledger = found.ledger
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == 4 * steps
    assert found.history[-1]["loss"] < 0.8


def test_items_whose_gradients_are_left_out_are_dropped(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """Sums of weighted gradients have no form for other microbatches."""
    examples = 4 * STEPS
    source = {"x": np.eye(examples, dtype=np.float32), "mask": np.ones(examples, np.float32)}

    def loss(params: Any, batch: Any) -> Any:
        return -jnp.sum(batch["x"] @ params["w"] * batch["mask"]) / jnp.sum(batch["mask"])

    def masked(path: Path, microbatches: int, **more: Any) -> fm.TrainingResult:
        about: dict[str, Any] = {"replicas": 2, "microbatches": microbatches, "policies": fm.policies.every(3)}
        weight = {"weight": lambda batch: jnp.sum(batch["mask"])}  # pyright: ignore[reportUnknownLambdaType]
        trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=threads_cluster, **about, **weight)
        checkpoint = fm.Checkpoint(path, every_steps=STOP)
        options: dict[str, Any] = {"batch_size": 4, "steps": STEPS, "progress": False, "checkpoint": checkpoint}
        return trainer.fit({"w": np.zeros(examples, np.float32)}, source, **options, **more)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] >= STOP:
            raise Stopped

    with pytest.raises(Stopped):
        masked(tmp_path, 2, callbacks=[stop])
    with pytest.warns(fm.FlowmlWarning, match="without gradients that waited for the next push of w"):
        found = masked(tmp_path, 1, resume="auto")
    applied = np.count_nonzero(found.params["w"])
    assert applied == 4 * (STEPS - STOP % 3)
    assert (found.ledger.used * 2, found.ledger.dropped * 2) == (applied, examples - applied)


@pytest.mark.parametrize("policies", [fm.policies.asynchronous(every=7, apply="sum"), fm.policies.downpour(7, 7)])
def test_near_the_end_what_waits_is_pushed_or_dropped(tmp_path: Path, policies: fm.Policy) -> None:
    """A replica pushes with its last item what it had gathered before, so each gets one, if there are as many."""
    steps, replicas = 24, 4

    def simulated(path: Path, **more: Any) -> fm.TrainingResult:
        cluster = fm.SimulatedCluster(replicas, fm.sim.Constant(0.01), fm.sim.Network(1e-3, 1e9))
        delays = {"worker:1": 0.03, "worker:2": 0.015}
        return count(cluster, path, (replicas, 1, 1), policies, 1, replicas * steps, delays, **more)

    whole = simulated(tmp_path / "all")
    assert whole.params["w"].sum() == whole.ledger.used == replicas * steps
    dropped: dict[int, int] = {}
    for step in range(steps // 2, steps):
        name = f"step-{step:012d}"
        if (tmp_path / "all" / name).exists():
            shutil.copytree(tmp_path / "all" / name, tmp_path / f"{step}" / name)
            found = simulated(tmp_path / f"{step}", resume="auto")
            assert found.params["w"].sum() == found.ledger.used
            dropped[step] = replicas * steps - found.ledger.used
    assert dropped[steps - 1] > 0, "fewer items are left than replicas"
    assert not any(dropped[step] for step in dropped if step < steps - 1)


@pytest.mark.parametrize("name", ADDING)
def test_a_fit_that_has_gone_on_without_a_replica_goes_on_so(
    threads_cluster: fm.Cluster, tmp_path: Path, name: str
) -> None:
    """What the others had gathered was divided among all, and the share of the one that is not there was lost."""
    steps, lost = 40, "worker:3"

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            threads_cluster.end_worker(lost)
        if record["replicas"] == 3 and fm.restore(tmp_path).step % 3:
            raise Stopped

    options: dict[str, Any] = {"replicas": "elastic"}
    about: Any = (threads_cluster, tmp_path, (4, 1, 1), ADDING[name], 1, 4 * steps, {"worker:0": 0.01})
    try:
        with pytest.raises(Stopped), pytest.warns(fm.FlowmlWarning, match=f"{lost} was lost"):
            count(*about, callbacks=[stop], **options)
        found = count(*about, resume="auto", **options)
    finally:
        threads_cluster.bring_back(threads_cluster.lost)
    rows = [tally.used for tally in found.ledger.groups.values()] or [found.ledger.used]
    assert found.params["w"].sum() == pytest.approx(rows[0])
    assert found.ledger.dropped <= 3, "what the lost one had gathered"

"""A fit that stops at a snapshot and goes on ends with the bits of one that was not stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.environment import checkpoints
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

STEPS, STOP = 8, 5
"""The steps of the whole fit, and those before the snapshot at which it stops: not a multiple of any rhythm here."""


class Stopped(Exception):
    """Stands for whatever ends a fit."""


@dataclass(frozen=True)
class Case:
    """A fit of `STEPS` steps, without stopping and stopped."""

    fit: Callable[..., fm.TrainingResult]
    path: Path

    def stopped(self, after: int = STOP) -> None:
        def stop(record: dict[str, Any]) -> None:
            if record["step"] >= after:
                raise Stopped

        with pytest.raises(Stopped):
            self.fit(checkpoint=self.checkpoint(after), callbacks=[stop])

    def checkpoint(self, every: int = STOP) -> fm.Checkpoint:
        return fm.Checkpoint(self.path, every_steps=every)

    def resumed(self, every: int = STOP) -> fm.TrainingResult:
        return self.fit(checkpoint=self.checkpoint(every), resume="auto")


def case(cluster: fm.Cluster, path: Path, policies: Any = None, optimizer: Any = None, **options: Any) -> Case:
    options = {"replicas": 2, **options}
    trainer = fm.Trainer(mlp_loss, optimizer or optax.adam(1e-2), cluster=cluster, policies=policies, **options)

    def fit(**more: Any) -> fm.TrainingResult:
        options: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **more}
        return trainer.fit(mlp(), data(), **options)

    return Case(fit, path / "checkpoints")


def assert_goes_on(case: Case) -> None:
    """The whole fit, and one that stops and goes on, are the same to the bit, and use the same work items."""
    whole = case.fit()
    case.stopped()
    assert fm.restore(case.path).step == STOP
    resumed = case.resumed()
    assert_same((resumed.params, resumed.opt_state), (whole.params, whole.opt_state))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history[STOP:]]
    assert resumed.history[0]["step"] == STOP
    assert resumed.ledger == whole.ledger


TOP = fm.filters.top_k(0.2).with_error_feedback()
POLICIES: dict[str, Any] = {
    "parameter server": None,
    "sums": {"fc0*": fm.policies.all_reduce(), "fc1*": fm.policies.every(3), "*": fm.policies.factors()},
    "filtered sums": {
        "fc0*": fm.Policy(fm.Ring(), filters=(fm.filters.low_rank(1).with_error_feedback(),)),
        "fc1*": fm.Policy(fm.AllReduce(), every=2, filters=(fm.filters.random_k(0.2).with_error_feedback(),)),
        "*": fm.policies.diloco(2, topology=fm.AllReduce(), filters=(fm.filters.random_k(0.5),)),
    },
    "exchanges": {
        "fc0*": fm.Policy(fm.Ring(), filters=(TOP,)),
        "fc1*": fm.Policy(fm.AllReduce(), every=2, filters=(fm.filters.quantise(4).with_error_feedback(),)),
        "*": fm.policies.diloco(2, topology=fm.Tree(), filters=(TOP, fm.filters.quantise(4, stochastic=True))),
    },
    "residuals": {
        "fc0*": fm.Policy(filters=(TOP, fm.filters.key_cache())),
        "fc1*": fm.Policy(every=2, filters=(fm.filters.quantise(4).with_error_feedback(),)),
        "*": fm.Policy(pull_filters=(fm.filters.top_k(0.3), fm.filters.key_cache())),
    },
    "own parameters": {
        "fc0*": fm.policies.diloco(4),
        "fc1*": fm.policies.sparse_loco(3, 0.3, 4),
        "*": fm.policies.local_sgd(2),
    },
    "fragments": fm.policies.diloco(4, fragments=2, delay=1),
    "significance and duals": {"fc0*": fm.policies.gaia(0.01), "*": fm.policies.admm(0.1, 1.0, 0)},
    "gossip and copies": {
        "fc0*": fm.policies.gossip("ring", every=2),
        "fc1*": fm.policies.choco((fm.filters.top_k(0.3),)),
        "*": fm.policies.no_loco(3),
    },
    "coded": fm.policies.coded(1),
}


@pytest.mark.filterwarnings("ignore:mlp_loss is not convex", "ignore:.*all replicas are in one site")
@pytest.mark.parametrize("name", POLICIES)
def test_a_stopped_fit_goes_on_bit_by_bit(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    assert_goes_on(case(threads_cluster, tmp_path, POLICIES[name]))


def test_the_last_snapshot_is_the_result(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    result = (one := case(threads_cluster, tmp_path)).fit(checkpoint=fm.Checkpoint(tmp_path / "checkpoints"))
    found = fm.restore(one.path)
    assert found.step == STEPS
    assert_same(found.params, result.params)
    count, mu, nu = (found.opt_state[0][name] for name in ("count", "mu", "nu"))
    assert_same((count, mu, nu), tuple(result.opt_state[0]))


def test_a_finished_fit_goes_on_when_it_gets_more_steps(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    one = case(threads_cluster, tmp_path)
    whole = one.fit()
    one.fit(steps=STOP, checkpoint=one.checkpoint())
    assert_same(one.resumed().params, whole.params)
    again = one.resumed()  # there is nothing left to do
    assert_same(again.params, whole.params)
    assert again.history == []


def test_workers_in_processes_send_and_get_the_same_buffers(process_cluster: fm.Cluster, tmp_path: Path) -> None:
    assert_goes_on(case(process_cluster, tmp_path, POLICIES["own parameters"]))


class Fed:
    """A source that stays with the driver."""

    def __init__(self) -> None:
        self.arrays = data()

    def __len__(self) -> int:
        return len(self.arrays["x"])

    def __getitem__(self, indices: Any) -> dict[str, np.ndarray]:
        return {name: array[indices] for name, array in self.arrays.items()}


def noisy_loss(params: Any, batch: Any, rng: jax.Array) -> jax.Array:
    noise = 0.1 * jax.random.normal(rng, batch["x"].shape)
    return mlp_loss(params, {**batch, "x": batch["x"] + noise})


def test_stages_keys_and_fed_batches_go_on(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    policies = {"fc0*": POLICIES["residuals"]["fc1*"], "fc1*": fm.policies.every(3), "*": fm.Policy()}
    optimizer = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(1)), optax.adam(1e-2))
    trainer = fm.Trainer(
        noisy_loss,
        optimizer,
        cluster=threads_cluster,
        replicas=2,
        placement=fm.Pipeline(stages=2),
        microbatches=2,
        policies=policies,
    )

    def fit(**more: Any) -> fm.TrainingResult:
        return trainer.fit(mlp(), Fed(), batch_size=BATCH, steps=STEPS, seed=3, progress=False, **more)

    assert_goes_on(Case(fit, tmp_path / "checkpoints"))
    found = fm.restore(tmp_path / "checkpoints")
    assert jax.numpy.issubdtype(found.opt_state[0]["rng_key"].dtype, jax.dtypes.prng_key)


def test_snapshots_change_nothing(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    one = case(threads_cluster, tmp_path, POLICIES["residuals"])
    whole, saved = one.fit(), one.fit(checkpoint=fm.Checkpoint(one.path, every_steps=2, keep=2))
    assert_same((saved.params, saved.opt_state), (whole.params, whole.opt_state))
    kept = sorted(p.name for p in one.path.iterdir())
    assert len(kept) == 2  # which one before the last depends on how long each was written
    assert kept[-1] == "step-000000000008"


ASYNCHRONOUS: dict[str, Any] = {
    "on arrival": fm.policies.asynchronous(),
    "within a bound": fm.policies.asynchronous(2, every=3),
    "mixtures": fm.policies.elastic_averaging(2, 0.3),
    "sums of sites": fm.Policy(topology=fm.Hierarchy(fm.AllReduce(), fm.ParameterServer(), sites=1), staleness=4),
    "dropping": fm.policies.quorum(1),
}


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_without_a_common_order_each_item_counts_once(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    slow = {"worker:0": 0.01, "worker:1": 0.01}  # or the fit may be over before a busy disk has the first snapshot
    one, steps = case(threads_cluster, tmp_path, ASYNCHRONOUS[name], delays=slow), 96
    checkpoint = fm.Checkpoint(one.path, every_steps=4)

    def stop(_: dict[str, Any]) -> None:
        if checkpoints.snapshots(one.path):
            raise Stopped

    with pytest.raises(Stopped):
        one.fit(steps=steps, checkpoint=checkpoint, callbacks=[stop])
    before = fm.restore(one.path).step
    assert 0 < before < steps
    resumed = one.fit(steps=steps, checkpoint=checkpoint, resume="auto")
    ledger = resumed.ledger
    assert len(resumed.history) == steps - before
    assert ledger.outstanding == 0
    items = steps * 2
    assert ledger.used + ledger.dropped + ledger.unseen == items
    if name != "dropping":  # each example takes part once in each of the 24 epochs
        assert (ledger.used, ledger.seen) == (items, ((24, 96),))


ENDING: dict[str, Any] = {
    "on arrival": fm.policies.asynchronous(),
    "Downpour": fm.policies.downpour(1, 2),
    "epochs end early": fm.policies.adam_epoch(0.75),
    "synchronous": fm.policies.synchronous(),
}


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("first", [2, 3, 4, 7])
def test_what_an_ended_fit_has_left_of_an_epoch_is_not_lost(
    threads_cluster: fm.Cluster, tmp_path: Path, name: str, first: int
) -> None:
    """An epoch has 4 steps."""
    one = case(threads_cluster, tmp_path, ENDING[name])
    whole = one.fit(steps=8).ledger
    assert one.fit(steps=first, checkpoint=one.checkpoint()).ledger.outstanding == 0
    resumed = one.fit(steps=8, checkpoint=one.checkpoint(), resume="auto")
    assert resumed.ledger.outstanding == 0
    if name == "epochs end early":
        assert [epoch.used >= 6 for epoch in resumed.ledger.epochs] == [True, True], "of 8 items, 3 in 4"
    else:
        assert (resumed.ledger.used, resumed.ledger.seen) == (whole.used, whole.seen)


def test_a_snapshot_comes_after_so_many_seconds(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    one = case(threads_cluster, tmp_path)
    whole = one.fit()
    saved = one.fit(checkpoint=fm.Checkpoint(one.path, every_s=1e-6, keep=STEPS))
    assert_same(saved.params, whole.params)
    steps = [fm.restore(p).step for p in one.path.iterdir()]
    assert max(steps) == STEPS
    assert len(steps) > 1


def test_another_fit_is_refused_with_what_differs(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    one = case(threads_cluster, tmp_path)
    one.fit(steps=2, checkpoint=one.checkpoint())
    with pytest.raises(fm.CheckpointError, match=r"has checkpoints of an earlier fit; give resume='auto'"):
        one.fit(checkpoint=one.checkpoint())
    with pytest.raises(fm.CheckpointError, match=r"seed=3 there and 4 here"):
        one.fit(checkpoint=one.checkpoint(), resume="auto", seed=4)
    other = case(threads_cluster, tmp_path, optimizer=optax.sgd(0.1, momentum=0.9))
    with pytest.raises(fm.CheckpointError, match=r"opt_state leaf '0/mu/fc0/bias', float32\[16\], is only there"):
        other.resumed()
    with pytest.raises(ValueError, match="needs checkpoint="):
        one.fit(resume="auto")
    local = case(threads_cluster, tmp_path, fm.policies.diloco(4))  # its replicas have optimizers of their own
    with pytest.raises(fm.CheckpointError, match=r"belongs to another fit: parameter .* has the policy .*outer here"):
        local.resumed()


def test_another_model_is_refused_leaf_by_leaf(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    params = mlp()
    checkpoint = fm.Checkpoint(tmp_path)
    options: dict[str, Any] = {"batch_size": BATCH, "steps": 2, "progress": False, "checkpoint": checkpoint}
    fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster).fit(params, data(), **options)

    def loss(params: Any, batch: Any) -> jax.Array:
        extra = sum(jax.numpy.sum(leaf) ** 2 for leaf in jax.tree.leaves(params["more"])) if "more" in params else 0.0
        layers = {name: layer for name, layer in params.items() if name != "more"}
        return mlp_loss(jax.tree.map(lambda x: x.astype(np.float32), layers), batch) + extra

    def refused(params: Any) -> str:
        with pytest.raises(fm.CheckpointError) as error:
            trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster)
            trainer.fit(params, data(), resume="auto", **options)
        return str(error.value)

    wide = {**mlp((24, 16)), "fc0": {**mlp((24, 16))["fc0"], "bias": np.zeros(24, np.float16)}}
    text = refused(wide | {"more": {"scale": np.ones(3, np.float32)}})
    assert "belongs to another model or optimizer: params leaf 'more/scale', float32[3], is only here" in text
    assert "'fc0/bias' is float32[16] there and float16[24] here" in text
    assert "'fc1/kernel' is float32[16, 16] there and float32[24, 16] here" in text
    assert "fc1/bias" not in text, "what is equal is not listed"
    many = refused(params | {"more": {f"{i}": np.ones(3, np.float32) for i in range(50)}})
    assert "and 42 more" in many and len(many) < 1500


@pytest.mark.parametrize("policy", [None, fm.policies.asynchronous()], ids=["common clocks", "on arrival"])
def test_callbacks_hear_of_a_step_while_a_fit_goes_on(
    threads_cluster: fm.Cluster, tmp_path: Path, policy: fm.Policy | None
) -> None:
    """Records of a fit that goes on came only at its end, so that no callback could stop it."""
    one, steps = case(threads_cluster, tmp_path, policy), 400
    one.fit(steps=STOP, checkpoint=one.checkpoint())
    heard: list[int] = []

    def stop(record: dict[str, Any]) -> None:
        heard.append(record["step"])
        raise Stopped

    with pytest.raises(Stopped):
        one.fit(steps=steps, checkpoint=one.checkpoint(), resume="auto", callbacks=[stop])
    assert heard == [STOP]
    assert fm.restore(one.path).step < steps

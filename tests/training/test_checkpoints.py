"""A fit that stops at a snapshot and goes on ends with the bits of one that was not stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
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
        options = {"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **more}
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


POLICIES: dict[str, Any] = {
    "parameter server": None,
}


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

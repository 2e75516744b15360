"""The state of a model in snapshots: `restore` returns what a fit that ends there does, and a stopped fit goes on."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import flowml as fm
from tests.training.reference import BATCH, assert_same
from tests.training.test_checkpoints import Stopped
from tests.training.test_state import OPTIMIZER, SOURCE, STEPS, loss, params, state, words

STOP = 3


def test_a_stopped_fit_goes_on_with_the_state_that_restore_shows(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    rules: Any = {"norm0/mean": "max", "norm0/var": "local", "*/seen": "sum"}
    trainer = fm.Trainer(
        loss,
        OPTIMIZER,
        cluster=threads_cluster,
        has_state=True,
        replicas=2,
        placement=fm.Pipeline(stages=2),
        microbatches=2,
        state_rules=rules,
    )
    fit = partial(trainer.fit, params(), SOURCE, batch_size=BATCH, state=state(), progress=False)
    whole, short = fit(steps=STEPS), fit(steps=STOP)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] >= STOP:
            raise Stopped

    checkpoint = fm.Checkpoint(tmp_path, every_steps=STOP)
    with pytest.raises(Stopped):
        fit(steps=STEPS, checkpoint=checkpoint, callbacks=[stop])
    found = fm.restore(tmp_path)
    assert found.step == STOP
    assert_same(words(found.state), words(short.state))

    resumed = fit(steps=STEPS, checkpoint=checkpoint, resume="auto")
    assert len(resumed.history) == STEPS - STOP
    for a, b in ((resumed.params, whole.params), (resumed.state, whole.state)):
        assert_same(words(a), words(b))
    assert_same(words(resumed.replica_states), words(whole.replica_states))
    assert_same(words(fm.restore(tmp_path).state), words(whole.state))

    other = state() | {"norm0": {**state()["norm0"], "seen": state()["norm0"]["mean"][0]}}
    with pytest.raises(fm.CheckpointError, match=r"state leaf 'norm0/seen' is int32\[\] there and float32\[\] here"):
        fit(steps=STEPS, checkpoint=checkpoint, resume="auto", state=other)


def test_the_state_goes_on_with_other_replicas_and_stages(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    rules: Any = {"norm0/mean": "mean", "*/seen": "sum"}

    def fit(replicas: int, stages: int, microbatches: int, **more: Any) -> fm.TrainingResult:
        trainer = fm.Trainer(
            loss,
            OPTIMIZER,
            cluster=threads_cluster,
            has_state=True,
            replicas=replicas,
            placement=fm.Pipeline(stages=stages) if stages > 1 else "auto",
            microbatches=microbatches,
            state_rules=rules,
        )
        return trainer.fit(params(), SOURCE, batch_size=BATCH, state=state(), progress=False, **more)

    fit(2, 2, 2, steps=STOP, checkpoint=fm.Checkpoint(tmp_path / "first"))
    before = fm.restore(tmp_path / "first").state
    for form in ((4, 1, 1), (2, 1, 2), (1, 2, 4)):
        path = tmp_path / str(form[0])
        shutil.copytree(tmp_path / "first", path)
        after = fit(*form, steps=STOP + 1, checkpoint=fm.Checkpoint(path), resume="auto").state
        seen = int(before["norm0"]["seen"])
        assert int(after["norm0"]["seen"]) == seen + BATCH, "each example of the one step counts once"
        assert not (after["norm0"]["mean"] == before["norm0"]["mean"]).all()

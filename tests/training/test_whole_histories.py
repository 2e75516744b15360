"""Callbacks get the record of each step before that from which a later fit goes on: a checkpoint waits for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optax
import pytest

import flowml as fm
from flowml_runtime.driver.training.unshown import MOST_S, Unshown
from flowml_runtime.driver.training.writing import Writer
from tests.training.reference import BATCH, data, mlp, mlp_loss

STEPS = 28


class StopError(Exception):
    pass


@pytest.mark.parametrize("last", [16, 17, 18])
def test_a_callback_sees_all_steps_before_those_of_the_next_fit(
    threads_cluster: fm.Cluster, tmp_path: Path, last: int
) -> None:
    policies, seen = fm.policies.decoupled_diloco(8, quorum=1), list[int]()

    def stop(record: Any) -> None:
        seen.append(record["step"])
        if record["step"] == last:
            raise StopError

    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=4, policies=policies)
    given: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False}
    given |= {"checkpoint": fm.Checkpoint(tmp_path / "there", every_steps=4), "resume": "auto"}
    with pytest.raises(StopError):
        trainer.fit(mlp(), data(), callbacks=[stop], **given)
    result = trainer.fit(mlp(), data(), callbacks=[lambda record: seen.append(record["step"])], **given)
    assert set(seen) == set(range(STEPS))
    assert 0 < result.resumed_at <= last
    assert fm.restore(tmp_path / "there").step == STEPS


def snapshot(steps: int) -> Any:
    return SimpleNamespace(content=SimpleNamespace(steps=steps))


def unshown(path: Path) -> tuple[Unshown, list[int]]:
    written = list[int]()
    return Unshown(Writer(fm.Checkpoint(path)), lambda s, _: written.append(s.content.steps), 0), written


def test_the_oldest_and_the_newest_wait_for_records(tmp_path: Path) -> None:
    waiting, written = unshown(tmp_path)
    for step in (4, 8, 12):
        waiting.put(snapshot(step), None, 0.0)
    waiting.shown(3)
    assert not written
    waiting.shown(4)
    assert written == [4]
    waiting.shown(12)
    assert written == [4, 12]
    waiting.put(snapshot(12), None, 0.0)
    assert written == [4, 12, 12]


def test_no_checkpoint_waits_for_ever(tmp_path: Path) -> None:
    waiting, written = unshown(tmp_path)
    waiting.put(snapshot(4), None, 1.0)
    waiting.put(snapshot(8), None, 2.0)
    waiting.wait(MOST_S)
    assert not written
    waiting.wait(1.0 + MOST_S)
    assert written == [4]
    waiting.drop()
    waiting.shown(8)
    assert written == [4]

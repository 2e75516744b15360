"""The time of shared-memory fits is predicted from probes of ten steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.training.outcome import Loss
from flowml_runtime.methods import TimeModel


def fit(replicas: int, steps: int, examples: int = 1, **given: Any) -> fm.TrainingResult:
    cluster = fm.SimulatedCluster(
        1,
        fm.sim.LogNormal(0.1, 0.1),
        fm.sim.Network(1e-4, 1e9),
        homes=fm.sim.Homes(apply_s=2e-3),
        devices_per_worker=replicas,
        arithmetic=False,
    )

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch @ params) ** 2)

    source = np.ones((replicas * examples * 10, 4), np.float32)
    trainer = fm.Trainer(
        loss,
        optax.sgd(0.1),
        cluster=cluster,
        replicas=replicas,
        policies=fm.policies.hogwild(),
        placement=fm.Pipeline(1),
    )
    return trainer.fit(jnp.zeros(4), source, batch_size=replicas * examples, steps=steps, progress=False, **given)


def test_two_probes_predict_a_longer_fit_on_more_replicas() -> None:
    model = TimeModel.of({1: fit(1, 10), 2: fit(2, 10)})
    for replicas in (2, 4, 8):
        result = fit(replicas, 100)
        assert abs(model.error(result, replicas)) < 0.15
        items = replicas * 100
        assert model.seconds(items, replicas) == pytest.approx(100 * model.step_s(replicas))


def test_a_model_needs_two_probes_of_some_steps() -> None:
    result = fit(1, 2)
    with pytest.raises(ValueError, match="two numbers of replicas"):
        TimeModel.of({1: result})
    with pytest.raises(ValueError, match="give it 10"):
        TimeModel.of({1: result, 2: fit(2, 2)})


def test_a_model_needs_the_replicas_that_the_probes_had() -> None:
    """Each wrong number gave a model, and a model gives a time for any number."""
    one, two, four = fit(1, 10), fit(2, 10), fit(4, 10)
    wrong: list[tuple[dict[int, fm.TrainingResult], str]] = [
        ({1: two, 2: one}, "replicas=1, and the fit has 2; give 2 for this result"),
        ({1: one, 2: one}, "replicas=2, and the fit has 1; give 1"),
        ({240: two, 241: four}, "replicas=240, and the fit has 2"),
        ({1: one, 2: fit(2, 10, examples=3)}, "are 1 with replicas=1 and 3 with replicas=2, so.*give fit a batch_size"),
        ({1: _paced(one, 0.0), 2: two}, "the probe of 1 replicas took 0 s; give a fit whose steps take some time"),
        ({2: _paced(two, 0.1), 4: _paced(four, 1.0)}, "a step of one takes -0.35 s.*give a probe of 1 replica"),
        ({1: one, 2: replace(two, losses=(Loss(("worker:1",), "it died", 3, 3, 0.0),))}, "lost or changed workers"),
    ]
    for probes, text in wrong:
        with pytest.raises(ValueError, match=text):
            TimeModel.of(probes)
    assert TimeModel.of({1: one, 2: two}).examples == 1


def _paced(result: fm.TrainingResult, step_s: float) -> fm.TrainingResult:
    """The result with steps that take so long."""
    return replace(result, history=[{**record, "seconds": step_s * i} for i, record in enumerate(result.history)])


def test_a_prediction_is_compared_with_a_fit_of_the_same_kind(tmp_path: Path) -> None:
    model, two = TimeModel(0.1, 0.01, 1), fit(2, 10)
    assert abs(model.error(two, 2)) < 1
    checkpoint = fm.Checkpoint(tmp_path, every_steps=5)
    fit(2, 5, checkpoint=checkpoint)
    resumed = fit(2, 10, checkpoint=checkpoint, resume="auto")
    assert resumed.resumed_at == 5
    wrong: list[tuple[fm.TrainingResult, int, str]] = [
        (two, 3, "replicas=3, and the fit has 2; give 2"),
        (two, 0, "replicas=0: give at least 1"),
        (fit(2, 10, examples=3), 2, "has 3 examples, and 1 in the probes; give the fit batch_size=2, or"),
        (resumed, 2, "goes on from step 5.*give the result of a fit without resume="),
        (replace(two, seconds=0.0), 2, "has used 20 items in 0 s.*give a fit of some steps"),
    ]
    for result, replicas, text in wrong:
        with pytest.raises(ValueError, match=text):
            model.error(result, replicas)


@pytest.mark.parametrize(("items", "replicas"), [(0, 1), (-1, 1), (1.5, 1), (1, 0), (1, True), ("8", 1)])
def test_counts_are_whole_numbers_from_one(items: Any, replicas: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"give (at least 1|a whole number of at least 1)"):
        TimeModel(0.1, 0.0).seconds(items, replicas)
    with pytest.raises((TypeError, ValueError), match="examples=0: give at least 1"):
        TimeModel(0.1, 0.0, 0)

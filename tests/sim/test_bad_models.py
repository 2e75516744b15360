"""Models that make no sense get one sentence that names the model, the argument and the fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest

import flowml as fm

S = fm.sim
NAN = math.nan
LINKS = {("a", "b"): (0.1, 1e6)}
NETWORK = S.Network(1e-4, 1e9)
ANY: Any = None

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "beyond floats": (
        lambda: S.Constant(10**400),
        r"Constant: s=inf makes no sense; give a finite number of at least 0",
    ),
    "half of all steps take nothing": (
        lambda: S.LogNormal(1, 1e9),
        r"LogNormal: sigma=1e\+09 makes no sense: half of all steps would take less than the smallest number",
    ),
    "no list of samples": (
        lambda: S.Empirical(3),  # pyright: ignore[reportArgumentType]
        r"Empirical: samples_s is of type int; give a list of measured times",
    ),
    "no times": (
        lambda: S.Recorded(ANY),
        r"Recorded: trace is of type NoneType; give a list of the times of each worker",
    ),
    "times of no worker": (
        lambda: S.Recorded([0.1, 0.2]),  # pyright: ignore[reportArgumentType]
        r"Recorded: trace\[0\] is of type float; give a list of the times of its steps",
    ),
    "a straggler beyond the cluster": (
        lambda: fm.SimulatedCluster(4, S.Straggler(S.Straggler(S.Constant(1), 2, workers=(9,)), 2, share=0.5), NETWORK),
        r"Straggler: workers names worker 9, and the cluster has workers 0 to 3",
    ),
    "a rate whose times overflow": (
        lambda: S.Network(0, 1e-320),
        r"Network: bytes_per_s=9.99989e-321 makes no sense; give at least 0.001 bytes a second",
    ),
    "a pair that is none": (
        lambda: S.Sites({"ab": (0.1, 1)}, ["a", "b"]),  # pyright: ignore[reportArgumentType]
        r"Regions: 'ab' is no pair of two regions; give a mapping \{\(region, region\): \(latency_s, bytes_per_s\)\}",
    ),
    "three regions": (
        lambda: S.Sites({("a", "b", "c"): (0.1, 1)}, ["a", "b"]),  # pyright: ignore[reportArgumentType]
        r"Regions: \('a', 'b', 'c'\) is no pair of two regions",
    ),
    "a link that is none": (
        lambda: S.Sites({("a", "b"): 0.1}, ["a", "b"]),  # pyright: ignore[reportArgumentType]
        r"Regions: 0.1 is no pair of latency and rate",
    ),
    "no regions": (lambda: S.Regions(ANY), r"Regions: links is of type NoneType; give a mapping"),
    "no text": (lambda: S.Regions.parse(ANY), r"Regions: the text of regions is of type NoneType; give a str"),
    "no local network": (
        lambda: S.Sites(LINKS, ["a", "b"], local=ANY),
        r"Sites: local=None is not an fm\.sim\.Network",
    ),
    "no changes": (lambda: S.Churn(ANY), r"Churn: changes is of type NoneType; give a list of \(time_s, worker, up\)"),
    "a change that is cut": (
        lambda: S.Churn([(1.0, 0)]),  # pyright: ignore[reportArgumentType]
        r"Churn: changes\[0\] has 2 fields; give time_s, worker and up",
    ),
    "a partition of one": (
        lambda: S.Partition(0, 0, 1),  # pyright: ignore[reportArgumentType]
        r"Partition: workers is of type int; give a list of numbers of workers",
    ),
    "a partition of none": (lambda: S.Partition([], 0, 1), r"Partition: workers is empty, so nothing is parted"),
    "an end that is none": (
        lambda: S.Disorder(end_s=NAN),
        r"Disorder: end_s=nan makes no sense; give a finite number of at least 0",
    ),
    "an end before its start": (
        lambda: S.Disorder(start_s=5, end_s=1),
        r"Disorder: end_s=1.0 is not after start_s=5.0; give a later end_s, or an earlier start_s",
    ),
    "a partition that ends before its start": (
        lambda: S.Partition([0], 3, 1),
        r"Partition: end_s=1.0 is not after start_s=3.0; give a later end_s, or an earlier start_s",
    ),
    "one fault": (
        lambda: fm.SimulatedCluster(2, S.Constant(1), NETWORK, faults=S.Crash(0, 1)),  # pyright: ignore[reportArgumentType]
        r"faults=Crash\(.*\) is no list; give one of fm\.sim\.Crash, Partition, Disorder and Churn",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_model_gets_a_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(fm.FlowmlError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_whether_there_is_arithmetic_is_true_or_false() -> None:
    with pytest.raises(TypeError, match=r"arithmetic='no' is of type str; give True or False"):
        fm.SimulatedCluster(2, S.Constant(1), NETWORK, arithmetic="no")  # pyright: ignore[reportArgumentType]


class Nonsense(S.ComputeModel):
    """A model of a user, which draws a negative time at step 1."""

    def draw(self, seed: int, workers: Any, steps: Any) -> Any:
        return np.where(np.asarray(steps) == 1, -0.5, 0.1) * np.ones(
            np.broadcast_shapes(np.shape(workers), np.shape(steps))
        )

    def __repr__(self) -> str:
        return "Nonsense()"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            S.Pareto(1, 1e-9),
            r"Pareto\(scale_s=1\.0, alpha=1e-09\) draws a step of inf s; give a model of times from 0 to 1e\+290 s",
        ),
        (S.Constant(1.7e308), r"Constant\(s=1\.7e\+308\) draws a step of 1\.7e\+308 s; give a model of times from 0"),
        (Nonsense(), r"Nonsense\(\) draws a step of -0\.5 s; give a model of times from 0"),
    ],
    ids=["overflow", "huge", "negative"],
)
def test_a_model_that_draws_a_time_that_is_none_ends_the_fit(model: S.ComputeModel, message: str) -> None:
    def loss(params: Any, batch: Any) -> Any:
        return (params["w"] * batch["x"]).sum()

    params, source = {"w": np.ones(1, np.float32)}, {"x": np.ones((8, 1), np.float32)}
    for compute, delays in ((model, None), (S.Constant(0.1), model)):
        cluster = fm.SimulatedCluster(2, compute, NETWORK, arithmetic=False)
        trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=2, delays=delays)
        with pytest.raises(fm.SimulationError, match=message):
            trainer.fit(params, source, batch_size=4, steps=4)

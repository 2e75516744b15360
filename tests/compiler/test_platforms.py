"""A plan holds a module for each platform that it is lowered for, and a worker compiles that of its device."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import flowml as fm
from flowml.devices import Device, platforms_of


def sorted_rows(x: Any) -> Any:
    return jnp.sort(x @ x.T, axis=1)


def test_a_plan_for_several_platforms_runs_on_each_of_them() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    plan = fm.compile(sorted_rows, x, devices=["worker:0"], platforms=("cuda", "tpu", "cpu"))
    with fm.Cluster.threads(workers=1) as cluster:
        (result,) = cluster.session.call(cluster.session.load(plan), [x])
    np.testing.assert_array_equal(result, sorted_rows(x))


def test_a_gpu_is_lowered_for_by_the_name_of_its_maker() -> None:
    devices = [Device("a/gpu:0", platform="gpu"), Device("b/cpu:0"), Device("c/gpu:0", platform="gpu")]
    assert platforms_of(devices) == ("cuda", "cpu")

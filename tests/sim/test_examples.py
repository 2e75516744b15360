"""The examples of simulations: what they show is so."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import flowml as fm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))  # as for a script that is run: examples share modules


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_diloco_is_faster_over_regions_and_learns_as_much() -> None:
    wan = example("wan")
    network = fm.sim.Sites(wan.REGIONS, dict.fromkeys(wan.REGIONS.names, 1))
    found = {
        name: wan.fit(fm.SimulatedCluster(4, wan.COMPUTE, network), wan.RULES[name], 4, 64)
        for name in ("synchronous", "DiLoCo")
    }
    assert wan.pushed(found["synchronous"]) == wan.EVERY * wan.pushed(found["DiLoCo"])
    assert found["DiLoCo"].seconds < 0.6 * found["synchronous"].seconds
    start = float(wan.loss(*wan.problem()))
    assert wan.final_loss(found["DiLoCo"]) < 0.1 * start
    assert wan.final_loss(found["DiLoCo"]) == pytest.approx(wan.final_loss(found["synchronous"]), rel=0.2)


def test_two_simulated_replicas_do_what_two_real_ones_do(process_cluster: fm.Cluster) -> None:
    wan = example("wan")
    network = fm.sim.Sites(wan.REGIONS, ["Oregon", "Frankfurt"])
    simulated = wan.fit(fm.SimulatedCluster(2, wan.COMPUTE, network), wan.RULES["DiLoCo"], 2, 32)
    real = wan.fit(process_cluster, wan.RULES["DiLoCo"], 2, 32)
    assert wan.pushed(simulated) == wan.pushed(real)
    for a, b in zip(jax.tree.leaves(simulated.params), jax.tree.leaves(real.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_training_on_spot_machines_goes_on_and_loses_the_restarts() -> None:
    """Two machines up, then one, then none, then two: three changes, of which the one to none costs nothing more."""
    spot = example("spot")
    record = {"metadata": {"gap_seconds": 300}, "data": [2, 1, 0, 2]}
    churn = fm.sim.Churn.from_spot(record, gap_s=6)
    run = spot.on_spot_machines(churn, 2, 4, 6.0)
    whole = spot.Run()
    whole.train(2, 6 + (6 - spot.RESTART_S) * 1.5)
    assert run.examples == pytest.approx(whole.examples, rel=0.15)
    assert spot.value(run) < spot.value(spot.Run())


def test_processes_train_on_when_one_is_killed_and_their_steps_are_those_of_the_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spot = example("spot")
    spot.COMPUTE = fm.sim.LogNormal(mean_s=0.05, sigma=0.2)
    spot.for_real(machines=2)
    told = capsys.readouterr().out
    assert "worker:1 was lost during training" in told
    assert "2 machines: 0.0" in told and "1 machines: 0.0" in told
    assert "the loss and the restart took " in told

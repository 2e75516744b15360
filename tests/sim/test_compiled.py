"""The rewritten simulator, compiled or not, does the same events at the same times."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.sim import session
from flowml_runtime.sim.native import kit
from flowml_runtime.sim.native.rewriting import COMPILED, COPIED, DRIVER, PACKAGE, rewritten

SITES = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), 3, fm.Quorum(0.75))
POLICIES: dict[str, Any] = {
    "synchronous": fm.policies.synchronous(),
    "quorum": fm.policies.quorum(0.75),
    "stale": fm.policies.asynchronous(2),
    "local": fm.policies.local_sgd(3),
    "sites": fm.Policy(topology=SITES, quorum=fm.Quorum(0.9)),
    "speculation": fm.policies.speculate(2),
    "ring": fm.policies.gossip(),
}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def fit(policy: Any, *, jobs: int = 1, compiled: bool = False) -> tuple[str | None, int | None, str]:
    models = fm.sim.LogNormal(0.1, 0.3), fm.sim.Network(1e-3, 1e6, 4e6)
    cluster = fm.SimulatedCluster(12, *models, arithmetic=False, jobs=jobs, compiled=compiled)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=12, policies=policy)
    source = {"x": np.zeros((96, 4), np.float32)}
    result = trainer.fit({"w": jnp.ones(4)}, source, batch_size=24, steps=8, progress=False)
    return result.trace_hash, result.events, str(result.ledger)


def native() -> list[str]:
    """The modules of the rewritten package that are imported."""
    return [name for name in sys.modules if name.partition(".")[0] == PACKAGE]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rewritten package that a test imports is gone after it, because another test imports another one."""
    assert not native()
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in native():
        del sys.modules[name]


@pytest.fixture
def python_kit(apart: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated clusters use the rewritten package, which is not compiled."""
    for path, text in rewritten().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    heap, world, parallel = (importlib.import_module(f"{PACKAGE}.sim.{name}") for name in ("heap", "world", "parallel"))
    machine = importlib.import_module(f"{PACKAGE}.protocol.training.driver")
    made = kit.Kit(heap.Clock, machine.TrainingDriver, world.Layout, parallel.Team, world.World)
    monkeypatch.setattr(session, "compiled", lambda: made)


@pytest.mark.usefixtures("python_kit")
def test_rewritten_sources_simulate_the_same_events() -> None:
    for name, policy in POLICIES.items():
        assert fit(policy, compiled=True) == fit(policy), name
    assert fit(POLICIES["quorum"], jobs=2, compiled=True) == fit(POLICIES["quorum"])


def test_copies_import_copies() -> None:
    for path, text in rewritten().items():
        driver = path.removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", ".") in DRIVER
        for name in DRIVER if driver else (*COMPILED, *COPIED):
            taken = text.partition(f"from flowml_runtime.{name} import ")[2].partition("\n")[0]
            assert not driver or not taken or f"/{name.rpartition('.')[2]}.py" in path, f"{path} takes {taken}"
            assert driver or not taken, path


def test_the_driver_of_a_compiled_simulation_speaks_in_the_usual_classes() -> None:
    """Its actions are carried out, and its accounts kept, by code that knows only those of the usual package."""
    for name in DRIVER:
        text = rewritten()[f"{PACKAGE}/{name.replace('.', '/')}.py"]
        assert "class Work:" not in text and "msgspec.Struct)" not in text


def test_a_simulator_that_cannot_be_compiled_runs_as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kit, "what_is_missing", lambda: "there is no C compiler 'cc'")
    with pytest.warns(fm.FlowmlWarning, match="runs as Python, because it cannot be compiled: there is no C compiler"):
        found = fit(POLICIES["quorum"], compiled=True)
    assert found == fit(POLICIES["quorum"])


@pytest.mark.timeout(1800)  # the build takes half a minute of processor time
@pytest.mark.usefixtures("apart")
@pytest.mark.skipif(kit.what_is_missing() is not None, reason=f"nothing compiles here: {kit.what_is_missing()}")
def test_the_compiled_simulator_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kit, "SPEED", "-O0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, policy in POLICIES.items():
            assert fit(policy, compiled=True) == fit(policy), name
        assert fit(POLICIES["quorum"], jobs=2, compiled=True) == fit(POLICIES["quorum"])

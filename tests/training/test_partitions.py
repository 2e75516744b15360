"""A worker on another machine is cut off in the middle of a fit, one way or both, and found again: it is lost within
seconds, the others go on, and what it still sends changes nothing.

The other machine is a network namespace of Linux, which only the administrator may make. Packets are lost because one
side has a wrong hardware address of the other: no connection is closed, and no error is told.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trustme

import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.transport.security import write_token
from flowml_runtime.worker.process import LOST_COORDINATOR
from tests.conftest import wait_until

OWN = 57 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Tests run beside each other, and each needs a network of its own."""
HERE, THERE = f"10.213.{OWN}.1", f"10.213.{OWN}.2"
NOWHERE = "02:00:00:00:00:01"
LOST_AFTER_S = 3.0
MOST_S = 20.0
"""How long nobody waits for a worker that is cut off, also on a busy machine. On an idle one it is half of that."""
CUT_AT, FOUND_AT = 12, 60
STEP_S = 0.1
WAYS = ("here", "there", "here and there")
CASES = [(policy, way) for policy in ("synchronous", "asynchronous") for way in WAYS]
"""Which side's packets are lost. `make test` has every second one."""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=30).stdout


@dataclass(frozen=True)
class Wire:
    """The line between this machine, which has one end of it, and the other, which has the other end."""

    name: str

    @property
    def sides(self) -> dict[str, tuple[list[str], str, str]]:
        """How to command each side, its end of the line, and the address of the other side."""
        return {"here": ([], f"{self.name}0", THERE), "there": (["-n", self.name], f"{self.name}1", HERE)}

    @contextmanager
    def cut(self, *ways: str) -> Generator[None]:
        """Lose what these sides send."""
        for way in ways:
            prefix, end, other = self.sides[way]
            ip(*prefix, "neigh", "replace", other, "lladdr", NOWHERE, "nud", "permanent", "dev", end)
        try:
            yield
        finally:
            for way in ways:
                prefix, end, other = self.sides[way]
                found = self.sides["there" if way == "here" else "here"]
                (about,) = json.loads(ip(*found[0], "-j", "link", "show", "dev", found[1]))
                ip(*prefix, "neigh", "replace", other, "lladdr", about["address"], "nud", "reachable", "dev", end)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("only the administrator may make network namespaces")
    wire = Wire(f"fm{os.getpid()}")
    try:
        ip("netns", "add", wire.name)
        ip("link", "add", f"{wire.name}0", "type", "veth", "peer", "name", f"{wire.name}1", "netns", wire.name)
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "del", wire.name], capture_output=True, check=False)
        pytest.skip(f"no network namespace can be made: {error.stderr.strip()}")
    try:
        for prefix, end, other in wire.sides.values():
            own = HERE if other == THERE else THERE
            ip(*prefix, "addr", "add", f"{own}/24", "dev", end)
            ip(*prefix, "link", "set", end, "up")
        ip("-n", wire.name, "link", "set", "lo", "up")
        yield wire
    finally:
        subprocess.run(["ip", "netns", "del", wire.name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    own = authority.issue_cert(HERE, THERE)
    found = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "ca")}
    own.cert_chain_pems[0].write_to_path(found["cert"])
    own.private_key_pem.write_to_path(found["key"])
    authority.cert_pem.write_to_path(found["ca"])
    return found


@contextmanager
def worker_there(
    wire: Wire, launched: LaunchedCluster, tls: dict[str, str], folder: Path
) -> Generator[subprocess.Popen[str]]:
    """`flowml worker` on the other machine."""
    write_token(folder / "token", launched.token)
    files = [part for name, path in tls.items() for part in (f"--tls-{name}", path)]
    command = [sys.executable, "-m", "flowml_tools.main", "worker", launched.address, "--token-file", "token", *files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            ["ip", "netns", "exec", wire.name, *command], cwd=folder, env=environment, stdout=log, stderr=log, text=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def train(cluster: fm.Cluster, policy: fm.Policy, callback: Any, path: Path) -> fm.TrainingResult:
    """A fit whose parameters show the weight with which each example was applied. Each worker is home to a layer."""
    steps, layers = 80, "abcd"

    def loss(params: Any, batch: Any) -> Any:
        return -sum(jnp.mean(params[layer]["w"][batch]) for layer in layers)

    workers = [device.worker for device in cluster.devices]
    trainer = fm.Trainer(
        loss,
        optax.sgd(1.0),
        cluster=cluster,
        replicas=len(workers),
        policies=policy,
        delays=dict.fromkeys(workers, STEP_S),
    )
    examples = steps * len(workers)
    params = {layer: {"w": jnp.zeros(examples)} for layer in layers}
    about: dict[str, Any] = {"batch_size": len(workers), "steps": steps, "on_loss": "shrink", "progress": False}
    at_end = fm.Checkpoint(path, every_steps=2 * steps)
    found = trainer.fit(params, np.arange(examples), callbacks=[callback], checkpoint=at_end, **about)
    assert fm.restore(path).step == steps, "the worker, which has lost the driver, has not taken the directory"
    assert [record["step"] for record in found.history] == list(range(steps))
    weights = [np.asarray(found.params[layer]["w"]) for layer in layers]
    for one in weights:
        np.testing.assert_array_equal(one, weights[0], "all layers have the same items")
    ledger = found.ledger
    assert ledger.outstanding == 0
    assert np.count_nonzero(weights[0]) == ledger.used + ledger.folded, "what is acknowledged is applied, and no more"
    most = 1.0 if policy == fm.policies.asynchronous() else 1 / 2
    assert weights[0].max() <= most + 1e-6, "nothing is applied twice"
    return found


@pytest.mark.filterwarnings("ignore:worker.. was lost")
@pytest.mark.parametrize(("policy", "ways"), CASES if "FLOWML_KILLS" in os.environ else CASES[::2])
def test_a_worker_that_is_cut_off_is_lost_and_comes_to_nothing(
    policy: str, ways: str, wire: Wire, tls: dict[str, str], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        about: dict[str, Any] = {"bind": f"{HERE}:0", "tls": tls, "lost_after_s": LOST_AFTER_S}
        launched = stack.enter_context(closing(LaunchedCluster(workers=3, **about)))
        process = stack.enter_context(worker_there(wire, launched, tls, tmp_path))
        cluster = stack.enter_context(closing(fm.Cluster.connect(launched.address, launched.token, tls=tls)))
        wait_until(lambda: len(cluster.devices) == 4, "all have joined", 60)
        times, line = list[float](), stack.enter_context(ExitStack())

        def callback(record: dict[str, Any]) -> None:
            times.append(time.monotonic())
            if record["step"] == CUT_AT:
                line.enter_context(wire.cut(*ways.split(" and ")))
            elif record["step"] == FOUND_AT:
                line.close()

        found = train(cluster, getattr(fm.policies, policy)(), callback, tmp_path / "fit")
        (loss,) = found.losses
        assert loss.workers == ("worker:3",)
        assert CUT_AT <= loss.step < FOUND_AT
        assert found.history[-1]["replicas"] == 3 or policy == "asynchronous"
        assert max(b - a for a, b in itertools.pairwise(times)) < MOST_S
        assert process.wait(90) == LOST_COORDINATOR, "the worker ends by itself"
    *_, said = (tmp_path / "log").read_text().splitlines()
    assert said.startswith("flowml: worker:3 ends: its coordinator was lost: ")


DRIVER = """
import sys
import numpy as np, optax
import flowml as fm
address, token, *files = sys.argv[1:]
with fm.Cluster.connect(address, token, tls=dict(zip(("cert", "key", "ca"), files))) as cluster:
    def loss(w, batch):
        return (batch @ w).sum()
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=2, delays={"worker:0": 0.05})
    show = lambda record: print(record["step"], flush=True)
    try:
        trainer.fit(np.zeros(4, np.float32), np.ones((8, 4), np.float32), batch_size=8, steps=4000,
                    progress=False, callbacks=[show], on_loss="replace")
    except fm.FlowmlError as error:
        print(error, flush=True)
"""


def test_a_driver_that_was_cut_off_is_told_that_it_is_the_one_that_was_lost(
    wire: Wire, tls: dict[str, str], tmp_path: Path
) -> None:
    """It waited for others in the places of its workers, which live."""
    with ExitStack() as stack:
        about: dict[str, Any] = {"bind": f"{HERE}:0", "tls": tls, "lost_after_s": LOST_AFTER_S}
        launched = stack.enter_context(closing(LaunchedCluster(workers=2, **about)))
        write_token(tmp_path / "token", launched.token)
        command = [sys.executable, "-c", DRIVER, launched.address, str(tmp_path / "token"), *tls.values()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        driver = stack.enter_context(
            subprocess.Popen(
                ["ip", "netns", "exec", wire.name, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        stack.callback(driver.kill)
        assert driver.stdout is not None
        while driver.stdout.readline() != f"{CUT_AT}\n":
            assert driver.poll() is None
        with wire.cut("here", "there"):
            time.sleep(3 * LOST_AFTER_S)  # so long it is cut off
        found = time.monotonic()
        *_, said = driver.stdout.read().splitlines()
        assert time.monotonic() - found < MOST_S
        assert "this process was suspended or cut off, and worker:" in said
        assert said.endswith('connect to the cluster again, and call fit(resume="auto")')

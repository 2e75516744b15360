"""A forked child of a process with a cluster: every call raises at once, and what the child does harms nothing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.tools.conftest import environment

X = np.ones(2, np.float32)


def net(x: Any) -> Any:
    with fm.layer("a"):
        h = jnp.sin(x)
    with fm.layer("b"):
        return jnp.cos(h)


def in_child(function: Callable[[], Any]) -> str:
    """What `function` raised in a forked child, or "returned"; fails if the child does not end."""
    receives, sends = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        try:
            function()
            sends.send("returned")
        except BaseException as error:
            sends.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX, which says that forking is not safe
        process.start()
    sends.close()
    try:
        assert receives.poll(20), "the child is still waiting"
        return receives.recv()
    finally:
        process.kill()
        process.join(10)
        receives.close()


@pytest.mark.parametrize("kind", ["threads", "local"])
def test_every_entry_raises_in_a_child_and_the_parent_goes_on(kind: str, tmp_path: Path) -> None:
    start = fm.Cluster.threads if kind == "threads" else fm.Cluster.local
    with start(workers=2, deadline_s=20) as cluster:
        f = fm.dataflow(net, placement={"a": "worker:0", "b": "worker:1"})
        given = fm.dataflow(net, placement={"a": "worker:0", "b": "worker:1"}, cluster=cluster)
        whole = fm.dataflow(net, placement={"*": "worker:0"}, cluster=cluster)
        expected = f(X), given(X), whole(jnp.asarray(X))
        trainer = fm.Trainer(lambda p, b: jnp.mean((b @ p) ** 2), optax.sgd(0.1))
        params, rows = jnp.ones((2, 2)), np.ones((8, 2), np.float32)
        trainer.fit(params, rows, batch_size=4, steps=2)

        def trace() -> None:
            with cluster.trace(tmp_path / "t.json"):
                pass

        def enter() -> None:
            with cluster:
                pass

        entries: dict[str, Callable[[], Any]] = {
            "a call": lambda: f(X),
            "a call with cluster=": lambda: given(X),
            "a call of one task": lambda: whole(jnp.asarray(X)),
            "submit": lambda: f.submit(X),
            "plan": lambda: given.plan(np.ones(3, np.float32)),
            "fit": lambda: trainer.fit(params, rows, batch_size=4, steps=2),
            "measure_links": cluster.measure_links,
            "trace": trace,
            "with": enter,
        }
        said = {name: in_child(entry) for name, entry in entries.items()}
        wanted = f"ClusterError: this cluster belongs to process {os.getpid()}, and this is process "
        assert [name for name, text in said.items() if not text.startswith(wanted) or "spawn" not in text] == []

        assert in_child(cluster.close) == "returned"
        assert in_child(lambda: cluster.__exit__(None, None, None)) == "returned"
        del entries
        assert np.array_equal(f(X), expected[0])
        assert np.array_equal(given(X), expected[1])


def test_a_future_of_the_parent_raises_in_a_child() -> None:
    from tests.network import Network
    from tests.plans import Gate, gated

    gate = Gate("fork")
    with Network() as network:
        future = network.session.submit(network.session.load(gated("fork")), [np.ones(4, np.float32)])
        try:
            text = in_child(future.result)
        finally:
            gate.opened.set()
        assert text.startswith("ClusterError: step 0 of with_callback belongs to process")
        assert future.exception(timeout=30) is None


@pytest.mark.parametrize(
    "start", [fm.Cluster.local, fm.Cluster.threads, lambda: fm.Cluster.connect("127.0.0.1:9", "t")]
)
def test_a_child_of_a_process_that_ran_jax_starts_no_cluster(start: Callable[[], Any]) -> None:
    jnp.ones(2).block_until_ready()
    text = in_child(start)
    assert text.startswith("ClusterError: process ")
    assert "in which JAX or a cluster had started" in text
    assert "spawn" in text


FORKED_EARLY = """
import os, sys
import numpy as np
import flowml as fm, jax
child = os.fork()
with fm.Cluster.local(workers=1) as cluster:
    doubled = fm.dataflow(lambda x: x * 2)(np.float32(21))
    print(doubled, flush=True)
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_that_was_forked_before_jax_ran_has_a_cluster_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED_EARLY], env=environment(), capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stdout) == (0, "42.0\n42.0\n"), done.stderr

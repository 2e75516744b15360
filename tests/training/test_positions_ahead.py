"""On a saturated link positions go ahead of changes, and a reader that has them waits for the changes (Gaia)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.sim.node import Node
from flowml_runtime.sim.sites import Mirrors
from flowml_runtime.transport.endpoint import ThreadEndpoint
from flowml_runtime.worker.training.exchange import positions
from flowml_runtime.worker.training.exchange.positions import Backlog

STEPS, RATE = 12, 0.5
SLOPES = {"a": np.linspace(1, 2, 24, dtype=np.float32).reshape(6, 4), "b": np.linspace(-3, -1, 16, dtype=np.float32)}
SOURCE = {"x": np.ones((64, 1), np.float32)}


def loss(params: Any, batch: Any) -> Any:
    """Its gradients are the slopes, whatever the parameters, so that the sum of all changes is known."""
    return jnp.mean(batch["x"]) * sum(jnp.sum(params[name] * slope) for name, slope in SLOPES.items())


def fit(cluster: Any, staleness: int = 3) -> Any:
    policy = fm.policies.gaia(0.5, sites=2, staleness=staleness)
    trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=4, policies=policy)
    params = {name: jnp.ones(slope.shape) for name, slope in SLOPES.items()}
    return trainer.fit(params, SOURCE, batch_size=16, steps=STEPS)


def slow_sites(rate: float) -> fm.SimulatedCluster:
    table = {("east", "west"): (1e-3, rate)}
    network = fm.sim.Sites(table, {"east": 2, "west": 2}, local=fm.sim.Network(1e-4, 1e9), shared_lines=True)
    return fm.SimulatedCluster(4, fm.sim.LogNormal(0.01, 0.5), network)


def assert_no_change_lost(result: Any) -> None:
    for name, slope in SLOPES.items():
        np.testing.assert_allclose(result.params[name], 1 - RATE * STEPS * slope, rtol=1e-4, err_msg=name)


def test_positions_and_rest_are_put_together_again() -> None:
    rng = np.random.default_rng(0)
    for which in ((True, False), (False,), (True, False, True, False), (False, True, False), ()):
        arrays = [rng.normal(size=3) for _ in which]
        ahead, rest = positions.split(which, arrays)
        assert len(ahead) == sum(which)
        again = positions.joined(which, ahead, rest) if ahead else rest
        assert all(a is b for a, b in zip(again, arrays, strict=True))
    assert positions.split((True, False), [np.zeros(0), np.zeros(0)])[0] == (), "nothing is significant"
    assert positions.split((True, False), [np.ones(3)])[0] == (), "the last changes are sent whole"


def test_the_layers_of_a_step_do_not_wait_for_each_other() -> None:
    """What waits is asked before the first layer of a step: its own layers are under way when the others are sent."""
    waits = iter([0, 500, 500, 3])
    backlog, ahead = Backlog(lambda _, __: next(waits)), [np.zeros(10, np.uint32)]
    assert [backlog.saturated(0, 0, "a", "b", ahead) for _ in range(2)] == [False, False]
    assert [backlog.saturated(0, 1, "a", "b", ahead) for _ in range(2)] == [True, True]
    assert backlog.saturated(0, 1, "a", "c", ahead)
    assert not backlog.saturated(0, 2, "a", "b", ahead), "less waits than the positions take"
    assert not backlog.saturated(0, 3, "a", "b", ()), "nothing to send ahead, and nothing asked"


@pytest.mark.parametrize(("rate", "saturated"), [(1e9, False), (2e3, True)])
def test_only_on_a_slow_link_positions_go_ahead_and_readers_wait(
    monkeypatch: pytest.MonkeyPatch, rate: float, saturated: bool
) -> None:
    sent, held = Counter[bool](), Counter[bool]()
    send, end = Node.send, Mirrors.end

    def counted(node: Node, to: str, message: Any, value: Any = None, nbytes: int = 0) -> None:
        if isinstance(message, wire.Gossip) and message.source != message.replica and node.name != to:
            sent[message.ahead] += nbytes > 0
        send(node, to, message, value, nbytes)

    def watched(mirrors: Any, step: Any) -> bool:
        over = end(mirrors, step)
        mine = [k for k in mirrors._node.lists if k[:2] == (mirrors._store, mirrors._at[0]) and mirrors._leads]
        held[over] += bool(mine)
        return over

    monkeypatch.setattr(Node, "send", counted)
    monkeypatch.setattr(Mirrors, "end", watched)
    result = fit(slow_sites(rate))
    assert (sent[True] > 0) == saturated
    assert (held[False] > 0) == saturated, "a step waits for changes whose positions it has"
    assert held[True] == 0, "and none ends before"
    assert_no_change_lost(result)


def test_real_workers_put_changes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always a full link: each significant change is sent in two messages."""
    ahead = Counter[bool]()
    send = ThreadEndpoint.send

    def counted(endpoint: ThreadEndpoint, peer: str, message: Any, *rest: Any) -> None:
        if isinstance(message, wire.Gossip):
            ahead[message.ahead] += 1
        send(endpoint, peer, message, *rest)

    monkeypatch.setattr(ThreadEndpoint, "send", counted)
    monkeypatch.setattr(ThreadEndpoint, "waiting", lambda self, peer: 2**20)
    with fm.Cluster.threads(workers=4) as cluster:
        result = fit(cluster)
    assert ahead[True] > 0
    assert_no_change_lost(result)


def test_with_staleness_0_nothing_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """All changes of a step are waited for in any case."""
    ahead = Counter[bool]()
    send = Node.send

    def counted(node: Node, to: str, message: Any, value: Any = None, nbytes: int = 0) -> None:
        ahead[isinstance(message, wire.Gossip) and message.ahead] += 1
        send(node, to, message, value, nbytes)

    monkeypatch.setattr(Node, "send", counted)
    assert_no_change_lost(fit(slow_sites(2e3), staleness=0))
    assert ahead[True] == 0

"""Kinds of knobs that are written here, and not in flowml, train as its own: simulated, and on workers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import PolicyError
from flowml.policy import Arrivals, Completion, Decide, Late, Never, Wait, register
from flowml.policy.answers import Answer
from flowml.policy.kinds import read
from flowml.policy.late import factor
from flowml.policy.wording import Value

REPLICAS, STEPS, RATE = 4, 12, 0.1
SOURCE = {"x": np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)}
ONES = {"x": np.ones((64, 4), np.float32)}
SLOW = fm.sim.Straggler(fm.sim.Constant(0.1), factor=2.5, workers=(3,))
NETWORK = fm.sim.Network(1e-4, 1e9)


@register
class FirstAfter(Completion, Value, frozen=True, tag=True):
    """The first `count` replicas complete a clock, but not before `least_s` seconds after the one before."""

    count: int
    least_s: float = 0.0
    late: Late = fm.Drop()

    def need(self, members: int) -> int:
        return min(self.count, members)

    def decide(self, arrivals: Arrivals, now: float) -> Answer:
        if arrivals.count + arrivals.hopeful < self.count:
            return Never(f"needs {self.count} replicas")
        if arrivals.count < self.count:
            return Wait()
        until = arrivals.began + self.least_s
        return Decide() if now >= until else Wait(until)


@register
class Fading(Late, Value, frozen=True, tag=True):
    """What is n clocks late counts 1 / (1 + n)."""

    @property
    def folds(self) -> bool:
        return True

    def factor(self, clocks: int) -> float:
        return 1 / (1 + clocks)


@register
class BackToTheQueue(Late, Value, frozen=True, tag=True):
    @property
    def requeues(self) -> bool:
        return True

    def describe(self) -> str:
        return "again"


def loss(w: Any, batch: Any) -> Any:
    return jnp.mean(batch["x"] @ w)


def simulated(policy: fm.Policy, source: Any = SOURCE, **more: Any) -> Any:
    cluster = fm.SimulatedCluster(REPLICAS, SLOW, NETWORK)
    trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=REPLICAS, policies=policy, **more)
    return trainer.fit(jnp.zeros(4), source, batch_size=16, steps=STEPS, progress=False)


def on_threads(policy: fm.Policy, cluster: fm.Cluster) -> Any:
    trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=REPLICAS, policies=policy)
    return trainer.fit(jnp.zeros(4), SOURCE, batch_size=16, steps=STEPS, progress=False)


def test_a_new_quorum_completes_clocks_under_both_clocks(threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(quorum=FirstAfter(3))
    assert policy.describe() == "FirstAfter(count=3) drop"
    found, known = simulated(policy), simulated(fm.policies.quorum(3))
    assert found.ledger == known.ledger and found.ledger.dropped > 0
    np.testing.assert_array_equal(found.params, known.params)
    assert found.virtual_seconds == known.virtual_seconds
    slower = simulated(fm.Policy(quorum=FirstAfter(3, least_s=0.2)))
    assert slower.virtual_seconds == pytest.approx(0.2 * STEPS, rel=0.05)
    real = on_threads(policy, threads_cluster)
    assert real.ledger.used >= 3 * STEPS


def test_a_new_quorum_may_say_that_there_is_none() -> None:
    with pytest.raises(fm.FlowmlError, match=r"clock 0 cannot be completed: .*FirstAfter.* needs 5 replicas"):
        simulated(fm.Policy(quorum=FirstAfter(5)))


@register
class Answers(Completion, Value, frozen=True, tag=True):
    """Completes a clock with all replicas, and until then answers what is no answer, or is over."""

    what: str

    def decide(self, arrivals: Any, now: float) -> Any:
        if arrivals.count == REPLICAS:
            return Decide()
        return {"none": None, "true": True, "class": Wait, "before": Wait(now - 1.0), "now": Wait(now)}[self.what]


@pytest.mark.parametrize("what", ["none", "true", "class"])
def test_what_is_no_answer_is_refused(what: str, threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(quorum=Answers(what))
    match = r"Answers\('\w+'\)\.decide\(\) answers .*; return Wait\(\), Wait\(until\), Decide\(\) or Never\(why\)"
    with pytest.raises(fm.FlowmlError, match=match):
        simulated(policy)
    with pytest.raises(fm.FlowmlError, match=match):
        on_threads(policy, threads_cluster)


@pytest.mark.parametrize("what", ["before", "now"])
def test_a_time_that_is_over_waits_for_the_next_arrival(what: str, threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(quorum=Answers(what))
    known = simulated(fm.policies.synchronous())
    found = simulated(policy)
    assert found.ledger == known.ledger and found.virtual_seconds == known.virtual_seconds
    assert on_threads(policy, threads_cluster).ledger == known.ledger


def test_a_new_quorum_inside_sites() -> None:
    def sites(quorum: Completion) -> fm.Policy:
        return fm.Policy(topology=fm.Hierarchy(fm.ParameterServer(), fm.AllReduce(), sites=2, quorum=quorum))

    found, known = simulated(sites(FirstAfter(1))), simulated(sites(fm.Quorum(1)))
    assert found.ledger == known.ledger and found.ledger.dropped > 0
    np.testing.assert_array_equal(found.params, known.params)


@register
class ByTable(Late, Value, frozen=True, tag=True):
    """What is n clocks late counts twice where n is `clocks`, else once."""

    clocks: int

    @property
    def folds(self) -> bool:
        return True

    def factor(self, clocks: int) -> float:
        return 1.0 + (clocks == self.clocks)


def test_a_new_late_rule_weighs_by_how_late_it_is(threads_cluster: fm.Cluster) -> None:
    """All gradients here are alike, so the parameters tell how many contributions were how many clocks late."""

    def moved(late: Late) -> float:
        fit = simulated(fm.Policy(quorum=fm.Quorum(0.75, late=late)), source=ONES)
        assert fit.ledger.folded == plain.ledger.folded
        return -float(fit.params[0]) / (RATE / REPLICAS)

    plain = simulated(fm.policies.quorum(0.75, late="fold"), source=ONES)
    whole = moved(fm.Fold())
    assert whole == pytest.approx(plain.ledger.used + plain.ledger.folded)
    late = {clocks: moved(ByTable(clocks)) - whole for clocks in range(1, STEPS)}
    assert sum(late.values()) == pytest.approx(plain.ledger.folded) and max(late) > 1
    assert len([n for n in late.values() if n > 0.5]) > 1, "all are equally late"
    expected = plain.ledger.used + sum(n / (1 + clocks) for clocks, n in late.items())
    assert moved(Fading()) == pytest.approx(expected, rel=1e-6)
    real = on_threads(fm.Policy(quorum=fm.Quorum(0.75, late=Fading())), threads_cluster)
    assert real.ledger.used >= 3 * STEPS


def test_a_late_contribution_counts_more_with_weighted_batches_too() -> None:
    policy = fm.Policy(quorum=fm.Quorum(0.75, late=ByTable(2)))
    plain = simulated(policy, source=ONES)
    weighted = simulated(policy, source=ONES, weight=lambda batch: batch["x"].sum())
    np.testing.assert_allclose(weighted.params, plain.params, rtol=1e-6)


def test_a_new_late_rule_inside_sites() -> None:
    def sites(late: Late) -> fm.Policy:
        quorum = fm.Quorum(1, late=late)
        return fm.Policy(topology=fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites=2, quorum=quorum))

    fits = [simulated(sites(late)) for late in (fm.Fold(), fm.Fold(0.5), Fading())]
    assert fits[2].ledger.folded == fits[0].ledger.folded > 0
    assert len({float(fit.params[0]) for fit in fits}) == 3


def test_a_new_late_rule_returns_work_to_the_queue(threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(quorum=fm.Quorum(0.75, late=BackToTheQueue()))
    assert policy.describe() == "quorum 0.75 again"
    found, known = simulated(policy), simulated(fm.policies.quorum(0.75, late="requeue"))
    assert found.ledger == known.ledger and found.ledger.requeued > 0
    np.testing.assert_array_equal(found.params, known.params)
    assert on_threads(policy, threads_cluster).ledger.dropped == 0


def test_factors_that_would_count_nothing_are_refused() -> None:
    @register
    class Nothing(Late, Value, frozen=True, tag="TestNothing"):
        @property
        def folds(self) -> bool:
            return True

        def factor(self, clocks: int) -> float:
            return 0.0

    with pytest.raises(PolicyError, match=r"multiplies what is 2 clocks late by 0.0; give a number above 0"):
        factor(Nothing(), 2)
    assert math.isclose(factor(fm.Fold(0.5), 2), 0.25)


def test_values_of_new_kinds_travel_by_their_names() -> None:
    policy = fm.Policy(quorum=FirstAfter(3, late=Fading()))
    data = msgspec.msgpack.encode(policy)
    assert msgspec.msgpack.decode(data, type=fm.Policy, dec_hook=read) == policy
    unknown = data.replace(b"FirstAfter", b"FirstAftir")
    with pytest.raises(msgspec.ValidationError, match="'FirstAftir' is no completion that this process knows"):
        msgspec.msgpack.decode(unknown, type=fm.Policy, dec_hook=read)
    wrong = data.replace(b"count\x03", b"count\xa13")
    with pytest.raises(msgspec.ValidationError, match="Expected `int`, got `str`"):
        msgspec.msgpack.decode(wrong, type=fm.Policy, dec_hook=read)


def test_what_is_no_kind_or_not_registered_is_refused() -> None:
    class Unregistered(Late, Value, frozen=True, tag=True):
        pass

    with pytest.raises(PolicyError, match=r"Unregistered is not registered; write @flowml.policy.register"):
        fm.Policy(quorum=fm.Quorum(0.75, late=Unregistered()))

    class NoTag(Late, Value, frozen=True):
        pass

    with pytest.raises(PolicyError, match=r"NoTag is no kind of a knob; write `class NoTag\(Late, Value"):
        register(NoTag)
    with pytest.raises(PolicyError, match=r"has the name 'Drop' already"):
        register(type("Drop", (Late, Value), {}, frozen=True, tag=True))


MODULE = """
from flowml.policy import Completion, Decide, Wait, register
from flowml.policy.wording import Value

@register
class FirstOf(Completion, Value, frozen=True, tag=True):
    count: int

    def decide(self, arrivals, now):
        return Decide() if arrivals.count >= self.count else Wait()
"""
SCRIPT = """
import sys
import jax.numpy as jnp, numpy as np, optax
import flowml as fm

if __name__ == "__main__":
    from first_of import FirstOf
    source = {"x": np.ones((16, 4), np.float32)}
    with fm.Cluster.local(workers=2):
        trainer = fm.Trainer(
            lambda w, b: jnp.mean(b["x"] @ w), optax.sgd(0.1), replicas=2, policies=fm.Policy(quorum=FirstOf(1))
        )
        print("used", trainer.fit(jnp.zeros(4), source, batch_size=4, steps=4, progress=False).ledger.used >= 4)
"""


@pytest.mark.parametrize("installed", [True, False])
def test_other_processes_find_the_kinds_of_installed_packages(tmp_path: Path, installed: bool) -> None:
    (tmp_path / "first_of.py").write_text(MODULE)
    (tmp_path / "script.py").write_text(SCRIPT)
    if installed:
        (tmp_path / "first_of-1.dist-info").mkdir()
        (tmp_path / "first_of-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: first-of\nVersion: 1\n")
        (tmp_path / "first_of-1.dist-info/entry_points.txt").write_text("[flowml.kinds]\nfirst_of = first_of\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    if installed:
        assert done.stdout == "used True\n", done.stderr
    else:
        assert "'FirstOf' is no completion that this process knows" in done.stderr

"""`fm.advise` ranks policies on simulated machines. Each setting here has a known answer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.advice import TIE, Trial, ranked, why
from flowml.policy.candidates import candidates

REPLICAS, BATCH, STEPS = 8, 64, 64
PARAMS = {"a": jax.ShapeDtypeStruct((64, 256), jnp.float32), "b": jax.ShapeDtypeStruct((256, 8), jnp.float32)}
SHAPES = {"x": jax.ShapeDtypeStruct((BATCH, 64), jnp.float32)}
FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
STEADY = fm.sim.Constant(0.1)
EXACT = ("synchronous()", "all_reduce()", "ring()", "factors()", "speculate(2)")


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"]) ** 2)


def trainer(compute: Any, network: Any = FAST, **settings: Any) -> fm.Trainer:
    cluster = fm.SimulatedCluster(REPLICAS, compute, network)
    return fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=REPLICAS, **settings)


def advice(compute: Any, network: Any = FAST, **settings: Any) -> fm.Advice:
    settings.setdefault("steps", STEPS)
    return fm.advise(trainer(compute, network), PARAMS, SHAPES, **settings)


def test_under_a_heavy_tail_those_that_do_not_wait_come_before_synchronous_training() -> None:
    found = advice(fm.sim.Pareto(0.1, 1.5))
    order = [trial.name for trial in found.trials]
    for name in ("quorum(0.75)", "backup_workers(7)", "asynchronous()", "speculate(2)"):
        assert order.index(name) < order.index("synchronous()")
    assert "waiting for the slowest replica" in found.setting()
    assert found.slowest_s > 3 * found.own_s
    quorum, late = found["quorum(0.75)"], found["asynchronous()"]
    assert 0.1 < quorum.dropped <= 0.25
    assert "does not wait for the slowest" in quorum.why
    assert "of the computed work is lost" in quorum.why
    assert (late.dropped, quorum.staleness) == (0, 0)
    assert f"{late.staleness:.1f} versions old on average, {late.most_stale} at most" in late.why
    assert late.staleness == pytest.approx(REPLICAS - 1, rel=0.3)  # each of the others pushes about once meanwhile


def test_over_slow_links_diloco_comes_first() -> None:
    found = advice(STEADY, fm.sim.Network(latency_s=0.05, bytes_per_s=1e6), steps=128)
    assert found.best.name.startswith("diloco(32")  # which of the two depends on how much they overlap
    assert "exchanging values" in found.setting()
    assert found.best.speed > 2
    assert found.best.nbytes < found["synchronous()"].nbytes / 10
    assert "replicas drift apart for 32 steps between exchanges" in found.best.why


def test_on_equal_machines_and_fast_links_nothing_beats_synchronous_training() -> None:
    found = advice(STEADY)
    assert found.best.name == "synchronous()"
    assert all(trial.speed < 1 + TIE for trial in found.trials)
    assert found["coded(1)"].speed == pytest.approx(0.5, rel=0.05)  # a replica computes twice as many examples
    assert found["quorum(0.75)"].speed == pytest.approx(0.75, rel=0.05)  # a quarter of the work is lost
    assert [t.name for t in found.trials[: len(EXACT)]] == list(EXACT)
    text = str(found)
    assert all(trial.name in text for trial in found.trials)
    assert "each step waits for all replicas" in text


def test_own_policies_are_among_those_tried_and_given_ones_replace_the_list() -> None:
    own = {"a": fm.policies.every(4), "*": fm.Policy()}
    found = fm.advise(trainer(STEADY, policies=own), PARAMS, SHAPES, policies={"mine": fm.policies.coded(1)}, steps=8)
    assert {trial.name for trial in found.trials} == {"synchronous()", "as given", "mine"}
    assert found["as given"].policies == own
    assert "one update has the gradients of 4 steps" in found["as given"].why
    with pytest.raises(KeyError, match="there are"):
        _ = found["theirs"]


def test_a_recorded_run_gives_the_machines() -> None:
    rows = [[0.1] * 4] * (REPLICAS - 1) + [[0.5] * 4]
    found = advice(fm.sim.Recorded(rows), policies={"quorum": fm.policies.quorum(0.75)}, steps=16)
    assert (found.own_s, found.slowest_s) == (pytest.approx(0.15), pytest.approx(0.5))
    assert found.best.name == "quorum"


def test_what_cannot_train_the_model_is_refused_with_its_reason() -> None:
    wrong = fm.policies.drop_compute(1.0)  # it needs microbatches
    found = advice(STEADY, policies={"cut": wrong, "ring": fm.policies.ring()}, steps=8)
    assert "microbatch" in found.refused["cut"]
    assert "not possible here:\n  cut: " in str(found)
    with pytest.raises(fm.PolicyError, match="none of these policies can train this model"):
        advice(STEADY, policies={"cut": wrong}, steps=8)


def test_rounds_that_the_steps_do_not_hold_are_refused_and_rows_are_in_the_order_of_their_times() -> None:
    tried = {"seldom": fm.policies.diloco(32), "often": fm.policies.local_sgd(4), "wide": fm.policies.quorum(0.75)}
    found = advice(fm.sim.LogNormal(0.1, 0.3), policies=tried, steps=16)
    assert found.refused["seldom"].endswith(
        "every 32 steps, of which 16 hold less than two rounds; give advise(steps=64) or more"
    )
    rows = [line.split()[0] for line in str(found).splitlines()[3:6]]
    assert rows == [t.name for t in sorted(found.trials, key=lambda trial: trial.seconds)]


def test_sites_get_gaia() -> None:
    table = {("a", "b"): (0.1, 1e6)}
    network = fm.sim.Sites(table, {"a": 4, "b": 4})
    found = advice(STEADY, network, steps=8)
    gaia = found["gaia(0.01)"].policies
    assert isinstance(gaia, fm.Policy)
    assert isinstance(gaia.topology, fm.Hierarchy)
    assert gaia.topology.sites == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_a_trial_repeats_and_leaves_the_trainer_as_it_was() -> None:
    mine = trainer(fm.sim.LogNormal(0.1, 0.3), policies=fm.policies.quorum(0.75))
    first, second = (fm.advise(mine, PARAMS, SHAPES, policies={}, steps=8) for _ in range(2))
    assert first == second
    params = {name: np.zeros(s.shape, np.float32) for name, s in PARAMS.items()}
    result = mine.fit(params, {"x": np.zeros((BATCH, 64), np.float32)}, batch_size=BATCH, steps=2, progress=False)
    assert math.isfinite(result.history[-1]["loss"])  # with arithmetic, and its own policy
    assert result.ledger.used == 2 * 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 3}, "steps=3: give at least 4"),
        ({"cluster": "local"}, "has none; give cluster=fm.SimulatedCluster"),
        ({"policies": fm.policies.quorum(0.75)}, "is a Policy; give a mapping from names to the policies to try"),
        ({"policies": [fm.Policy()]}, "is a list; give a mapping from names"),
        ({"policies": {"x": 3}}, r"policies\['x'\] is 3, of type int; give an fm.Policy such as"),
        ({"batch": {}}, "batch={} has no arrays; give one global batch"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((fm.FlowmlError, ValueError, TypeError), match=text):
        fm.advise(trainer(STEADY), PARAMS, **{"batch": SHAPES, **arguments})


def test_without_a_cluster_it_says_that_it_needs_a_simulated_one() -> None:
    without = fm.Trainer(loss, optax.sgd(0.1), replicas=REPLICAS)
    with pytest.raises(fm.SimulationError, match="and there is no cluster; give cluster="):
        fm.advise(without, PARAMS, SHAPES)


def test_rules_are_tried_and_explained_by_the_policies_that_they_choose() -> None:
    def coded(path: str, shape: tuple[int, ...]) -> fm.Policy:
        return fm.policies.coded(1)

    own = trainer(STEADY, policies=fm.policies.adam_auto(8))
    found = fm.advise(own, PARAMS, SHAPES, policies={"coded": coded}, steps=16)
    assert {trial.name for trial in found.trials} == {"as given", "coded", "synchronous()"}
    assert "no replica waits for a slow one" in found["as given"].why
    assert "each example is computed several times" in found["coded"].why
    assert found["coded"].speed == pytest.approx(0.5, abs=0.05)  # a replica computes twice as much


def test_a_staleness_that_is_shown_as_0_is_no_word_of_the_reason() -> None:
    plain = Trial("synchronous()", fm.Policy(), 1.0, 1.0)
    for staleness, told in ((0.04, False), (0.2, True)):
        trial = Trial("x", fm.policies.asynchronous(), 1.0, 1.0, staleness=staleness, most_stale=1)
        assert ("versions old" in why(trial, plain, [fm.policies.asynchronous()])) is told


def test_one_replica_has_nothing_to_compare() -> None:
    alone = fm.Trainer(loss, optax.sgd(0.1), cluster=fm.SimulatedCluster(1, STEADY, FAST))
    with pytest.raises(fm.SimulationError, match="give replicas="):
        fm.advise(alone, PARAMS, SHAPES)


def test_ties_go_to_the_policy_that_changes_training_less() -> None:
    times = {"exact": 1.04, "stale": 1.0, "slow": 2.0, "slower": 2.09, "slowest": 2.2}
    trials = [Trial(name, fm.Policy(), seconds, 0.0) for name, seconds in times.items()]
    assert [t.name for t in ranked(trials)] == ["exact", "stale", "slow", "slower", "slowest"]
    assert [t.name for t in ranked(trials[::-1])] == ["stale", "exact", "slower", "slow", "slowest"]


@pytest.mark.parametrize("replicas", [2, 3, 4, 16, 1000])
def test_candidates_are_sound_for_any_number_of_replicas(replicas: int) -> None:
    found, refused = candidates(replicas, 4, 0.1)
    assert refused == {}
    for name, policy in found.items():
        if "'" not in name and name.startswith(("synchronous", "quorum", "diloco", "backup", "softsync", "drop")):
            assert eval(f"fm.policies.{name}", {"fm": fm}) == policy  # a name is the call that makes the policy

"""A weight below 0 is refused under every rule, on threads and on processes: nothing of that replica is applied."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import pytest

import flowml as fm
from tests.training.reference import assert_close
from tests.training.test_weights import BATCH, SOURCE, masked_mean, params, weighted_by

KINDS = ["threads_cluster", "process_cluster"]
RULES: dict[str, Any] = {
    "server": fm.Policy(),
    "every 2": fm.policies.every(2),
    "all-reduce": fm.policies.all_reduce(),
    "ring": fm.Policy(topology=fm.Ring()),
    "ring, every 2": fm.Policy(topology=fm.Ring(), every=2),
    "quorum": fm.policies.quorum(0.5),
    "quorum of all": fm.policies.quorum(2),
}
MATCH = r"the weight of .* at step \d is below 0 or not finite; the gradient of layer .* is left out"


def gradient(half: int) -> Any:
    piece = {k: v[half * BATCH // 2 : (half + 1) * BATCH // 2] for k, v in SOURCE.items()}
    return jax.grad(masked_mean)(params(), piece)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_applied_where_all_weights_are_below_0(kind: str, rule: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    with pytest.warns(fm.FlowmlWarning, match=MATCH):
        result = weighted_by(cluster, [-1.0] * 4, replicas=2, policies=RULES[rule])
    assert_close(result.params, params())
    assert result.ledger.nonfinite
    assert all(np.isnan(r["loss"]) and r["replicas"] == 0 for r in result.history)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["every 2", "ring, every 2"])
def test_a_contribution_of_two_steps_is_left_out_as_a_whole(
    kind: str, rule: str, request: pytest.FixtureRequest
) -> None:
    """Replica 1 has a weight below 0 in the first of two steps. Where replicas send sums, no sum is applied."""
    cluster = request.getfixturevalue(kind)
    with pytest.warns(fm.FlowmlWarning, match=MATCH):
        result = weighted_by(cluster, [3.0, -1.0, 3.0, 3.0], replicas=2, policies=RULES[rule])
    expected = params()
    if rule == "every 2":
        expected = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b) / 2, params(), gradient(0), gradient(2))
    assert_close(result.params, expected)
    assert [r["replicas"] for r in result.history] == [1, 2]
    assert all(set(counts) == {1} for counts in result.ledger.nonfinite.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quorum_applies_the_other_replica(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    with pytest.warns(fm.FlowmlWarning, match=MATCH):
        result = weighted_by(cluster, [3.0, -1.0], replicas=2, policies=RULES["quorum of all"])
    assert_close(result.params, jax.tree.map(lambda p, g: p - 0.1 * g, params(), gradient(0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [*RULES, "asynchronous"])
def test_a_fit_may_end_with_it(kind: str, rule: str, request: pytest.FixtureRequest) -> None:
    """Under a rule that adds nothing up, the weight itself is what is seen."""
    cluster = request.getfixturevalue(kind)
    policy = RULES.get(rule, fm.policies.asynchronous())
    with pytest.raises(fm.WorkerError, match=r"at step \d: .*the weight of replica \d.* is below 0 or not finite"):
        weighted_by(cluster, [-1.0] * 4, replicas=2, policies=policy, on_nonfinite="raise")


@pytest.mark.parametrize("kind", KINDS)
def test_without_sums_the_loss_is_left_out_and_said(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = weighted_by(cluster, [-1.0, -1.0], replicas=2, policies=fm.policies.asynchronous())
    assert any("the weight of replica" in str(w.message) for w in caught)
    assert sum(result.ledger.nonfinite_losses.values()) == 2

"""Plausible mistakes of somebody who has read only the pages: each error is one sentence with the fix."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import flowml as fm
from flowml.policy.compose import resolve


def test_a_name_that_was_not_called() -> None:
    policies: Any = {"w": fm.policies.quorum}
    with pytest.raises(fm.PolicyError) as caught:
        resolve(policies, ["w"])
    assert str(caught.value) == "policies['w'] is quorum, of type function; call quorum(…)"


@pytest.mark.parametrize("given", ["top_k", fm.filters.top_k(0.1)], ids=str)
def test_filters_that_are_no_tuple(given: Any) -> None:
    with pytest.raises(fm.PolicyError, match=r"filters=.*top_k.*: give a tuple of filters, such as"):
        fm.Policy(filters=given)


def test_a_call_on_a_simulated_cluster() -> None:
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))

    def double(x: Any) -> Any:
        return 2 * x

    with pytest.raises(fm.SimulationError, match=r"'double' is a call, and a SimulatedCluster runs only fits of fm.Tr"):
        fm.dataflow(double, cluster=cluster)(jnp.ones(3))

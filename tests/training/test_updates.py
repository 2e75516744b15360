"""Proximal steps and votes, each against a naive version of itself."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flowml.policy.apply import Prox
from flowml.training.updates import ballot, elected, proximal, proximal_step

BOXES = [(-np.inf, np.inf), (0.0, np.inf), (-0.5, 0.25)]


@pytest.mark.parametrize(("l1", "l2", "box"), [*itertools.product([0.0, 0.3], [0.0, 0.7], BOXES)])
def test_the_proximal_step_minimises(l1: float, l2: float, box: tuple[float, float]) -> None:
    """Against a search over a grid."""
    if not l1 and not l2 and box == BOXES[0]:
        return
    prox = Prox(l1=l1, l2=l2, low=box[0], high=box[1])
    grid = np.linspace(-3, 3, 60001)
    grid = grid[(grid >= box[0]) & (grid <= box[1])]
    for x in (-2.0, -0.31, -0.1, 0.0, 0.2, 0.29, 1.5):
        costs = 0.5 * (grid - x) ** 2 + l1 * np.abs(grid) + l2 / 2 * grid**2
        np.testing.assert_allclose(proximal_step(prox, jnp.float32(x)), grid[np.argmin(costs)], atol=1e-4)


def test_prox_follows_the_update_and_leaves_the_state() -> None:
    def momentum(gradient: Any, parameter: Any, trace: Any) -> tuple[Any, ...]:
        return parameter - (trace + gradient), trace + gradient

    arrays = (jnp.array([0.1, -0.3]), jnp.array([1.0, -2.0]), jnp.array([-0.5, 4.0]))
    found, expected = proximal(Prox(low=0.0), momentum, 1)(*arrays), momentum(*arrays)
    np.testing.assert_allclose(found[0], np.maximum(expected[0], 0))
    np.testing.assert_allclose(found[1], expected[1])


@pytest.mark.parametrize("seed", range(20))
def test_votes_elect_as_a_loop_over_rows_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, bins, voters, rows = 7, 3, 4, int(rng.integers(1, 4))
    given = rng.normal(size=(voters, features, bins)).astype(np.float32)
    votes = [0] * features
    for one in given:
        for winner in sorted(range(features), key=lambda f: -float((one[f] ** 2).sum()))[:rows]:
            votes[winner] += 1
    total = given.sum(0)
    order = sorted(range(features), key=lambda f: (-votes[f], -float((total[f] ** 2).sum())))
    expected = np.zeros_like(total)
    for winner in order[: 2 * rows]:
        expected[winner] = total[winner]
    ballots = sum(np.asarray(ballot(jnp.asarray(one), rows)) for one in given)
    np.testing.assert_array_equal(ballots, votes)
    np.testing.assert_array_equal(elected(jnp.asarray(total), jnp.asarray(ballots), rows), expected)

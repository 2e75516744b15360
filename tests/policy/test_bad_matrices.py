"""A mixing matrix or a pattern that makes no sense is refused with the fix."""

from __future__ import annotations

from typing import Any

import optax
import pytest

import flowml as fm


@pytest.mark.parametrize(
    ("matrix", "fix"),
    [
        ([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], "this is not; give such a matrix, or the name of a graph such as 'ring'"),
        ([[1.5, -0.5], [-0.5, 1.5]], "W[0, 1] is -0.5; give 0 where two replicas exchange nothing, and a share from 0"),
        ([[float("nan"), 1.0], [1.0, 0.0]], "W[0, 0] is nan; give 0 where two replicas exchange nothing"),
        ([[0.5, 0.6], [0.5, 0.4]], "row 0 of W adds up to 1.1 instead of 1"),
        ([[1.0, 0.0], [0.0, 1.0]], "average with itself alone and nothing be exchanged; give an entry above 0 to each"),
        ([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]], "no path leads from replica 0 to replica 1, so they wo"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_refused_with_the_fix(matrix: list[list[float]], fix: str) -> None:
    with pytest.raises(fm.PolicyError) as caught:
        fm.Gossip(matrix)
    assert fix in str(caught.value)


def test_a_pattern_that_is_no_text_is_named_without_its_policy() -> None:
    wrong: Any = {3: fm.Policy()}
    cluster = fm.SimulatedCluster(1, fm.sim.Constant(0.1), fm.sim.Network(0.0, 1e9))
    with pytest.raises(TypeError, match=r"^policies has the pattern 3 of type int; give patterns of parameter paths"):
        fm.Trainer(lambda params, batch: 0.0, optax.sgd(0.1), cluster=cluster, policies=wrong)

"""The pieces of a step: without a code they tile the work item, with a code the partitions of the replica's row."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.plan import Training
from flowml.training.compiler import compile_training
from flowml.training.pieces import pieces
from flowml.training.spec import TrainingSpec
from tests.training.reference import data, mlp, mlp_loss


def training(replicas: int, microbatches: int, batch_size: int, policy: fm.Policy) -> Training:
    spec = TrainingSpec(
        mlp_loss,
        optax.sgd(0.1),
        replicas=replicas,
        microbatches=microbatches,
        policies=policy,
        placement=fm.Pipeline(1),
    )
    batch: Any = jax.tree.map(lambda a: a[:batch_size], data())
    found = compile_training(spec, mlp(), batch, [f"worker:{i}/cpu:0" for i in range(replicas)]).plan.training
    assert found is not None
    return found


def test_without_a_code_the_work_item_is_tiled() -> None:
    plan = training(2, 3, 24, fm.Policy())
    found = pieces(plan, 1, sequence=5, start=60)
    assert [(p.start, p.size, p.sequence, p.microbatch, p.coefficient) for p in found] == [
        (60, 4, 5, 0, 1.0),
        (64, 4, 5, 1, 1.0),
        (68, 4, 5, 2, 1.0),
    ]


@pytest.mark.parametrize(
    ("replicas", "policy"),
    [
        (4, fm.policies.coded(1)),
        (4, fm.policies.coded(2, "cyclic")),
        (6, fm.policies.coded_reduce(2, 2, 1)),
        (12, fm.policies.coded_reduce(3, 2, 2)),
    ],
)
def test_any_decodable_set_covers_every_example_of_the_batch_once(replicas: int, policy: fm.Policy) -> None:
    """The decoded sum of what replicas compute contains each example of the global batch exactly once."""
    size, clock = 48, 3
    plan = training(replicas, 2, size, policy)
    code = plan.code
    assert code is not None
    coefficients = code.decode(range(replicas))
    assert coefficients is not None
    item = plan.item_size
    covered = np.zeros(10 * size)
    keys: dict[int, tuple[int, int]] = {}
    for replica in range(replicas):
        sequence = clock * replicas + replica
        mine = pieces(plan, replica, sequence, sequence * item)
        assert len(mine) == plan.microbatches
        assert sum(p.size for p in mine) == code.load * size
        for p in mine:
            covered[p.start : p.start + p.size] += coefficients.get(replica, 0.0) * p.coefficient
            assert keys.setdefault(p.start, (p.sequence, p.microbatch)) == (p.sequence, p.microbatch)
    np.testing.assert_allclose(covered[clock * size : (clock + 1) * size], 1, atol=1e-9)
    assert not covered[: clock * size].any()
    assert not covered[(clock + 1) * size :].any()
    assert len(set(keys.values())) == len(keys)  # each microbatch has a key of its own

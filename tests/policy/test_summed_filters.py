"""Filters whose encodings replicas add up: the sum is that of a naive version, and nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.arrays import ArraySpec
from flowml.policy import filters as f
from flowml.policy.filters.dense import orthonormal, outer_product

Buffers = list[list[f.State]]
"""By replica and array."""


def summed(chain: Any, values: list[list[Any]], buffers: Buffers, clock: int = 0) -> list[Any]:
    """The sum of what replicas give, each a list of arrays. Their buffers are those for the next push."""

    def talk(replica: int) -> f.Talk:
        about = [f.Context((7, i, clock), clock) for i in range(len(values[replica]))]
        parts = zip(values[replica], buffers[replica], about, strict=True)

        def commit(after: Any) -> None:
            buffers[replica] = list(after)

        return f.Talk([f.add_up(chain, v, state, context) for v, state, context in parts], commit)

    talks = [talk(r) for r in range(len(values))]
    while True:
        totals = [sum(arrays[1:], arrays[0]) for arrays in zip(*(t.sent for t in talks), strict=True)]
        more = [t.take(totals) for t in talks]
        if not any(more):
            break
    for one in talks:
        one.commit()
        for mine, first in zip(one.total(), talks[0].total(), strict=True):
            np.testing.assert_array_equal(mine, first)
    return talks[0].total()


def kept(buffers: Buffers, array: int = 0) -> Any:
    return sum(np.asarray(states[array].get(f.RESIDUAL, 0.0), np.float64) for states in buffers)


CHAINS = [
    (f.low_rank(1).with_error_feedback(),),
    (f.low_rank(2).with_error_feedback(),),
    (f.random_k(0.3).with_error_feedback(),),
    (f.random_k(3).with_error_feedback(),),
]


@given(st.integers(0, 2**32), st.sampled_from(CHAINS), st.integers(1, 5))
def test_what_has_arrived_and_what_is_kept_is_what_was_given(seed: int, chain: Any, replicas: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(6, 9), (2, 3, 8), (5,), ()]
    buffers: Buffers = [[{} for _ in shapes] for _ in range(replicas)]
    given_, arrived = ([np.zeros(s) for s in shapes] for _ in range(2))
    for clock in range(4):
        values = [[rng.normal(size=s).astype(np.float32) for s in shapes] for _ in range(replicas)]
        for i, total in enumerate(summed(chain, values, buffers, clock)):
            assert total.shape == shapes[i] and total.dtype == np.float32
            arrived[i] = arrived[i] + total
            given_[i] = given_[i] + sum(np.asarray(v[i], np.float64) for v in values)
    for i in range(len(shapes)):
        np.testing.assert_allclose(arrived[i] + kept(buffers, i), given_[i], atol=1e-4)


def test_low_rank_is_powersgd_of_the_sum() -> None:
    """The naive version adds up the matrices first, with a QR decomposition: the power iteration finds their span."""
    rng = np.random.default_rng(0)
    values = [[rng.normal(size=(12, 3)) @ rng.normal(size=(3, 8))] for _ in range(3)]
    total = sum(v[0] for v in values)
    buffers: Buffers = [[{}] for _ in values]
    found: list[float] = []
    for clock in range(40):
        (got,) = summed((f.low_rank(2),), values, buffers, clock)
        basis = np.asarray(buffers[0][0]["0"])
        left, _ = np.linalg.qr(total @ basis)
        again = summed((f.low_rank(2),), values, [list(b) for b in buffers], clock + 1)[0]
        np.testing.assert_allclose(again, left @ left.T @ total, atol=1e-9)
        found.append(float(np.linalg.norm(total - got)))
    u, s, v = np.linalg.svd(total)
    best = np.linalg.norm(total - (u[:, :2] * s[:2]) @ v[:2])
    assert found[0] > best * 1.01 and found[-1] < best * (1 + 1e-6), "the best approximation of this rank"


def test_random_k_takes_the_same_elements_of_all() -> None:
    rng = np.random.default_rng(1)
    values = [[rng.normal(size=40).astype(np.float32)] for _ in range(4)]
    (got,) = summed((f.random_k(0.25),), values, [[{}] for _ in values])
    chosen = got != 0
    assert chosen.sum() == 10
    np.testing.assert_allclose(got[chosen], sum(v[0] for v in values)[chosen] * 4, rtol=1e-5)


@given(st.integers(0, 2**32), st.sampled_from([np.float32, np.float64]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_columns_are_orthonormal_also_where_some_depend_on_others(seed: int, dtype: Any, scale: float) -> None:
    rng = np.random.default_rng(seed)
    columns = (rng.normal(size=(9, 2)) @ rng.normal(size=(2, 4)) * scale).astype(dtype)
    columns[:, rng.integers(4)] = 0
    found = orthonormal(columns, rng.uniform(-1, 1, (9, 4)).astype(dtype))
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-5 if dtype == np.float32 else 1e-12)
    assert found.dtype == dtype
    right = rng.normal(size=(5, 4)).astype(dtype)
    np.testing.assert_allclose(outer_product(found, right), found @ right.T, atol=1e-5)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_sum_with_nan_is_nan_for_all_and_leaves_what_was_kept(chain: Any) -> None:
    good, bad = np.ones((6, 9), np.float32), np.ones((6, 9), np.float32)
    bad[0, 0] = np.nan
    committed: list[Any] = []
    talks = [f.Talk([f.add_up(chain, v, {}, f.Context((1,)))], committed.append, spoiled=v is bad) for v in (good, bad)]
    more = [True]
    while any(more):
        totals = [np.add(talks[0].sent[0], talks[1].sent[0])]
        before = totals[0].copy()
        more = [t.take(totals) for t in talks]
        np.testing.assert_array_equal(totals[0], before)
    assert all(not np.isfinite(t.total()[0]).all() for t in talks)
    assert not committed, "only a sum that is applied changes what filters keep"


def test_the_bytes_of_each_sum() -> None:
    payload = tuple(ArraySpec(shape, "float32") for shape in ((16, 8), (8,), ()))
    assert f.sum_sizes((f.low_rank(2),), payload, (0, 1)) == ((16 * 2 + 8 + 1) * 4, 8 * 2 * 4)
    assert f.sum_sizes((f.random_k(0.25),), payload, (0, 1)) == ((32 + 2 + 1) * 4,)
    assert f.sum_sizes((), payload, ()) == ((128 + 8 + 1) * 4,)


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        ((f.top_k(0.1),), "differs from replica to replica"),
        ((f.quantise(8),), "a scale of its own"),
        ((f.random_skip(0.5),), "has another size at each step"),
        ((f.compress(),), "are no numbers"),
        ((f.low_rank(2), f.quantise(8)), "a scale of its own"),
        ((f.random_k(0.5), f.random_k(0.5)), "of a total is not what it makes of what each adds"),
    ],
)
def test_other_filters_of_sums_are_refused_with_a_way_out(chain: Any, why: str) -> None:
    for topology in (fm.AllReduce(), fm.Ring(), fm.Tree(), fm.Hierarchy(fm.ParameterServer(), fm.Ring())):
        with pytest.raises(fm.PolicyError, match=rf"{why}.*use low_rank\(2\) or random_k\(0.1\) alone, or topology"):
            fm.Policy(topology=topology, filters=chain)

"""Filters whose encodings replicas add up: the sum is that of a naive version, and nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import ml_dtypes
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

        return f.Adding([f.add_up(chain, v, state, context) for v, state, context in parts], commit)

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
    talks = [
        f.Adding([f.add_up(chain, v, {}, f.Context((1,)))], committed.append, spoiled=v is bad) for v in (good, bad)
    ]
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
        ((f.random_skip(0.5),), r"that of random_skip\(0.5\) depends on the values"),
        ((f.compress(),), r"that of compress\(\) depends on the values"),
        ((f.top_k(0.1), f.compress()), r"that of compress\(\) depends on the values"),
        ((f.low_rank(2), f.quantise(8)), r"what low_rank\(2\) decodes may have other bits on another processor"),
        ((f.kkt(0.1),), r"that of kkt\(0.1\) depends on the values"),
        ((f.top_k(0.1), f.key_cache()), r"what key_cache\(\) sends has a meaning only with what it has sent before"),
    ],
)
def test_other_filters_of_sums_are_refused_with_a_way_out(chain: Any, why: str) -> None:
    for topology in (fm.AllReduce(), fm.Ring(), fm.Tree(), fm.Hierarchy(fm.ParameterServer(), fm.Ring())):
        with pytest.raises(fm.PolicyError, match=rf"{why}.*such as top_k\(0.1\) or quantise\(8\), or topology"):
            fm.Policy(topology=topology, filters=chain)


EXCHANGED = [
    (f.top_k(0.2).with_error_feedback(),),
    (f.top_k(3),),
    (f.top_k(0.3).with_error_feedback(), f.quantise(4)),
    (f.quantise(8),),
    (f.quantise(2, stochastic=True).with_error_feedback(),),
    (f.sign().with_error_feedback(),),
    (f.random_k(0.5), f.quantise(8)),
]
FILTERED = (0, 1)
"""The last array of a payload is the weight."""


def exchanges(chain: Any, values: list[list[Any]], buffers: Buffers, spoiled: int = -1) -> list[f.Exchange]:
    """The parts of replicas in one exchange, after it. There is a slot more than replicas, which stays empty."""

    def part(replica: int) -> f.Exchange:
        about = [(state, f.Context((replica, i))) for i, state in enumerate(buffers[replica])]
        seat = f.Seat(replica + 1, len(values) + 1)

        def commit(after: Any) -> None:
            buffers[replica] = list(after)

        return f.Exchange(chain, values[replica], FILTERED, about, seat, commit, spoiled=replica == spoiled)

    parts = [part(r) for r in range(len(values))]
    payload = [ArraySpec(v.shape, v.dtype.name) for v in values[0]]
    assert parts[0].sent[0].nbytes == (len(values) + 1) * f.slot_bytes(chain, payload, FILTERED)
    total = np.sum([p.sent[0] for p in parts], axis=0, dtype=np.uint8)
    assert not any(p.take([total]) for p in parts)
    return parts


def payloads(seed: int, replicas: int, dtype: Any = np.float32) -> list[list[Any]]:
    rng = np.random.default_rng(seed)
    shapes = ((6, 9), (7,))
    return [[*(rng.normal(size=s).astype(dtype) for s in shapes), np.ones((), np.float32)] for _ in range(replicas)]


@given(st.integers(0, 2**32), st.sampled_from(EXCHANGED), st.integers(1, 5))
def test_an_exchange_is_the_sum_of_what_each_has_decoded(seed: int, chain: Any, replicas: int) -> None:
    buffers: Buffers = [[{}, {}, {}] for _ in range(replicas)]
    arrived = [np.zeros((6, 9)), np.zeros(7)]
    given_ = [np.zeros((6, 9)), np.zeros(7)]
    for push in range(3):
        values = payloads(seed + push, replicas)
        naive: list[Any] = [0.0, 0.0]
        for r, mine in enumerate(values):
            for i in FILTERED:
                wire, _ = f.encode(chain, mine[i], buffers[r][i], f.Context((r, i)))
                naive[i] = naive[i] + f.decode(chain, iter(wire), f.Form(mine[i].shape, mine[i].dtype), {})[0]
        parts = exchanges(chain, values, buffers)
        totals = [p.total() for p in parts]
        for total in totals:
            assert total[2] == replicas
            for i in FILTERED:
                np.testing.assert_array_equal(total[i], totals[0][i])
                np.testing.assert_allclose(total[i], naive[i], atol=1e-5)
        for p in parts:
            p.commit()
        for i in FILTERED:
            arrived[i] += totals[0][i]
            given_[i] += sum(v[i] for v in values)
    if f.feeds_back(chain):
        for i in FILTERED:
            np.testing.assert_allclose(arrived[i] + kept(buffers, i), given_[i], atol=1e-4)


@pytest.mark.parametrize("chain", EXCHANGED, ids=str)
def test_an_exchange_with_a_spoiled_payload_is_nan_for_all(chain: Any) -> None:
    buffers: Buffers = [[{}, {}, {}] for _ in range(3)]
    for one in exchanges(chain, payloads(0, 3), buffers, spoiled=1):
        assert all(np.isnan(a).all() for a in one.total())
    assert buffers == [[{}, {}, {}]] * 3, "only a sum that is applied changes what filters keep"


def test_low_precision_is_added_in_float32() -> None:
    values = payloads(0, 5, ml_dtypes.bfloat16)
    total = exchanges((f.top_k(1.0),), values, [[{}, {}, {}] for _ in values])[0].total()[0]
    assert total.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(total, sum(v[0].astype(np.float32) for v in values).astype(ml_dtypes.bfloat16))


def test_slots_that_no_replica_can_have_sent_are_refused() -> None:
    (one,) = exchanges((f.top_k(0.2),), payloads(0, 1), [[{}, {}, {}]])
    wrong = one.sent[0].copy()
    wrong[len(wrong) // 2] = 7
    one.take([wrong])
    with pytest.raises(f.EncodingError, match="a slot begins with 7"):
        one.total()
    one.take([np.zeros_like(wrong)])
    with pytest.raises(f.EncodingError, match="no slot has anything"):
        one.total()

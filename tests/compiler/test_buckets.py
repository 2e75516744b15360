"""Small gradients share a bucket with those that the backward pass makes next to them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowml.training.buckets import Bundle, pack

ONE = st.builds(
    lambda nbytes, ready, kind: (nbytes, ready, kind),
    st.integers(0, 50),
    st.integers(0, 9),
    st.sampled_from([None, "a", "b"]),
)


@given(st.lists(ONE, max_size=20))
def test_every_leaf_is_in_one_bucket_which_is_small_or_of_one_bundle(drawn: list[tuple[int, int, str | None]]) -> None:
    bundles = [Bundle((2 * i, 2 * i + 1), nbytes, ready, kind) for i, (nbytes, ready, kind) in enumerate(drawn)]
    buckets = pack(bundles, most_bytes=60)
    assert sorted(leaf for bucket in buckets for leaf in bucket) == list(range(2 * len(bundles)))
    assert buckets == sorted(buckets)
    for bucket in buckets:
        inside = [b for b in bundles if b.leaves[0] in bucket]
        assert {leaf for b in inside for leaf in b.leaves} == set(bucket)
        assert len(inside) == 1 or (sum(b.nbytes for b in inside) <= 60 and len({b.kind for b in inside} - {None}) == 1)


def test_buckets_follow_the_backward_pass() -> None:
    layers = [Bundle((i,), 20, ready=10 - i, kind="all") for i in range(7)]
    assert pack(layers, most_bytes=60) == [(0,), (1, 2, 3), (4, 5, 6)]
    large = Bundle((5,), 100, ready=5, kind="all")
    assert pack([*layers[:5], large, layers[6]], most_bytes=60) == [(0, 1), (2, 3, 4), (5,), (6,)]

"""Gradient codes: every set that must be decodable is, and the decoded sum is the gradient of the whole batch."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowml.errors import PolicyError
from flowml.policy.codes import Code, CyclicRepetition, FractionalRepetition, TreeCode, matrix, repetition

SMALL = [(n, s) for n in range(1, 13) for s in range(n)]


def error(code: Code, arrived: list[int]) -> float:
    """The largest error of an entry of aᵀB; infinite if the code says that these replicas are not enough."""
    found = code.decode(arrived)
    if found is None:
        return np.inf
    assert set(found) <= set(arrived)
    coefficients = np.zeros(code.workers)
    for worker, coefficient in found.items():
        coefficients[worker] = coefficient
    return float(np.abs(coefficients @ matrix(code) - 1).max())


def without(code: Code, late: tuple[int, ...]) -> list[int]:
    return [w for w in range(code.workers) if w not in late]


@pytest.mark.parametrize(("members", "stragglers"), SMALL)
def test_every_set_of_survivors_is_decoded(members: int, stragglers: int) -> None:
    codes: list[Code] = [CyclicRepetition(members, stragglers)]
    if members % (stragglers + 1) == 0:
        codes.append(FractionalRepetition(members, stragglers))
    for code in codes:
        for late in combinations(range(members), stragglers):
            assert error(code, without(code, late)) < 1e-9, (code, late)


@pytest.mark.parametrize("stragglers", [1, 2, 3, 5, 6, 7, 13, 20, 21])
def test_random_survivors_of_84_are_decoded(stragglers: int) -> None:
    draw = np.random.default_rng(stragglers)
    codes: list[Code] = [CyclicRepetition(84, stragglers), repetition(84, stragglers)]
    for code in codes:
        for _ in range(8):
            late = tuple(draw.choice(84, stragglers, replace=False))
            assert error(code, without(code, late)) < 1e-9, (code, late)


@pytest.mark.parametrize(("members", "stragglers"), [(n, s) for n, s in SMALL if s > 0])
def test_one_late_replica_too_many_is_noticed(members: int, stragglers: int) -> None:
    cyclic = CyclicRepetition(members, stragglers)
    assert cyclic.decode(range(members - stragglers - 1)) is None
    if members % (stragglers + 1) == 0:
        fractional = FractionalRepetition(members, stragglers)
        assert fractional.decode(range(stragglers + 1, members)) is None  # a whole group is late
        assert fractional.decode(range(stragglers, members)) is not None


@pytest.mark.parametrize("code", [CyclicRepetition(7, 2), FractionalRepetition(6, 2), TreeCode(3, 2, 1)])
def test_a_replica_computes_the_load_and_nothing_twice(code: Code) -> None:
    for worker in range(code.workers):
        partitions = [j for j, _ in code.row(worker)]
        assert partitions == sorted(set(partitions))
        assert Fraction(len(partitions), code.partitions) == code.load
        assert all(0 <= j < code.partitions for j in partitions)


@pytest.mark.parametrize("code", [CyclicRepetition(7, 2), FractionalRepetition(6, 2)])
def test_the_partitions_of_a_replica_include_its_own(code: Code) -> None:
    assert all(w in dict(code.row(w)) for w in range(code.workers))


def test_repetition_has_the_structure_of_the_paper() -> None:
    assert np.array_equal(matrix(FractionalRepetition(4, 1)), np.kron(np.eye(2), np.ones((2, 2))))
    whole = matrix(CyclicRepetition(5, 2))
    for worker in range(5):
        assert set(np.flatnonzero(whole[worker])) == {(worker + i) % 5 for i in range(3)}
        assert np.count_nonzero(whole[:, worker]) == 3


@given(st.integers(2, 12), st.data())
def test_the_decoded_sum_is_the_gradient_of_the_batch(members: int, data: st.DataObject) -> None:
    stragglers = data.draw(st.integers(0, members - 1))
    late = data.draw(st.sets(st.integers(0, members - 1), max_size=stragglers))
    seed = data.draw(st.integers(0, 2**32 - 1))
    gradients = np.random.default_rng(seed).standard_normal((members, 5)).astype(np.float32)
    for code in (repetition(members, stragglers), CyclicRepetition(members, stragglers)):
        sent = [sum(np.float32(b) * gradients[j] for j, b in code.row(w)) for w in range(members)]
        found = code.decode([w for w in range(members) if w not in late])
        assert found is not None
        total = sum(a * sent[w] for w, a in found.items())
        np.testing.assert_allclose(total, gradients.sum(0), atol=2e-4)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_the_fractional_result_has_the_same_bits_whoever_is_late(groups: int, stragglers: int, seed: int) -> None:
    code = FractionalRepetition(groups * (stragglers + 1), stragglers)
    draw = np.random.default_rng(seed)
    gradients = draw.standard_normal((code.workers, 3)).astype(np.float32)
    sent = [np.sum([gradients[j] for j, _ in code.row(w)], axis=0) for w in range(code.workers)]
    everyone = code.decode(range(code.workers))
    some = code.decode(set(range(code.workers)) - set(draw.permutation(code.workers)[:stragglers].tolist()))
    assert everyone is not None
    assert some is not None
    first, second = (np.sum([sent[w] for w in sorted(found)], axis=0) for found in (everyone, some))
    assert np.array_equal(first, second)


def naive_tree(code: TreeCode, late: set[int]) -> np.ndarray | None:
    """What the home gets if each node adds its own gradients to its children's decoded messages, written dumbly.

    A message is a row over partitions: how much of each partition's gradient it contains.
    """
    whole = matrix(code)

    def message(worker: int) -> np.ndarray | None:
        """The message of a replica, from its own share and what it hears of its children."""
        if worker in late:
            return None
        below = heard(worker)
        return None if below is None else whole[worker] + below

    def heard(parent: int) -> np.ndarray | None:
        first = code.children * (parent + 1)
        if first >= code.workers:
            return np.zeros(code.partitions)
        messages = {i: m for i in range(code.children) if (m := message(first + i)) is not None}
        found = code.code.decode(messages)
        if found is None:
            return None
        return np.sum([a * messages[i] for i, a in found.items()], axis=0)

    return heard(-1)


@pytest.mark.parametrize(
    "code",
    [TreeCode(3, 2, 1), TreeCode(4, 2, 1), TreeCode(4, 2, 2), TreeCode(5, 2, 2), TreeCode(3, 3, 1), TreeCode(2, 4, 1)],
)
def test_a_tree_with_s_late_children_of_every_parent_is_decoded(code: TreeCode) -> None:
    draw = np.random.default_rng(0)
    parents = code.tolerates // code.stragglers
    for _ in range(20):
        late = {
            code.children * parent + int(i)
            for parent in range(parents)
            for i in draw.choice(code.children, code.stragglers, replace=False)
        }
        assert len(late) == code.tolerates
        assert error(code, without(code, tuple(late))) < 1e-9
        total = naive_tree(code, late)
        assert total is not None
        np.testing.assert_allclose(total, 1, atol=1e-9)


@given(st.sampled_from([TreeCode(3, 2, 1), TreeCode(4, 2, 1), TreeCode(2, 3, 1)]), st.data())
def test_a_tree_is_decoded_exactly_if_its_messages_reach_the_home(code: TreeCode, data: st.DataObject) -> None:
    late = data.draw(st.sets(st.integers(0, code.workers - 1)))
    arrived = without(code, tuple(late))
    total = naive_tree(code, late)
    if total is None:
        assert code.decode(arrived) is None
    else:
        assert error(code, arrived) < 1e-9


def test_a_tree_of_84_has_the_load_of_the_paper() -> None:
    tree = TreeCode(children=4, levels=3, stragglers=1)
    assert (tree.workers, tree.tolerates) == (84, 21)
    assert tree.load == Fraction(1, 14)
    assert CyclicRepetition(84, tree.tolerates).load == Fraction(22, 84)
    assert tree.partitions == 28
    draw = np.random.default_rng(3)
    for _ in range(3):
        late = tuple(4 * parent + int(draw.integers(4)) for parent in range(21))
        assert error(tree, without(tree, late)) < 1e-9


def test_a_tree_of_one_level_is_its_code() -> None:
    for n, s in [(4, 1), (5, 2), (6, 2)]:
        tree = TreeCode(n, 1, s)
        assert np.array_equal(matrix(tree), matrix(repetition(n, s)))
        assert (tree.load, tree.tolerates, tree.partitions) == (Fraction(s + 1, n), s, n)


def test_codes_travel() -> None:
    for code in (FractionalRepetition(4, 1), CyclicRepetition(5, 2), TreeCode(4, 3, 1)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(code), type=Code) == code
    with pytest.raises(msgspec.ValidationError, match="does not divide 4 replicas"):
        msgspec.json.decode(b'{"type": "fractional", "workers": 4, "stragglers": 2}', type=Code)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CyclicRepetition(3, 3), "needs at least 4 replicas, there are 3; use fewer stragglers"),
        (lambda: FractionalRepetition(5, 1), "does not divide 5 replicas; use a multiple of 2 replicas, or code='cyc"),
        (lambda: CyclicRepetition(0, 0), "of 0 replicas for 0 stragglers does not exist"),
        (lambda: CyclicRepetition(4, -1), "for -1 stragglers does not exist"),
        (lambda: TreeCode(3, 2, 3), "needs at least 4 children of each parent, there are 3"),
        (lambda: TreeCode(3, 0, 1), "a tree of 0 levels has no replicas"),
        (lambda: TreeCode(10, 9, 1), "is too large; at most 4096 replicas"),
        (lambda: TreeCode(1, 10**9, 0), "is too large"),
    ],
)
def test_a_code_that_does_not_exist_is_refused(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(PolicyError, match=text.replace("(", r"\(")):
        make()

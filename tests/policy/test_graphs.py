"""Mixing graphs: rows are doubly stochastic, stay so when replicas are lost, and average at the rate of the gap."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowml.errors import PolicyError
from flowml.policy.graphs import (
    CompleteGraph,
    ExponentialGraph,
    Graph,
    NestedGraph,
    OwnMatrix,
    RandomPairs,
    RingGraph,
    TorusGraph,
    among,
    as_graph,
    check_members,
    gap,
    matrix,
    own_matrix,
    partner,
    readers,
    renormalised,
    sites_of,
    spectral_gap,
)
from flowml.policy.kinds import read

GRAPHS: list[Graph] = [RingGraph(), TorusGraph(), ExponentialGraph(), CompleteGraph(), RandomPairs(7)]
STILL = GRAPHS[:-1]


def is_doubly_stochastic(weights: np.ndarray) -> bool:
    sums = np.concatenate([weights.sum(0), weights.sum(1)])
    return bool((weights >= 0).all()) and bool(np.allclose(sums, 1, atol=1e-12))


def birkhoff(seed: int, members: int) -> np.ndarray:
    """A random doubly stochastic matrix: a mean of permutations."""
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.ones(4))
    found = shares[0] * np.eye(members)
    for share in shares[1:]:
        found += share * np.eye(members)[draw.permutation(members)]
    return found


@given(st.sampled_from(GRAPHS), st.integers(1, 40), st.integers(0, 2**40))
def test_the_rows_of_a_graph_are_doubly_stochastic(graph: Graph, members: int, turn: int) -> None:
    whole = matrix(graph, members, turn)
    assert is_doubly_stochastic(whole)
    assert (np.diag(whole) > 0).all()
    if not isinstance(graph, ExponentialGraph):
        assert np.allclose(whole, whole.T)


def test_rows_are_those_of_the_textbook() -> None:
    assert RingGraph().row(0, 5) == pytest.approx({0: 1 / 3, 1: 1 / 3, 4: 1 / 3})
    assert RingGraph().row(1, 2) == pytest.approx({0: 2 / 3, 1: 1 / 3})
    assert RingGraph().row(0, 1) == {0: pytest.approx(1)}
    assert TorusGraph().row(0, 12) == pytest.approx(dict.fromkeys([0, 1, 3, 4, 8], 1 / 5))
    assert ExponentialGraph().row(6, 8) == pytest.approx(dict.fromkeys([6, 7, 0, 2], 1 / 4))
    assert CompleteGraph().row(2, 4) == dict.fromkeys(range(4), 1 / 4)


def test_a_row_costs_its_neighbours_and_not_the_replicas() -> None:
    for graph, degree in ((RingGraph(), 3), (TorusGraph(), 5), (ExponentialGraph(), 25)):
        assert len(graph.row(12345, 2**24)) == degree


@given(st.integers(1, 60), st.integers(0, 2**53 - 1), st.integers(0, 2**40))
def test_pairs_are_a_matching_of_all_but_one(members: int, seed: int, turn: int) -> None:
    partners = [partner(seed, turn, r, members) for r in range(members)]
    assert all(partners[p] == r for r, p in enumerate(partners))
    assert sum(p == r for r, p in enumerate(partners)) == members % 2


def test_pairs_differ_from_round_to_round_and_are_the_same_everywhere() -> None:
    drawn = {tuple(partner(1, turn, r, 8) for r in range(8)) for turn in range(50)}
    assert len(drawn) > 20
    assert [partner(0, 0, r, 6) for r in range(6)] == [partner(0, 0, r, 6) for r in range(6)]
    assert [partner(0, 1, r, 8) for r in range(8)] != [partner(1, 0, r, 8) for r in range(8)]


@given(st.sampled_from(STILL), st.integers(2, 40))
def test_the_gap_of_a_graph_is_that_of_its_matrix(graph: Graph, members: int) -> None:
    assert gap(graph, members) == pytest.approx(spectral_gap(matrix(graph, members)), abs=1e-9)


@pytest.mark.parametrize("graph", STILL)
@pytest.mark.parametrize("members", [2, 9, 16])
def test_the_distance_to_the_mean_decays_at_least_at_the_gap(graph: Graph, members: int) -> None:
    values = np.random.default_rng(members).standard_normal((members, 3))
    mean, weights = values.mean(0), matrix(graph, members)
    for _ in range(20):
        mixed = weights @ values
        before, after = np.linalg.norm(values - mean), np.linalg.norm(mixed - mean)
        assert after <= (1 - gap(graph, members)) * before + 1e-12
        np.testing.assert_allclose(mixed.mean(0), mean, atol=1e-12)
        values = mixed


def test_the_slowest_pattern_of_a_ring_decays_exactly_at_the_gap() -> None:
    members = 12
    values = np.cos(2 * np.pi * np.arange(members) / members)
    mixed = matrix(RingGraph(), members) @ values
    np.testing.assert_allclose(mixed, (1 - gap(RingGraph(), members)) * values, atol=1e-12)


@pytest.mark.parametrize("members", [2, 5, 8])
def test_random_pairs_decay_at_their_gap_on_average(members: int) -> None:
    values = np.random.default_rng(0).standard_normal(members)
    values -= values.mean()
    squares = [np.sum((matrix(RandomPairs(3), members, t) @ values) ** 2) for t in range(4000)]
    assert np.mean(squares) / np.sum(values**2) == pytest.approx((1 - gap(RandomPairs(), members)) ** 2, rel=0.05)


def complement(weights: np.ndarray, gone: list[int]) -> np.ndarray:
    """The stochastic complement, written out with whole matrices."""
    here = [i for i in range(len(weights)) if i not in gone]
    through = np.linalg.inv(np.eye(len(gone)) - weights[np.ix_(gone, gone)])
    return weights[np.ix_(here, here)] + weights[np.ix_(here, gone)] @ through @ weights[np.ix_(gone, here)]


@given(st.sampled_from(GRAPHS), st.integers(1, 14), st.data())
def test_without_the_lost_the_living_are_doubly_stochastic(graph: Graph, members: int, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, members - 1), max_size=members - 1))
    here = [r for r in range(members) if r not in gone]
    whole = np.zeros((len(here), len(here)))
    for i, replica in enumerate(here):
        row = renormalised(graph, replica, members, gone, turn=5)
        assert list(row) == sorted(row)
        assert not set(row) & gone
        for j, weight in row.items():
            whole[i, here.index(j)] = weight
    assert is_doubly_stochastic(whole)
    if isinstance(graph, RandomPairs):
        assert np.allclose(whole, whole.T)
    else:
        assert spectral_gap(np.linalg.matrix_power(whole, 4)) > 0  # connected
        np.testing.assert_allclose(whole, complement(matrix(graph, members), sorted(gone)), atol=1e-12)


def test_a_ring_closes_around_lost_replicas() -> None:
    assert set(renormalised(RingGraph(), 1, 8, {2, 3})) == {0, 1, 4}
    alone = renormalised(RandomPairs(0), 0, 2, {1})
    assert alone == {0: pytest.approx(1)}


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.data())
def test_any_doubly_stochastic_matrix_of_a_connected_graph_is_taken(
    seed: int, members: int, data: st.DataObject
) -> None:
    weights = birkhoff(seed, members)
    reach = np.linalg.matrix_power(weights, members) > 0
    if not reach.all():
        with pytest.raises(PolicyError, match=r"no path leads from replica 0|with itself alone"):
            own_matrix(weights)
        return
    graph = own_matrix(weights)
    np.testing.assert_array_equal(matrix(graph, members), weights)
    gone = data.draw(st.sets(st.integers(0, members - 1), max_size=members - 1))
    here = [r for r in range(members) if r not in gone]
    rows = [renormalised(graph, r, members, gone) for r in here]
    whole = np.array([[row.get(j, 0.0) for j in here] for row in rows])
    assert np.allclose(whole.sum(0), 1)
    assert np.allclose(whole.sum(1), 1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(0, 8), st.floats(1e-4, 0.5))
def test_a_matrix_whose_sums_differ_from_one_is_refused(seed: int, members: int, at: int, more: float) -> None:
    weights = birkhoff(seed, members)
    assume(at < members)
    weights[at, (at + 1) % members] += more
    with pytest.raises(PolicyError, match="would change the mean over replicas"):
        own_matrix(weights)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("rnig", "graph='rnig' is not one; give 'ring', 'torus', 'exponential', 'complete', 'random_pairs', or"),
        (3, "neither the name of a graph nor a matrix of numbers"),
        (None, "neither the name of a graph nor a matrix of numbers"),
        ([[1.0, 0.0]], "a mixing matrix is square"),
        ([[1.0, 0.0], [1.0]], "neither the name of a graph nor a matrix of numbers"),
        ([[0.5, 0.5], [0.4, 0.6]], "column 1 of W adds up to 1.1"),
        ([[0.5, 0.4], [0.5, 0.5]], "row 0 of W adds up to 0.9"),
        ([[1.5, -0.5], [-0.5, 1.5]], r"W\[0, 1\] is -0.5"),
        ([[float("nan"), 1], [1, 0]], r"W\[0, 0\] is nan"),
        ([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]], "no path leads from replica 0 to replica 1"),
        ([[1.0, 0.0], [0.0, 1.0]], "nothing be exchanged"),
        ([[0.0, 1.0], [1.0, 0.0]], "passes parameters around"),
        ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], "passes parameters around"),
    ],
)
def test_a_graph_that_does_not_average_is_refused(value: object, text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        as_graph(value)


def test_a_directed_matrix_without_a_diagonal_may_average() -> None:
    cycle, skip = np.eye(3)[[1, 2, 0]], np.eye(3)[[2, 0, 1]]
    weights = 0.5 * cycle + 0.5 * skip  # cycles of two and of three replicas
    assert spectral_gap(matrix(own_matrix(weights), 3)) == pytest.approx(0.5)


def test_a_matrix_for_other_replicas_is_refused() -> None:
    graph = own_matrix(np.full((3, 3), 1 / 3))
    check_members(graph, 3)
    with pytest.raises(PolicyError, match="has 3 rows, but there are 4 replicas"):
        check_members(graph, 4)
    check_members(RingGraph(), 4)


def test_graphs_travel() -> None:
    for graph in (*GRAPHS, own_matrix([[0.5, 0.5], [0.5, 0.5]])):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(graph), type=Graph, dec_hook=read) == graph
    with pytest.raises(msgspec.ValidationError, match="doubly stochastic"):
        msgspec.json.decode(b'{"type": "matrix", "rows": [[0.5, 0.4], [0.5, 0.5]]}', type=Graph, dec_hook=read)
    assert isinstance(as_graph([[1.0]]), OwnMatrix)


@given(st.data(), st.integers(2, 8), st.integers(2, 4), st.integers(0, 20))
def test_rounds_of_sites_are_doubly_stochastic_and_reach_all(
    data: st.DataObject, members: int, often: int, turn: int
) -> None:
    flat = st.sampled_from([as_graph(name) for name in ("ring", "torus", "exponential", "complete", "random_pairs")])
    sites = data.draw(st.integers(1, members))
    graph = NestedGraph(data.draw(flat), data.draw(flat), sites, often)
    check_members(graph, members)
    weights = matrix(graph, members, turn)
    np.testing.assert_allclose(weights.sum(0), 1)
    np.testing.assert_allclose(weights.sum(1), 1)
    for r in range(members):
        assert readers(graph, r, members, turn) == tuple(i for i in range(members) if weights[i, r] and i != r)
    leaders = {site[0] for site in sites_of(sites, members)}
    if (turn + 1) % often == 0:  # only leaders take part
        assert all(weights[r, r] == 1 for r in range(members) if r not in leaders)
    through = np.eye(members)
    for n in range(40 * often):
        through = matrix(graph, members, n) @ through
    assert (through > 0).all()
    gone = data.draw(st.sets(st.integers(0, members - 1), max_size=members - 1))
    left = among(graph, members, gone)
    check_members(left, members - len(gone))
    np.testing.assert_allclose(matrix(left, members - len(gone), turn).sum(0), 1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.data())
def test_those_that_are_left_of_a_matrix_average(seed: int, members: int, data: st.DataObject) -> None:
    weights = birkhoff(seed, members)
    assume((np.linalg.matrix_power(weights, members) > 0).all())
    gone = data.draw(st.sets(st.integers(0, members - 1), max_size=members - 1))
    check_members(among(own_matrix(weights), members, gone), members - len(gone))


def test_the_gap_of_sites_is_that_of_their_rounds() -> None:
    nested = NestedGraph(as_graph("complete"), as_graph("complete"), 2, 2)
    assert 0 < gap(nested, 4) < 1
    assert gap(NestedGraph(as_graph("complete"), as_graph("complete"), 1, 2), 4) == pytest.approx(1.0)

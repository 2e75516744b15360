"""Gossip as a policy: its normal form, its readers, and which compositions are sound."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.policy import Policy, check_composition
from flowml.policy.graphs import ExponentialGraph, RandomPairs, RingGraph, TorusGraph, as_graph, readers
from flowml.policy.kinds import read

OWN = as_graph([[0.4, 0.6, 0.0], [0.0, 0.4, 0.6], [0.6, 0.0, 0.4]])


@given(
    st.sampled_from([RingGraph(), TorusGraph(), ExponentialGraph(), RandomPairs(3)]),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_readers_are_the_rows_that_have_a_replica(graph: Any, members: int, turn: int) -> None:
    for replica in range(members):
        naive = [i for i in range(members) if i != replica and replica in graph.row(i, members, turn)]
        assert list(readers(graph, replica, members, turn)) == naive


def test_readers_of_a_directed_matrix() -> None:
    assert [readers(OWN, r, 3) for r in range(3)] == [(2,), (0,), (1,)]


def test_every_is_the_rhythm_of_the_rounds() -> None:
    policy = Policy(topology=fm.Gossip("torus"), every=4)
    assert policy == fm.policies.gossip("torus", every=4)
    assert policy.topology == fm.Gossip("torus", 4)
    assert policy.payload == fm.Weights()
    assert policy.every == fm.Once()
    assert policy.describe() == "gossip torus every 4"
    assert [c for c in range(12) if policy.topology.due(c)] == [3, 7, 11]


def test_no_loco_is_gossip_with_an_outer_optimizer() -> None:
    policy = fm.policies.no_loco(50)
    assert policy == Policy(topology=fm.Gossip("random_pairs"), every=50, apply=fm.Outer())
    assert policy.describe() == "gossip random pairs every 50, outer"


def test_gossip_travels() -> None:
    for policy in (fm.policies.gossip(), fm.policies.gossip([[0.5, 0.5], [0.5, 0.5]], 3), fm.policies.no_loco(5)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(policy), type=Policy, dec_hook=read) == policy
        assert msgspec.structs.replace(policy) == policy


UNSOUND: list[tuple[dict[str, Any], str]] = [
    ({"quorum": fm.Quorum(0.75)}, "would change the mean over replicas"),
    ({"staleness": 2}, "would change the mean over replicas"),
    ({"payload": fm.Delta()}, "reaches only the neighbours"),
    ({"payload": fm.Factors()}, "replicas average parameters"),
    ({"apply": "sum"}, "replicas average parameters"),
    ({"every": fm.Every(4, delay=1)}, "give the steps between two rounds as every=k"),
]


@pytest.mark.parametrize(("knobs", "text"), UNSOUND)
def test_an_unsound_composition_raises(knobs: dict[str, Any], text: str) -> None:
    with pytest.raises(fm.PolicyError, match=text):
        Policy(topology=fm.Gossip("ring"), **knobs)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fm.Gossip("star"), "graph='star' is not one"),
        (lambda: fm.Gossip(every=0), "an int of at least 1"),
        (lambda: fm.Gossip(pull=-1), "between 0 and 2"),
        (lambda: fm.Gossip(pull=0), "would never agree"),
        (
            lambda: fm.policies.no_loco(4, pull=9),
            r"Gossip\(pull=9\).*farther from the mean than it was; give a number bet",
        ),
        (lambda: Policy(topology=fm.Gossip(pull=0.5)), "pull=0.5 would have no effect"),
        (lambda: Policy(topology=fm.Gossip("complete", pull=1.5), payload=fm.Delta()), "pull=1.5 would have no effect"),
        (lambda: fm.Gossip([[0.5, 0.4], [0.5, 0.6]]), "doubly stochastic"),
        (lambda: Policy(topology=fm.Gossip("ring", 2), every=2), "says twice"),
    ],
)
def test_a_gossip_that_does_not_average_is_refused(make: Any, text: str) -> None:
    with pytest.raises(fm.PolicyError, match=text):
        make()


def test_a_layer_that_drops_is_sound_beside_gossip() -> None:
    assert check_composition({"a": fm.policies.gossip(), "b": fm.policies.quorum(0.5)}, 4) == ()
    with pytest.raises(fm.PolicyError, match="has 3 rows, but there are 4 replicas"):
        check_composition({"a": Policy(topology=fm.Gossip(OWN))}, 4)
    assert check_composition({"a": fm.policies.gossip(), "b": Policy()}, 4) == ()

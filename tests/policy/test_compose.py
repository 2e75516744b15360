"""Patterns pick policies, and the policies of one model must go together."""

from __future__ import annotations

import pytest

from flowml import policies
from flowml.errors import PolicyError
from flowml.policy import DEFAULT_PATTERN, Gossip, Policy, Quorum, Ring, Tree, check_composition, resolve
from flowml.policy.compose import lonely

PATHS = ("params/conv1/kernel", "params/conv1/bias", "params/fc1/kernel", "head/w")


def test_the_first_pattern_in_order_wins_and_params_need_not_be_named() -> None:
    every, stale, rest = policies.every(4), policies.asynchronous(3), policies.synchronous(apply="sum")
    found = resolve({"conv*": every, "params/fc?/kernel": stale, "*": rest}, PATHS)
    assert list(found.values()) == [("conv*", every), ("conv*", every), ("params/fc?/kernel", stale), ("*", rest)]
    assert list(found) == list(PATHS)


def test_what_no_pattern_matches_is_synchronous() -> None:
    assert resolve({"*/bias": policies.every(2)}, PATHS)["head/w"] == (DEFAULT_PATTERN, Policy())
    assert resolve({}, PATHS) == {p: (DEFAULT_PATTERN, Policy()) for p in PATHS}


def test_patterns_are_case_sensitive_on_every_platform() -> None:
    with pytest.raises(PolicyError, match=r"matches no parameter; there are: .*; give a pattern of one of them"):
        resolve({"CONV*": Policy()}, PATHS)


def test_a_pattern_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(PolicyError, match=r"'cnov\*'.*params/conv1/kernel, .*head/w"):
        resolve({"cnov*": Policy(), "*": Policy()}, PATHS)


def test_a_long_list_of_parameters_is_cut_short() -> None:
    with pytest.raises(PolicyError, match=r"… \(500 in all\)"):
        resolve({"x": Policy()}, [f"layer{i}/w" for i in range(500)])


def test_only_policies_are_policies() -> None:
    with pytest.raises(PolicyError, match=r"policies\['\*'\] is 'sync'"):
        resolve({"*": "sync"}, PATHS)  # pyright: ignore[reportArgumentType]


def test_layers_with_other_policies_do_not_restrict_a_quorum() -> None:
    for other in (policies.asynchronous(3), policies.all_reduce(), Policy(), policies.quorum(0.5, every=4)):
        mixed = {"conv": policies.quorum(0.75), "fc": other}
        assert check_composition(mixed, replicas=4) == ()


def test_one_replica_has_nothing_to_add_up() -> None:
    (note,) = check_composition({"a": policies.all_reduce(), "b": policies.all_reduce()}, replicas=1)
    assert note == "'a' (sync, all-reduce): one replica has nothing to add up"


def test_a_quorum_that_cannot_drop_is_remarked_upon_once() -> None:
    share, count = policies.quorum(0.75), Policy(quorum=Quorum(2))
    notes = check_composition({"a": share, "b": Policy(), "c": count, "d": share}, replicas=2)
    assert notes == ("a, d: Quorum(0.75) of 2 can never drop", "c: Quorum(2) of 2 can never drop")
    for full in (Policy(quorum=Quorum(2, limit_s=9.0)), policies.speculate()):
        assert check_composition({"a": full}, replicas=2) == ()


def test_a_share_below_one_replica_is_refused_where_gradients_are_applied_on_arrival() -> None:
    with pytest.raises(PolicyError, match=r"'a': Quorum\(0.2\) .* of 3 replicas .* less than one; give softsync\(3\)"):
        check_composition({"a": policies.softsync(5)}, replicas=3)
    for sound in (policies.softsync(3), policies.quorum(0.2), policies.adam_epoch(0.2)):
        check_composition({"a": sound}, replicas=3)
    check_composition({"a": policies.softsync(5)}, replicas=1)  # no other waits for its share


def test_one_replica_that_would_average_alone_is_told() -> None:
    once = policies.average_once()
    (warning,) = lonely({"a": once, "b": once}, 1)
    assert warning.startswith("a, b (once, weights): one replica has no other to average with")
    assert lonely({"a": once}, 2) == lonely({"a": policies.local_sgd(4)}, 1) == lonely({"a": Policy()}, 1) == ()
    for policy in (once, policies.local_sgd(4), policies.adam_convolution(4)):
        (note,) = check_composition({"a": policy}, 1)
        assert "no other to average with" in note
    assert check_composition({"a": policies.diloco(4)}, 1) == ()


def test_somebody_has_to_train() -> None:
    with pytest.raises(PolicyError, match="replicas=0"):
        check_composition({}, replicas=0)


@pytest.mark.parametrize("topology", [Ring(), Tree(2), Gossip()])
def test_a_ring_a_tree_and_a_graph_have_two_members(topology: Ring | Tree | Gossip) -> None:
    with pytest.raises(PolicyError, match=r"'a': topology=.* needs at least 2 replicas, and there is one"):
        check_composition({"a": Policy(topology=topology)}, replicas=1)
    check_composition({"a": Policy(topology=topology)}, replicas=2)

"""The rules for stopping between microbatches as values: what they say, and which compositions they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import flowml as fm
from flowml.policy import check_composition, cut_by

LIMIT = fm.Deadline(limit_s=0.2, of="microbatches")


def test_a_limit_stops_a_replica_and_leaves_none_out() -> None:
    assert fm.policies.drop_compute(0.2) == fm.Policy(quorum=LIMIT)
    assert fm.policies.drop_compute(0.2, topology=fm.Hierarchy()).quorum == LIMIT  # a sum over all replicas
    assert fm.policies.drop_compute(0.2).describe() == "microbatches cut after 0.2 s"
    assert (LIMIT.stops(0.19), LIMIT.stops(0.2)) == (False, True)
    assert LIMIT.never_drops(4) and LIMIT.need(4) == 4
    assert not fm.Deadline(limit_s=0.2).stops(1.0), "that is the limit of a clock, and not of a replica"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: fm.Deadline(of="microbatches"), "give limit_s="),
        (lambda: fm.Deadline(0.5, limit_s=1, of="microbatches"), "leave share and grace out"),
        (lambda: fm.Deadline(grace=1.0, limit_s=1, of="microbatches"), "leave share and grace out"),
        (lambda: fm.Deadline(limit_s=1, of="samples"), "of='samples'.* is not known"),  # pyright: ignore
        (lambda: fm.Deadline(limit_s=1, late="requeue", of="microbatches"), "late='requeue' is not sound"),
        (lambda: fm.Quorum(0.5, of="microbatches", late="fold"), "late='fold' is not sound"),
        (lambda: fm.Quorum(0.5, of="microbatches", over="epoch"), "give a fraction such as 0.75 and of='samples'"),
        (lambda: fm.Quorum(0.5, of="batches"), "give of='replicas', 'samples' or 'microbatches'"),  # pyright: ignore
        (lambda: fm.policies.quorum(4, "microbatches", payload=fm.Factors()), "factors are sent for each microbatch"),
        (lambda: fm.policies.drop_compute(0.1, payload=fm.Factors()), "factors are sent for each microbatch"),
        (lambda: fm.policies.drop_compute(0), "a number of seconds above 0"),
        (lambda: fm.Policy(topology=fm.Gossip("ring"), quorum=LIMIT), "is not sound"),
        (
            lambda: fm.Policy(topology=fm.Hierarchy(fm.Ring(), fm.ParameterServer(), 2), quorum=LIMIT),
            "a sum over its replicas",
        ),
    ],
)
def test_what_is_not_sound_says_why(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(fm.PolicyError, match=message):
        wrong()


def test_a_quorum_of_microbatches_leaves_no_replica_out() -> None:
    quorum = fm.Quorum(0.75, of="microbatches")
    assert fm.policies.quorum(0.75, of="microbatches") == fm.Policy(quorum=quorum)
    assert fm.policies.quorum(0.75, "samples", "requeue").quorum == fm.Quorum(0.75, "samples", late="requeue")
    assert fm.Policy(quorum=quorum).describe() == "quorum 0.75 of microbatches"
    assert quorum.never_drops(4) and quorum.waits_for_all and not quorum.stops(9.0)
    assert (quorum.need(16), fm.Quorum(3, of="microbatches").need(16)) == (12, 3)
    assert cut_by([fm.Policy(quorum=quorum), fm.Policy(quorum=quorum, every=2)], 2, 4) == quorum
    with pytest.raises(fm.PolicyError, match=r"a step of 2 replicas has \(8\).*at most 7"):
        cut_by([fm.policies.quorum(9, "microbatches")], 2, 4)


def test_all_layers_have_the_rule_or_none() -> None:
    one = fm.policies.drop_compute(0.2)
    assert cut_by([fm.Policy(), fm.policies.quorum(0.5)], 2, 1) is None
    assert cut_by([one, fm.policies.drop_compute(0.2, every=3)], 2, 4) == LIMIT
    for other in (fm.Policy(), fm.policies.drop_compute(0.3)):
        with pytest.raises(fm.PolicyError, match="give all layers the same quorum"):
            cut_by([one, other], 2, 4)
    with pytest.raises(fm.PolicyError, match="microbatches=1 leaves nothing out"):
        cut_by([one], 2, 1)


def test_a_count_of_examples_may_exceed_the_number_of_replicas() -> None:
    policies = {"a": fm.Policy(quorum=fm.Quorum(12, of="samples"))}
    assert check_composition(policies, 2) == ()

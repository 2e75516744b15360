"""A value of the wrong kind is answered with what to write in its place, and errors show values as users write them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import flowml as fm

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a class": (
        lambda: fm.Policy(payload=fm.Delta),
        "payload=Delta is a class; give a value of it, as payload=fm.Delta()",
    ),
    "a class of an apply": (lambda: fm.Policy(apply=fm.Outer), "as apply=fm.Outer(optimizer)"),
    "a class of a site": (lambda: fm.Hierarchy(fm.Ring, fm.Ring()), "local=Ring is a class; give a value of it"),
    "a class between sites": (lambda: fm.Hierarchy(fm.Ring(), fm.Tree), "remote=Tree is a class; give a value of it"),
    "a number": (lambda: fm.Policy(quorum=0.75), "quorum=0.75 is not known; give quorum=fm.Quorum(0.75)"),
    "a name": (
        lambda: fm.Policy(topology="all_reduce"),
        "'all_reduce' is not known; give topology=fm.AllReduce() or fm.P",
    ),
    "an unknown name": (lambda: fm.Policy(quorum="most"), "quorum=fm.Quorum(0.75) or fm.Deadline(0.75)"),
    "a function": (
        lambda: fm.Policy(filters=(fm.filters.top_k,)),
        "not a filter, but a function that makes one; call it",
    ),
    "an unknown argument": (
        lambda: fm.Policy(quorom=fm.Quorum(0.5)),  # pyright: ignore[reportCallIssue]
        "Policy has no argument quorom=; did you mean quorum=? Policy has topology=, staleness=, quorum=, every=, ",
    ),
    "an unknown argument of a part": (
        lambda: fm.Gossip("ring", evry=3),  # pyright: ignore[reportCallIssue]
        "Gossip has no argument evry=; did you mean every=? Gossip has graph=, every=, pull=",
    ),
    "an unknown argument of a named policy": (
        lambda: fm.policies.local_sgd(8, stalenes=1),  # pyright: ignore[reportCallIssue]
        "local_sgd has no argument stalenes=; did you mean staleness=?",
    ),
    "an argument that nothing is like": (
        lambda: fm.Ring(3),  # pyright: ignore[reportCallIssue]
        "Ring is given too many values (1): Ring() has no arguments",
    ),
    "a missing argument": (
        fm.Mix,  # called without arguments
        "Mix needs pull=; give fm.Mix(0.1)",
    ),
    "a filter of a code": (
        lambda: fm.Policy(quorum=fm.Coded(1), filters=(fm.filters.top_k(0.1),)),
        "with filters=(top_k(0.1),) is not sound",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_error_says_what_to_write(name: str) -> None:
    make, text = WRONG[name]
    with pytest.raises(fm.PolicyError) as caught:
        make()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (fm.Gossip("exponential", every=3), "fm.Gossip('exponential', every=3)"),
        (fm.Gossip(np.full((2, 2), 0.5)), "fm.Gossip(((0.5, 0.5), (0.5, 0.5)))"),
        (
            fm.Hierarchy(fm.Ring(), fm.ParameterServer(), sites=2),
            "fm.Hierarchy(local=fm.Ring(), remote=fm.ParameterServer(), sites=2)",
        ),
        (fm.Every(4, offset=1), "fm.Every(4, offset=1)"),
        (fm.Every(4, pull=2), "fm.Every(4, pull=2)"),
        (fm.Once(), "fm.Once()"),
        (fm.Delta(), "fm.Delta()"),
        (fm.Quorum(2, late="fold"), "fm.Quorum(2, late=fm.Fold())"),
    ],
)
def test_values_are_shown_as_they_are_written(value: object, text: str) -> None:
    assert repr(value) == text


PARTS = (
    *[fm.Policy, fm.Quorum, fm.Deadline, fm.Coded, fm.Speculate, fm.Every, fm.Fold, fm.Drop, fm.Requeue],
    *[fm.Gradient, fm.Factors, fm.Delta, fm.Weights, fm.Outer, fm.Mix, fm.Consensus, fm.Prox, fm.Vote, fm.Distill],
    *[fm.StalenessScaled, fm.ParameterServer, fm.AllReduce, fm.Ring, fm.Tree, fm.Hierarchy, fm.Gossip, fm.SharedMemory],
)


@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
def test_every_part_of_a_policy_names_the_argument_that_it_lacks(kind: type) -> None:
    with pytest.raises(fm.PolicyError, match=f"^{kind.__name__} has no argument nothing_like_it=; {kind.__name__}"):
        kind(nothing_like_it=1)

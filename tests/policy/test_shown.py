"""What a policy, or a part of one, prints is Python that makes it: `repr(eval(repr(x))) == repr(x)`."""

from __future__ import annotations

import numpy as np
import optax
import pytest

import flowml as fm

NAMED = {
    "synchronous": fm.policies.synchronous(),
    "all_reduce": fm.policies.all_reduce(every=2, apply="sum"),
    "every": fm.policies.every(4),
    "asynchronous": fm.policies.asynchronous(3, every=fm.Every(1, 4)),
    "factors": fm.policies.factors(),
    "quorum": fm.policies.quorum(0.75, of="samples", late=fm.Fold(0.5)),
    "backup_workers": fm.policies.backup_workers(1),
    "deadline": fm.policies.deadline(1, grace=0.2),
    "drop_compute": fm.policies.drop_compute(1.5),
    "compensate": fm.policies.compensate(),
    "softsync": fm.policies.softsync(3),
    "double_buffer": fm.policies.double_buffer(),
    "local_sgd": fm.policies.local_sgd(8),
    "diloco": fm.policies.diloco(32, fragments=2, delay=4, alpha=0.5),
    "decoupled_diloco": fm.policies.decoupled_diloco(8, quorum=1, late="drop"),
    "sparse_loco": fm.policies.sparse_loco(8),
    "elastic_averaging": fm.policies.elastic_averaging(4, 0.2),
    "average_once": fm.policies.average_once(),
    "downpour": fm.policies.downpour(4, 2),
    "admm": fm.policies.admm(2.0, share=2, staleness=4, l1=0.1, low=0.0),
    "gossip": fm.policies.gossip("torus", every=2),
    "no_loco": fm.policies.no_loco(8, pull=0.5),
    "choco": fm.policies.choco((fm.filters.top_k(0.1),)),
    "hogwild": fm.policies.hogwild(every=4),
    "gaia": fm.policies.gaia(0.1, sites=((0, 1), (2,)), staleness=2),
    "coded": fm.policies.coded(1, "cyclic"),
    "coded_reduce": fm.policies.coded_reduce(2, 3, 1),
    "speculate": fm.policies.speculate(3, after=2.0),
    "ring": fm.policies.ring(),
    "ssp": fm.policies.ssp(8),
    "parameter_server": fm.policies.parameter_server(0.1, staleness=4),
    "adam_convolution": fm.policies.adam_convolution(10),
    "adam_epoch": fm.policies.adam_epoch(),
    "vote": fm.policies.vote(3),
    "power_sgd": fm.policies.power_sgd(2),
    "one_bit": fm.policies.one_bit(),
    "qsgd": fm.policies.qsgd(4),
    "deep_compression": fm.policies.deep_compression(),
    "skeleton": fm.policies.skeleton(0.05),
}
PARTS = (
    fm.Deadline(1),
    fm.Deadline(0.5, limit_s=2.0),
    fm.Quorum(1),
    fm.Quorum(0.5, limit_s=60.0),
    fm.Quorum(0.75, of="samples", over="epoch"),
    fm.Hierarchy(fm.ParameterServer(), fm.Tree(2), sites=3, quorum=fm.Quorum(1)),
    fm.Hierarchy(fm.Gossip("complete"), fm.Gossip("ring", every=3), sites=2),
    fm.Gossip(np.full((2, 2), 0.5), every=2),
    fm.Gossip(fm.policy.graphs.RandomPairs(7)),
    fm.Hierarchy(fm.Gossip(np.full((2, 2), 0.5)), fm.Gossip("complete", every=2), sites=2),
    fm.policies.gossip(((0.5, 0.5, 0), (0.5, 0.25, 0.25), (0, 0.25, 0.75))),
    fm.Prox(l2=0.1, high=2.0, after=fm.Sum()),
    fm.StalenessScaled(0.5),
    fm.filters.significance(0.1, decay=None),
    fm.filters.kkt(0.1),
    fm.filters.random_skip(0.1).with_error_feedback(0.5),
    fm.filters.quantise(2, stochastic=True, block=0),
    fm.filters.compress(9),
)


def test_every_named_policy_is_here() -> None:
    assert set(NAMED) == set(fm.policies.__all__) - {"adam_auto", "ensemble_compression"}  # a rule, and see below


@pytest.mark.parametrize("value", [*NAMED.values(), *PARTS], ids=repr)
def test_what_is_shown_makes_the_value_again(value: object) -> None:
    """`Deadline(1)`, one replica, was shown as the default, which is all of them."""
    made = eval(repr(value), {"fm": fm})
    assert made == value
    assert repr(made) == repr(value)


def test_functions_and_arrays_are_names() -> None:
    predict, inputs, optimizer = (lambda params, inputs: inputs), np.zeros((4, 2)), optax.sgd(0.1)
    matrix = np.full((5, 5), 0.2)
    names = {"fm": fm, "predict": predict, "inputs": inputs, "optimizer": optimizer, "matrix": matrix}
    for policy in (
        fm.policies.ensemble_compression(predict, inputs, 4, 10, optimizer),
        fm.Policy(payload=fm.Weights(), apply=fm.Distill(predict, inputs, 10, optimizer, batch_size=2)),
        fm.policies.diloco(4, optimizer),
        fm.policies.gossip(matrix),
    ):
        assert repr(eval(repr(policy), names)) == repr(policy)

"""Kinds of apply: what each is called, what it refuses, and with what it is sound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml import policies
from flowml.errors import PolicyError
from flowml.policy import Policy, coefficients
from flowml.policy.apply import (
    APPLIES,
    Apply,
    Consensus,
    Distill,
    Mean,
    Mix,
    Outer,
    Prox,
    StalenessScaled,
    Sum,
    Vote,
    travelling,
    unsound,
)
from flowml.policy.kinds import read
from flowml.training.updates import check_vote

PROX = Prox(l1=0.1, after="sum")
DISTILL = Distill(lambda params, inputs: inputs, (), steps=3, optimizer=optax.sgd(0.1))
KINDS: list[Any] = [
    Mean(),
    Sum(),
    StalenessScaled(0.5),
    Outer(optax.sgd(0.1)),
    Mix(0.25),
    Consensus(1.0),
    Vote(3),
    DISTILL,
    PROX,
]
make: Any = Policy
"""What a user may type, whatever the checker says."""


def test_strings_are_names_of_kinds() -> None:
    assert Policy().apply == Policy(apply="mean").apply == Mean()
    assert Policy(apply="sum").apply == Sum()
    assert Policy(apply="sum") == Policy(apply=Sum())
    assert policies.asynchronous(apply="sum").describe() == "async, sum"


def test_every_kind_is_tested_and_travels() -> None:
    assert [type(k) for k in KINDS] == list(APPLIES)
    for kind in KINDS:
        sent = travelling(kind)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Apply, dec_hook=read) == sent
        assert (sent.describe(), sent.averages) == (kind.describe(), kind.averages)
        assert hash(kind) == hash(msgspec.structs.replace(kind))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (StalenessScaled(), "async ≤2, ÷ staleness"),
        (StalenessScaled(0.5), "async ≤2, 0.5 ÷ staleness"),
        (Outer(optax.adagrad(0.1)), "async ≤2, outer"),
        (Vote(2), "async ≤2, vote 2"),
        (Prox(l1=0.1, low=0, after="sum"), "async ≤2, sum l1 0.1 box 0..inf"),
    ],
)
def test_descriptions(kind: Any, words: str) -> None:
    assert Policy(staleness=2, apply=kind).describe() == words


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda: make(apply="prox"), "apply='mean', apply='sum', or one of fm.StalenessScaled"),
        (lambda: make(apply=Mix), "is a class; give a value of it, as apply=fm.Mix"),
        (lambda: make(apply=optax.sgd(0.1)), "fm.Outer"),
        (lambda: StalenessScaled(0), r"StalenessScaled\(rate=0\): .* above 0"),
        (lambda: StalenessScaled(math.nan), "above 0"),
        (lambda: StalenessScaled(True), "above 0"),
        (lambda: Outer(0.7), r"Outer\(0.7\) has no optimizer; give an optax.GradientTransformation"),
        (lambda: Mix(0), r"Mix\(pull=0\): .* in \(0, 1\]"),
        (lambda: Mix(1.5), r"in \(0, 1\]"),
        (lambda: Vote(0), "int of at least 1"),
        (lambda: Vote(1.5), "int of at least 1"),  # pyright: ignore[reportArgumentType]
        (Prox, "changes nothing"),
        (lambda: Prox(l1=-0.1), r"Prox\(l1=-0.1\): a penalty"),
        (lambda: Prox(l2=math.inf), "a penalty"),
        (lambda: Prox(low=1, high=0), "no number lies in this box"),
        (lambda: Prox(low=math.nan), "no number lies in this box"),
        (lambda: Prox(l1=1, after=Prox(l1=1)), "after='mean', after='sum'"),  # pyright: ignore[reportArgumentType]
        (lambda: make(topology=fm.AllReduce(), apply=Vote(2)), "use topology=ParameterServer"),
        (lambda: make(topology=fm.Ring(), apply=StalenessScaled()), "never stale; use apply='mean'"),
        (lambda: make(apply=Mix(0.5)), "use payload=Weights"),
        (lambda: make(apply=Prox(l1=1, after=Mix(0.5))), "use payload=Weights"),
    ],
)
def test_what_is_wrong_or_not_sound(wrong: Callable[[], Any], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        wrong()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("payload", ["Gradient", "Factors", "Delta", "Weights"])
@pytest.mark.parametrize("collective", [False, True])
def test_the_table_of_what_is_sound(kind: Any, payload: Any, collective: bool) -> None:
    base = kind.after if isinstance(kind, Prox) else kind
    allowed = {
        "Gradient": (Mean, Sum, StalenessScaled, Outer, Vote),
        "Factors": (Mean, Sum, StalenessScaled, Outer, Vote),
        "Delta": (Mean, Sum, StalenessScaled, Outer, Consensus),
        "Weights": (Mean, Mix, Distill),
    }[payload]
    sound = isinstance(base, allowed) and not (collective and isinstance(base, StalenessScaled | Vote))
    why = unsound(kind, payload, collective=collective)
    assert (why is None) == sound
    assert why is None or "; use " in why  # the nearest that is sound


def test_a_vote_over_arrays_without_rows_says_so() -> None:
    with pytest.raises(PolicyError, match="has no effect, because it has only arrays without rows"):
        check_vote("e", Vote(1), [(0, 3)])
    with pytest.raises(PolicyError, match="because it has only scalars"):
        check_vote("s", Vote(1), [()])


@pytest.mark.parametrize("apply", [Mix(0.1), Prox(l1=0.1, after=Mix(0.1)), Consensus(1.0)], ids=str)
def test_what_is_about_own_parameters_is_refused_where_they_are_shared(apply: Any) -> None:
    with pytest.raises(PolicyError, match=r"it is about parameters that each replica has"):
        Policy(topology=fm.SharedMemory(), apply=apply)


@pytest.mark.parametrize("apply", [Prox(l1=0.1), Prox(low=0, after="sum")], ids=str)
def test_a_proximal_step_of_complex_numbers_is_refused_by_name(apply: Any) -> None:
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9))
    trainer = fm.Trainer(
        lambda p, b: jnp.mean(jnp.abs(b["x"] @ p["z"]) ** 2),
        optax.sgd(0.1),
        cluster=cluster,
        replicas=2,
        policies=Policy(apply=apply),
    )
    source = {"x": np.ones((8, 3), np.float32)}
    with pytest.raises(PolicyError, match=r"'z' has elements of complex64, and fm.Prox\(.*compares numbers"):
        trainer.fit({"z": jnp.ones(3, jnp.complex64)}, source, batch_size=4, steps=1, progress=False)


def test_scales_and_coefficients() -> None:
    assert [StalenessScaled(0.6).scale(s) for s in (0, 1, 2, 3)] == pytest.approx([0.6, 0.6, 0.3, 0.2])
    assert Prox(l1=1, after=StalenessScaled(0.6)).scale(3) == pytest.approx(0.2)
    for kind in (Mean(), StalenessScaled(), Outer(), Vote(1), Prox(l1=1)):
        assert coefficients(kind, [1, 3], 2) == (0.25, 0.25)
    for kind in (Sum(), Prox(l1=1, after="sum")):
        assert coefficients(kind, [1, 3], 2) == (0.5, 0.5)


def test_an_optimizer_is_told_where_it_belongs() -> None:
    with pytest.raises(PolicyError, match=r"give apply=fm\.Outer\(optimizer\)"):
        make(apply=optax.sgd(0.1))

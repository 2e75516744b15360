"""Arguments of a wrong type or range: accepted, or refused with one sentence that names the argument and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss

ODD: list[Any] = [
    "x",
    b"x",
    None,
    -1,
    0,
    1.5,
    math.nan,
    math.inf,
    10**40,
    True,
    np.int64(-3),
    np.float32(0.5),
    [],
    object(),
]
"""Values of which an argument may accept some. `ids` of a test show them."""


def named(value: object) -> str:
    """A name of a case that is the same in every process: without the addresses of functions."""
    return re.sub(r" at 0x\w+", "", str(value))


SENTENCE = re.compile(r"[^\n]{20,600}")
"""One line."""

OURS = (TypeError, ValueError, fm.FlowmlError)


def told(error: BaseException, argument: str) -> bool:
    """Whether an error is ours: one sentence, which names the argument."""
    text = str(error)
    return bool(SENTENCE.fullmatch(text)) and argument in text


def attempt(call: Callable[[], Any], argument: str) -> Any:
    try:
        return call()
    except OURS as error:
        assert told(error, argument), f"{type(error).__name__}: {error}"
        return None


TRAINER = ("loss", "optimizer", "cluster", "replicas", "placement", "microbatches", "schedule", "policies", "weight",
           "delays", "check_replicas", "on_nonfinite")  # fmt: skip
FIT = ("params", "source", "batch_size", "epochs", "steps", "seed", "shuffle", "opt_state", "callbacks", "progress")


def short_fit(there: fm.Cluster, **odd: Any) -> Any:
    options: dict[str, Any] = {"loss": mlp_loss, "optimizer": optax.sgd(0.1), "cluster": there}
    run: dict[str, Any] = {"params": mlp(), "source": data(), "batch_size": BATCH, "steps": 1}
    for name, value in odd.items():
        (options if name in TRAINER else run)[name] = value
    if "epochs" in odd:
        del run["steps"]
    return fm.Trainer(options.pop("loss"), options.pop("optimizer"), **options).fit(
        run.pop("params"), run.pop("source"), **run
    )


@pytest.mark.parametrize("argument", [*TRAINER, *FIT])
def test_a_fit_takes_it_or_says_what_is_wrong(threads_cluster: fm.Cluster, argument: str) -> None:
    named = {"epochs": "epochs=", "steps": "steps=", "params": "param", "opt_state": "opt_state"}.get(
        argument, argument
    )
    for odd in ODD:
        if argument == "params" and isinstance(odd, float | np.float32):
            continue  # a parameter, with which the loss does what it likes
        attempt(lambda odd=odd: short_fit(threads_cluster, **{argument: odd}), named)  # pyright: ignore


@pytest.mark.parametrize(
    ("odd", "error", "says"),
    [
        ({"shuffle": "no"}, TypeError, "shuffle='no' is of type str; give True or False"),
        ({"shuffle": 0}, TypeError, "shuffle=0 is of type int; give True or False"),
        ({"shuffle": fm.Shards}, TypeError, "give True or False, fm.Shards() or fm.WithReplacement()"),
        ({"progress": "x"}, TypeError, "progress='x' is of type str; give True or False"),
        ({"callbacks": [None]}, TypeError, "callbacks=[None]: give a list of functions that take a record"),
        ({"callbacks": ""}, TypeError, "callbacks='': give a list of functions that take a record"),
        ({"callbacks": print}, TypeError, "callbacks=<built-in function print>: give a list of functions"),
        ({"replicas": "x"}, TypeError, "replicas='x' is of type str; give a whole number of at least 1"),
        ({"replicas": -1}, ValueError, "replicas=-1: give at least 1"),
        ({"microbatches": None}, TypeError, "microbatches=None is of type NoneType; give a whole number of at least 1"),
        ({"loss": 3}, TypeError, "loss=3 is of type int; give a function of (params, batch)"),
        ({"optimizer": optax.GradientTransformation}, TypeError, "optimizer must be an optax.GradientTransformation"),
        ({"schedule": None}, ValueError, "schedule=None is unknown; give '1f1b' or 'gpipe'"),
        ({"schedule": np.zeros(2)}, ValueError, "is unknown; give '1f1b' or 'gpipe'"),
        ({"on_nonfinite": []}, ValueError, "on_nonfinite=[] is unknown; give 'refuse' or 'raise' or 'apply'"),
        ({"delays": [1]}, TypeError, "delays=[1] is a list; give a mapping from worker names to seconds"),
        ({"delays": {"worker:0": 1e300}}, ValueError, "delays['worker:0']=1e+300: give seconds of at least 0, at most"),
        ({"delays": {"worker:0": 10**400}}, ValueError, "give seconds of at least 0, at most 1e+09"),
        ({"policies": {1: fm.Policy()}}, TypeError, "give patterns of parameter paths as text"),
        ({"policies": fm.policies.quorum}, TypeError, "it makes a policy, and is none; call it: fm.policies.quorum(…)"),
        ({"policies": fm.Policy}, TypeError, "policies=Policy: it is a class, and no policy; give a value, such as"),
        ({"opt_state": "x"}, TypeError, "is of type str, which is not an array"),
        ({"placement": {"fc*": 3}}, fm.PlacementError, "placement pattern 'fc*' names 3, which is no device; give"),
        ({"placement": {3: "worker:0"}}, fm.PlacementError, "placement pattern 3 is of type int; patterns are text"),
        ({"placement": lambda g, d: 3}, fm.PlacementError, "the placement callable returns a int; return a mapping"),
        ({"placement": lambda g, d: {g.nodes[0].id: 3}}, fm.PlacementError, "callable names 3, which is no device"),
    ],
    ids=named,
)  # fmt: skip
def test_what_is_said(threads_cluster: fm.Cluster, odd: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)) as caught:
        short_fit(threads_cluster, **odd)
    assert SENTENCE.fullmatch(str(caught.value))


def test_numpy_scalars_are_numbers_and_flags(threads_cluster: fm.Cluster) -> None:
    result = short_fit(
        threads_cluster,
        replicas=np.int64(2),
        microbatches=np.uint8(2),
        batch_size=np.int32(BATCH),
        steps=np.int64(2),
        seed=np.int64(3),
        shuffle=np.bool_(False),
        progress=np.False_,
        check_replicas=np.int16(1),
        delays={"worker:0": Fraction(1, 1000), "worker:1": np.float32(0.001)},
        placement=fm.Pipeline(np.int64(1)),  # pyright: ignore[reportArgumentType]
    )
    assert len(result.history) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fm.Pipeline("x"), "Pipeline: stages='x' is of type str; give a whole number of at least 1"),  # pyright: ignore
        (lambda: fm.Pipeline(0), "Pipeline: stages=0: give at least 1"),
        (lambda: fm.AutoPlacement(memory_bytes=2.5), "AutoPlacement: memory_bytes=2.5 is of type float; give"),  # pyright: ignore
        (lambda: fm.AutoPlacement(time_limit_s="x"), "AutoPlacement: time_limit_s='x': give seconds above 0"),  # pyright: ignore
        (lambda: fm.layer(3), "layer name 3 is of type int; give text, as in layer('encoder')"),  # pyright: ignore
        (lambda: fm.device(None), "device name None is not valid; give device('worker:1')"),  # pyright: ignore
        (lambda: fm.compile(3, devices=["worker:0"]), "compile() takes a function, got int"),  # pyright: ignore
        (lambda: fm.compile(jnp.sin, 1.0, devices="worker:0"), "devices='worker:0' is not a list of devices; give"),
        (lambda: fm.compile(jnp.sin, 1.0, devices=[3]), "devices names 3, which is no device; give names"),  # pyright: ignore
        (lambda: fm.compile(jnp.sin, 1.0, devices=None), "devices=None is not a list of devices; give"),  # pyright: ignore
    ],
)  # fmt: skip
def test_placements_labels_and_devices(make: Any, says: str) -> None:
    with pytest.raises(OURS, match=re.escape(says)):
        make()


def twice(x: Any) -> Any:
    return x * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cluster": "x"}, "cluster='x' is of type str; give an fm.Cluster"),
        ({"cluster": fm.Cluster}, "is of type type; give an fm.Cluster"),
        ({"static_argnums": 1.5}, "static_argnums takes positions and static_argnames names, got 1.5 and None"),
        ({"static_argnames": 3}, "static_argnums takes positions and static_argnames names, got None and 3"),
        ({"donate_argnums": "x"}, "donate_argnums takes positions and donate_argnames names, got 'x' and None"),
        ({"donate_argnums": 4}, "donate_argnums=4: twice has 1 positional arguments"),
        ({"donate_argnames": "z"}, "donate_argnames='z': twice has no such argument; it has x"),
    ],
    ids=str,
)
def test_options_of_a_program(options: dict[str, Any], says: str) -> None:
    for make in (lambda: fm.dataflow(twice, **options), lambda: fm.dataflow(**options)(twice)):
        with pytest.raises((TypeError, ValueError), match=re.escape(says)):
            make()
    if "cluster" not in options:
        with pytest.raises((TypeError, ValueError), match=re.escape(says)):
            fm.compile(twice, jax.ShapeDtypeStruct((2,), jnp.float32), devices=["worker:0"], **options)


@pytest.mark.parametrize("argument", ["placement", "static_argnums", "static_argnames", "donate_argnums", "cluster"])
def test_a_program_takes_it_or_says_what_is_wrong(threads_cluster: fm.Cluster, argument: str) -> None:
    for odd in ODD:
        options: dict[str, Any] = {"cluster": threads_cluster, argument: odd}
        if argument == "cluster" and odd is None:
            continue  # the current one, of which other tests tell
        attempt(
            lambda options=options: fm.dataflow(twice, **options)(np.ones(2, np.float32)),
            argument.split("_", maxsplit=1)[0],
        )  # pyright: ignore


def test_positions_may_be_numpy_integers(threads_cluster: fm.Cluster) -> None:
    power = fm.dataflow(lambda x, n: x**n, cluster=threads_cluster, static_argnums=np.int64(1))  # pyright: ignore
    assert power(jnp.float32(3), 2) == 9

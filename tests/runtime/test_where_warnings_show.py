"""A warning shows the line of the user's code that called the library, however far below it the reason was found."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml import callers
from tests.test_house import SOURCES, relative

SOURCE = np.ones((8, 4), np.float32)
LARGE = np.ones(600_000, np.float32)


def mean(params: Any, batch: Any) -> Any:
    return jnp.mean((batch @ params) ** 2)


def wavy(params: Any, batch: Any) -> Any:
    return jnp.mean(jnp.sin(3 * batch @ params)) - jnp.sum(params**2)


def total(params: Any, batch: Any) -> Any:
    return jnp.sum((batch @ params) ** 2)


def infinite(params: Any, batch: Any) -> Any:
    return jnp.log(0 * jnp.sum(params)) + mean(params, batch)


def printing(params: Any, batch: Any) -> Any:
    jax.debug.print("{}", params[0])
    return mean(params, batch)


def holding(params: Any, batch: Any) -> Any:
    return mean(params, batch) + jnp.sum(jnp.asarray(LARGE)) * 0 + jnp.sum(params)


def fit(cluster: fm.Cluster, loss: Any = mean, optimizer: Any = None, **given: Any) -> Any:
    fitting = {k: given.pop(k) for k in ("checkpoint", "resume", "steps") if k in given}
    options: dict[str, Any] = {"batch_size": 4, "steps": 1, "progress": False} | fitting
    trainer = fm.Trainer(loss, optimizer or optax.sgd(0.1), cluster=cluster, replicas=2, **given)
    return trainer.fit(jnp.full(4, 0.5), SOURCE, **options)


def resumed(cluster: fm.Cluster, path: Path) -> None:
    checkpoint = fm.Checkpoint(path, every_steps=1)
    fit(cluster, checkpoint=checkpoint)
    fit(cluster, optimizer=optax.sgd(0.2), checkpoint=checkpoint, resume="auto", steps=2)


def damaged(cluster: fm.Cluster, path: Path) -> None:
    checkpoint = fm.Checkpoint(path, every_steps=1)
    fit(cluster, checkpoint=checkpoint, steps=2)
    newest = max(path.glob("step-*"))
    for file in newest.iterdir() if newest.is_dir() else (newest,):
        file.write_bytes(b"")
    fit(cluster, checkpoint=checkpoint, resume="auto", steps=2)


def compiled(fn: Any, **given: Any) -> None:
    spec = jax.ShapeDtypeStruct((4,), jnp.float32)
    fm.compile(fn, spec, jax.ShapeDtypeStruct((8, 4), jnp.float32), devices=["worker:0"], **given)


def called(cluster: fm.Cluster, fn: Any, **given: Any) -> None:
    fm.dataflow(fn, cluster=cluster, **given)(jnp.ones(4), SOURCE)


def submitted(cluster: fm.Cluster, fn: Any, **given: Any) -> None:
    fm.dataflow(fn, cluster=cluster, **given).submit(jnp.ones(4), SOURCE).result(timeout=60)


CASES: dict[str, tuple[Callable[[fm.Cluster, Path], Any], str]] = {
    "a loss that is not convex": (lambda c, _: fit(c, wavy, policies=fm.policies.average_once()), "is not convex"),
    "a loss that is no mean": (lambda c, _: fit(c, total), "is no mean over examples"),
    "a gradient that is not finite": (lambda c, _: fit(c, infinite), "NaN or infinity"),
    "an optimizer that watches": (
        lambda c, _: fit(c, optimizer=optax.chain(optax.zero_nans(), optax.sgd(0.1))),
        "and it gets none of them",
    ),
    "a policy without effect": (
        lambda c, _: fit(c, optimizer=optax.sgd(0.1, momentum=0.9), policies=fm.policies.softsync(1)),
        "stale gradients are scaled",
    ),
    "an option of a fit": (lambda c, _: fit(c, printing, effects="drop"), "runs without"),
    "an option of a call": (lambda c, _: called(c, printing, effects="drop"), "runs without"),
    "an option of a submitted call": (lambda c, _: submitted(c, printing, effects="drop"), "runs without"),
    "an option of a plan": (lambda c, _: compiled(printing, effects="drop"), "runs without"),
    "what a fit closes over": (lambda c, _: fit(c, holding), "closes over"),
    "what a call closes over": (lambda c, _: called(c, holding), "closes over"),
    "what a plan closes over": (lambda c, _: compiled(holding), "closes over"),
    "another optimizer than before": (resumed, "is another one than that which wrote"),
    "a damaged checkpoint": (damaged, "The fit goes on from"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_warning_shows_the_line_of_the_user(
    case: str, threads_cluster: fm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowml.captured.WARN_BYTES", 2_000_000)
    do, text = CASES[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do(threads_cluster, tmp_path / "fit")
    assert any(text in str(w.message) for w in caught), [str(w.message) for w in caught]
    assert {w.filename for w in caught} == {__file__}, [(w.filename, w.lineno, str(w.message)) for w in caught]


def _library(name: str) -> Any:
    """A function of a module of the library that warns, called by way of what the library is written with."""
    found: dict[str, Any] = {"__name__": name, "warn": callers.warn, "contextlib": contextlib, "functools": functools}
    text = (
        "@contextlib.contextmanager\ndef block():\n    warn('a block')\n    yield\n"
        "@functools.singledispatch\ndef of(x):\n    warn('a call')\n"
    )
    exec(compile(text, "<string>", "exec"), found)
    return found


@pytest.mark.parametrize("name", ["flowml.x", "flowml_runtime.x.y", "flowml_native", "jax.x"])
def test_a_warning_leaves_the_library(name: str) -> None:
    found = _library(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with found["block"]():
            found["of"](1)
    assert [(str(w.message), w.filename) for w in caught] == [("a block", __file__), ("a call", __file__)]


def test_a_warning_shows_a_module_of_a_like_name() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _library("flowml_of_mine")["of"](1)
    assert caught[0].filename == "<string>"


def test_all_warnings_are_given_in_one_place() -> None:
    counting = {relative(f) for f in SOURCES if "warnings.warn(" in f.read_text()}
    assert counting == {"flowml/callers.py"}

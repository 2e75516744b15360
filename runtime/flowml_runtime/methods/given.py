"""Checks what users give to methods: clusters, functions, parameters and examples, each before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowml.errors import ClusterError, WorkerLostError
from flowml.ir._jax import path_name
from flowml.leaves import check_array
from flowml.training.step import described
from flowml_runtime.cluster import Cluster
from flowml_runtime.driver.training.structs import structs


def check_cluster(cluster: object) -> None:
    """Raise TypeError for what is no cluster of real workers, ClusterError for one without any."""
    if not isinstance(cluster, Cluster):
        raise TypeError(
            f"cluster={cluster!r} is of type {type(cluster).__name__}, and a method computes on real workers; give an "
            "fm.Cluster, such as fm.Cluster.local(workers=2)"
        )
    if not cluster.devices:
        raise ClusterError("this cluster has no workers: it is closed, or all of them are lost; start another")


def check_function(name: str, value: object, form: str) -> None:
    """Raise TypeError for what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; give a function {form}")


def check_loss(value: Any) -> Any:
    """What a loss returned. Raises ValueError if that is not one floating number."""
    if jnp.shape(value) if isinstance(value, jax.Array) else not isinstance(value, float):
        found = jax.ShapeDtypeStruct(value.shape, value.dtype) if isinstance(value, jax.Array) else value
        raise ValueError(f"loss returns {described(found)}; give a function that returns the mean over the examples")
    return value


def check_params(params: Any) -> None:
    """Raise TypeError for a leaf that is no floating array, ValueError for parameters without leaves."""
    found = jax.tree_util.tree_leaves_with_path(structs(params, "parameter"))
    for path, leaf in found:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"parameter {path_name(path)!r} has dtype {leaf.dtype}, which has no gradient; give floating arrays"
            )
    if not found:
        raise ValueError("params has no arrays; give a pytree of floating arrays")


def count_examples(source: Any) -> int:
    """The number of rows of each array of `source`. Raises TypeError for a leaf that is no array, and ValueError for
    arrays without rows, or with different numbers of rows."""
    rows: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(source):
        name = path_name(path)
        check_array(f"source leaf {name!r}", leaf)
        if not np.ndim(leaf):
            raise ValueError(f"source leaf {name!r} is one number; give an array with a row for each example")
        rows[name] = len(leaf)
    if not rows or not all(rows.values()):
        raise ValueError("source has no examples; give a pytree of arrays with a row for each example")
    if len(set(rows.values())) > 1:
        counts = " and ".join(f"{count} of {name!r}" for name, count in rows.items())
        raise ValueError(f"source has different numbers of rows ({counts}); give a row of each for every example")
    return next(iter(rows.values()))


def titled(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the name that errors of its program show."""

    def called(*args: Any) -> Any:
        return fn(*args)

    called.__name__ = called.__qualname__ = name
    return called


@contextmanager
def losses_told(told: Callable[[], str]) -> Generator[None]:
    """The loss of a worker says in what state the method was, and what to do; `told` says both."""
    try:
        yield
    except WorkerLostError as error:
        reason = str(error).partition("; ")[0]
        text = f"{reason}; {told()}"
        raise WorkerLostError(text, worker=error.worker, step=error.step, node=error.node) from error

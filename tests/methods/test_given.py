"""`fm.methods`: what no method can take is refused in one line before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowml as fm
from flowml_runtime.methods import Boosted, Portions, TimeModel, Vectors, boost, lbfgs

SOURCE = {"x": np.ones((12, 2), np.float32)}
PARAMS = {"w": np.ones(2, np.float32)}
X = np.random.default_rng(0).normal(size=(40, 4))
Y = (X[:, 0] > 0) * 1.0


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=2) as found:
        yield found


ROWS = {"x": np.ones((12, 2)), "y": np.ones(3)}
SIMULATED = fm.SimulatedCluster(2, fm.sim.Constant(1.0), fm.sim.Network(0, 1e6))
WRONG: list[tuple[str, Any, str]] = [
    ("loss", None, "loss=None is of type NoneType; give a function loss"),
    ("params", {}, "params has no arrays; give"),
    ("params", {"w": np.ones(2, int)}, "parameter 'w' has dtype int32, which has no gradient; give floating"),
    ("params", {"w": "a"}, "parameter 'w' is of type str"),
    ("params", {"w": "f4"}, "parameter 'w' is of type str, which is not an array"),
    ("source", None, "source has no examples; give"),
    ("source", 1, "is of type int, which is not an array; give"),
    ("source", {"x": np.ones(())}, "source leaf 'x' is one number; give an array with a row"),
    ("source", {"x": np.ones((0, 2))}, "source has no examples"),
    ("source", ROWS, "different numbers of rows .12 of 'x' and 3 of 'y'.; give"),
    ("cluster", None, "cluster=None is of type NoneType.*give an fm.Cluster"),
    ("cluster", SIMULATED, "SimulatedCluster, and a method computes on real workers; give"),
    ("copies", "no", "copies='no' is of type str; give True or False"),
    ("steps", 0, "steps=0: give at least 1"),
    ("memory", 1.5, "memory=1.5 is of type float; give a whole number"),
    ("portions", -1, "portions=-1: give at least 1"),
    ("params", {"w": np.full(2, np.nan, np.float32)}, "the loss of the start is nan; give"),
]


@pytest.mark.parametrize(("argument", "value", "text"), WRONG)
def test_lbfgs_says_what_to_give(cluster: fm.Cluster, argument: str, value: Any, text: str) -> None:
    good: dict[str, Any] = {
        "loss": loss,
        "params": PARAMS,
        "source": SOURCE,
        "cluster": cluster,
        "steps": 1,
        "portions": 1,
    }
    with pytest.raises((TypeError, ValueError), match=text):
        lbfgs(**(good | {argument: value}))


def test_portions_and_vectors_say_what_to_give(cluster: fm.Cluster) -> None:
    vectors = Vectors(PARAMS, cluster)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: Portions(loss, SOURCE, vectors, cluster, 0, copies=True), "portions=0: give at least 1"),
        (lambda: Portions(loss, SOURCE, vectors, cluster, 1, copies=2), "copies=2"),  # pyright: ignore
        (lambda: Portions(loss, SOURCE, [], cluster, 1, copies=True), "give Vectors.params, cluster"),  # pyright: ignore
        (lambda: Vectors({}, cluster), "params has no arrays"),
        (lambda: Vectors(PARAMS, None), "give an fm.Cluster"),  # pyright: ignore
        (
            lambda: vectors.put({"w": np.ones(3, np.float32)}),
            r"leaf 'w' is float32\[3\], and float32\[2\] in params; give",
        ),
        (
            lambda: vectors.put({"w": np.ones(2, np.float16)}),
            r"leaf 'w' is float16\[2\], and float32\[2\] in params; give",
        ),
        (
            lambda: vectors.put({"v": np.ones(2, np.float32)}),
            r"leaf 'w', .* is missing; leaf 'v', .* is too much; give",
        ),
        (lambda: vectors.put([np.ones(2, np.float32)]), "leaf 'w', .* is missing; leaf '0', .* is too much; give"),
    ]
    for call, text in wrong:
        with pytest.raises((TypeError, ValueError), match=text):
            call()


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        *(("rate", v, "rate=.*: give a number above 0") for v in (None, "a", 0, -1, math.nan, math.inf)),
        *(("l2", v, "l2=.*: give a number above 0") for v in (None, 0, -1, math.nan)),
        ("depth", 17, "depth=17: give at most 16"),
        ("trees", 2.0, "whole number"),
        ("bins", 1, "bins=1"),
        ("cluster", None, "give an fm.Cluster"),
        ("split", "x", "give 'rows' or 'features'"),
        ("x", X * 1j, "x holds what is no number"),
    ],
)
def test_boost_says_what_to_give(cluster: fm.Cluster, argument: str, value: Any, text: str) -> None:
    good: dict[str, Any] = {"x": X, "y": Y, "cluster": cluster, "trees": 1, "depth": 1, "bins": 4}
    with pytest.raises((TypeError, ValueError), match=text):
        boost(**(good | {argument: value}))


@pytest.mark.parametrize("x", [X[:, :2], X[0], X * math.nan, "a", np.ones((2, 5))])
def test_trees_take_rows_of_the_features_of_their_fit(x: Any) -> None:
    with pytest.raises(ValueError, match=r"give rows of the 4 features|NaN or infinity|no number"):
        Boosted((), np.zeros((3, 4)), 0).margin(x)


NUMBERS = st.one_of(st.integers(-3, 3), st.floats(), st.sampled_from([None, True, "1", 1j, np.float32(0.5)]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(alone=NUMBERS, contention=NUMBERS, items=NUMBERS, replicas=NUMBERS)
def test_a_time_model_predicts_a_time_or_says_what_to_give(
    alone: Any, contention: Any, items: Any, replicas: Any
) -> None:
    try:
        model = TimeModel(alone, contention)
        assert model.seconds(items, replicas) >= 0
        assert model.step_s(replicas) > 0
    except (TypeError, ValueError) as error:
        assert "give" in str(error) and "\n" not in str(error), error


@pytest.mark.parametrize(
    ("probes", "text"),
    [
        (None, "NoneType is no mapping; give"),
        ([1, 2], "list is no mapping; give"),
        ({1: None, 2: None}, "a NoneType is no result of a fit; give"),
        ({0: None, 2: None}, "replicas=0: give at least 1"),
    ],
)
def test_a_time_model_is_made_of_fits(probes: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        TimeModel.of(probes)


def test_a_closed_cluster_is_named() -> None:
    with fm.Cluster.threads(workers=1) as closed:
        pass
    for call in (lambda: lbfgs(loss, PARAMS, SOURCE, closed, steps=1), lambda: boost(X, Y, closed)):
        with pytest.raises(fm.ClusterError, match="no workers: it is closed, or all of them are lost; start another"):
            call()


Pieces = dict[str, np.ndarray]
SPACE: Pieces = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}


def test_operations_say_how_vectors_differ_leaf_by_leaf(cluster: fm.Cluster) -> None:
    """An operation of JAX, or zip, said before that its arguments do not fit."""
    vectors = Vectors(SPACE, cluster)
    wide = {"a": np.ones((2, 4), np.float32), "b": np.ones(4, np.float32)}
    x, foreign, gone = vectors.put(SPACE), Vectors(wide, cluster).put(wide), vectors.put(SPACE)
    gone[1].delete()
    wrong: list[tuple[Any, str]] = [
        (foreign, r": y is no vector of this space: leaf 'a' is float32\[2, 4\], and float32\[2, 3\] in params; give"),
        ([x[0].astype(jnp.float16), x[1]], r"leaf 'a' is float16\[2, 3\], and float32\[2, 3\] in params; give"),
        (x[:1], r"leaf 'b', float32\[4\], is missing; give"),
        ([*x, x[0]], r"leaf 'piece 2', float32\[2, 3\], is too much; give"),
        ([x[0], "b"], "leaf 'b' is of type str, and no array, and float32"),
        (SPACE, "y is of type dict; give a vector, which put"),
        (None, "y is of type NoneType; give a vector"),
        (gone, r"leaf 'b' of y: .* was deleted by delete.*; put\(\) its pytree again"),
    ]
    for y, text in wrong:
        for operation in (vectors.dot, lambda x, y: vectors.axpy(1.0, x, y)):
            with pytest.raises((TypeError, ValueError, fm.ClusterError), match=text):
                operation(x, y)
    evaluate = Portions(lambda p, _: jnp.sum(p["b"]), SOURCE, vectors, cluster, 1, copies=True)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: evaluate(foreign), "Portions: params is no vector of this space: leaf 'a'"),
        (lambda: vectors.get(foreign), "get: vector is no vector of this space: leaf 'a'"),
        (lambda: vectors.tree(x[:1]), "tree: 1 pieces; give one for each of the 2 leaves"),
        (lambda: vectors.scale(1j, x), "scale: a=1j is of type complex; give a real number"),  # pyright: ignore
        (lambda: vectors.combine(1.0, x, None, x), "combine: b=None is of type NoneType; give a real"),  # pyright: ignore
    ]
    for call, text in calls:
        with pytest.raises((TypeError, ValueError), match=text):
            call()
    arrays = [np.ones((2, 3), np.float32), np.ones(4, np.float32)]
    assert vectors.dot(x, arrays) == 10.0


def test_vectors_of_other_and_closed_clusters_are_named(cluster: fm.Cluster) -> None:
    vectors = Vectors(SPACE, cluster)
    x = vectors.put(SPACE)
    with fm.Cluster.threads(workers=1) as other:
        foreign = Vectors(SPACE, other).put(SPACE)
        with pytest.raises(ValueError, match="vectors are on another cluster; give the cluster of Vectors"):
            Portions(loss, SOURCE, vectors, other, 1, copies=True)
        with pytest.raises(fm.ClusterError, match=r"dot: leaf 'a' of y: .* is on another cluster; pass its value"):
            vectors.dot(x, foreign)
    with pytest.raises(fm.ClusterError, match=r"dot: leaf 'a' of y: .* is gone: its cluster is closed"):
        vectors.dot(x, foreign)

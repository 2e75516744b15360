"""What a source hands out: buffers that it uses again, and leaves that are no arrays of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

SOURCE = data()
CLUSTERS = ["threads_cluster", "process_cluster", "grpc_cluster"]


def fit(cluster: fm.Cluster, source: Any, params: Any = None, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=2)
    return trainer.fit(mlp() if params is None else params, source, batch_size=BATCH, epochs=4, **options)


class Reusing:
    """Gives each batch in the same two buffers."""

    def __init__(self) -> None:
        self.buffers = {k: np.empty((BATCH, *v.shape[1:]), v.dtype) for k, v in SOURCE.items()}

    def __len__(self) -> int:
        return len(SOURCE["x"])

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        for name, buffer in self.buffers.items():
            np.take(SOURCE[name], indices, 0, out=buffer[: len(indices)])
        return {name: buffer[: len(indices)] for name, buffer in self.buffers.items()}


class ReusingRecords:
    """Gives each record in the same two buffers."""

    def __init__(self) -> None:
        self.buffers = {k: np.empty(v.shape[1:], v.dtype) for k, v in SOURCE.items()}

    def __len__(self) -> int:
        return len(SOURCE["x"])

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        for name, buffer in self.buffers.items():
            buffer[...] = SOURCE[name][int(index)]
        return self.buffers


@pytest.mark.parametrize("kind", CLUSTERS)
@pytest.mark.parametrize("source", [Reusing, ReusingRecords])
def test_a_source_may_hand_out_the_same_buffer_again(
    kind: str, source: type[Any], request: pytest.FixtureRequest
) -> None:
    cluster = request.getfixturevalue(kind)
    expected = fit(cluster, SOURCE).params
    assert_same(fit(cluster, source()).params, expected)


@pytest.mark.parametrize("kind", CLUSTERS[:2])
def test_parameters_may_change_once_the_fit_has_them(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    given = {k: {n: np.array(v) for n, v in layer.items()} for k, layer in mlp().items()}

    def overwrite(record: Any) -> None:
        for layer in given.values():
            for value in layer.values():
                value[...] = np.nan

    expected = fit(cluster, SOURCE).params
    assert_same(fit(cluster, SOURCE, given, callbacks=[overwrite]).params, expected)


class Batches:
    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf

    def __len__(self) -> int:
        return len(SOURCE["x"])

    def __getitem__(self, indices: np.ndarray) -> dict[str, Any]:
        return {"x": SOURCE["x"][indices], "y": self.leaf(indices)}


WORDS = np.array(["a", "bc"] * (len(SOURCE["x"]) // 2))


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            {**SOURCE, "y": SOURCE["y"].tolist()},
            r"source leaf 'y/0/0' is of type float, which is not an array; give a NumPy",
        ),
        ({**SOURCE, "y": 3}, r"source leaf 'y' is of type int, which is not an array"),
        ((SOURCE["x"], "name"), r"source leaf '1' is of type str, which is not an array"),
        ({**SOURCE, "y": WORDS}, r"source leaf 'y' has dtype <U2, which is not numeric; encode it as numbers"),
        ({**SOURCE, "y": SOURCE["y"].astype(object)}, r"source leaf 'y' has dtype object, which is not numeric"),
        ({**SOURCE, "y": SOURCE["y"].astype(">f4")}, r"source leaf 'y' has dtype >f4, .* give .astype\('float32'\)"),
        (
            {**SOURCE, "y": SOURCE["y"].astype("M8[s]")},
            r"source leaf 'y' has dtype datetime64\[s\], which is not numeric",
        ),
        (Batches(lambda i: [0.5] * len(i)), r"source leaf 'y' is of type list, which is not an array"),
        (Batches(lambda i: WORDS[i]), r"source leaf 'y' has dtype <U2, which is not numeric"),
        (Batches(lambda i: SOURCE["y"][i].astype(">f4")), r"source leaf 'y' has dtype >f4"),
    ],
)
def test_leaves_that_are_no_arrays_are_named(threads_cluster: fm.Cluster, source: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        fit(threads_cluster, source)


def test_a_list_of_records_is_a_source(threads_cluster: fm.Cluster) -> None:
    records = [{"x": x, "y": y} for x, y in zip(SOURCE["x"], SOURCE["y"], strict=True)]
    with_labels = [{**r, "y": [float(v) for v in r["y"]]} for r in records]
    assert fm.data.as_source(with_labels).examples == len(records)


@pytest.mark.parametrize(
    ("source", "leaf"),
    [
        ({"x": SOURCE["x"].tolist()}, "x/0/0"),
        ({"x": SOURCE["x"].tolist(), "y": SOURCE["y"].tolist()}, "x/0/0"),
        ({"a": {"x": [1.0, 2.0]}}, "a/x/0"),
    ],
)
def test_a_dict_without_arrays_names_its_leaf(source: Any, leaf: str) -> None:
    with pytest.raises(TypeError, match=f"source leaf '{leaf}' is of type float, which is not an array; give a NumPy"):
        fm.data.as_source(source)


def test_a_dict_from_numbers_to_records_is_a_source() -> None:
    assert fm.data.as_source({0: 1.0, 1: 2.0, 2: 3.0}).examples == 3


@pytest.mark.parametrize("callbacks", [None, print, [3], 3])
def test_callbacks_that_are_none(threads_cluster: fm.Cluster, callbacks: Any) -> None:
    with pytest.raises(TypeError, match="give a list of functions that take a record"):
        fit(threads_cluster, SOURCE, callbacks=callbacks)


def test_a_cluster_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"cluster=3 is of type int; give an fm.Cluster"):
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("most", [2.5, None, "x", True])
def test_a_number_of_programs_that_is_none(threads_cluster: fm.Cluster, most: Any) -> None:
    before = threads_cluster.max_programs
    with pytest.raises(TypeError, match=r"max_programs=.* give a whole number of at least 1"):
        threads_cluster.max_programs = most
    with pytest.raises(ValueError, match="max_programs=0: give at least 1"):
        threads_cluster.max_programs = 0
    assert threads_cluster.max_programs == before

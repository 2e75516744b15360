"""Trees of one structure, such as a model and its moving average: after a loss each argument gets its own values, or an
error says that it could be another one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml_runtime.saved import MOST_SAVED
from tests.conftest import wait_until

WORKER = "worker:1"


@pytest.fixture
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=2) as cluster:
        yield cluster


def tree(value: float, cluster: fm.Cluster) -> Any:
    return fm.put({"w": np.full(4, value, np.float32), "b": np.full(2, value, np.float32)}, cluster, WORKER)


def step(model: Any, x: Any) -> Any:
    return {"w": model["w"] + x, "b": model["b"] + x}, jnp.sum(model["w"])


def average(mean: Any, model: Any) -> Any:
    return {name: mean[name] * 0.5 + model[name] * 0.5 for name in ("w", "b")}


def both(first: Any, second: Any, x: Any) -> Any:
    return step(first, x)[0], step(second, 10 * x)[0]


def sums(*models: Any) -> list[Any]:
    return [jnp.sum(model["w"]) / 4 for model in models]


def lose(cluster: fm.Cluster) -> None:
    cluster.end_worker(WORKER)
    wait_until(lambda: WORKER not in {d.worker for d in cluster.devices}, "the loss is known", 30)
    cluster.bring_back([WORKER])


def again(call: Callable[[], Any]) -> Any:
    """The result of a call that goes on after the loss. The first that misses a value raises the error of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = call()
        except fm.WorkerLostError as error:
            assert "it goes on from the state saved in" in str(error)
            found = call()
    assert any("goes on from the state saved in" in str(w.message) for w in caught)
    return found


def refused(call: Callable[[], Any], path: Path) -> None:
    for _ in range(3):
        with pytest.raises(fm.WorkerLostError, match=rf"may be another one: .*fm\.load\('{path}"):
            call()


def placed(function: Any, cluster: fm.Cluster, keep: Any = None) -> Any:
    return fm.dataflow(
        function,
        cluster=cluster,
        placement=lambda graph, devices: dict.fromkeys((node.id for node in graph.nodes), devices[1]),
        keep=keep,
    )


@pytest.mark.parametrize("saves", ["ab", "ba", "(a, b)", "{a, b}"])
def test_values_that_were_saved_come_back_as_they_were(cluster: fm.Cluster, tmp_path: Path, saves: str) -> None:
    a, b = tree(1, cluster), tree(100, cluster)
    values = placed(sums, cluster)
    if saves in ("ab", "ba"):
        for name in saves:
            fm.save({"a": a, "b": b}[name], tmp_path / name)
    else:
        fm.save((a, b) if saves == "(a, b)" else {"x": {"y": a}, "z": b}, tmp_path)
    lose(cluster)
    assert again(lambda: values(b)) == [100]
    assert again(lambda: values(b, a)) == [100, 1]


def test_a_tree_that_was_not_saved_is_refused(cluster: fm.Cluster, tmp_path: Path) -> None:
    a, b = tree(1, cluster), tree(100, cluster)
    fm.save(a, tmp_path)
    lose(cluster)
    refused(lambda: placed(sums, cluster)(b), tmp_path)
    refused(lambda: placed(sums, cluster)(a, b), tmp_path)


def test_a_model_and_its_average_go_on_from_their_own(cluster: fm.Cluster, tmp_path: Path) -> None:
    train, mean_of, values = placed(step, cluster, 0), placed(average, cluster, 0), placed(sums, cluster)
    model, mean = tree(1, cluster), tree(100, cluster)
    for number in range(4):
        model, _ = train(model, 1.0)
        mean = mean_of(mean, model)
        if number == 1:
            fm.save((model, mean), tmp_path)
            expected = values(model, mean)
    lose(cluster)
    found = again(lambda: values(model, mean))
    assert found == expected
    assert again(lambda: values(mean)) == expected[1:]


def test_an_average_does_not_go_on_from_its_model(cluster: fm.Cluster, tmp_path: Path) -> None:
    train, mean_of, values = placed(step, cluster, 0), placed(average, cluster, 0), placed(sums, cluster)
    model, mean = tree(1, cluster), tree(100, cluster)
    fm.save(model, tmp_path / "put")
    mean = mean_of(mean, model)
    lose(cluster)
    refused(lambda: values(mean), tmp_path / "put")
    model, mean = tree(1, cluster), tree(100, cluster)
    for _ in range(3):
        model, _ = train(model, 1.0)
        fm.save(model, tmp_path / "made")
        mean = mean_of(mean, model)
    model, _ = train(model, 1.0)
    lose(cluster)
    refused(lambda: values(mean), tmp_path / "made")
    refused(lambda: values(model, mean), tmp_path / "made")
    assert again(lambda: values(model)) == [4]


@pytest.mark.parametrize("given", ["together", "alone"])
def test_two_models_of_one_function(cluster: fm.Cluster, tmp_path: Path, given: str) -> None:
    train, values = placed(step, cluster, 0), placed(sums, cluster)
    a, b = train(tree(1, cluster), 1.0)[0], train(tree(100, cluster), 1.0)[0]
    fm.save((a, b) if given == "together" else a, tmp_path)
    for _ in range(2):
        a, b = train(a, 1.0)[0], train(b, 1.0)[0]
    lose(cluster)
    if given == "alone":
        refused(lambda: values(b), tmp_path)
        assert again(lambda: values(a)) == [2]
    else:
        assert again(lambda: values(b, a)) == [101, 2]


def test_models_that_read_each_other_are_refused(cluster: fm.Cluster, tmp_path: Path) -> None:
    mix, values = placed(average, cluster, 0), placed(sums, cluster)
    a, b = tree(1, cluster), tree(100, cluster)
    for number in range(3):
        a = mix(a, b)
        b = mix(b, a)
        if number == 1:
            fm.save(a, tmp_path)
    lose(cluster)
    refused(lambda: values(b), tmp_path)
    refused(lambda: values(a), tmp_path)


def test_outputs_of_one_call_are_told_apart(cluster: fm.Cluster, tmp_path: Path) -> None:
    train, values = placed(both, cluster, (0, 1)), placed(sums, cluster)
    a, b = train(tree(1, cluster), tree(100, cluster), 1.0)
    fm.save((a, b), tmp_path)
    a, b = train(a, b, 1.0)
    lose(cluster)
    assert again(lambda: values(b)) == [110]
    assert again(lambda: values(a, b)) == [2, 110]


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_outputs_that_the_caller_exchanges_on_each_turn(cluster: fm.Cluster, tmp_path: Path, turns: int) -> None:
    """After an even number of turns each had the other's name, and got its values."""
    train, values = placed(both, cluster, (0, 1)), placed(sums, cluster)
    a, b = train(tree(1, cluster), tree(100, cluster), 1.0)
    fm.save((a, b), tmp_path)
    for _ in range(turns):
        a, b = train(a, b, 1.0)
        a, b = b, a
    lose(cluster)
    if turns == 1:
        assert again(lambda: values(a, b)) == [110, 2]
    else:
        refused(lambda: values(a, b), tmp_path)


def test_one_of_two_outputs_that_was_not_saved_is_refused(cluster: fm.Cluster, tmp_path: Path) -> None:
    train, values = placed(both, cluster, (0, 1)), placed(sums, cluster)
    a, b = tree(1, cluster), tree(100, cluster)
    fm.save(a, tmp_path / "put")
    a, b = train(a, b, 1.0)
    lose(cluster)
    refused(lambda: values(b), tmp_path / "put")
    a, b = train(tree(1, cluster), tree(100, cluster), 1.0)
    fm.save(a, tmp_path / "made")
    a, b = train(a, b, 1.0)
    lose(cluster)
    refused(lambda: values(b), tmp_path / "made")
    assert again(lambda: values(a)) == [2]


def test_a_copy_of_a_loaded_model_is_refused_while_both_are_used(cluster: fm.Cluster, tmp_path: Path) -> None:
    train, values = placed(step, cluster, 0), placed(sums, cluster)
    twice = placed(lambda model: {name: 2 * value for name, value in model.items()}, cluster, 0)
    fm.save(tree(1, cluster), tmp_path)
    model = fm.load(tmp_path, cluster)
    target = twice(model)
    model, _ = train(model, 1.0)
    lose(cluster)
    refused(lambda: values(target), tmp_path)
    refused(lambda: values(model), tmp_path)


@pytest.mark.parametrize("first", ["put", "load", "step"])
def test_a_loop_goes_on_after_each_loss(cluster: fm.Cluster, tmp_path: Path, first: str) -> None:
    """Also if nothing is saved between two of them, and if the state has a constant."""

    def counted(state: Any, x: Any) -> Any:
        model, _, count = state
        return (step(model, x)[0], jnp.zeros(4), count + 1), jnp.sum(model["w"]) / 4

    train = placed(counted, cluster, 0)
    weights = {"w": np.ones(4, np.float32), "b": np.ones(2, np.float32)}
    state = fm.put((weights, np.zeros(4, np.float32), np.int32(0)), cluster, WORKER)
    if first == "step":
        state, _ = train(state, 0.0)
    fm.save(state, tmp_path)
    if first == "load":
        state = fm.load(tmp_path, cluster, like=state)
    for _ in range(3):
        for _ in range(2):
            state, _ = train(state, 1.0)
        lose(cluster)
        state, value = again(lambda state=state: train(state, 1.0))
        assert value == 1


def test_arguments_that_were_loaded_together_go_on_before_the_next_save(cluster: fm.Cluster, tmp_path: Path) -> None:
    """Their structures differ, and leaves of both have one type. One of them alone could be the other's."""

    def with_moments(model: Any, moments: Any, x: Any) -> Any:
        return step(model, x)[0], {"of": step(moments["of"], x)[0]}, jnp.sum(model["w"]) / 4

    train, values = placed(with_moments, cluster, (0, 1)), placed(sums, cluster)
    fm.save((tree(1, cluster), {"of": tree(0, cluster)}), tmp_path)
    model, moments = fm.load(tmp_path, cluster)
    for _ in range(2):
        model, moments, _ = train(model, moments, 1.0)
    lose(cluster)
    refused(lambda: values(model), tmp_path)
    assert again(lambda: train(model, moments, 1.0))[2] == 1


def counted(state: Any) -> Any:
    model, count = state
    return step(model, 1.0)[0], count + 1


def average_of(mean: Any, state: Any) -> Any:
    return average(mean, state[0])


def begun(cluster: fm.Cluster, path: Path, first: str) -> tuple[Any, Any]:
    """A model with a count, and its average, which were saved together before any call."""
    if first == "apart":
        found = (tree(1, cluster), fm.put(np.int32(0), cluster, WORKER)), tree(100, cluster)
    else:
        model, mean = ({name: np.full(n, value, np.float32) for name, n in (("w", 4), ("b", 2))} for value in (1, 100))
        found = fm.put(((model, np.int32(0)), mean), cluster, WORKER)
    fm.save(found, path)
    return fm.load(path, cluster, like=found) if first == "load" else found


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("first", ["put", "apart", "load"])
def test_two_programs_go_on_from_what_was_saved_before_their_first_turn(
    cluster: fm.Cluster, tmp_path: Path, first: str, turns: int
) -> None:
    train, mean_of, values = placed(counted, cluster, "*"), placed(average_of, cluster, "*"), placed(sums, cluster)
    state, mean = begun(cluster, tmp_path, first)
    for _ in range(2):
        for _ in range(turns):
            state = train(state)
            mean = mean_of(mean, state)
        lose(cluster)
        state = again(lambda state=state: train(state))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fm.FlowmlWarning)
            mean = mean_of(mean, state)
            assert values(state[0], mean) == [2, 51]
    lose(cluster)
    assert again(lambda: values(mean)) == [100]


def test_a_copy_of_an_element_is_refused_while_both_are_used(cluster: fm.Cluster, tmp_path: Path) -> None:
    train, mean_of, values = placed(counted, cluster, "*"), placed(average_of, cluster, "*"), placed(sums, cluster)
    twice = placed(lambda state: ({name: 2 * value for name, value in state[0].items()}, state[1] + 1), cluster, "*")
    state, mean = begun(cluster, tmp_path, "put")
    target = twice(state)
    state = train(state)
    mean = mean_of(mean, state)
    lose(cluster)
    refused(lambda: train(target), tmp_path)
    refused(lambda: train(state), tmp_path)
    assert again(lambda: values(mean)) == [100]


def test_a_part_of_the_state_beside_it_is_refused(cluster: fm.Cluster, tmp_path: Path) -> None:
    """It has the structure of the average, and is none."""
    train, part = placed(counted, cluster, "*"), placed(lambda state: step(state[0], 1.0)[0], cluster, "*")
    state, _ = begun(cluster, tmp_path, "put")
    model = part(state)
    state = train(state)
    lose(cluster)
    refused(lambda: train(state), tmp_path)
    refused(lambda: part((model, state[1])), tmp_path)


def test_the_error_of_what_a_lost_call_was_given_is_that_of_the_loss(cluster: fm.Cluster) -> None:
    model = tree(1, cluster)
    for leaf in model.values():
        leaf.perish()
    for _ in range(2):
        with pytest.raises(fm.WorkerLostError, match=r"donated to a call during which a worker was lost; .*fm\.save"):
            placed(sums, cluster)(model)


def test_a_long_loop_remembers_few_saves(cluster: fm.Cluster, tmp_path: Path) -> None:
    train, mean_of = placed(step, cluster, 0), placed(average, cluster, 0)
    model, mean = tree(1, cluster), tree(100, cluster)
    for _ in range(3 * MOST_SAVED):
        model, _ = train(model, 1.0)
        fm.save(model, tmp_path)
        mean = mean_of(mean, model)
    assert 0 < len(mean["w"].lineage.line) <= MOST_SAVED + 1


def test_a_tree_that_was_saved_at_the_place_of_another_is_not_taken_for_it(cluster: fm.Cluster, tmp_path: Path) -> None:
    a, b = tree(1, cluster), tree(100, cluster)
    where = fm.save(b, tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    assert fm.save(a, tmp_path / "saved") == where
    lose(cluster)
    with pytest.raises(fm.WorkerLostError, match=f"saved in {where} is not there any more"):
        placed(sums, cluster)(b)
    assert again(lambda: placed(sums, cluster)(a)) == [1]

"""Loops of several programs that share kept values: after a loss all of them go on from one state, or an error says
what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from tests.conftest import wait_until

State = dict[str, Any]
LAYERS = {"step": "w", "average": "a", "mix": "b", "gradient": "w", "update": "w"}
TOGETHER = dict.fromkeys("wab", "worker:1")
TURN = "begin the turn again, or "
APART = {"w": "worker:0", "a": "worker:1", "b": "worker:0"}


@pytest.fixture
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=2) as cluster:
        yield cluster


def step(w: Any) -> Any:
    with fm.layer("w"):
        return w + 1.0


def average(a: Any, w: Any) -> Any:
    with fm.layer("a"):
        return a * 0.5 + w


def mix(b: Any, a: Any) -> Any:
    with fm.layer("b"):
        return b * 0.25 + a


def gradient(w: Any, x: Any) -> Any:
    with fm.layer("w"):
        return w * 0.5 + x


def update(w: Any, g: Any) -> Any:
    with fm.layer("w"):
        return w - 0.25 * g


class Loop:
    """Programs on two workers, or in this process."""

    def __init__(self, cluster: fm.Cluster | None = None, places: State | None = None) -> None:
        functions = (step, average, mix, gradient, update)
        self.programs = {f.__name__: self.placed(f, cluster, places or {}) for f in functions}

    def placed(self, function: Any, cluster: fm.Cluster | None, places: State) -> Any:
        layer = LAYERS[function.__name__]
        if cluster is None:
            return function
        return fm.dataflow(function, cluster=cluster, placement={layer: places[layer]}, keep="*")

    def turn(self, state: State, at: Callable[[str], None] = lambda name: None) -> State:
        raise NotImplementedError

    def call(self, name: str, at: Callable[[str], None], *args: Any) -> Any:
        at(name)
        return self.programs[name](*args)


class Two(Loop):
    def turn(self, state: State, at: Callable[[str], None] = lambda name: None) -> State:
        w = self.call("step", at, state["w"])
        return {"w": w, "a": self.call("average", at, state["a"], w)}


class Reversed(Loop):
    def turn(self, state: State, at: Callable[[str], None] = lambda name: None) -> State:
        a = self.call("average", at, state["a"], state["w"])
        return {"w": self.call("step", at, state["w"]), "a": a}


class Three(Loop):
    def turn(self, state: State, at: Callable[[str], None] = lambda name: None) -> State:
        w = self.call("step", at, state["w"])
        a = self.call("average", at, state["a"], w)
        return {"w": w, "a": a, "b": self.call("mix", at, state["b"], a)}


class Gradients(Loop):
    def turn(self, state: State, at: Callable[[str], None] = lambda name: None) -> State:
        g = self.call("gradient", at, state["w"], jnp.ones(2))
        w = self.call("update", at, state["w"], g)
        return {"w": w, "a": self.call("average", at, state["a"], w)}


class Seldom(Loop):
    """The average is made in every third turn only."""

    def turn(self, state: State, at: Callable[[str], None] = lambda name: None) -> State:
        for _ in range(3):
            state = {**state, "w": self.call("step", at, state["w"])}
        return {**state, "a": self.call("average", at, state["a"], state["w"])}


def zeros(*, three: bool) -> State:
    return {name: np.zeros(2, np.float32) for name in ("wab" if three else "wa")}


def here(state: State) -> dict[str, float]:
    return {name: float(np.asarray(value)[0]) for name, value in state.items()}


def lose(cluster: fm.Cluster, worker: str = "worker:1") -> None:
    cluster.end_worker(worker)
    wait_until(lambda: worker not in {d.worker for d in cluster.devices}, "the loss is known", 30)
    cluster.bring_back([worker])


def retried(call: Callable[[], Any]) -> Any:
    """The result of a call that goes on after one error at most."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FlowmlWarning)
        try:
            return call()
        except fm.WorkerLostError as error:
            assert "it goes on from the state saved in" in str(error)
            return call()


def refused(call: Callable[[], Any], why: str, remedy: str = "begin again: ") -> None:
    """Each time, in one line that says why and what to do."""
    for _ in range(2):
        with pytest.raises(fm.WorkerLostError, match=f"because [^;]*{why}") as caught:
            call()
        assert f"; {remedy}give each program what fm.load('" in str(caught.value)
        assert "\n" not in str(caught.value)


def survive(loop: Loop, known: list[State], cluster: fm.Cluster, path: Path, state: State, losses: set[int]) -> int:
    """Run turns, and lose worker:1 before the calls of these numbers. A turn that raises is tried again, with what was
    loaded if the error says so. Every state that a turn ends with is one of the plain loop. Returns how many raised."""
    calls, errors, left, done = 0, 0, set(losses), 0

    def at(name: str) -> None:
        nonlocal calls
        calls += 1
        if calls in left:
            left.remove(calls)
            lose(cluster)

    while done < 9 or left:
        try:
            state = loop.turn(state, at)
            done = known.index(here(state))
        except fm.WorkerLostError as error:
            errors += 1
            assert errors < 12
            if "fm.load(" in str(error):
                state = fm.load(path, cluster)
            continue
        if done in (2, 6):
            fm.save(state, path)
    return errors


@pytest.mark.parametrize("kind", [Two, Reversed, Three, Gradients, Seldom])
@pytest.mark.parametrize("places", [TOGETHER, APART], ids=["together", "apart"])
def test_each_state_after_a_loss_is_one_of_the_plain_loop(
    cluster: fm.Cluster, tmp_path: Path, kind: type[Loop], places: State
) -> None:
    """The losses are before each call of a turn, and soon after each other."""
    start = zeros(three=kind is Three)
    plain, known, state = kind(), [here(start)], start
    for _ in range(20):
        state = plain.turn(state)
        known.append(here(state))
    loop = kind(cluster, places)
    for first in range(10, 14):
        for second in (first + 1, first + 2, first + 5):
            state = fm.put(start, cluster, {name: places[name] for name in start})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fm.FlowmlWarning)
                assert survive(loop, known, cluster, tmp_path / f"{first} {second}", state, {first, second})


def begun(cluster: fm.Cluster, path: Path, places: State = TOGETHER) -> tuple[Loop, State]:
    """A loop one turn after the save: w was 2 and a 2.5, and are 3 and 4.25."""
    loop = Two(cluster, places)
    state = loop.turn(loop.turn(fm.put(zeros(three=False), cluster, {name: places[name] for name in "wa"})))
    fm.save(state, path)
    return loop, jax.block_until_ready(loop.turn(state))


def test_what_was_made_since_the_loop_goes_on_is_not_replaced(cluster: fm.Cluster, tmp_path: Path) -> None:
    loop, state = begun(cluster, tmp_path)
    lose(cluster)
    w = retried(lambda: loop.programs["step"](state["w"]))
    a = retried(lambda: loop.programs["average"](state["a"], w))
    assert here({"w": w, "a": a}) == {"w": 3, "a": 4.25}
    assert here(loop.turn({"w": w, "a": a})) == {"w": 4, "a": 6.125}


def test_each_loss_is_one_error_for_all_programs(cluster: fm.Cluster, tmp_path: Path) -> None:
    """A turn that is tried again as a whole makes each step once."""
    loop, state = begun(cluster, tmp_path)
    lose(cluster)
    assert here(retried(lambda: loop.turn(state))) == {"w": 3, "a": 4.25}


def test_a_tree_of_fresh_and_lost_values(cluster: fm.Cluster, tmp_path: Path) -> None:
    def both(state: Any) -> Any:
        with fm.layer("a"):
            return {"w": state["w"] * 1.0, "a": state["a"] * 0.5 + state["w"]}

    loop, state = begun(cluster, tmp_path)
    lose(cluster)
    w = retried(lambda: loop.programs["step"](state["w"]))
    program = fm.dataflow(both, cluster=cluster, placement={"a": "worker:1"}, keep="*")
    assert here(retried(lambda: program({"w": w, "a": state["a"]}))) == {"w": 3, "a": 4.25}


def test_a_later_value_that_is_not_lost_is_refused(cluster: fm.Cluster, tmp_path: Path) -> None:
    loop, state = begun(cluster, tmp_path, APART)
    w = jax.block_until_ready(loop.programs["step"](state["w"]))
    lose(cluster)
    refused(lambda: loop.programs["average"](state["a"], w), "'result' of a call of step is of a later step")
    loaded = fm.load(tmp_path, cluster)
    assert here(loop.turn(loaded)) == {"w": 3, "a": 4.25}


def test_a_later_value_that_the_call_does_not_get_is_refused(cluster: fm.Cluster, tmp_path: Path) -> None:
    def alone(a: Any) -> Any:
        with fm.layer("a"):
            return a * 0.5

    loop, state = begun(cluster, tmp_path, APART)
    lose(cluster)
    program = fm.dataflow(alone, cluster=cluster, placement={"a": "worker:1"}, keep="*")
    refused(lambda: program(state["a"]), "of a call of step is of a later step")
    assert here(loop.turn(fm.load(tmp_path, cluster))) == {"w": 3, "a": 4.25}


def test_a_turn_that_is_left_in_the_middle_does_not_go_on_there(cluster: fm.Cluster, tmp_path: Path) -> None:
    loop, state = begun(cluster, tmp_path)
    w = jax.block_until_ready(loop.programs["step"](state["w"]))
    lose(cluster)
    refused(lambda: loop.programs["average"](state["a"], w), "step is called before it with the saved", TURN)
    assert here(retried(lambda: loop.turn({"w": w, "a": state["a"]}))) == {"w": 3, "a": 4.25}


@pytest.mark.parametrize("put", [True, False])
def test_a_later_value_that_was_fetched_is_refused(cluster: fm.Cluster, tmp_path: Path, *, put: bool) -> None:
    loop, state = begun(cluster, tmp_path)
    w: Any = np.asarray(state["w"]) * np.float32(0.5)
    if put:
        w = fm.put(w, cluster, "worker:0")
    state = {"w": w, "a": state["a"]}
    lose(cluster)
    refused(lambda: loop.programs["average"](state["a"], state["w"]), "a part of the later state that was fetched")


@pytest.mark.parametrize("put", [True, False])
def test_what_is_fetched_after_the_loss_is_as_it_is(cluster: fm.Cluster, tmp_path: Path, *, put: bool) -> None:
    loop, state = begun(cluster, tmp_path)
    lose(cluster)
    w: Any = np.asarray(retried(lambda: loop.programs["step"](state["w"]))) * np.float32(0.5)
    w = fm.put(w, cluster, "worker:0") if put else w
    assert here({"a": retried(lambda: loop.programs["average"](state["a"], w))}) == {"a": 2.75}


def test_a_gradient_of_the_lost_state_is_refused(cluster: fm.Cluster, tmp_path: Path) -> None:
    loop, state = begun(cluster, tmp_path)
    on_other = Two(cluster, {**TOGETHER, "w": "worker:0"}).programs["gradient"]
    state = {"w": loop.programs["update"](state["w"], np.ones(2, np.float32)), "a": state["a"]}
    fm.save(state, tmp_path)
    w = loop.programs["update"](state["w"], on_other(state["w"], np.ones(2, np.float32)))
    g = jax.block_until_ready(on_other(w, np.ones(2, np.float32)))
    lose(cluster)
    remedy = "begin the turn again if it makes that argument, or "
    refused(lambda: loop.programs["update"](w, g), "'result' was made of the state that is lost", remedy)


def test_a_second_loss_before_all_programs_have_gone_on(cluster: fm.Cluster, tmp_path: Path) -> None:
    loop, state = begun(cluster, tmp_path)
    lose(cluster)
    w = jax.block_until_ready(retried(lambda: loop.programs["step"](state["w"])))
    lose(cluster)
    refused(lambda: loop.programs["average"](state["a"], w), "step is called before it", TURN)
    assert here(retried(lambda: loop.turn({"w": w, "a": state["a"]}))) == {"w": 3, "a": 4.25}


def test_a_second_loss_that_leaves_a_value_of_the_first_recovery(cluster: fm.Cluster, tmp_path: Path) -> None:
    """It is of a later step than the saved one again."""
    loop, state = begun(cluster, tmp_path)
    on_other = Two(cluster, {**TOGETHER, "w": "worker:0"}).programs["step"]
    lose(cluster)
    w = retried(lambda: on_other(state["w"]))
    a = jax.block_until_ready(retried(lambda: loop.programs["average"](state["a"], w)))
    lose(cluster)
    refused(lambda: loop.programs["average"](a, w), "'result' of a call of step is of a later step")


@pytest.mark.parametrize("whole", [True, False])
def test_a_save_between(cluster: fm.Cluster, tmp_path: Path, *, whole: bool) -> None:
    """A save of one value amid a recovery does not change where the other one goes on."""
    loop, state = begun(cluster, tmp_path / "all")
    lose(cluster)
    w = retried(lambda: loop.programs["step"](state["w"]))
    if not whole:
        fm.save({"w": w}, tmp_path / "one")
    state = {"w": w, "a": retried(lambda: loop.programs["average"](state["a"], w))}
    if whole:
        fm.save(state, tmp_path / "all")
        state = loop.turn(state)
        lose(cluster)
        state = retried(lambda: loop.turn(state))
        assert here(state) == {"w": 4, "a": 6.125}
    else:
        assert here(state) == {"w": 3, "a": 4.25}


def test_a_rest_of_a_step_that_is_lost_in_part_is_not_used(cluster: fm.Cluster, tmp_path: Path) -> None:
    def wide(state: Any) -> Any:
        with fm.layer("w"):
            w = state["w"] + 1.0
        with fm.layer("a"):
            return {"w": w, "a": state["a"] * 0.5 + w}

    program = fm.dataflow(wide, cluster=cluster, placement={"w": "worker:0", "a": "worker:1"}, keep="*")
    loop = Two(cluster, APART)
    state = program(fm.put(zeros(three=False), cluster, {"w": "worker:0", "a": "worker:1"}))
    fm.save(state, tmp_path)
    old = jax.block_until_ready(program(state))
    lose(cluster)
    assert here(retried(lambda: program(old))) == {"w": 2, "a": 2.5}
    with pytest.raises(fm.ClusterError, match="is of a step that is lost in part: wide goes on from the state saved"):
        old["w"].fetch()
    assert float(np.asarray(retried(lambda: loop.programs["step"](old["w"])))[0]) == 2

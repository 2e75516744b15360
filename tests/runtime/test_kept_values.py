"""Values that stay on the workers between calls: training loops, handles and `fm.put`."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import flowml as fm
from flowml.errors import ClusterError
from tests.conftest import wait_until

LAYERS = ("a", "b", "c", "d")
PATTERN = {"a": "worker:0", "b": "worker:1", "c": "worker:0", "d": "worker:1"}
PLACEMENTS: dict[str, Any] = {"auto": "auto", "pipeline": fm.Pipeline(stages=2), "pattern": PATTERN}
OPTIMIZER = optax.adam(1e-2)


GATE = threading.Event()


def wait(x: Any) -> Any:
    """A callback that holds up its step."""
    GATE.wait(60)
    return x


def loss_of(params: Any, x: Any, y: Any) -> Any:
    for name in LAYERS:
        with fm.layer(name):
            x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
    return jnp.mean((x - y) ** 2)


def train(state: Any, batch: Any) -> Any:
    params, moments = state
    loss, gradients = jax.value_and_grad(loss_of)(params, *batch)
    updates, moments = OPTIMIZER.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), {"loss": loss}


def evaluate(state: Any, batch: Any) -> Any:
    return loss_of(state[0], *batch)


@pytest.fixture
def begin(rng: np.random.Generator) -> tuple[Any, Any]:
    params = {n: {"w": rng.normal(size=(16, 16)).astype("f") * 0.3, "b": np.zeros(16, "f")} for n in LAYERS}
    return (params, OPTIMIZER.init(params)), tuple(rng.normal(size=(8, 16)).astype("f") for _ in range(2))


@pytest.fixture(params=["threads_cluster", "process_cluster"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue(request.param)


class Counted:
    """The bytes that the driver feeds and is sent, while it watches."""

    def __init__(self, cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed = self.fetched = 0
        send, receive = cluster.endpoint.send, cluster.session.on_message

        def sending(peer: str, message: Any, arrays: Any = (), timeout_s: float | None = None) -> None:
            self.fed += sum(a.nbytes for a in arrays)
            send(peer, message, arrays, timeout_s)

        def receiving(peer: str, message: Any, arrays: Any) -> None:
            self.fetched += sum(a.nbytes for a in arrays)
            receive(peer, message, arrays)

        monkeypatch.setattr(cluster.endpoint, "send", sending)
        monkeypatch.setattr(cluster.session, "on_message", receiving)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_training_loop_equals_jit_and_moves_only_batches(
    cluster: fm.Cluster, placement: str, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, batch = begin
    step = fm.dataflow(train, cluster=cluster, keep=0, donate_argnums=0, placement=PLACEMENTS[placement])
    score = fm.dataflow(evaluate, cluster=cluster, placement=PLACEMENTS[placement])
    jitted, expected = jax.jit(train), state
    counted = Counted(cluster, monkeypatch)
    for n in range(6):
        if n == 2:
            counted.fed = counted.fetched = 0
        state, metrics = step(state, batch)
        expected, wanted = jitted(expected, batch)
        np.testing.assert_array_equal(metrics["loss"], wanted["loss"])
    here = not cluster.pids and placement == "auto"  # one program, on the caller's thread
    assert counted.fed == (0 if here else 4 * sum(a.nbytes for a in batch))  # to one device, if a layer reads them
    assert counted.fetched == (4 * 4 if cluster.pids else 0)
    np.testing.assert_array_equal(score(state, batch), jax.jit(evaluate)(expected, batch))
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, fm.Remote) for leaf in leaves)
    for leaf, want in zip(leaves, jax.tree.leaves(expected), strict=True):
        got = leaf.fetch()
        assert isinstance(got, jax.Array)
        assert (got.shape, got.dtype, got.weak_type) == (want.shape, want.dtype, want.weak_type)
        np.testing.assert_array_equal(got, want)
    if placement == "pattern":
        assert {state[0][n]["w"].device for n in ("a", "c")} == {"worker:0/cpu:0"}
        assert {state[1][0].mu[n]["w"].device for n in ("b", "d")} == {"worker:1/cpu:0"}


def test_programs_follow_what_was_put_on_the_workers(threads_cluster: fm.Cluster, begin: Any) -> None:
    state, batch = begin
    there = fm.put(state, threads_cluster, PATTERN)
    assert there[0]["b"]["w"].device == there[1][0].nu["b"]["b"].device == "worker:1/cpu:0"
    step = fm.dataflow(train, cluster=threads_cluster, keep=0, donate_argnums=0)
    assert {p.device for p in step.plan(there, batch).partitions} == {"worker:0/cpu:0", "worker:1/cpu:0"}
    expected = state
    for _ in range(3):
        there, _ = step(there, batch)
        expected, _ = jax.jit(train)(expected, batch)
    assert [r.device for r in jax.tree.leaves(there[0]["b"])] == ["worker:1/cpu:0"] * 2
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda r: r.fetch(), there), expected)


def test_calls_whose_results_all_stay_do_not_wait(threads_cluster: fm.Cluster) -> None:
    def first(x: Any) -> Any:
        return jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x) + 1

    GATE.clear()
    later = fm.dataflow(lambda x: x * 2, cluster=threads_cluster, keep=0)
    held = fm.dataflow(first, cluster=threads_cluster, keep=0)(np.float32(3))
    for _ in range(5):
        held = later(held)  # each begins when its input is made, and no call has waited
    GATE.set()
    assert float(held) == 128


def test_a_value_is_not_overwritten_while_an_earlier_call_reads_it(threads_cluster: fm.Cluster) -> None:
    def reads(x: Any, y: Any) -> Any:
        with fm.device("worker:1"):
            late = jax.pure_callback(wait, jax.ShapeDtypeStruct((4,), jnp.float32), y)
        with fm.device("worker:0"):
            return x + late

    read = fm.dataflow(reads, cluster=threads_cluster)
    overwrite = fm.dataflow(lambda x: x * 0, cluster=threads_cluster, keep=0, donate_argnums=0)
    value, ones = fm.put(np.full(4, 7, "f"), threads_cluster, "worker:0"), np.ones(4, "f")
    for _ in range(2):  # the second time everything is compiled
        GATE.clear()
        value = fm.put(np.full(4, 7, "f"), threads_cluster, "worker:0")
        future = read.submit(value, ones)
        zero = overwrite(value)
        GATE.set()
        np.testing.assert_array_equal(future.result(60), np.full(4, 8))
        np.testing.assert_array_equal(zero, np.zeros(4))


def test_every_kind_of_array_stays_and_comes_back_as_from_jit(cluster: fm.Cluster) -> None:
    tree = {
        "weak": 2.0,
        "int": np.int32(3),
        "key": jax.random.key(1),
        "half": jnp.ones(5, jnp.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False]),
        "complex": np.array([1 + 2j], np.complex64),
    }

    def change(tree: Any, x: Any) -> Any:
        return {**tree, "key": jax.random.split(tree["key"])[1], "half": tree["half"] * x, "new": jnp.arange(3)}, x

    kept, _ = fm.dataflow(change, cluster=cluster, keep=0)(tree, jnp.bfloat16(2))
    again, _ = fm.dataflow(change, cluster=cluster, keep="0/*")(kept, jnp.bfloat16(2))
    wanted = jax.jit(change)(jax.jit(change)(tree, jnp.bfloat16(2))[0], jnp.bfloat16(2))[0]
    for name, want in wanted.items():
        got = again[name].fetch()
        assert (got.shape, got.dtype, getattr(got, "weak_type", False)) == (
            want.shape,
            want.dtype,
            getattr(want, "weak_type", False),
        ), name
        plain = jax.random.key_data if name == "key" else (lambda a: a)
        np.testing.assert_array_equal(plain(got), plain(want))
    assert again["flag"] is not kept["flag"]  # what is returned unchanged is a value of its own too


def test_a_handle_is_used_like_an_array(threads_cluster: fm.Cluster) -> None:
    want = np.arange(6, dtype="f").reshape(2, 3)
    held = fm.put(want, threads_cluster, "worker:1")
    assert (held.shape, held.dtype, held.ndim, held.size, held.nbytes, len(held)) == ((2, 3), np.float32, 2, 6, 24, 2)
    assert held.device == "worker:1/cpu:0"
    assert repr(held) == "Remote(float32[2,3] 'result' on worker:1/cpu:0)"
    np.testing.assert_array_equal(np.asarray(held), want)
    np.testing.assert_array_equal(np.asarray(held, np.int32), want.astype(np.int32))
    np.testing.assert_array_equal(held + 1, want + 1)
    np.testing.assert_array_equal(1 - held, 1 - want)
    np.testing.assert_array_equal(held @ held.T, want @ want.T)
    np.testing.assert_array_equal(held > 2, want > 2)
    np.testing.assert_array_equal(held[1], want[1])
    assert jnp.sum(held) == 15
    assert jax.jit(lambda x: x.sum() * 2)(held) == 30
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(x**2))(held), 2 * want)
    assert float(held.mean()) == 2.5
    scalar = fm.put(2.5, threads_cluster)
    assert (float(scalar), int(scalar), bool(scalar), scalar.item(), f"{scalar:.2f}") == (2.5, 2, True, 2.5, "2.50")
    assert jax.block_until_ready(held) is held
    copies = (copy.copy(held), copy.deepcopy(held), held.copy(), pickle.loads(pickle.dumps(held)))
    with pytest.raises(AttributeError, match="no_such"):
        _ = held.no_such
    held.delete()
    for copied in copies:
        assert not isinstance(copied, fm.Remote)
        np.testing.assert_array_equal(copied, want)


def test_a_handle_has_all_that_an_array_has(threads_cluster: fm.Cluster) -> None:
    want = jnp.arange(6, dtype="f").reshape(2, 3)
    held: Any = fm.put(want, threads_cluster, "worker:1")
    for name in sorted({*dir(want)} - {"__annotations__", "__dict__", "__numpy_dtype__", "__weakref__", "device"}):
        try:
            expected = getattr(want, name)
        except (AttributeError, NotImplementedError):
            continue
        if not name.startswith("__") or hasattr(jax.Array, name):
            assert callable(getattr(held, name)) == callable(expected), name
    assert isinstance(held, jax.Array)
    assert eqx.is_inexact_array(held)
    assert (held.aval, held.weak_type, held.itemsize, held.sharding, held.committed) == (
        want.aval,
        want.weak_type,
        want.itemsize,
        want.sharding,
        want.committed,
    )
    assert (held.devices(), held.tolist(), held.T.shape) == (want.devices(), want.tolist(), (3, 2))
    np.testing.assert_array_equal(held.at[0].set(7), want.at[0].set(7))
    np.testing.assert_array_equal(np.full(3, 2, "f") * held, 2 * want)
    assert isinstance(np.full(3, 2, "f") * held, jax.Array)
    assert [s.data.shape for s in held.addressable_shards] == [(2, 3)]
    np.testing.assert_array_equal(jnp.from_dlpack(held), want)
    assert range(9)[fm.put(np.int32(4), threads_cluster)] == 4
    with pytest.raises(TypeError, match="unhashable"):
        hash(held)
    with pytest.raises(TypeError, match="immutable"):
        held[0] = 1.0
    key = fm.put(jax.random.key(3), threads_cluster)
    assert jax.random.key_impl(key) == "threefry2x32"
    np.testing.assert_array_equal(jax.random.normal(key, (3,)), jax.random.normal(jax.random.key(3), (3,)))


def test_libraries_take_handles_for_arrays(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    params = {"w": np.full((2, 3), 3, "f")}
    held = fm.put(params, threads_cluster)
    jax.tree.map(np.testing.assert_array_equal, OPTIMIZER.init(held), OPTIMIZER.init(params))
    assert optax.tree.norm(held) == optax.tree.norm(params)
    arrays, others = eqx.partition({**held, "rate": 0.1}, eqx.is_array)
    assert arrays["w"] is held["w"]
    assert others == {"w": None, "rate": 0.1}
    assert eqx.filter_jit(lambda t: t["w"][0, 0] * t["n"])({**held, "n": 2}) == 6
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(held["w"])
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(model, np.ones((1, 2), "f")), np.full((1, 3), 6))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "c", held)
        saver.wait_until_finished()
        jax.tree.map(np.testing.assert_array_equal, saver.restore(tmp_path / "c"), params)
    jax.tree.map(
        np.testing.assert_array_equal, serialization.msgpack_restore(serialization.msgpack_serialize(held)), params
    )


def test_keep_chooses_outputs_by_position_pattern_or_size(threads_cluster: fm.Cluster) -> None:
    def three(x: Any) -> Any:
        return {"big": jnp.zeros((300, 300)) + x, "small": x}, x + 1, (x + 2, x + 3)

    def kept(keep: Any) -> list[bool]:
        out = fm.dataflow(three, cluster=threads_cluster, keep=keep)(np.float32(1))
        return [isinstance(leaf, fm.Remote) for leaf in jax.tree.leaves(out)]

    assert kept(None) == [False] * 5
    assert kept(0) == [True, True, False, False, False]
    assert kept((1, -1)) == [False, False, True, True, True]
    assert kept("auto") == [True, False, False, False, False]
    assert kept(["0/small", "2/*"]) == [False, True, False, True, True]
    whole = fm.dataflow(lambda x: {"y": x + 1}, cluster=threads_cluster, keep=0)(np.float32(1))
    assert float(whole["y"]) == 2
    with pytest.raises(ValueError, match="keep=3, but the function returns a tuple of 3"):
        kept(3)
    with pytest.raises(ValueError, match=r"keep='weights\*' matches no output; the outputs are 0/big, 0/small"):
        kept("weights*")
    with pytest.raises(TypeError, match=r"keep=1\.5: give positions"):
        kept(1.5)


def test_equinox_modules_stay(threads_cluster: fm.Cluster) -> None:
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    x = np.ones((3, 4), "f")

    def update(model: Any, x: Any) -> Any:
        loss, gradients = eqx.filter_value_and_grad(lambda m: jnp.sum(jax.vmap(m)(x) ** 2))(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradients)), loss

    step = fm.dataflow(update, cluster=threads_cluster, keep=0, donate_argnums=0)
    expected, got = model, model
    for _ in range(3):
        got, loss = step(got, x)
        expected, wanted = eqx.filter_jit(update)(expected, x)
        np.testing.assert_array_equal(loss, wanted)
    assert isinstance(got.layers[0].weight, fm.Remote)
    np.testing.assert_array_equal(got.layers[1].weight, expected.layers[1].weight)


def workers_of(cluster: fm.Cluster) -> list[Any]:
    return list(cluster.session._local.values())  # pyright: ignore[reportPrivateUsage]


def test_memory_is_freed_with_the_handles(threads_cluster: fm.Cluster, begin: Any) -> None:
    def held() -> int:
        gc.collect()
        return sum(sum(w._keeping.kept.sizes().values()) for w in workers_of(threads_cluster))

    state, batch = begin
    wait_until(lambda: held() == 0, "handles of earlier tests are freed")
    step = fm.dataflow(train, cluster=threads_cluster, keep=0, donate_argnums=0)
    for _ in range(4):
        state, _ = step(state, batch)
    count = len(jax.tree.leaves(state))
    wait_until(lambda: held() == count, "only the newest state is kept")
    assert threads_cluster.session.held.on("worker:0/cpu:0") == sum(r.nbytes for r in jax.tree.leaves(state))
    extra = fm.put(np.ones(3), threads_cluster)
    extra.delete()
    with pytest.raises(
        ClusterError, match=r"was deleted by delete\(\) at test_kept_values.py:\d+ \(test_memory_is_freed"
    ):
        extra.fetch()
    wait_until(lambda: held() == count, "a deleted value is freed")
    del state
    wait_until(lambda: held() == 0, "everything is freed")
    assert threads_cluster.session.held.on("worker:0/cpu:0") == 0


@pytest.mark.parametrize("keep", [None, 0])
@pytest.mark.parametrize("argument", [np.ones((3, 3), np.float32), 2.0], ids=["numpy", "number"])
def test_calls_move_arrays_on_purpose_under_a_transfer_guard(
    threads_cluster: fm.Cluster, argument: Any, keep: int | None
) -> None:
    """What is fed, fetched and returned, on the caller's thread and on others."""

    def fn(x: Any) -> Any:
        return x * 2, jnp.sum(x), jax.random.key(1)

    program = fm.dataflow(fn, cluster=threads_cluster, keep=keep)
    with jax.transfer_guard("disallow"):
        results = [program(argument), program.submit(argument).result()]
        doubled = [np.asarray(first) for first, *_ in results]
        brought = np.asarray(fm.put(np.ones(3, np.float32), threads_cluster))
    for value in doubled:
        np.testing.assert_array_equal(value, np.asarray(argument) * 2)
    np.testing.assert_array_equal(brought, np.ones(3))


@pytest.mark.parametrize("keep", [None, 0])
def test_a_handle_of_64_bits_is_taken_as_jit_takes_its_value(cluster: fm.Cluster, keep: int | None) -> None:
    def fn(x: Any) -> Any:
        return x * 2, jnp.sum(x)

    with jax.enable_x64(True):
        handle = fm.put(np.arange(3.0) / 3, cluster)
        kept, _ = fm.dataflow(fn, cluster=cluster, keep=0)(handle)
    program = fm.dataflow(fn, cluster=cluster, keep=keep)
    for wide in (handle, kept, handle):
        found = program(wide)[0]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wide).astype(np.float32) * 2)
    assert handle.dtype == kept.dtype == np.float64


def test_a_future_is_an_argument(threads_cluster: fm.Cluster) -> None:
    GATE.clear()

    def slow(x: Any) -> Any:
        return {"y": jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x) + 1}

    later = fm.dataflow(lambda tree, k: tree["y"] * k, cluster=threads_cluster)
    kept = fm.dataflow(slow, cluster=threads_cluster, keep=0).submit(np.float32(3))
    product = later.submit(kept, np.float32(5))  # begins when the handle has its value
    assert not kept.done()
    GATE.set()
    assert product.result(60) == 20
    assert float(kept.result(60)["y"]) == 4
    fetched = fm.dataflow(slow, cluster=threads_cluster).submit(np.float32(3))
    assert later(fetched, np.float32(2)) == 8


def test_a_future_of_handles_does_not_keep_the_arguments(threads_cluster: fm.Cluster) -> None:
    value = fm.put(np.ones(3, "f"), threads_cluster)
    future = fm.dataflow(lambda x: x + 1, cluster=threads_cluster, keep=0).submit(value)
    np.testing.assert_array_equal(future.result(60), np.full(3, 2))
    argument = weakref.ref(value)
    del value
    gc.collect()
    assert argument() is None

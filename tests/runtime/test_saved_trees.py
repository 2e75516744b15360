"""`fm.save` and `fm.load`: written by the workers that hold the values, complete or not there, and checked."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.environment import checkpoints, locks
from flowml_runtime.saved import Saved, taken_from
from flowml_runtime.worker.keeping import Keeping
from tests.conftest import wait_until


def state(cluster: fm.Cluster) -> Any:
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"w": jnp.ones(4, jnp.bfloat16)}}
    placed = fm.put(params, cluster, {"a": "worker:0", "*": "worker:1"})
    return {
        "params": placed,
        "opt": optax.adam(0.1).init(params),
        "key": jax.random.key(3),
        "step": 7,
        "n": np.arange(3),
    }


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(jnp.result_type(b), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(params=["threads_cluster", "process_cluster", "grpc_cluster"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue(request.param)


def test_a_tree_comes_back_here_and_where_it_was(cluster: fm.Cluster, tmp_path: Path) -> None:
    tree = state(cluster)
    where = fm.save(tree, tmp_path)
    files = sorted(p.name for p in where.iterdir())
    assert files == ["buffers.bin", "manifest.json", "worker0.bin", "worker1.bin"], "each worker has written its values"
    assert_equal(fm.load(tmp_path, like=tree), tree)
    plain = fm.load(tmp_path)
    assert_equal(plain["opt"][0]["mu"], tree["opt"][0].mu)
    there = fm.load(tmp_path, cluster, like=tree)
    assert (there["params"]["a"].device, there["params"]["b"]["w"].device) == ("worker:0/cpu:0", "worker:1/cpu:0")
    assert type(there["opt"]) is type(tree["opt"])
    assert_equal(jax.tree.map(lambda x: x.fetch(), there), tree)
    moved = fm.load(tmp_path, cluster, {"a": "worker:1", "*": "worker:0"}, like=tree)
    assert (moved["params"]["a"].device, moved["params"]["b"]["w"].device) == ("worker:1/cpu:0", "worker:0/cpu:0")
    assert_equal(jax.tree.map(lambda x: x.fetch(), moved), tree)


def test_workers_with_another_disk_send_their_values(
    threads_cluster: fm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = state(threads_cluster)
    monkeypatch.setattr("flowml_runtime.worker.keeping.write_invited", lambda *_: None)
    where = fm.save(tree, tmp_path)
    assert sorted(p.name for p in where.iterdir()) == ["buffers.bin", "manifest.json"]
    assert_equal(fm.load(tmp_path, like=tree), tree)


def test_values_that_are_still_computed_are_waited_for(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    step = fm.dataflow(lambda s: s * 2 + 1, cluster=threads_cluster, keep=0, donate_argnums=0)
    value = fm.put(jnp.zeros(1000), threads_cluster)
    for _ in range(5):
        value = step(value)
    fm.save([value], tmp_path)
    later = step(value)  # overwrites what was saved
    assert_equal(fm.load(tmp_path)[0], jnp.full(1000, 31.0))
    assert_equal(later.fetch(), jnp.full(1000, 63.0))


@pytest.mark.parametrize(
    "tree",
    [
        {"a": None, "b": [], "c": {}, "e": [None, jnp.ones(2), [], {}], "f": {"g": {}, "h": [None, {}]}},
        {"empty": {"in": {"it": []}}},
        [[], [None], {}],
        [],
        {},
        None,
    ],
    ids=str,
)
def test_none_and_empty_containers_come_back_also_without_like(tmp_path: Path, tree: Any) -> None:
    fm.save(tree, tmp_path)
    found = fm.load(tmp_path)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert jax.tree.structure(fm.load(tmp_path, like=tree)) == jax.tree.structure(tree)


def test_what_has_no_values_is_not_saved_and_not_put(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    struct = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(TypeError, match=r"save: leaf 'w' is a jax.ShapeDtypeStruct without values; give an array"):
        fm.save(struct, tmp_path)
    with pytest.raises(TypeError, match=r"fm.put: leaf 'w' is a jax.ShapeDtypeStruct without values; give an array"):
        fm.put(struct, threads_cluster)
    with pytest.raises(TypeError, match=r"traced by another JAX transformation, and save\(\) needs its values"):
        jax.jit(lambda x: fm.save({"w": x}, tmp_path))(jnp.ones(2))


def test_gradients_of_integers_come_back(cluster: fm.Cluster, tmp_path: Path) -> None:
    params = {"n": jnp.int32(2), "w": jnp.ones(3)}
    step = fm.dataflow(jax.grad(lambda p: jnp.sum(p["n"] * p["w"]), allow_int=True), cluster=cluster, keep=0)
    tree = {"gradients": step(params), "params": fm.put(params, cluster)}
    assert fm.put(tree, cluster)["gradients"]["n"].dtype == jax.dtypes.float0
    fm.save(tree, tmp_path)
    for found in (fm.load(tmp_path), fm.load(tmp_path, cluster), fm.load(tmp_path, cluster, like=tree)):
        assert found["gradients"]["n"].dtype == jax.dtypes.float0
        assert found["gradients"]["n"].shape == ()
        np.testing.assert_array_equal(found["gradients"]["w"], [2, 2, 2])
        np.testing.assert_array_equal(found["params"]["n"], 2)


def test_the_newest_complete_tree_is_loaded(tmp_path: Path) -> None:
    for n in range(4):
        fm.save({"n": n}, tmp_path, keep=2)
    paths = checkpoints.snapshots(tmp_path)
    assert [int(fm.load(p)["n"]) for p in paths] == [3, 2]
    data = paths[0] / checkpoints.DATA
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.warns(fm.FlowmlWarning, match=r"changed or is damaged.* Loaded is step-0+3"):
        assert int(fm.load(tmp_path)["n"]) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(fm.CheckpointError, match="there is no checkpoint at"):
        fm.load(tmp_path / "empty")


def test_other_trees_and_leaves_are_refused(tmp_path: Path) -> None:
    fm.save({"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}, tmp_path)
    with pytest.raises(fm.CheckpointError) as error:
        fm.load(tmp_path, like={"w": np.ones((2, 4), np.float32), "c": np.ones(3, np.float32)})
    text = str(error.value)
    assert "leaf 'b', float32[3], is only there; leaf 'c', float32[3], is only here" in text
    assert "leaf 'w' is float32[2, 3] there and float32[2, 4] here" in text
    with pytest.raises(
        TypeError, match=r"^the tree cannot be saved: [^\n]*; give each dict keys of one kind, such as text$"
    ):
        fm.save({"a": 1, 3: 1}, tmp_path)
    for use in (fm.restore, fm.load, lambda given: fm.save({"n": 1}, given), fm.Checkpoint):
        with pytest.raises(
            TypeError, match=r"^fm\.[^\n]*: give the name of a directory, and not a value of type dict$"
        ):
            use({"w": np.ones((20, 30))})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="save: leaf 'x'"):
        fm.save({"x": "text"}, tmp_path)
    with pytest.raises(fm.CheckpointError, match=r"holds a tree of fm.save, and no fit"):
        fm.restore(tmp_path)
    checkpoints.write(tmp_path / "fit", 1, b"{}", {}, keep=1)
    with pytest.raises(fm.CheckpointError, match="holds a fit, and no tree"):
        fm.load(tmp_path / "fit")


@pytest.mark.parametrize("where", ["the driver", "a worker"])
def test_a_full_disk_leaves_what_was_saved_before(threads_cluster: fm.Cluster, tmp_path: Path, where: str) -> None:
    large: Any = np.ones(100_000, np.float32)
    if where == "a worker":
        large = fm.put(large, threads_cluster)
    fm.save({"n": 1}, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            fm.CheckpointError, match=r": \[Errno 27\] File too large; .*let this process write larger files"
        ):
            fm.save({"n": 2, "large": large}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000001"]
    assert int(fm.load(tmp_path)["n"]) == 1


class Answers:
    """Takes what a worker answers."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    def send(self, peer: str, message: Any, arrays: Any = (), timeout_s: float = 0.0) -> None:
        self.written.append(message)


@pytest.mark.parametrize(
    ("file", "token"), [("../out.bin", None), ("w.bin", "guess"), ("/tmp/w.bin", None), ("a.txt", None)]
)
def test_a_worker_writes_only_where_it_is_invited(tmp_path: Path, file: str, token: str | None) -> None:
    """A message from a driver must not make a worker write to any other place of its disk."""
    (tmp_path / "in").mkdir()
    real = checkpoints.invite(tmp_path / "in")
    answers = Answers()
    keeping = Keeping("worker", answers, {})  # type: ignore[arg-type]
    keeping.kept.put("driver", (1,), [jnp.ones(3)])
    keeping.on_message(
        "driver", wire.Write(number=1, names=(1,), folder=str(tmp_path / "in"), file=file, token=token or real), ()
    )
    keeping.close()
    keeping.join(10)
    assert [(w.parts, w.error) for w in answers.written] == [((), "")]
    assert sorted(p.name for p in tmp_path.rglob("*")) == [checkpoints.TOKEN, "in"]


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"12345678")
    where = fm.save({"n": np.zeros(2, np.float32)}, tmp_path / "tree")
    path = where / checkpoints.MANIFEST
    found = msgspec.json.decode(path.read_bytes())
    found["body"]["arrays"][0]["file"] = "../../secret.bin"
    found["checksum"] = checkpoints._checksum(msgspec.json.encode(found["body"]))  # pyright: ignore[reportPrivateUsage]
    path.write_bytes(msgspec.json.encode(found))
    with pytest.raises(fm.CheckpointError, match="names the file"):
        fm.load(where)


def test_an_equinox_module_is_saved_without_its_functions(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    model = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    whole = model, optax.adam(1e-2).init(eqx.filter(model, eqx.is_inexact_array))
    there = fm.put(whole, threads_cluster)
    assert type(there[0].layers[0].weight) is fm.Remote and there[0].activation is model.activation
    where = fm.save(there, tmp_path)
    for cluster in (None, threads_cluster):
        loaded = fm.load(tmp_path, cluster, like=whole)
        assert loaded[0].activation is model.activation
        assert_equal(eqx.filter(loaded, eqx.is_array), eqx.filter(whole, eqx.is_array))
    owner = there[0].layers[0].weight.owner
    assert owner is not None
    record = next(record for record in owner.saved if record.path == where)
    arrays = len(jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    assert record.fitting(there[0]) == [(0, arrays)], "a model has the leaves that are arrays"
    assert record.fitting(there) == [(0, len(jax.tree.leaves(eqx.filter(whole, eqx.is_array))))]
    found = taken_from(record, {0: (there[0], (0, arrays))})[0]
    assert found.activation is model.activation
    assert_equal(eqx.filter(found, eqx.is_array), eqx.filter(model, eqx.is_array))


def test_functions_elsewhere_in_a_tree_are_refused(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    tree = {"w": np.ones(3), "f": jax.nn.relu}
    for name, take in (("put", lambda: fm.put(tree, threads_cluster)), ("save", lambda: fm.save(tree, tmp_path))):
        with pytest.raises(TypeError, match=rf"{name}: leaf 'f' is of type .*; .*eqx\.partition\(.*combine"):
            take()
    assert not Saved(tmp_path, {}).fitting(tree), "a tree that has functions cannot be one that was saved"


def test_workers_read_their_values_and_the_driver_those_of_other_disks(
    threads_cluster: fm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = state(threads_cluster)["params"]
    fm.save(tree, tmp_path)
    read = checkpoints.read_arrays

    def refused(*_: Any) -> Any:
        raise fm.CheckpointError("no file")

    monkeypatch.setattr(checkpoints, "read_arrays", refused)  # in the driver
    assert_equal(jax.tree.map(lambda x: x.fetch(), fm.load(tmp_path, threads_cluster, like=tree)), tree)
    monkeypatch.setattr(checkpoints, "read_arrays", read)
    monkeypatch.setattr("flowml_runtime.worker.keeping.read_arrays", refused)
    there = fm.load(tmp_path, threads_cluster, like=tree)
    assert_equal(jax.tree.map(lambda x: x.fetch(), there), tree)
    assert there["b"]["w"].device == "worker:1/cpu:0"


@pytest.mark.parametrize("damaged", ["worker0.bin", "worker1.bin", "buffers.bin"])
def test_a_damaged_file_is_found_also_where_workers_read(
    threads_cluster: fm.Cluster, tmp_path: Path, damaged: str
) -> None:
    tree = state(threads_cluster)
    fm.save(tree, tmp_path, keep=2)
    where = fm.save(tree | {"step": 8}, tmp_path, keep=2)
    data = where / damaged
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    held = threads_cluster.session.held
    gc.collect()  # values of earlier tests that were in cycles may be freed at any time, also below
    before = sum(held.on(device.name) for device in threads_cluster.devices)
    with pytest.warns(fm.FlowmlWarning, match=r"changed or is damaged.* Loaded is step-0+1"):
        loaded = fm.load(tmp_path, threads_cluster, like=tree)
    assert int(loaded["step"]) == 7
    assert_equal(jax.tree.map(lambda x: x.fetch(), loaded["params"]), tree["params"])
    del loaded
    gc.collect()
    wait_until(lambda: sum(held.on(d.name) for d in threads_cluster.devices) <= before, "the values are freed", 10)


def test_a_worker_reads_only_what_its_driver_knows(tmp_path: Path) -> None:
    """A message from a driver must not make a worker read any other file of its disk."""
    where = fm.save({"n": np.arange(3.0, dtype=np.float32)}, tmp_path)
    (entry,) = checkpoints.manifest(where).arrays
    part = wire.Part(entry.spec, entry.offset, entry.checksum)
    answers = Answers()
    keeping = Keeping("worker", answers, {"cpu": jax.devices()[0]})  # type: ignore[arg-type]
    asked = [
        (str(where), entry.file, part),
        (str(where), "../secret.bin", part),
        (str(where), entry.file, msgspec.structs.replace(part, checksum="0" * 32)),
        (str(tmp_path), entry.file, part),
    ]
    for number, (folder, file, what) in enumerate(asked):
        message = wire.ReadFile(number=number, device="cpu", names=(number,), folder=folder, file=file, parts=(what,))
        keeping.on_message("driver", message, ())
    wait_until(lambda: len(answers.written) == len(asked), "all are answered", 10)
    assert [answer.kept for answer in answers.written] == [True, False, False, False]
    np.testing.assert_array_equal(keeping.kept.value("driver", 0), np.arange(3.0))
    (cell,) = keeping.kept.find("driver", [1])
    assert cell.error == "its file is not seen from its worker"
    keeping.close()
    keeping.join(10)


def test_a_tree_of_64_bits_is_loaded_as_put_brings_it(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        fm.save({"n": jnp.arange(3), "w": jnp.ones(2)}, tmp_path)
    loaded = fm.load(tmp_path, threads_cluster)
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(loaded)] == ["int32", "float32"]
    np.testing.assert_array_equal(loaded["n"].fetch(), [0, 1, 2])


SAVES = """
import sys
import numpy as np
import flowml as fm
for step in range(10):
    fm.save({"w": np.full(1000, step), "by": np.array(int(sys.argv[2]))}, sys.argv[1])
"""


def test_threads_and_processes_save_in_turn(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """They wrote into the same folder, and most of them failed."""
    other = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path), "7"])
    tree = {"w": fm.put(np.full(1000, 3), threads_cluster), "by": np.array(3)}
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: fm.save(tree, tmp_path), range(30)))
    assert other.wait(60) == 0
    assert len(set(paths)) == 30
    assert len(list(tmp_path.iterdir())) == 1, "the newest, and nothing unfinished"
    found = fm.load(tmp_path)
    assert found["by"] in (3, 7)
    assert np.unique(found["w"]).size == 1


def test_who_waits_too_long_for_a_turn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TURN_S", 0.1)
    fm.save({"w": 1.0}, tmp_path)
    with locks.turn(tmp_path), pytest.raises(fm.CheckpointError, match="another process has written there"):
        fm.save({"w": 2.0}, tmp_path)
    assert fm.load(tmp_path) == {"w": 1.0}


@pytest.mark.parametrize("value", [np.int64(2**40), np.array([1, -(2**40)]), np.float64(1e300), 2**40, 1e300])
def test_numbers_that_would_be_others_are_refused(value: Any, tmp_path: Path) -> None:
    """JAX gives them 32 bits. A count of 2**40 examples came back as 0."""
    with pytest.raises(OverflowError, match=r"leaf 'x' has numbers that 32 bits cannot hold.*jax_enable_x64"):
        fm.save({"x": value}, tmp_path / "tree")
    assert not list((tmp_path / "tree").glob("step*"))
    with jax.enable_x64(True):
        fm.save({"x": value}, tmp_path / "tree")
        np.testing.assert_array_equal(fm.load(tmp_path / "tree")["x"], value)


@pytest.mark.parametrize("value", [np.int64(2**31 - 1), np.array([0.1, np.inf, np.nan]), np.zeros(0), np.array([True])])
def test_numbers_that_fit_are_saved_in_32_bits(value: Any, tmp_path: Path) -> None:
    fm.save({"x": value}, tmp_path / "tree")
    np.testing.assert_array_equal(fm.load(tmp_path / "tree")["x"], jnp.asarray(value))

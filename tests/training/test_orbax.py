"""Checkpoints of Orbax: written by flowml and read by Orbax itself, and the other way round."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import flowml as fm
from flowml.data import epoch_order
from flowml_runtime.environment import checkpoints
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def loop(params: Any, opt_state: Any, steps: range) -> tuple[Any, Any]:
    """A loop of optax over the batches of a fit with seed 3."""
    source = data()
    per_epoch = len(source["x"]) // BATCH
    for step in steps:
        order = epoch_order(len(source["x"]), 3, step // per_epoch, shuffle=True)
        rows = order[step % per_epoch * BATCH :][:BATCH]
        batch = {name: array[rows] for name, array in source.items()}
        gradient = jax.jit(jax.grad(mlp_loss))(params, batch)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def fit(cluster: fm.Cluster, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, OPTIMIZER, cluster=cluster, replicas=2)
    return trainer.fit(options.pop("params", mlp()), data(), batch_size=BATCH, seed=3, progress=False, **options)


def test_orbax_restores_what_a_fit_has_written_and_a_loop_of_optax_goes_on(
    threads_cluster: fm.Cluster, tmp_path: Path
) -> None:
    whole = fit(threads_cluster, steps=8)
    fit(threads_cluster, steps=5, checkpoint=fm.Checkpoint(tmp_path / "flowml"))
    path = fm.to_orbax(tmp_path / "flowml", tmp_path / "orbax")
    params = mlp()
    like = {"params": params, "opt_state": OPTIMIZER.init(params), "step": 0}
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(path, like)
    assert found["step"] == 5
    assert_same(found["params"], fm.restore(tmp_path / "flowml").params)
    params, opt_state = loop(found["params"], found["opt_state"], range(5, 8))
    assert_close((params, opt_state), (whole.params, whole.opt_state))
    with pytest.raises(fm.CheckpointError, match="is there already"):
        fm.to_orbax(tmp_path / "flowml", path)


@pytest.mark.parametrize("kind", ["standard", "pytree", "manager"])
def test_a_fit_goes_on_from_what_orbax_has_written(threads_cluster: fm.Cluster, tmp_path: Path, kind: str) -> None:
    params = mlp()
    params, opt_state = loop(params, OPTIMIZER.init(params), range(4))  # an epoch
    tree = {"params": params, "opt_state": opt_state}
    path = tmp_path / "orbax"
    if kind == "manager":
        with ocp.CheckpointManager(path) as manager:
            for step in (9, 10):
                values = jax.tree.map(lambda x, s=step: x + (s - 10), tree)
                manager.save(step, args=ocp.args.StandardSave(values))
            manager.wait_until_finished()
    else:
        with (ocp.StandardCheckpointer if kind == "standard" else ocp.PyTreeCheckpointer)() as checkpointer:
            checkpointer.save(path, tree)
    found = fm.from_orbax(path, jax.eval_shape(lambda: {"params": mlp(), "opt_state": OPTIMIZER.init(mlp())}))
    assert_same(found, tree)
    assert type(found["opt_state"]) is type(opt_state)
    plain = fm.from_orbax(path)
    assert_same(plain["opt_state"][1][0]["mu"], opt_state[1][0].mu)
    went_on = fit(threads_cluster, params=found["params"], opt_state=found["opt_state"], steps=4, shuffle=False)
    again = fit(threads_cluster, params=params, opt_state=opt_state, steps=4, shuffle=False)
    assert_same((went_on.params, went_on.opt_state), (again.params, again.opt_state))


def test_items_by_name_saved_trees_and_keys(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "w": jnp.arange(4, dtype=jnp.bfloat16),
        "key": jax.random.key(3),
        "list": [np.arange(3), {"n": 7}],
    }
    fm.save(tree, tmp_path / "saved")
    path = fm.to_orbax(tmp_path / "saved", tmp_path / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(path)
    assert found["w"].dtype == jnp.bfloat16 and int(found["list"][1]["n"]) == 7
    np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(tree["key"]))
    with ocp.CheckpointManager(tmp_path / "named") as manager:
        save, about = ocp.args.StandardSave, ocp.args.JsonSave({"n": 1})
        manager.save(1, args=ocp.args.Composite(a=save({"x": jnp.ones(2)}), b=save({"y": jnp.zeros(3)}), about=about))
        manager.wait_until_finished()
    assert_same(fm.from_orbax(tmp_path / "named"), {"a": {"x": jnp.ones(2)}, "b": {"y": jnp.zeros(3)}})


def test_what_is_no_array_in_a_module_comes_from_like(tmp_path: Path) -> None:
    """Orbax has a None in its place if equinox has left it out, and nothing at all if `fm.save` has."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    tree = {"params": arrays, "opt_state": OPTIMIZER.init(arrays)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
    fm.save(tree | {"params": model}, tmp_path / "saved")
    fm.to_orbax(tmp_path / "saved", tmp_path / "from saved")
    other = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(1))
    for path in (tmp_path / "orbax", tmp_path / "from saved"):
        found = fm.from_orbax(path, {"params": other, "opt_state": OPTIMIZER.init(eqx.filter(other, eqx.is_array))})
        assert found["params"].activation is other.activation
        assert_same((eqx.filter(found["params"], eqx.is_array), found["opt_state"]), (arrays, tree["opt_state"]))
        np.testing.assert_array_equal(found["params"](np.ones(3)), model(np.ones(3)))


class Noisy(eqx.Module):
    w: jax.Array
    keys: jax.Array
    name: str = eqx.field(default="noisy", static=True)
    act: Any = jnp.tanh


def noisy(number: int, implementation: str) -> Noisy:
    return Noisy(jnp.full(3, number, jnp.float32), jax.random.split(jax.random.key(number, impl=implementation)))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_keys_come_back_and_are_told_by_their_kind(tmp_path: Path, implementation: str) -> None:
    """Orbax has the words of a key in its metadata, and reads the key whatever is asked for."""
    tree: dict[str, Any] = {"model": noisy(1, implementation), "key": jax.random.key(3, impl=implementation)}
    fm.save(tree, tmp_path / "saved")
    fm.to_orbax(tmp_path / "saved", tmp_path / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "own", eqx.filter(tree, eqx.is_array))
    like: dict[str, Any] = {"model": noisy(2, implementation), "key": jax.random.key(4, impl=implementation)}
    kind = jax.random.key(0, impl=implementation).dtype
    for path in (tmp_path / "orbax", tmp_path / "own"):
        found = fm.from_orbax(path, like)
        assert found["key"].dtype == found["model"].keys.dtype == kind
        for key, expected in ((found["key"], tree["key"]), (found["model"].keys, tree["model"].keys)):
            np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))
        for change, what in (
            ({"w": jnp.ones(2)}, rf"leaf 'key', {kind}\[\], is only there; leaf 'w', float32\[2\], is only here"),
            ({"key": jax.random.key(1, impl="unsafe_rbg")}, rf"leaf 'key' is {kind}\[\] there and key<urbg>\[\] here"),
            ({"key": jax.random.key_data(tree["key"])}, rf"leaf 'key' is {kind}\[\] there and uint32\[\d\] here"),
            ({"key": like["model"].keys}, rf"leaf 'key' is {kind}\[\] there and {kind}\[2\] here"),
        ):
            with pytest.raises(fm.CheckpointError, match=rf"cannot be read as like=: {what}; give a tree like it$"):
                fm.from_orbax(path, {"model": like["model"]} | change)


def test_a_model_with_dropout_comes_back_from_a_fit(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.drop = nnx.Linear(8, 4, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.drop(self.a(x))

    kind, params, state = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, state: Any, batch: Any) -> Any:
        model = nnx.merge(kind, params, state)
        return jnp.mean(model(batch["x"]) ** 2), nnx.split(model, nnx.Param, ...)[2]

    trainer = fm.Trainer(loss, OPTIMIZER, cluster=threads_cluster, replicas=2, has_state=True)
    source, checkpoint = {"x": np.ones((16, 8), np.float32)}, fm.Checkpoint(tmp_path / "flowml")
    options: dict[str, Any] = {"batch_size": 4, "steps": 2, "progress": False, "checkpoint": checkpoint}
    fitted = trainer.fit(params, source, state=state, **options)
    like = {"params": params, "opt_state": OPTIMIZER.init(params), "state": state, "step": 0}
    path = fm.to_orbax(tmp_path / "flowml", tmp_path / "orbax")
    found = fm.from_orbax(path, like)
    assert jax.tree.structure(found["state"]) == jax.tree.structure(fitted.state)
    expected = {"params": fitted.params, "opt_state": fitted.opt_state, "state": fitted.state, "step": 2}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        one, other = (jax.random.key_data(x) if is_key else x for x in (a, b))
        np.testing.assert_array_equal(one, other)
    with pytest.raises(
        fm.CheckpointError, match=r"as like=: leaf 'step', int\d+\[\], is only there; give a tree like it$"
    ):
        fm.from_orbax(path, {name: tree for name, tree in like.items() if name != "step"})


def test_several_items_are_compared_by_name(tmp_path: Path) -> None:
    a, b = {"x": jnp.ones(2)}, {"y": jnp.zeros(3)}
    with ocp.CheckpointManager(tmp_path) as manager:
        save, about = ocp.args.StandardSave, ocp.args.JsonSave({"n": 1})
        manager.save(1, args=ocp.args.Composite(a=save(a), b=save(b), about=about))
        manager.wait_until_finished()
    assert_same(fm.from_orbax(tmp_path, {"a": a, "b": b}), {"a": a, "b": b})
    assert_same(fm.from_orbax(tmp_path, {"a": a, "b": None}), {"a": a, "b": b})
    assert_same(fm.from_orbax(tmp_path / "1" / "a", a), a)
    for like, what in (
        ([a, b], "has the items a, b, and like= is of type list; give a dict with a tree for each"),
        ({}, r"item 'a' is only there; item 'b' is only there; give a dict with a tree for each of its items a, b, or"),
        ({"a": a}, "cannot be read as like=: item 'b' is only there; give"),
        ({"a": a, "b": b, "other": a}, "as like=: item 'other' is only here, or no pytree there; give"),
        ({"a": b, "b": b}, r"leaf 'x', float32\[2\], is only there; leaf 'y', float32\[3\], is only here"),
    ):
        with pytest.raises(fm.CheckpointError, match=what):
            fm.from_orbax(tmp_path, like)


@pytest.mark.parametrize(
    "names", [{"step_prefix": "step"}, {"step_prefix": "my_run", "step_format_fixed_length": 4}, {}]
)
def test_the_newest_step_of_a_manager_is_read_whatever_its_names(
    threads_cluster: fm.Cluster, tmp_path: Path, names: dict[str, Any]
) -> None:
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(**names)) as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave({"x": jnp.full(2, step)}))
        manager.wait_until_finished()
    (tmp_path / "plots_2024").mkdir()
    (tmp_path / "99").write_text("no step")
    assert_same(fm.from_orbax(tmp_path), {"x": jnp.full(2, 10)})
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    with pytest.raises(fm.CheckpointError, match=r"holds checkpoints of Orbax; .* fm\.from_orbax"):
        trainer.fit(mlp(), data(), batch_size=4, steps=1, progress=False, checkpoint=fm.Checkpoint(tmp_path))


def test_items_and_trees_whose_names_end_with_a_number_are_no_steps(tmp_path: Path) -> None:
    trees = {f"layer_{n}": {"x": jnp.full(2, n)} for n in (1, 2)}
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "orbax", args=ocp.args.Composite(**items))
    assert_same(fm.from_orbax(tmp_path / "orbax"), trees)
    fm.save({"x": jnp.ones(2)}, tmp_path / "saved")
    fm.to_orbax(tmp_path / "saved", tmp_path / "saved" / "orbax_1")
    checkpoints.prepare(tmp_path / "saved")


def test_nothing_is_written_into_a_directory_of_orbax(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"w": jnp.ones(3)})
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        manager.save(7, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
        manager.wait_until_finished()
    for path in (tmp_path / "orbax", tmp_path / "manager"):
        before = sorted(path.rglob("*"))
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
        with pytest.raises(fm.CheckpointError, match=r"holds checkpoints of Orbax; .* fm\.from_orbax"):
            trainer.fit(mlp(), data(), batch_size=4, steps=1, progress=False, checkpoint=fm.Checkpoint(path))
        with pytest.raises(fm.CheckpointError, match=r"holds checkpoints of Orbax; give fm\.save another directory"):
            fm.save(mlp(), path)
        assert sorted(path.rglob("*")) == before


def test_a_tree_in_place_of_a_directory_is_refused_in_a_sentence(tmp_path: Path) -> None:
    tree: Any = {"w": jnp.ones((100, 100))}
    given = "and not a value of type dict"
    of = "that a fit or fm.save has written"
    for use, text in (
        (
            lambda: fm.to_orbax(tree, tmp_path / "new"),
            f"fm.to_orbax: give the name of a directory {of}, {given}; Orbax",
        ),
        (lambda: fm.to_orbax(tmp_path, tree), f"fm.to_orbax(path=): give the name of a directory, {given}"),
        (lambda: fm.from_orbax(tree), f"fm.from_orbax: give the name of a directory, {given}"),
    ):
        with pytest.raises(TypeError) as error:
            use()
        assert str(error.value).startswith(text)
        assert len(str(error.value)) < 150


@pytest.mark.parametrize("files", ["d/*", "manifest.ocdbt"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_checkpoint_is_said_to_be_so(tmp_path: Path, files: str, *, gone: bool) -> None:
    tree = {"a": {"w": jnp.ones((8, 16))}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
    for file in (tmp_path / "orbax").glob(files):
        if gone:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for like in (tree, None):
        with pytest.raises(
            fm.CheckpointError, match=r"damaged or incomplete.*; give another one, such as an older step"
        ):
            fm.from_orbax(tmp_path / "orbax", like)


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fm.CheckpointError, match="is no checkpoint of Orbax"):
        fm.from_orbax(tmp_path)
    with pytest.raises(fm.CheckpointError, match="there is no checkpoint at"):
        fm.to_orbax(tmp_path, tmp_path / "new")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"w": jnp.ones(3)})
    for like, what in (
        ({"other": jnp.ones(3)}, r"leaf 'w', float32\[3\], is only there; leaf 'other', float32\[3\], is only here"),
        ({"w": jnp.ones(4)}, r"leaf 'w' is float32\[3\] there and float32\[4\] here"),
    ):
        with pytest.raises(fm.CheckpointError, match=rf"cannot be read as like=: {what}; give a tree like it"):
            fm.from_orbax(tmp_path / "orbax", like)
    with pytest.raises(TypeError, match="like: leaf 'w' is of type str"):
        fm.from_orbax(tmp_path / "orbax", {"w": "text"})
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(fm.UnsupportedError, match=r"pip install 'flowml\[orbax\]'"):
        fm.from_orbax(tmp_path / "orbax")


def test_an_empty_array_is_refused_before_orbax_begins(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Orbax would end with a traceback of a thread, and leave a part."""
    fm.save({"a": jnp.ones(2), "b": {"c": jnp.zeros((0, 3))}}, tmp_path / "tree")
    with pytest.raises(fm.CheckpointError, match=r"Orbax writes no empty array, and b/c in .* holds nothing"):
        fm.to_orbax(tmp_path / "tree", tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
    assert "Traceback" not in capfd.readouterr().err

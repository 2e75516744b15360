"""A loss with state: its leaves stay where their layer runs, and microbatches see them in order, as on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from flowml.training.state import Rule, joined, rules_of
from tests.training.reference import BATCH, EXAMPLES, data

SOURCE = data()
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
STEPS = 6
WIDTHS = (12, 16, 16, 2)

PLACEMENTS: dict[str, Any] = {
    "auto": "auto",
    "pipeline": fm.Pipeline(stages=2),
    "pattern": {"fc0": "worker:0", "norm0": "worker:1", "fc1": "worker:0", "norm1": "worker:1", "fc2": "worker:0"},
}


def params() -> Any:
    keys = jax.random.split(jax.random.key(1), 3)
    found: dict[str, Any] = {f"fc{i}": {"kernel": jax.random.normal(keys[i], WIDTHS[i : i + 2]) / 4} for i in range(3)}
    return found | {f"norm{i}": {"scale": jnp.ones(16), "bias": jnp.zeros(16)} for i in range(2)}


def state() -> Any:
    """Statistics of two layers, a counter and a key: floats, integers and a typed key."""
    return {
        f"norm{i}": {"mean": jnp.zeros(16), "var": jnp.ones(16), "seen": jnp.zeros((), jnp.int32)} for i in range(2)
    } | {"noise": {"key": jax.random.key(3)}}


def loss(params: Any, state: Any, batch: Any) -> Any:
    """The statistics are used as well as updated, so that a microbatch that saw others would compute another loss."""
    x, new = batch["x"], dict(state)
    key, use = jax.random.split(state["noise"]["key"])
    new["noise"] = {"key": key}
    for i in range(2):
        x = x @ params[f"fc{i}"]["kernel"]
        old, norm = state[f"norm{i}"], params[f"norm{i}"]
        x = (x - old["mean"]) / jnp.sqrt(old["var"] + 0.1)
        new[f"norm{i}"] = {
            "mean": 0.9 * old["mean"] + 0.1 * jax.lax.stop_gradient(x).mean(0),
            "var": 0.9 * old["var"] + 0.1 * jax.lax.stop_gradient(x).var(0),
            "seen": old["seen"] + len(x),
        }
        x = jnp.tanh(x * norm["scale"] + norm["bias"])
    x = x + 0.1 * jax.random.normal(use, x.shape)
    return jnp.mean((x @ params["fc2"]["kernel"] - batch["y"]) ** 2), (new, {"norm": jnp.mean(jnp.abs(x))})


def loop(replicas: int = 1, microbatches: int = 1, *, steps: int = STEPS, function: Any = loss) -> Any:
    """The plain loop: parameters, the state of each replica, losses."""
    values, states, shares = params(), [state()] * replicas, replicas * microbatches
    opt_state, rows = OPTIMIZER.init(values), BATCH // shares
    gradient, losses = jax.jit(jax.value_and_grad(function, has_aux=True)), list[float]()
    for step in range(steps):
        order = epoch_order(EXAMPLES, 0, step * BATCH // EXAMPLES)[step * BATCH % EXAMPLES :][:BATCH]
        found: list[Any] = []
        for share in range(shares):
            mine, replica = order[share * rows :][:rows], share // microbatches
            value, gradients = gradient(values, states[replica], {k: v[mine] for k, v in SOURCE.items()})
            states[replica] = value[1][0]
            found.append((value[0], gradients))
        mean = jax.tree.map(lambda *xs: sum(xs) / shares, *found)
        losses.append(float(mean[0]))
        updates, opt_state = OPTIMIZER.update(mean[1], opt_state, values)
        values = optax.apply_updates(values, updates)
    return values, states, losses


def words(tree: Any) -> Any:
    keys = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return jax.tree.map(keys, tree)


def close(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(words(found)), jax.tree.leaves(words(wanted)), strict=True
    ):
        assert a.dtype == b.dtype, path
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def fit(cluster: Any, *, steps: int = STEPS, function: Any = loss, **options: Any) -> Any:
    trainer = fm.Trainer(function, OPTIMIZER, cluster=cluster, has_state=True, **options)
    return trainer.fit(params(), SOURCE, batch_size=BATCH, steps=steps, state=state(), progress=False)


def simulated(workers: int = 4) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(workers, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=True)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_one_replica_equals_the_loop(threads_cluster: fm.Cluster, placement: Any) -> None:
    values, states, losses = loop(microbatches=4)
    result = fit(threads_cluster, placement=placement, microbatches=4)
    close(result.params, values)
    close(result.state, states[0])
    np.testing.assert_allclose([record["loss"] for record in result.history], losses, rtol=1e-5)
    assert {type(record["aux"]["norm"]) for record in result.history} != {type(None)}


def test_worker_processes_equal_the_loop(process_cluster: fm.Cluster) -> None:
    values, states, _ = loop(microbatches=2)
    result = fit(process_cluster, placement=fm.Pipeline(stages=2), microbatches=2)
    close(result.params, values)
    close(result.state, states[0])


def test_a_layers_state_is_where_the_layer_runs(threads_cluster: fm.Cluster) -> None:
    plan = fm.Trainer(loss, OPTIMIZER, cluster=threads_cluster, placement=fm.Pipeline(stages=2), has_state=True).plan(
        params(), {k: v[:BATCH] for k, v in SOURCE.items()}, state()
    )
    assert plan.training is not None
    where = {leaf.name: leaf.stage for leaf in plan.training.state}
    assert where["norm0/mean"] == where["norm0/var"] == where["norm0/seen"] == 0
    assert where["norm1/mean"] == where["norm1/var"] == where["norm1/seen"] == 1


@pytest.mark.parametrize("kind", ["threads", "simulated"])
def test_replicas_have_state_of_their_own_and_a_rule_joins_it(threads_cluster: fm.Cluster, kind: str) -> None:
    cluster: Any = threads_cluster if kind == "threads" else simulated()
    values, states, _ = loop(2, 2)
    rules = {"norm0/mean": "max", "norm1/mean": "first", "norm*/seen": "sum", "norm1/var": "local"}
    result = fit(cluster, replicas=2, microbatches=2, placement=fm.Pipeline(stages=2), state_rules=rules)
    close(result.params, values)
    for found, wanted in zip(result.replica_states, states, strict=True):
        close(found, wanted)
    naive = {f"norm{i}": dict(states[0][f"norm{i}"]) for i in range(2)} | {"noise": states[0]["noise"]}
    naive["norm0"]["mean"] = np.maximum(states[0]["norm0"]["mean"], states[1]["norm0"]["mean"])
    naive["norm0"]["var"] = (states[0]["norm0"]["var"] + states[1]["norm0"]["var"]) / 2
    for i in range(2):
        naive[f"norm{i}"]["seen"] = states[0][f"norm{i}"]["seen"] + states[1][f"norm{i}"]["seen"]
    close(result.state, naive)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_state_that_crosses_devices_is_seen_in_order(threads_cluster: fm.Cluster, schedule: str) -> None:
    """What is read on one device and made on another. GPipe would read it for all microbatches at once."""

    def crossing(params: Any, state: Any, batch: Any) -> Any:
        with fm.layer("first"):
            x = jnp.tanh(batch["x"] @ params["first"]["kernel"] + state["last"]["memory"])
        with fm.layer("last"):
            y = x @ params["last"]["kernel"]
            memory = 0.5 * state["last"]["memory"] + jax.lax.stop_gradient(y).mean()
        return jnp.mean((y - batch["y"]) ** 2), {"last": {"memory": memory}}

    values = {"first": {"kernel": jnp.ones((12, 8)) / 9}, "last": {"kernel": jnp.ones((8, 2)) / 7}}
    begun = {"last": {"memory": jnp.zeros(())}}
    trainer = fm.Trainer(
        crossing,
        optax.sgd(0.1),
        cluster=threads_cluster,
        placement={"first": "worker:0", "last": "worker:1"},
        microbatches=3,
        schedule=schedule,
        has_state=True,
    )
    result = trainer.fit(values, SOURCE, batch_size=BATCH, steps=5, shuffle=False, state=begun, progress=False)
    assert schedule == "1f1b" or any("one after the other" in note for note in result.plan.notes)
    memory = begun
    for step in range(5):
        batch = {k: v[step * BATCH % EXAMPLES :][:BATCH] for k, v in SOURCE.items()}
        total: Any = None
        for part in range(3):
            rows = {k: v[part * 8 :][:8] for k, v in batch.items()}
            (_, memory), found = jax.value_and_grad(crossing, has_aux=True)(values, memory, rows)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        values = jax.tree.map(lambda p, g: p - 0.1 * g / 3, values, total)
    close(result.params, values)
    close(result.state, memory)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [("mean", [3.5]), ("max", [6.0]), ("sum", [6.0]), ("first", [1.0]), ("local", [1.0, 6.0])],
)
def test_rules_are_those_of_numpy(rule: Rule, wanted: Sequence[float]) -> None:
    """Two replicas begin with 1 and end with 1 and 6: the sum is what both have added to it."""
    found = joined(rule, [np.float32(1), np.float32(1)], [np.float32(1), np.float32(6)])
    assert [float(x) for x in found] == (list(wanted) if rule == "local" else list(wanted) * 2)
    assert all(np.asarray(x).dtype == np.float32 for x in found)


def test_keys_are_those_of_the_first_replica_also_raw_ones() -> None:
    """The largest words of two keys are another key, which no replica had."""
    leaves = {
        "typed": jax.random.key(0),
        "raw": jax.random.PRNGKey(0),
        "several": jnp.zeros((3, 2), jnp.uint32),
        "rbg": jnp.zeros(4, jnp.uint32),
        "seen": jnp.zeros((), jnp.uint32),
        "counts": jnp.zeros(3, jnp.uint32),
        "pair": jnp.zeros(2, jnp.int32),
    }
    rules = dict(zip(leaves, rules_of(None, list(leaves), list(leaves.values())), strict=True))
    assert [n for n, rule in rules.items() if rule == "first"] == ["typed", "raw", "several", "rbg"]
    assert [n for n, rule in rules.items() if rule == "max"] == ["seen", "counts", "pair"]
    assert rules_of({"raw": "max"}, list(leaves), list(leaves.values()))[1] == "max"


def test_a_raw_key_of_replicas_is_joined_as_a_typed_one(threads_cluster: fm.Cluster) -> None:
    def drawing(params: Any, state: Any, batch: Any) -> Any:
        key, use = jax.random.split(state["key"])
        first = jnp.where(batch["x"][0, 0] > 0, jax.random.fold_in(key, 1), key)  # replicas go different ways
        return jnp.mean((batch["x"] @ params["w"] + jax.random.normal(use)) ** 2), {"key": first}

    def run(key: Any) -> Any:
        trainer = fm.Trainer(drawing, OPTIMIZER, cluster=threads_cluster, replicas=2, has_state=True)
        found = trainer.fit({"w": jnp.ones(12)}, SOURCE, batch_size=BATCH, steps=4, state={"key": key}, progress=False)
        first, second = (s["key"] for s in found.replica_states)
        return [
            np.asarray(k if k.dtype == np.uint32 else jax.random.key_data(k))
            for k in (found.state["key"], first, second)
        ]

    joined_key, first, second = run(jax.random.PRNGKey(5))
    assert not np.array_equal(first, second), "the replicas end alike, so that any rule would do"
    np.testing.assert_array_equal(joined_key, first)


def test_a_dropped_step_that_ended_keeps_its_state() -> None:
    """Replica 1 is slow, and a quorum of one goes on without it. Steps that it does not end leave no trace."""
    compute = fm.sim.Straggler(fm.sim.Constant(0.1), 3.0, workers=(1,))
    with closing(fm.SimulatedCluster(2, compute, fm.sim.Network(1e-4, 1e9), arithmetic=True)) as cluster:
        result = fit(cluster, replicas=2, policies=fm.policies.quorum(1))
    seen = [int(s["norm0"]["seen"]) for s in result.replica_states]
    assert seen[0] == STEPS * BATCH // 2, "replica 0 ends every step"
    assert 0 <= seen[1] < seen[0] and seen[1] % (BATCH // 2) == 0


def refused(
    match: str, function: Any = loss, error: type[Exception] = ValueError, **options: Any
) -> Callable[[], None]:
    def check() -> None:
        begun, at = options.pop("state", state()), options.pop("has_state", True)
        with pytest.raises(error, match=match):
            fm.Trainer(function, OPTIMIZER, cluster=simulated(2), has_state=at, **options).fit(
                params(), SOURCE, batch_size=BATCH, steps=1, state=begun, progress=False
            )

    return check


def _no_state(params: Any, state: Any, batch: Any) -> Any:
    return loss(params, state, batch)[0]


def _other_state(params: Any, state: Any, batch: Any) -> Any:
    return loss(params, state, batch)[0], {"norm0": state["norm0"]}


def _other_dtype(params: Any, state: Any, batch: Any) -> Any:
    value, (new, _) = loss(params, state, batch)
    return value, new | {"norm1": new["norm1"] | {"mean": new["norm1"]["mean"].astype(jnp.bfloat16)}}


def _stateless(params: Any, batch: Any) -> Any:
    return jnp.sum(params["fc0"]["kernel"]) + jnp.sum(batch["x"])


def test_a_loss_that_takes_no_batch_says_how_it_is_called() -> None:
    trainer = fm.Trainer(lambda params: params["fc0"]["kernel"].sum(), OPTIMIZER, cluster=simulated(2))
    with pytest.raises(TypeError, match=r"\(params, batch\): too many .*; a loss is loss\(params, batch\[, rng\]\)"):
        trainer.fit(params(), SOURCE, batch_size=BATCH, steps=1, progress=False)


def test_a_loss_that_wants_state_says_how_it_was_called() -> None:
    trainer = fm.Trainer(loss, OPTIMIZER, cluster=simulated(2))
    with pytest.raises(TypeError, match="string indexing") as caught:
        trainer.fit(params(), SOURCE, batch_size=BATCH, steps=1, progress=False)
    (note,) = (n for n in caught.value.__notes__ if "was called as" in n)
    assert "loss was called as loss(params, batch" in note and "needs Trainer(has_state=True)" in note


def test_bad_input_is_refused_with_what_to_do() -> None:
    refused("_no_state returns no state; with has_state=True a loss returns", _no_state)()
    refused("_other_state returns .* beside the scalar, and the state is", _other_state)()
    refused("'norm1/mean' as float32.* and returns it as bfloat16", _other_dtype)()
    refused("none is given; give state=", state=None)()
    refused("the loss has none; give Trainer\\(has_state=True\\)", has_state=False)()
    refused("state_rules\\['nrom\\*'\\] matches no state; there is: ", state_rules={"nrom*": "mean"})()
    refused("'norm0/seen' is int32, which has no mean", state_rules={"*/seen": "mean"})()
    refused("state_rules\\['\\*'\\]", state_rules={"*": "median"})()
    refused(
        "cannot be called as _stateless\\(params, state, batch\\): .*; leave has_state out", _stateless, error=TypeError
    )()
    refused("state leaf 'n' is of type object, which is not an array", state={"n": object()}, error=TypeError)()
    refused("state leaf 'n' has dtype datetime64", state={"n": np.zeros(2, "M8[D]")}, error=TypeError)()
    refused("may compute the same examples", replicas=2, policies=fm.policies.coded(1), error=fm.PolicyError)()


def test_microbatches_that_a_step_leaves_out_leave_no_trace() -> None:
    """Replica 1 is about to begin its last microbatch when the time is over; see `test_microbatches`."""
    compute = fm.sim.Straggler(fm.sim.Constant(0.1), 2.0, workers=(1,))
    cluster = fm.SimulatedCluster(2, compute, fm.sim.Network(1e-5, 1e9), arithmetic=True)
    policy = fm.policies.drop_compute(0.12)
    result = fit(cluster, replicas=2, microbatches=4, placement=fm.Pipeline(stages=1), policies=policy)
    rows = BATCH // 8
    assert result.ledger.left_out == STEPS * rows
    assert [int(s["norm0"]["seen"]) for s in result.replica_states] == [STEPS * 4 * rows, STEPS * 3 * rows]


def test_a_step_does_not_replace_finite_state_by_nan() -> None:
    source = {k: v.copy() for k, v in SOURCE.items()}
    source["x"][0] = np.nan
    trainer = fm.Trainer(loss, OPTIMIZER, cluster=simulated(2), has_state=True)
    with pytest.warns(fm.FlowmlWarning, match="NaN or infinity"):
        result = trainer.fit(params(), source, batch_size=BATCH, epochs=1, state=state(), progress=False, shuffle=False)
    assert np.isfinite(result.state["norm1"]["mean"]).all()
    assert int(result.state["norm0"]["seen"]) == EXAMPLES - BATCH, "the other steps count"

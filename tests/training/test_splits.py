"""Which examples the replicas of a fit get, with `shuffle=fm.Shards(...)` and `fm.WithReplacement()`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from flowml.instructions import Feed
from flowml.splits import Shuffle, dealt
from tests.training.reference import BATCH, EXAMPLES, assert_same, data, mlp, mlp_loss

REPLICAS = 3
EACH = BATCH // REPLICAS
BATCHES = EXAMPLES // BATCH
KINDS: list[Any] = [
    fm.Shards(),
    fm.Shards(reassign_every=2),
    fm.Shards(reshuffle=False),
    fm.Shards(contiguous=True),
    fm.WithReplacement(),
]


class Seen:
    """A source that keeps which examples were asked for, one work item after another."""

    def __init__(self) -> None:
        self.data = data()
        self.asked: list[np.ndarray] = []

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, indices: np.ndarray) -> Any:
        self.asked.append(np.array(indices))
        return {name: leaf[indices] for name, leaf in self.data.items()}


def shards_of(order: np.ndarray) -> list[list[int]]:
    """The examples of each replica in an epoch."""
    rows = order[: BATCHES * BATCH].reshape(BATCHES, REPLICAS, EACH)
    return [rows[:, replica].reshape(-1).tolist() for replica in range(REPLICAS)]


def order_of(shuffle: Shuffle, epoch: int, examples: int = EXAMPLES) -> np.ndarray:
    return epoch_order(examples, 7, epoch, shuffle=dealt(shuffle, REPLICAS, BATCH))


@pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES + 1, EXAMPLES + 23, BATCH, 5])
@pytest.mark.parametrize("kind", KINDS[:-1], ids=str)
def test_an_epoch_of_shards_visits_each_example_once(kind: Shuffle, examples: int) -> None:
    for epoch in range(3):
        assert sorted(order_of(kind, epoch, examples).tolist()) == list(range(examples))


def test_a_shard_stays_with_its_replica_and_is_shuffled_again() -> None:
    first, second = (shards_of(order_of(fm.Shards(), epoch)) for epoch in (0, 5))
    for one, other in zip(first, second, strict=True):
        assert (sorted(one), one != other) == (sorted(other), True)
    assert shards_of(order_of(fm.Shards(reshuffle=False), 0)) == shards_of(order_of(fm.Shards(reshuffle=False), 5))


def test_examples_are_dealt_anew_after_so_many_epochs() -> None:
    sets = [[frozenset(shard) for shard in shards_of(order_of(fm.Shards(reassign_every=2), e))] for e in range(4)]
    assert sets[0] == sets[1] != sets[2] == sets[3]


def test_contiguous_shards_are_ranges() -> None:
    found = shards_of(order_of(fm.Shards(contiguous=True), 3))
    assert [sorted(shard) for shard in found] == [list(range(i * 32, (i + 1) * 32)) for i in range(REPLICAS)]


def test_with_replacement_each_draw_is_from_all_examples() -> None:
    draws = np.concatenate([order_of(fm.WithReplacement(), epoch) for epoch in range(200)])
    counts = np.bincount(draws, minlength=EXAMPLES)
    assert abs(counts - 200).max() < 5 * 200**0.5
    assert len(set(order_of(fm.WithReplacement(), 0).tolist())) == pytest.approx(EXAMPLES * (1 - np.exp(-1)), rel=0.15)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_replicas_of_a_fit_get_what_the_order_says(kind: Shuffle) -> None:
    source, epochs = Seen(), 2
    with fm.Cluster.threads(workers=REPLICAS) as cluster:
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=REPLICAS)
        source.asked.clear()
        trainer.fit(mlp(), source, batch_size=BATCH, epochs=epochs, seed=7, shuffle=kind, progress=False)
    fed = Counter(tuple(a.tolist()) for a in source.asked if len(a) == EACH)
    orders = [order_of(kind, epoch)[: BATCHES * BATCH].reshape(-1, EACH) for epoch in range(epochs)]
    assert {tuple(item.tolist()) for order in orders for item in order} <= set(fed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_arrays_on_workers_and_an_equal_fit_by_hand_agree(kind: Shuffle) -> None:
    """What a worker takes out of its copy of the source is what the order says."""
    with fm.Cluster.threads(workers=REPLICAS) as cluster:
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=REPLICAS)
        found = trainer.fit(mlp(), data(), batch_size=BATCH, epochs=2, seed=7, shuffle=kind, progress=False)
    params, source = mlp(), data()
    for epoch in range(2):
        for batch in order_of(kind, epoch)[: BATCHES * BATCH].reshape(BATCHES, BATCH):
            gradient = jax.grad(mlp_loss)(params, {name: leaf[batch] for name, leaf in source.items()})
            params = jax.tree_util.tree_map(lambda p, g: p - 0.1 * g, params, gradient)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.params, params)


def test_a_resumed_fit_has_the_same_shards_and_another_split_is_another_fit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": BATCH, "seed": 7, "progress": False}
    kind = fm.Shards(reassign_every=1)
    path = fm.Checkpoint(tmp_path, every_steps=5)
    with fm.Cluster.threads(workers=REPLICAS) as cluster:
        trainer = fm.Trainer(mlp_loss, optax.adam(0.01), cluster=cluster, replicas=REPLICAS)
        whole = trainer.fit(mlp(), data(), steps=10, shuffle=kind, **settings)
        trainer.fit(mlp(), data(), steps=5, shuffle=kind, checkpoint=path, **settings)
        with pytest.raises(fm.CheckpointError, match=r"shuffle=Shards\(reassign_every=1"):
            trainer.fit(mlp(), data(), steps=10, checkpoint=path, resume="auto", **settings)
        rest = trainer.fit(mlp(), data(), steps=10, shuffle=kind, checkpoint=path, resume="auto", **settings)
    assert_same(rest.params, whole.params)


def test_drift_of_replicas_is_larger_with_shards_of_neighbours() -> None:
    """Replicas that see one class each move apart between exchanges: the data of an honest test of local methods."""
    x = np.concatenate([np.full((48, 1), v, np.float32) for v in (-1, 1)])

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((params["w"] - batch) ** 2)

    losses: dict[str, float] = {}
    for name, kind in {"mixed": fm.Shards(), "apart": fm.Shards(contiguous=True)}.items():
        cluster = fm.SimulatedCluster(2, fm.sim.Constant(1.0), fm.sim.Network(1e-4, 1e9))
        trainer = fm.Trainer(loss, optax.sgd(0.2), cluster=cluster, replicas=2, policies=fm.policies.local_sgd(8))
        result = trainer.fit({"w": jnp.zeros(())}, x, batch_size=8, steps=16, shuffle=kind, progress=False)
        losses[name] = float(np.mean([record["loss"] for record in result.history[8:]]))
    assert losses["apart"] < losses["mixed"] / 2  # each replica fits its own class


@pytest.mark.parametrize("policy", [fm.policies.adam_epoch(), fm.policies.coded(1), fm.policies.speculate(2)], ids=str)
def test_where_work_is_not_bound_to_replicas_shards_are_refused(policy: fm.Policy) -> None:
    cluster = fm.SimulatedCluster(REPLICAS + 1, fm.sim.Constant(1.0), fm.sim.Network(1e-4, 1e9))
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=REPLICAS + 1, policies=policy)
    with pytest.raises(
        fm.UnsupportedError,
        match=r"so none has examples of its own; give|in every epoch, whose examples would count less",
    ):
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, shuffle=fm.Shards(), progress=False)
    result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, shuffle=fm.WithReplacement(), progress=False)
    assert len(result.history) == 2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fm.Shards(reassign_every=-1), "reassign_every=-1: give at least 0"),
        (lambda: fm.Shards(reassign_every=1.5), "reassign_every=1.5 is of type float"),  # pyright: ignore[reportArgumentType]
        (lambda: fm.Shards(reshuffle="no"), "reshuffle='no' is of type str"),  # pyright: ignore[reportArgumentType]
        (lambda: fm.Shards(2), r"^Shards\(2\): give arguments by name, such as reassign_every=$"),  # pyright: ignore[reportCallIssue]
        (lambda: fm.Shards(reshufle=True), r"^Shards has no argument reshufle=; did you mean reshuffle=\?"),  # pyright: ignore[reportCallIssue]
        (lambda: fm.WithReplacement(3), r"^WithReplacement is given too many values \(1\): .* has no arguments$"),  # pyright: ignore[reportCallIssue]
        (lambda: fm.Shards(contiguous=True, reassign_every=2), "ranges of neighbouring examples stay"),
    ],
)
def test_bad_splits(make: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        make()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_split_travels_in_messages(kind: Any) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(kind), type=Shuffle) == kind


def test_blocks_of_columns_go_only_to_the_devices_that_read_them(threads_cluster: fm.Cluster) -> None:
    """Examples divided by feature: the same training as on whole rows, and no device is fed another's columns."""
    x = np.random.default_rng(0).normal(size=(64, 7)).astype(np.float32)
    source = {"x": np.array_split(x, 3, axis=1), "y": x.mean(1)}
    params = {f"block{i}": jnp.full((block.shape[1], 4), 0.1 * i + 0.1) for i, block in enumerate(source["x"])}

    def loss(params: Any, batch: Any) -> Any:
        h: Any = 0.0
        for name, block in zip(sorted(params), batch["x"], strict=True):
            with fm.layer(name):
                h = h + jnp.tanh(block @ params[name])
        return jnp.mean((h.mean(1) - batch["y"]) ** 2)

    def rows(params: Any, batch: Any) -> Any:
        whole = {"x": jnp.split(batch["x"], np.cumsum([3, 2]), axis=1), "y": batch["y"]}
        return loss(params, whole)

    placement = {"block0": "worker:0", "block1": "worker:1", "block2": "worker:2"}
    about: dict[str, Any] = {"cluster": threads_cluster}
    options: dict[str, Any] = {"batch_size": 16, "epochs": 2, "seed": 0, "progress": False}
    found = fm.Trainer(loss, optax.sgd(0.1), placement=placement, **about).fit(params, source, **options)
    expected = fm.Trainer(rows, optax.sgd(0.1), **about).fit(params, source | {"x": x}, **options)
    assert_same(found.params, expected.params)
    fed = {
        program.device: {slot for i in program.instructions if isinstance(i, Feed) for slot in i.slots}
        for program in found.plan.programs
    }
    names = [f"worker:{i}/cpu:0" for i in range(3)]
    assert [[0 in fed[n], 1 in fed[n], 2 in fed[n]] for n in names] == np.eye(3, dtype=bool).tolist()

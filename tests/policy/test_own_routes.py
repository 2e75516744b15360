"""Topologies, graphs, filters and applies that are written here, and not in flowml, train as its own on both clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import PolicyError
from flowml.policy import Apply, Topology, register
from flowml.policy.filters import Context, EncodingError, Filter, Form, on_numpy
from flowml.policy.graphs import Graph, Weights, check_members
from flowml.policy.routes import Round, check
from flowml.policy.wording import Value

REPLICAS, STEPS, BATCH = 4, 4, 16
RNG = np.random.default_rng(3)
SOURCE = {"x": RNG.normal(size=(64, 6)).astype(np.float32), "y": RNG.normal(size=(64, 3)).astype(np.float32)}
PARAMS = {"w": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32), "b": jnp.zeros(3)}


@register
class Chain(Topology, Value, frozen=True, tag=True):
    """The sum goes from rank to rank in two halves, and back."""

    def chunks(self, ranks: int) -> int:
        return 2

    def rounds(self, rank: int, ranks: int) -> Sequence[Round]:
        def step(number: int, by: int, *, add: bool) -> Round:
            sender = number if by > 0 else ranks - 1 - number
            sends = tuple((rank + by, c) for c in (0, 1)) if rank == sender else ()
            takes = tuple((c, (sender,)) for c in (0, 1)) if rank == sender + by else ()
            return Round(sends, takes, add, complete=not add or rank == ranks - 1)

        there = [step(number, 1, add=True) for number in range(ranks - 1)]
        return [*there, *(step(number, -1, add=False) for number in range(ranks - 1))]


@register
class Skips(Graph, Value, frozen=True, tag=True):
    """Each replica averages with the one `by` after it in odd rounds, and after none in even ones. W is directed."""

    by: int = 1

    @property
    def changes(self) -> bool:
        return True

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        other = (replica + self.by) % members
        return dict.fromkeys(sorted((replica, other)), 0.5) if turn % 2 and other != replica else {replica: 1.0}


@register
class Leaky(Graph, Value, frozen=True, tag=True):
    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        return {replica: 0.9}


@register
class Halves(Filter, frozen=True):
    """Sends float16."""

    call: ClassVar[str] = "Halves"
    gives: ClassVar[frozenset[Any]] = frozenset({"values"})

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        return (form._replace(dtype=np.dtype(np.float16)),) if form.dtype == np.float32 else None

    def encode(self, value: Any, state: Any, context: Context) -> tuple[list[Any], Any]:
        return [np.asarray(value).astype(np.float16)], None

    def decode(self, parts: Sequence[Any], form: Form, run: Any = on_numpy) -> Any:
        if not np.isfinite(parts[0]).all():
            raise EncodingError("a number is not finite")
        return np.asarray(parts[0]).astype(form.dtype)


@register
class Clipped(Apply, Value, frozen=True, tag=True):
    """No number of the mean is larger than a share of its parameter's, or than `least`."""

    share: float
    least: float = 0.01

    def gradient(self, mean: Any, parameter: Any, xp: Any) -> Any:
        most = xp.maximum(self.share * xp.abs(parameter), self.least)
        return xp.clip(mean, -most, most)


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def fit(policy: fm.Policy, cluster: Any, optimizer: Any = None, replicas: int = REPLICAS) -> Any:
    trainer = fm.Trainer(loss, optimizer or optax.adam(0.05), cluster=cluster, replicas=replicas, policies=policy)
    return trainer.fit(PARAMS, SOURCE, batch_size=BATCH, steps=STEPS, shuffle=False, progress=False)


def virtual(**more: Any) -> Any:
    return fm.SimulatedCluster(REPLICAS, fm.sim.Constant(0.003), fm.sim.Network(1e-4, 1e9), **more)


def on_both(policy: fm.Policy, cluster: fm.Cluster, optimizer: Any = None) -> Any:
    """The fit on threads, which equals the simulated one to the bit."""
    real, found = fit(policy, cluster, optimizer), fit(policy, virtual(), optimizer)
    jax.tree.map(np.testing.assert_array_equal, real.params, found.params)
    assert real.ledger == found.ledger and real.traffic == found.traffic
    return real


def plain(change: Any = lambda g, p: g, optimizer: Any = None, each: Any = lambda g: g) -> Any:
    """The same training, written as a loop: `each` is what becomes of a replica's gradient, `change` of the mean."""
    optimizer, params = optimizer or optax.adam(0.05), PARAMS
    state, size = optimizer.init(params), BATCH // REPLICAS
    for step in range(STEPS):
        parts = [jax.tree.map(lambda x, a=BATCH * step + size * r: x[a : a + size], SOURCE) for r in range(REPLICAS)]
        gradients = [jax.tree.map(each, jax.grad(loss)(params, part)) for part in parts]
        mean = jax.tree.map(lambda *g: sum(g) / REPLICAS, *gradients)
        updates, state = optimizer.update(jax.tree.map(change, mean, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def crossed(result: Any) -> int:
    return sum(count for layer in result.traffic.values() for name, count in layer.items() if "wire" in name)


def pushed(result: Any) -> int:
    return sum(layer["pushed_bytes"] for layer in result.traffic.values())


def near(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_a_new_topology_adds_up_gradients(threads_cluster: fm.Cluster, inside: bool) -> None:
    sites = fm.Hierarchy(Chain(), Chain(), sites=2)
    policy = fm.Policy(topology=sites if inside else Chain())
    assert policy.describe() == ("sync, chain in sites, chain between" if inside else "sync, chain")
    real = on_both(policy, threads_cluster)
    near(real.params, plain())
    if not inside:  # there and back over each edge
        nbytes = sum(np.asarray(p).nbytes for p in PARAMS.values())
        assert crossed(real) == 2 * (REPLICAS - 1) * nbytes * STEPS


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda r: replace(r, takes=()), "sends chunk 0 to 1, which takes none"),
        (lambda r: replace(r, sends=()), r"rank 1 takes chunk 0 of \[0\], which is not sent to it then"),
        (lambda r: replace(r, complete=True), r"with complete=True, and has 1 of rank 0 \+ 1 of rank 1"),
        (lambda r: replace(r, add=False), "."),
        (lambda r: Round((), (), add=True), "rank 0 ends with 1 of rank 0 in chunk 0"),
    ],
)
def test_a_topology_that_is_no_sum_is_refused(wrong: Any, why: str, threads_cluster: fm.Cluster) -> None:
    class Wrong(Chain, frozen=True, tag=f"Wrong{abs(hash(why))}"):
        def rounds(self, rank: int, ranks: int) -> Sequence[Round]:
            return [wrong(r) for r in super().rounds(rank, ranks)]

    with pytest.raises(PolicyError, match=rf"Wrong\(\).* is no sum over 3 ranks: .*{why}"):
        check(Wrong(), 3)
    register(Wrong)
    with pytest.raises(PolicyError, match="is no sum over 4 ranks"):
        fit(fm.Policy(topology=Wrong()), virtual())


def test_a_new_graph_averages_with_its_neighbours(threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(topology=fm.Gossip(Skips(2)))
    assert policy.describe() == "gossip skips"
    on_both(policy, threads_cluster)
    moved = fit(fm.Policy(topology=fm.Gossip(Skips(4))), virtual())  # with itself alone
    with pytest.raises(AssertionError):
        near(fit(policy, virtual()).params, moved.params)


def test_a_graph_that_does_not_average_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"row 0 of W adds up to 0.9"):
        check_members(Leaky(), 4)


def test_a_new_filter_makes_what_is_sent_smaller(threads_cluster: fm.Cluster) -> None:
    policy = fm.Policy(filters=(Halves(),))
    assert repr(policy.filters[0]) == "Halves()"
    real = on_both(policy, threads_cluster)
    near(real.params, plain(each=lambda g: g.astype(jnp.float16).astype(jnp.float32)))
    assert pushed(real) * 2 == pushed(fit(fm.Policy(), virtual()))
    on_both(fm.Policy(filters=(Halves().with_error_feedback(), fm.filters.compress())), threads_cluster)


@pytest.mark.parametrize("topology", [fm.ParameterServer(), fm.AllReduce(), fm.Hierarchy(sites=2)], ids=str)
def test_a_new_apply_changes_what_the_optimizer_gets(topology: Any, threads_cluster: fm.Cluster) -> None:
    kind = Clipped(0.05)
    policy = fm.Policy(topology=topology, apply=kind)
    real = on_both(policy, threads_cluster)
    near(real.params, plain(lambda g, p: kind.gradient(g, p, jnp)))
    boxed = fit(fm.Policy(topology=topology, apply=fm.Prox(low=-0.5, high=0.5, after=kind)), virtual())
    assert max(float(jnp.abs(p).max()) for p in boxed.params.values()) <= 0.5


def test_a_new_apply_comes_before_what_couples_layers(threads_cluster: fm.Cluster) -> None:
    kind, optimizer = Clipped(0.05), optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5))
    real = on_both(fm.Policy(apply=kind), threads_cluster, optimizer)
    near(real.params, plain(lambda g, p: kind.gradient(g, p, jnp), optimizer))

"""Applies run beside the thread that steps the machines: it never waits for them, and their faults are told.

The tests talk to a real worker over real endpoints, as its driver and as another worker.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.devices import worker_of
from flowml.plan import Training
from flowml_runtime import wire
from flowml_runtime.driver.loading import messages
from flowml_runtime.transport.endpoint import ThreadHub
from flowml_runtime.worker.worker import Worker

WAIT_S = 60.0
PLAN = "training"
IDS: dict[str, Any] = {"plan_id": PLAN, "run": 0}
SIDE = 256
EXAMPLES = 8


def loss(params: Any, batch: Any) -> Any:
    with fm.layer("slow"):
        y = batch["x"] @ params["slow"]
    with fm.layer("other"):
        y = y @ params["other"]
    for layer in ("fast0", "fast1"):
        with fm.layer(layer):
            y = y * params[layer]
    return jnp.mean(y**2)


def slow_for_matrices(passes: int) -> optax.GradientTransformation:
    """Plain descent, after `passes` products of every matrix."""

    def worked(u: Any) -> Any:
        if u.ndim < 2:
            return u
        product = jax.lax.fori_loop(0, passes, lambda _, x: jnp.tanh(x @ u), u)
        return u + 1e-20 * product

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree_util.tree_map(lambda u: -0.1 * worked(u), updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


class Peers:
    """The worker that is home to both layers, its driver and another worker: what these two hear, and ways to send."""

    def __init__(self, stack: ExitStack, cluster: fm.Cluster, passes: int) -> None:
        trainer = fm.Trainer(
            loss,
            slow_for_matrices(passes),
            cluster=cluster,
            replicas=2,
            placement=fm.Pipeline(1),
            policies={"fast*": fm.policies.quorum(2), "*": fm.policies.asynchronous()},
        )
        vector, matrix = np.ones(SIDE, np.float32), np.full((SIDE, SIDE), 1e-3, np.float32)
        self.params = {"fast0": vector, "fast1": vector, "other": matrix, "slow": matrix}
        plan = trainer.plan(self.params, {"x": np.ones((EXAMPLES, SIDE), np.float32)})
        assert plan.training is not None
        self.training: Training = plan.training
        self.home = worker_of(self.training.stores[self.store("slow")].home)
        others = [w for w in ("worker:0", "worker:1") if w != self.home]
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        hub = ThreadHub()
        home, self.driver, self.other = (hub.endpoint(n) for n in (self.home, "driver", *others))
        here = [d for d in plan.devices if worker_of(d) == self.home]
        worker = Worker(self.home, {d: jax.devices()[0] for d in here}, home)
        for closing in (home, self.driver, self.other, worker):
            stack.callback(closing.close)
        home.start(worker.on_message, worker.on_lost)
        for endpoint in (self.driver, self.other):
            endpoint.start(lambda _peer, message, _arrays: self.heard.put(message), lambda *_: None)
        for message, piece in messages(PLAN, plan, self.home, (), WAIT_S, {}):
            self.tell(message, [piece])
        self.until(lambda m: isinstance(m, wire.Loaded))

    def begin(self) -> None:
        """Start a fit and load the stores."""
        self.tell(wire.StartTraining(**IDS, total_clocks=5, seed=0, shuffle=False, examples=EXAMPLES * 5, source="fed"))
        for index, store in enumerate(self.training.stores):
            arrays = [jax.tree_util.tree_leaves(self.params)[i] for i in store.leaves]
            if worker_of(store.home) == self.home:
                self.tell(wire.StoreValue(**IDS, store=index, version=0, specs=store.specs), arrays)

    def tell(self, message: wire.Wire, arrays: Any = ()) -> None:
        self.driver.send(self.home, message, arrays)

    def contribute(self, name: str, replica: int, shape: tuple[int, ...]) -> None:
        index = self.store(name)
        specs = self.training.stores[index].parts[0].payload
        message = wire.Contribution(
            **IDS, store=index, part=0, replica=replica, incarnation=0, clock=0, base_version=0, weight=1, specs=specs
        )
        self.other.send(self.home, message, [np.ones(shape, np.float32)])

    def store(self, name: str) -> int:
        [index] = [i for i, s in enumerate(self.training.stores) if any(name in p for p in s.paths)]
        return index

    def until(self, wanted: Callable[[Any], bool]) -> list[Any]:
        """Everything that is heard up to a message, that one last."""
        found = [self.heard.get(timeout=WAIT_S)]
        while not wanted(found[-1]):
            found.append(self.heard.get(timeout=WAIT_S))
        return found


@pytest.fixture
def peers(threads_cluster: fm.Cluster) -> Iterator[Callable[[int], Peers]]:
    with ExitStack() as stack:
        yield lambda passes: Peers(stack, threads_cluster, passes)


def test_a_message_to_the_leader_does_not_wait_for_the_apply_of_another_store(peers: Callable[[int], Peers]) -> None:
    """The home tells the leader what has arrived for one store while it applies to another, for a second or so."""
    world = peers(2000)
    world.begin()
    world.contribute("slow", 1, (SIDE, SIDE))
    [fast, *_] = [f for f in ("fast0", "fast1") if worker_of(world.training.stores[world.store(f)].home) == world.home]
    world.contribute(fast, 1, (SIDE,))
    slow = world.store("slow")
    before = world.until(lambda m: isinstance(m, wire.Published) and m.store == slow and m.version == 1)
    told = [m for m in before if isinstance(m, wire.Arrived)]
    assert [(m.store, m.replica, m.clock) for m in told] == [(world.store(fast), 1, 0)], "it came after the apply"


def test_what_cannot_be_applied_is_a_fault_that_names_the_store(peers: Callable[[int], Peers]) -> None:
    world = peers(1)
    world.begin()
    world.contribute("slow", 1, (SIDE, SIDE // 2))
    failed = world.until(lambda m: isinstance(m, wire.StepFailed))[-1]
    name = world.training.stores[world.store("slow")].name
    assert (failed.worker, failed.node, failed.step) == (world.home, f"store {name}", 0)
    assert str(SIDE // 2) in failed.error

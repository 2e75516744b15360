"""Measures a training loop of the user's own whose state stays on the workers.

The step is Adam on 20 layers of 1024 x 1024 (80 MiB of parameters, 240 MiB of state), with batches of 8 rows. All sides
overwrite the state in place. On one device `jax.jit` runs in this process, and flowml in a worker with the same cores.
Narrower layers make a step of about 10 ms, in which the cost of a call shows.
On two workers the peer is `fm.Trainer` with the same two stages. The bytes of a call are those of the arrays that the
driver sends and gets. One row has as many leaves as a model of many small parts: there the time is Python's. The last
rows are about first calls, which compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flowml_tools.bench import first_calls
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import Probe, interleave, per_call, tell

SUMMARY = "an own training loop whose state stays on the workers; against jax.jit and fm.Trainer"
REPEATS = 15
CALLS = 2
NARROW, NARROW_CALLS = 512, 5
"""The width of the layers, and the calls of a measurement, with which a step takes about 10 ms."""
LAYERS, WIDTH, ROWS = 20, 1024, 8
LEAVES = 10_000
STEPS = 6


def rows(repeats: int | None) -> list[Row]:
    count = repeats or REPEATS
    return [
        *_one_device(count, "Adam on 80 MiB", WIDTH, CALLS),
        *_one_device(count, "Adam on 20 MiB", NARROW, NARROW_CALLS),
        *_two_workers(count),
        _small_leaves(count),
        *first_calls.rows(repeats),
    ]


def loss(params: Any, x: Any) -> Any:
    import jax.numpy as jnp

    import flowml as fm

    for name in sorted(params):
        with fm.layer(name):
            x = jnp.tanh(x @ params[name])
    return jnp.mean(x**2)


def step(state: Any, x: Any) -> Any:
    import jax
    import optax

    params, moments = state
    value, gradients = jax.value_and_grad(loss)(params, x)
    updates, moments = optimizer().update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), value


def optimizer() -> Any:
    import optax

    return optax.adam(1e-3)


def begin(layers: int = LAYERS, width: int = WIDTH) -> tuple[Any, Any]:
    """A state and a batch."""
    import numpy as np

    rng = np.random.default_rng(0)
    params = {f"layer{i:02}": rng.normal(size=(width, width)).astype("f") / width**0.5 for i in range(layers)}
    return (params, optimizer().init(params)), rng.normal(size=(ROWS, width)).astype("f")


def loop(program: Callable[..., Any], state: Any, batch: Any) -> Callable[[], None]:
    """One more step of a loop, until its loss is known."""

    def once() -> None:
        nonlocal state
        state, value = program(state, batch)
        float(value)

    return once


def _one_device(repeats: int, name: str, width: int, calls: int) -> list[Row]:
    import jax
    import jax.numpy as jnp

    import flowml as fm

    tell(f"loops: {name}, one device")
    state, batch = begin(width=width)
    with fm.Cluster.local(workers=1) as cluster, fm.Cluster.threads(workers=1) as inside:
        programs = [fm.dataflow(step, cluster=c, keep=0, donate_argnums=0) for c in (cluster, inside)]
        jitted = jax.jit(step, donate_argnums=0)
        loops = [*(loop(p, state, batch) for p in programs), loop(jitted, jax.tree.map(jnp.array, state), batch)]
        probes = [per_call(once, calls) for once in loops]
        ours, threads, peer = interleave(f"loops: {name}, one device", probes, repeats)
    return [
        Row(f"{name}, one device, worker process", "s", ours, Peer("jax.jit", peer), Goal("at most", 1.02)),
        Row(f"{name}, one device, in this process", "s", threads, Peer("jax.jit", peer), Goal("at most", 1.02)),
    ]


def _two_workers(repeats: int) -> list[Row]:
    import jax

    import flowml as fm

    tell("loops: two workers")
    state, batch = begin()
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with fm.Cluster.local(workers=2) as cluster:
        placement = fm.Pipeline(stages=2)
        program = fm.dataflow(step, cluster=cluster, placement=placement, keep=0, donate_argnums=0)
        once = loop(program, state, batch)
        once()
        moved = Sample(tuple(_bytes_moved(cluster, once) / nbytes for _ in range(3)))
        trainer = fm.Trainer(loss, optimizer(), cluster=cluster, placement=placement)
        probes = [per_call(once, CALLS), _fit(trainer, state[0], batch)]
        ours, peer = interleave("loops: two workers", probes, repeats)
    name = "Adam on 80 MiB, two stages"
    return [
        Row(name, "s", ours, Peer("fm.Trainer", peer), Goal("at most", 1.1)),
        Row(f"{name}: bytes of a call", "share", moved, Peer("none"), Goal("at most", 0.01, "value")),
    ]


def _fit(trainer: Any, params: Any, batch: Any) -> Probe:
    """The seconds of a step, from the end of the first step of a fit to that of its last."""
    import numpy as np

    source = np.concatenate([batch] * 4)

    def probe() -> float:
        history = trainer.fit(params, source, batch_size=len(batch), steps=STEPS, progress=False).history
        return (history[-1]["seconds"] - history[0]["seconds"]) / (STEPS - 1)

    return probe


def _bytes_moved(cluster: Any, call: Callable[[], None]) -> int:
    """Bytes of the arrays that the driver sends and gets during a call."""
    moved: list[int] = []
    session, endpoint = cluster.session, cluster.endpoint
    send, receive = endpoint.send, session.on_message

    def sending(peer: str, message: Any, arrays: Sequence[Any] = (), timeout_s: float | None = None) -> None:
        moved.append(sum(a.nbytes for a in arrays))
        send(peer, message, arrays, timeout_s)

    def receiving(peer: str, message: Any, arrays: Sequence[Any]) -> None:
        moved.append(sum(a.nbytes for a in arrays))
        receive(peer, message, arrays)

    endpoint.send, session.on_message = sending, receiving
    try:
        call()
    finally:
        del endpoint.send, session.on_message
    return sum(moved)


def _small_leaves(repeats: int) -> Row:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import flowml as fm

    tell(f"loops: {LEAVES:,} leaves (compiling takes a minute)")

    def add(state: Any, x: Any) -> Any:
        return [leaf + x for leaf in state], x

    state, x = [np.float32(i) for i in range(LEAVES)], jnp.float32(1)
    with fm.Cluster.local(workers=1) as cluster:
        program = fm.dataflow(add, cluster=cluster, keep=0, donate_argnums=0)
        jitted = jax.jit(add, donate_argnums=0)
        loops = [loop(program, state, x), loop(jitted, [jnp.asarray(leaf) for leaf in state], x)]
        ours, peer = interleave(f"loops: {LEAVES:,} leaves", [per_call(once, 1) for once in loops], repeats)
    return Row(f"{LEAVES:,} leaves of one number", "s", ours, Peer("jax.jit", peer), Goal("at most", 1.5))

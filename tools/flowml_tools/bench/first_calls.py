"""Measures first calls, which trace and compile, against those of `jax.jit`.

Every round starts a new cluster, because a cluster keeps what its workers have compiled, and clears JAX's caches before
each call. Each function of a small collection is called once by jit and once by flowml, with the placement "auto" and
with two stages. A row is about the ratios of all functions: of each the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import tell

LIMIT = 1.5
REPEATS = 5

Function = tuple[str, Callable[..., Any], tuple[Any, ...]]


def rows(repeats: int | None) -> list[Row]:
    import flowml as fm

    rounds = repeats or REPEATS
    ratios: dict[str, dict[str, list[float]]] = {"auto": {}, "two stages": {}}
    steps: tuple[list[float], list[float]] = [], []
    for number in range(rounds):
        tell(f"loops: first calls, {number} of {rounds}")
        with fm.Cluster.local(workers=2) as cluster:
            fm.dataflow(lambda x: x + 1, cluster=cluster)(1.0)
            for name, fn, arguments in functions():
                for way, placement in (("auto", "auto"), ("two stages", fm.Pipeline(stages=2))):
                    ours, peer = _pair(fn, arguments, cluster, placement, ours_first=bool(number % 2))
                    ratios[way].setdefault(name, []).append(ours / peer)
            for values, taken in zip(steps, _first_steps(cluster, ours_first=bool(number % 2)), strict=True):
                values.append(taken)
    found = [
        Row(
            f"first call of {len(of)} functions, {way}: of jit's",
            "share",
            Sample(tuple(map(statistics.median, of.values()))),
            Peer("none"),
            Goal("at most", LIMIT, "value"),
        )
        for way, of in ratios.items()
    ]
    ours, peer = (Sample(tuple(values)) for values in steps)
    return [*found, Row("first step of two replicas", "s", ours, Peer("jax.jit", peer), Goal("at most", LIMIT))]


def _pair(fn: Any, arguments: Any, cluster: Any, placement: Any, *, ours_first: bool) -> tuple[float, float]:
    """The seconds of the first call with flowml and with jit."""
    import jax

    import flowml as fm

    return _in_turn(
        lambda: fm.dataflow(fn, cluster=cluster, placement=placement)(*arguments),
        lambda: jax.jit(fn)(*arguments),
        ours_first=ours_first,
    )


def _first_steps(cluster: Any, *, ours_first: bool) -> tuple[float, float]:
    """The seconds until a fit of two replicas has made its first step, and those of a jitted step."""
    import jax
    import numpy as np

    import flowml as fm
    from flowml_tools.bench.loops import begin, loss, optimizer, step

    state, x = begin(layers=4, width=64)
    source = np.concatenate([x, x])

    def fit() -> None:
        trainer = fm.Trainer(loss, optimizer(), cluster=cluster, replicas=2)
        trainer.fit(state[0], source, batch_size=len(source), steps=1, progress=False)

    return _in_turn(fit, lambda: jax.jit(step)(state, source), ours_first=ours_first)


def _in_turn(ours: Callable[[], Any], peer: Callable[[], Any], *, ours_first: bool) -> tuple[float, float]:
    """The seconds of both, each with JAX's caches empty."""
    import jax

    taken = [0.0, 0.0]
    ways = (ours, peer)
    for which in (0, 1) if ours_first else (1, 0):
        jax.clear_caches()
        began = time.perf_counter()
        jax.block_until_ready(ways[which]())
        taken[which] = time.perf_counter() - began
    return taken[0], taken[1]


def functions() -> list[Function]:
    """Functions of different kinds, each with two layers or more."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import flowml as fm
    from flowml_tools.bench.loops import begin, loss, step

    x, w = np.ones((16, 32), np.float32), np.eye(32, dtype=np.float32)
    image, kernel = np.ones((2, 3, 8, 8), np.float32), np.ones((3, 3, 3, 3), np.float32)
    state, batch = begin(layers=4, width=64)

    def forward(x: Any, w: Any) -> Any:
        for i in range(4):
            with fm.layer(f"dense{i}"):
                x = jax.nn.gelu(x @ w)
        return x

    def recurrent(x: Any, w: Any) -> Any:
        def run(w: Any) -> Any:
            with fm.layer("cell"):
                last, _ = jax.lax.scan(lambda h, row: (jnp.tanh(h @ w + row), None), jnp.zeros(32), x)
            with fm.layer("head"):
                return jnp.mean((last @ w) ** 2)

        return jax.value_and_grad(run)(w)

    def convolution(image: Any, kernel: Any) -> Any:
        for i in range(2):
            with fm.layer(f"conv{i}"):
                image = jax.nn.relu(jax.lax.conv(image, kernel, (1, 1), "SAME"))
        return jnp.mean(image)

    def attention(x: Any, w: Any) -> Any:
        def run(w: Any) -> Any:
            with fm.layer("attend"):
                y = jax.nn.softmax((x @ w) @ (x @ w).T) @ x
            with fm.layer("head"):
                return jnp.mean((y @ w) ** 2)

        return jax.grad(run)(w)

    def dropout(x: Any, w: Any) -> Any:
        with fm.layer("mask"):
            x = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0)
        with fm.layer("head"):
            return x @ w

    def ordering(x: Any, w: Any) -> Any:
        with fm.layer("sort"):
            x = jnp.sort(x, axis=1)
        with fm.layer("transform"):
            return jnp.abs(jnp.fft.fft(x @ w))

    return [
        ("dense layers", forward, (x, w)),
        ("gradient", jax.value_and_grad(loss), (state[0], batch)),
        ("Adam step", step, (state, batch)),
        ("recurrent gradient", recurrent, (x, w)),
        ("convolutions", convolution, (image, kernel)),
        ("attention gradient", attention, (x, w)),
        ("dropout", dropout, (x, w)),
        ("sort and transform", ordering, (x, w)),
    ]

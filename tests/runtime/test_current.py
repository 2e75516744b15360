"""Which cluster is the current one, in threads, pools and asyncio tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime.cluster import current_cluster
from flowml_runtime.current import Blocks


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


def test_two_threads_each_in_a_block_use_their_own_clusters() -> None:
    both_inside, both_done = threading.Barrier(2), threading.Barrier(2)

    def net(x: Any) -> Any:
        with fm.layer("a"):
            h = jnp.sin(x)
        with fm.layer("b"):
            return jnp.cos(h)

    def work(workers: int, second: str) -> list[int]:
        f = fm.dataflow(net, placement={"a": "worker:0", "b": second})
        trainer = fm.Trainer(lambda p, b: jnp.mean((b @ p) ** 2), optax.sgd(0.1), replicas=workers)
        with fm.Cluster.threads(workers=workers) as mine:
            both_inside.wait(30)
            assert current_cluster() is mine
            np.testing.assert_allclose(f(jnp.ones(3)), np.cos(np.sin(np.ones(3))), rtol=1e-6)
            used = len(f.plan(jnp.ones(3)).devices)
            result = trainer.fit(jnp.ones((2, 2)), np.ones((24, 2), np.float32), batch_size=12, steps=2)
            both_done.wait(60)
        return [used, len(result.history)]

    with ThreadPoolExecutor(2) as pool:
        three, one = pool.submit(work, 3, "worker:2"), pool.submit(work, 1, "worker:0")
        assert three.result(100) == [2, 2]
        assert one.result(100) == [1, 2]
    with pytest.raises(ClusterError, match="there is no cluster"):
        current_cluster()


def test_a_plain_thread_sees_the_block_of_its_process() -> None:
    blocks: Blocks[str] = Blocks()
    with pytest.raises(ClusterError, match="there is no cluster"):
        in_thread(blocks.current)
    blocks.enter("outer")
    blocks.enter("inner")
    assert in_thread(blocks.current) == "inner"
    blocks.leave("inner")
    assert blocks.current() == in_thread(blocks.current) == "outer"

    def own() -> tuple[str, str, str]:
        blocks.enter("own")
        seen = blocks.current(), in_thread(blocks.current)
        blocks.leave("own")
        return *seen, blocks.current()

    assert in_thread(own) == ("own", "outer", "outer")  # the main thread's comes first for those that have none
    blocks.leave("outer")


def test_a_plain_thread_is_not_made_to_guess() -> None:
    blocks: Blocks[str] = Blocks()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        first.submit(blocks.enter, "a").result(10)
        assert blocks.current() == in_thread(blocks.current) == "a"
        second.submit(blocks.enter, "b").result(10)
        with pytest.raises(ClusterError, match=r"MainThread is in no .* block, and there are 2 .*give cluster="):
            blocks.current()
        assert first.submit(blocks.current).result(10) == "a"
        assert second.submit(blocks.current).result(10) == "b"
        first.submit(blocks.leave, "a").result(10)
        assert blocks.current() == "b"


def test_tasks_have_blocks_of_their_own_and_inherit_the_one_they_are_made_in() -> None:
    blocks: Blocks[str] = Blocks()

    async def within(name: str, inside: asyncio.Barrier) -> list[str]:
        blocks.enter(name)
        await inside.wait()
        seen = [blocks.current(), await asyncio.create_task(current()), await asyncio.to_thread(blocks.current)]
        await inside.wait()
        blocks.leave(name)
        return seen

    async def current() -> str:
        return blocks.current()

    async def main() -> None:
        blocks.enter("outer")
        inside = asyncio.Barrier(2)
        assert await asyncio.gather(within("a", inside), within("b", inside)) == [["a"] * 3, ["b"] * 3]
        later = asyncio.create_task(current())  # made inside the block, runs after it
        blocks.leave("outer")
        with pytest.raises(ClusterError, match="there is no cluster"):
            await later

    asyncio.run(main())


def test_a_block_may_be_left_by_another_thread() -> None:
    blocks: Blocks[str] = Blocks()
    in_thread(lambda: blocks.enter("a"))
    assert blocks.current() == "a"
    blocks.leave("a")
    with pytest.raises(ClusterError, match="there is no cluster"):
        blocks.current()

"""Many callers of one plan, with steps that fail: every call ends, with its own value or with a typed error."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.errors import DeadlineError, FlowmlError, WorkerError
from flowml_runtime import wire
from flowml_runtime.execution.mailbox import Mailbox
from tests.network import Network
from tests.plans import callback_then_double, chain, never_sent

X = np.arange(4, dtype=np.float32)
CALLERS = 8


@pytest.fixture
def hasty() -> Generator[None]:
    """Threads are switched a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def test_steps_are_fed_in_the_order_of_their_numbers_whoever_calls(hasty: None) -> None:
    with Network(in_flight=64) as network:
        handle = network.session.load(chain())
        worker, fed = network.workers[0], list[int]()

        def spy(peer: str, message: Any, arrays: Sequence[Any]) -> None:
            if isinstance(message, wire.Value) and message.kind == "feed":
                fed.append(message.step)
            worker.on_message(peer, message, arrays)

        network.receivers[worker.name] = spy

        def call(_: int) -> None:
            for _ in range(40):
                network.session.submit(handle, [X]).result(timeout=30)

        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(call, range(CALLERS)))
        assert fed == list(range(40 * CALLERS))


def test_a_step_that_its_worker_gives_up_unasked_fails_its_call() -> None:
    with Network(deadline_s=30) as network:
        handle = network.session.load(never_sent())
        future = network.session.submit(handle, [X])
        network.workers[1].mailbox.cancel((handle.plan_id, 0, "worker:1/cpu:0"))
        with pytest.raises(WorkerError, match=r"the step was cancelled .*worker:1, step 0"):
            future.result(timeout=5)


def test_a_value_that_comes_at_the_deadline_leaves_its_step_whole() -> None:
    """The deadline has passed, and before the step is given up its value comes: then it is not given up."""
    mailbox, scope = Mailbox(), ("plan", 0, "worker:0/cpu:0")
    mailbox.open("plan")
    claim = mailbox.claim(scope, ("edge", 0, 0))
    assert not claim.wait(0.0)
    mailbox.put(scope, ("edge", 0, 0), "value")
    assert not mailbox.expire(scope, claim)
    assert (claim.done, claim.cancelled, claim.value) == (True, False, "value")
    mailbox.put(scope, ("edge", 1, 0), "the next")
    assert mailbox.take(scope, ("edge", 1, 0), 0.0) == "the next"


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize("raised", [Unprintable(), ValueError("half a character: \udc80"), ValueError("x" * 2**21)])
def test_whatever_a_callback_raises_ends_its_call(raised: Exception) -> None:
    def refuse_negative(x: Any) -> Any:
        if x.min() < 0:
            raise raised
        return x

    with Network() as network:
        handle = network.session.load(callback_then_double(refuse_negative))
        with pytest.raises(WorkerError, match=type(raised).__name__):
            network.session.submit(handle, [X - 1]).result(timeout=10)
        np.testing.assert_array_equal(network.session.submit(handle, [X]).result(timeout=10)[0], X * 2)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_every_one_of_many_callers_gets_its_value_or_its_error(kind: str, hasty: None) -> None:
    def check(x: Any) -> Any:
        if x[0] < 0:
            raise ValueError("negative")
        if x[0] % 17 == 3:
            time.sleep(0.002)
        return x

    def net(x: Any) -> Any:
        with fm.layer("a"):
            a = jnp.sin(x) + 1 - jnp.sin(x)
        with fm.layer("b"):
            checked = jax.pure_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        with fm.layer("c"):
            return checked * 2 + 0 * a

    place = {"a": "worker:0", "b": "worker:1", "c": "worker:0"}
    start = fm.Cluster.threads if kind == "threads" else lambda **o: fm.Cluster.local(**o, allow_python=True)
    with start(workers=2, deadline_s=20) as cluster:
        f = fm.dataflow(net, placement=place, cluster=cluster)
        f(jnp.ones(3))

        def call(caller: int) -> list[str]:
            wrong: list[str] = []
            for n in range(40):
                number = caller * 100 + n + 1
                x = np.full(3, -number if n % 5 == 4 else number, np.float32)
                try:
                    future = f.submit(x) if n % 2 else None
                    y = future.result(timeout=25) if future is not None else f(x)
                    if x[0] < 0 or not np.array_equal(y, 2 * x):
                        wrong.append(f"{x[0]} gave {y}")
                except WorkerError as error:
                    if x[0] > 0 or "negative" not in str(error):
                        wrong.append(f"{x[0]} raised {error}")
                except FlowmlError as error:
                    wrong.append(f"{x[0]} raised {type(error).__name__}: {error}")
            return wrong

        with ThreadPoolExecutor(CALLERS) as pool:
            assert [w for caller in pool.map(call, range(CALLERS)) for w in caller] == []


def test_an_input_that_its_worker_does_not_take_is_a_deadline_error() -> None:
    with Network() as network:
        handle = network.session.load(chain())
        takes = network.receivers["worker:0"]

        def full(peer: str, message: Any, arrays: Sequence[Any]) -> None:
            if isinstance(message, wire.Value):
                raise TimeoutError
            takes(peer, message, arrays)

        network.receivers["worker:0"] = full
        with pytest.raises(DeadlineError, match=r"step 0 of plan .*: worker:0 did not take its input for 60 s"):
            network.session.call(handle, [X])
        network.receivers["worker:0"] = takes
        np.testing.assert_array_equal(network.session.call(handle, [X])[0], (X + 1) * 2)

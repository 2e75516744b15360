"""The executor, worker and session with hand-made plans: what a step computes, keeps alive, and leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowml.errors import DeadlineError, FlowmlError, PlacementError, WorkerError
from flowml.instructions import Feed, Fetch, Free, Run, Send
from flowml.plan import ArraySpec, Constant, Output
from flowml_runtime import wire
from flowml_runtime.execution.mailbox import Cancelled, Mailbox
from flowml_runtime.execution.programs import aligned_copy, safe_donations
from flowml_runtime.protocol.errors import ProtocolError
from tests.network import Network
from tests.plans import VECTOR, W0, W1, Gate, PlanBuilder, chain, fetched, gated, one_device, split_key


def vector(start: float = 0.0) -> np.ndarray:
    return np.arange(4, dtype=np.float32) + np.float32(start)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float8_e4m3fn", "int4", "int32", "uint8", "bool", "complex64"]
)
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 2)])
def test_one_device_equals_jit_to_the_bit(dtype: str, shape: tuple[int, ...]) -> None:
    spec = ArraySpec(shape, dtype)
    x = jnp.arange(int(np.prod(shape))).reshape(shape).astype(dtype)

    def function(a: Any) -> tuple[Any, ...]:
        return (jnp.where(a != 0, a, jnp.ones_like(a)),)

    expected = np.asarray(jax.jit(function)(x)[0])
    with Network(1) as network:
        handle = network.session.load(one_device(function, spec))
        for given_as in (x, np.asarray(x)):
            (result,) = network.session.submit(handle, [given_as]).result()
            assert isinstance(result, jax.Array)
            assert result.dtype == x.dtype
            assert np.asarray(result).tobytes() == expected.tobytes()


def test_a_chain_over_two_workers_and_back() -> None:
    with Network() as network:
        handle = network.session.load(chain((W0, W1)))
        (result,) = network.session.submit(handle, [vector()]).result()
        np.testing.assert_array_equal(result, (vector() + 1) * 2)
        assert network.held_values() == 0


def test_many_steps_in_flight_each_get_their_own_result() -> None:
    with Network(in_flight=8) as network:
        handle = network.session.load(chain((W0, W1)))
        futures = [network.session.submit(handle, [vector(n)]) for n in range(50)]
        for n, future in enumerate(futures):
            np.testing.assert_array_equal(future.result()[0], (vector(n) + 1) * 2)
        assert len(handle.steps) == 0
        assert network.held_values() == 0


TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from tests.network import Network
from tests.plans import W0, W1, chain, one_device
x = np.arange(4, dtype=np.float32)
first, second = jax.local_devices()
with Network(devices=[first, second]) as network:
    handle = network.session.load(chain((W0, W1)))
    (result,) = network.session.submit(handle, [jax.device_put(x, second)]).result()
    np.testing.assert_array_equal(result + jnp.ones(4), (x + 1) * 2 + 1)  # bound to no device
with Network(1, local=True, devices=[second]) as network:
    handle = network.session.load(one_device(lambda a: (a + 1,)))
    for given in (x, jax.device_put(x, first), jax.device_put(x, second)):
        np.testing.assert_array_equal(network.session.call(handle, [given])[0] + jax.device_put(x, first), 2 * x + 1)
"""


def test_devices_of_one_process_pass_values_to_each_other() -> None:
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", TWO_DEVICES], check=True, timeout=100, env=os.environ | settings
    )


def test_the_local_way_equals_the_fed_way() -> None:
    plan = one_device()
    with Network(1) as fed, Network(1, local=True) as local:
        there, here = fed.session.load(plan), local.session.load(plan)
        assert there.local is None
        assert here.local is not None
        expected = fed.session.call(there, [vector()])
        np.testing.assert_array_equal(local.session.call(here, [vector()])[0], expected[0])
        np.testing.assert_array_equal(local.session.submit(here, [vector()]).result()[0], expected[0])


def test_typed_keys_cross_devices_as_what_they_are() -> None:
    key = jax.random.key(7)
    with Network() as network:
        handle = network.session.load(split_key())
        halves, draw = network.session.submit(handle, [key]).result()
    expected = jax.random.split(key)
    assert halves.dtype == expected.dtype
    np.testing.assert_array_equal(jax.random.key_data(halves), jax.random.key_data(expected))
    np.testing.assert_array_equal(draw, jax.random.normal(expected[0], (4,)))


def test_outputs_from_arguments_constants_and_fetches_with_weak_types() -> None:
    weak = ArraySpec((), "float32", weak_type=True)
    build = PlanBuilder()
    double = build.xla("double", lambda x: (x * 2,), [weak], [weak])
    build.program(W0, Feed((0,), (0,)), Run(double, (0,), (1,)), Fetch((0,), (1,)))
    build.constants.append(Constant(VECTOR, vector().tobytes()))
    outputs = [fetched(weak), fetched(weak), Output(weak, "input", 0), Output(VECTOR, "constant", 0)]
    with Network(1) as network:
        handle = network.session.load(build.build([weak], outputs))
        x = jnp.asarray(3.0)
        first, second, passed, constant = network.session.submit(handle, [x]).result()
    assert [float(first), float(second), float(passed)] == [6.0, 6.0, 3.0]
    assert first.weak_type
    assert passed.weak_type
    np.testing.assert_array_equal(constant, vector())
    jax.jit(lambda a: a + 1, donate_argnums=0)(passed)  # results are the caller's own
    assert not x.is_deleted()


def test_a_constant_is_resident_and_survives_donation_of_what_it_meets() -> None:
    build = PlanBuilder()
    add = build.xla("add", lambda a, b: (a + b,), [VECTOR, VECTOR], [VECTOR], donate=[0, 1])
    build.constants.append(Constant(VECTOR, vector(10).tobytes()))
    build.program(W0, Feed((0,), (0,)), Run(add, (1, 0), (2,)), Free((0,)), Fetch((0,), (2,)), constants=[(1, 0)])
    with Network(1) as network:
        handle = network.session.load(build.build([VECTOR], [fetched()]))
        for _ in range(3):
            (result,) = network.session.submit(handle, [vector()]).result()
            np.testing.assert_array_equal(result, vector() + vector(10))


def test_what_was_lent_is_not_donated() -> None:
    build = PlanBuilder()
    step = build.xla("step", lambda a: (a + 1,), [VECTOR], [VECTOR], donate=[0])
    twice = build.xla("twice", lambda a, b: (a + b,), [VECTOR, VECTOR], [VECTOR], donate=[0])
    grow = build.xla("grow", lambda a: (jnp.concatenate([a, a]),), [VECTOR], [ArraySpec((8,), "float32")], donate=[0])
    edge = build.message(W0, W1)
    build.program(
        W0,
        Feed((0,), (0,)),
        Run(step, (0,), (1,)),  # 1: a fed buffer may be taken if the plan says so
        Send(edge, (1,)),
        Run(step, (1,), (2,)),  # 3: its argument is on its way to worker 1
        Run(twice, (2, 2), (3,)),  # 4: given twice
        Run(grow, (3,), (4,)),  # 5: no output could use it
        Run(step, (3,), (1,)),  # 6
        Run(step, (1,), (5,)),  # 7: buffer 1 holds another value by now
    )
    plan = build.build([VECTOR], [])
    assert safe_donations(plan, plan.programs[0]) == {1: (0,), 3: (), 4: (), 5: (), 6: (0,), 7: (0,)}


def test_a_numpy_argument_may_be_overwritten_once_submit_returns() -> None:
    gate = Gate("overwrite")
    x = aligned_copy(vector(5))
    with Network() as network:
        handle = network.session.load(gated("overwrite"))
        first = network.session.submit(handle, [vector()])
        second = network.session.submit(handle, [x])
        x[...] = -1
        gate.opened.set()
        np.testing.assert_array_equal(first.result()[0], vector() * 2)
        np.testing.assert_array_equal(second.result()[0], vector(5) * 2)


def test_submit_waits_while_too_many_steps_are_in_flight() -> None:
    gate = Gate("full")
    with Network(in_flight=2) as network:
        handle = network.session.load(gated("full"))
        futures = [network.session.submit(handle, [vector()]) for _ in range(2)]
        late = threading.Thread(target=lambda: futures.append(network.session.submit(handle, [vector(1)])))
        late.start()
        assert gate.entered.acquire(timeout=30)
        assert len(futures) == 2
        assert len(handle.steps) == 2
        gate.opened.set()
        late.join(30)
        assert [float(f.result()[0][0]) for f in futures] == [0.0, 0.0, 2.0]


def test_futures_tell_when_they_are_done() -> None:
    gate = Gate("futures")
    called: list[bool] = []
    done = threading.Event()
    with Network() as network:
        handle = network.session.load(gated("futures"))
        future = network.session.submit(handle, [vector()])
        future.add_done_callback(lambda f: (called.append(f.done()), done.set()))
        assert not future.done()
        with pytest.raises(DeadlineError, match="step 0 of with_callback is not done"):
            future.result(timeout=0.01)
        gate.opened.set()
        assert future.exception() is None
        assert done.wait(30)
        assert called == [True]
        assert future.result() is future.result()
        assert float(future.then(lambda r: r[0].sum()).result()) == 12.0


def test_loading_refuses_what_cannot_run() -> None:
    with Network(python=False) as network:
        with pytest.raises(WorkerError, match=r"worker:0 cannot load .*Python callback.*allow_python=True") as caught:
            network.session.load(gated("refused"))
        assert caught.value.worker == "worker:0"
        plan = one_device(device="worker:9/cpu:0")
        with pytest.raises(PlacementError, match="worker:9/cpu:0"):
            network.session.load(plan)
        broken = one_device()
        broken.executables.clear()
        with pytest.raises(WorkerError, match="lacks executable"):
            network.session.load(broken)
        handle = network.session.load(one_device())
        with pytest.raises(TypeError, match=r"x0.*shape \(3,\)"):
            network.session.submit(handle, [np.zeros(3, np.float32)])
        with pytest.raises(TypeError, match="takes 1 arrays"):
            network.session.submit(handle, [])
        assert network.session.submit(handle, [vector()]).exception() is None


def test_bytes_of_a_plan_travel_only_where_they_are_run() -> None:
    from flowml.plan import Plan

    build = PlanBuilder()
    add = build.xla("add", lambda x: (x + 1,), [VECTOR], [VECTOR])
    double = build.xla("double", lambda x: (x * 2,), [VECTOR], [VECTOR])
    edge = build.message(W0, W1)
    build.program(W0, Feed((0,), (0,)), Run(add, (0,), (1,)), Send(edge, (1,)))
    build.program(W1, Feed((0,), (0,)), Run(double, (0,), (1,)), Fetch((0,), (1,)))
    plan = build.build([VECTOR], [fetched()])
    seen: dict[str, set[str]] = {}
    with Network() as network:
        for worker in network.workers:

            def spy(peer: str, message: Any, arrays: Any, worker: Any = worker) -> None:
                if type(message).__name__ == "LoadPlan":
                    seen[worker.name] = set(Plan.decode(arrays[0].tobytes()).executables)
                worker.on_message(peer, message, arrays)

            network.receivers[worker.name] = spy
        network.session.load(plan)
    assert seen == {f"worker:{n}": {plan.tasks[n].executable} for n in (0, 1)}


def test_unloading_ends_the_threads_of_a_plan(no_leaks: Callable[[], AbstractContextManager[None]]) -> None:
    with Network() as network:
        keep = network.session.load(chain())  # by now each worker has its loader thread
        with no_leaks():
            handle = network.session.load(chain())
            network.session.submit(handle, [vector()]).result()
            network.session.unload(handle)
        with pytest.raises(FlowmlError, match="was unloaded"):
            network.session.submit(handle, [vector()])
        assert network.session.submit(keep, [vector()]).exception() is None


def test_nothing_is_left_after_close(no_leaks: Callable[[], AbstractContextManager[None]]) -> None:
    with no_leaks(), Network() as network:
        for plan in (one_device(), chain()):
            handle = network.session.load(plan)
            network.session.submit(handle, [vector()]).result()


SCOPES = [("plan", step, device) for step in (0, 1) for device in (W0, W1)]


def test_a_value_that_comes_twice_fails_its_step() -> None:
    gate = Gate("twice")
    with Network() as network:
        handle = network.session.load(gated("twice"))
        future = network.session.submit(handle, [vector()])
        assert gate.entered.acquire(timeout=30)
        value = wire.Value(plan_id=handle.plan_id, step=1, kind="edge", index=0, device=W1)
        network.workers[1].on_message("worker:0", value, [vector()])
        second = network.session.submit(handle, [vector()])
        network.workers[1].on_message("worker:0", value, [vector()])
        with pytest.raises(WorkerError, match="came twice"):
            second.result(timeout=30)
        gate.opened.set()
        assert future.exception(timeout=30) is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "take", "cancel"]), st.sampled_from(SCOPES), st.integers(0, 2)), max_size=40
    )
)
def test_a_mailbox_agrees_with_a_plain_dictionary(actions: list[tuple[str, Any, int]]) -> None:
    mailbox = Mailbox()
    mailbox.open("plan")
    model: dict[Any, Any] = {}
    cancelled: set[Any] = set()
    for n, (action, scope, index) in enumerate(actions):
        key = ("edge", index, 0)
        if action == "put":
            if (scope, key) in model:
                with pytest.raises(ProtocolError, match="came twice"):
                    mailbox.put(scope, key, n)
                continue
            mailbox.put(scope, key, n)
            if scope not in cancelled:
                model[scope, key] = n
        elif action == "cancel":
            mailbox.cancel(scope)
            cancelled.add(scope)
            model = {k: v for k, v in model.items() if k[0] != scope}
        elif scope in cancelled:
            with pytest.raises(Cancelled):
                mailbox.take(scope, key, 0.0)
        elif (scope, key) in model:
            assert mailbox.take(scope, key, 0.0) == model.pop((scope, key))
        else:
            with pytest.raises(TimeoutError):
                mailbox.take(scope, key, 0.0)
            cancelled.add(scope)  # a step whose value was too late is over
            model = {k: v for k, v in model.items() if k[0] != scope}
        assert len(mailbox) == len(model)
    mailbox.close("plan")
    assert len(mailbox) == 0


@given(st.permutations(range(6)))
def test_every_taker_gets_its_value_in_whatever_order_they_come(order: list[int]) -> None:
    mailbox = Mailbox()
    mailbox.open("plan")
    got: dict[int, Any] = {}

    def take(index: int) -> None:
        got[index] = mailbox.take(SCOPES[index % len(SCOPES)], ("edge", index, 0), 30.0)

    takers = [threading.Thread(target=take, args=(i,)) for i in range(6)]
    for index, taker in zip(order, takers, strict=True):
        taker.start()
        mailbox.put(SCOPES[index % len(SCOPES)], ("edge", index, 0), index)
    for taker in takers:
        taker.join(30)
    assert got == {i: i for i in range(6)}
    assert len(mailbox) == 0

"""Replicas that each apply sums of gradients compare their bits: a flipped one is one typed error, soon."""

from __future__ import annotations

import ctypes
import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.worker.training.exchange.agreement import digest
from flowml_runtime.worker.training.homes import Homes
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

SOURCE = data()
REPLICAS = 3
FAULTY = "worker:1"
FLIPPED_AT = 10
MIDDLE_OF_MANTISSA = 1
"""The byte of a float32 in which the bit is. The change is too small for a number that is not finite."""

Record = dict[str, Any]


def trainer(cluster: fm.Cluster, **options: Any) -> fm.Trainer:
    layout: dict[str, Any] = {"placement": fm.Pipeline(1), "replicas": REPLICAS, **options}
    return fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, policies=fm.policies.all_reduce(), **layout)


def flipping_a_bit() -> Callable[[Record], None]:
    """From step FLIPPED_AT on: a bit of one parameter of FAULTY is stuck at 1, as a fault of memory would have it.

    Parameters live in new memory after each step, so it is set again after each. It only ever adds to the size of the
    parameter: a bit that is flipped back and forth may end where it was.
    """
    found: list[Homes] = []

    def on_step(record: Record) -> None:
        if record["step"] == FLIPPED_AT:
            homes = [h for h in gc.get_objects() if isinstance(h, Homes)]
            found.extend(h for h in homes if h._run.me == FAULTY and not h._run.stopped)
            assert found
        for held in [held for homes in found for held in homes._held.values()]:
            memory = np.asarray(held.values[held.params - 1])
            ctypes.cast(memory.ctypes.data, ctypes.POINTER(ctypes.c_uint8))[MIDDLE_OF_MANTISSA] |= 0x10

    return on_step


def test_a_flipped_bit_is_found_at_the_next_check(threads_cluster: fm.Cluster) -> None:
    faulty = trainer(threads_cluster, check_replicas=5)
    with pytest.raises(fm.DivergedError) as caught:
        faulty.fit(mlp(), SOURCE, batch_size=BATCH, steps=100_000, callbacks=[flipping_a_bit()])
    error = caught.value
    assert error.step is not None
    assert FLIPPED_AT - 5 <= error.step < FLIPPED_AT + 500
    assert error.step % 5 == 4, "checks come after every fifth step"
    layer = (error.node or "").removeprefix("store ")
    assert layer
    text = str(error)
    assert f"step {error.step}: replicas hold different" in text
    assert repr(layer) in text
    assert f"replica 0 (worker:0), 2 (worker:2) differs from replica 1 ({FAULTY})" in text
    after = trainer(threads_cluster).fit(mlp(), SOURCE, batch_size=BATCH, steps=5)
    assert len(after.history) == 5


def test_the_end_of_a_fit_is_checked_too(threads_cluster: fm.Cluster) -> None:
    faulty = trainer(threads_cluster, check_replicas=10_000)
    with pytest.raises(fm.DivergedError) as caught:
        faulty.fit(mlp(), SOURCE, batch_size=BATCH, steps=200, callbacks=[flipping_a_bit()])
    assert caught.value.step == 199


@pytest.mark.parametrize("check", [0, 1, 7, 100])
def test_checks_change_no_bit_of_what_is_trained(threads_cluster: fm.Cluster, check: int) -> None:
    result = trainer(threads_cluster, check_replicas=check).fit(mlp(), SOURCE, batch_size=BATCH, steps=30)
    expected = trainer(threads_cluster, check_replicas=0).fit(mlp(), SOURCE, batch_size=BATCH, steps=30)
    assert_same(result.params, expected.params)
    assert result.traffic == expected.traffic


def test_processes_that_agree_end_without_a_word(process_cluster: fm.Cluster) -> None:
    result = trainer(process_cluster, replicas=2, check_replicas=1).fit(mlp(), SOURCE, batch_size=BATCH, steps=30)
    assert len(result.history) == 30


@pytest.mark.parametrize("value", [-1, 1.5, "often", None])
def test_the_knob_takes_whole_numbers(threads_cluster: fm.Cluster, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="check_replicas"):
        trainer(threads_cluster, check_replicas=value)


def test_a_digest_stands_for_every_bit_of_every_array() -> None:
    arrays = [jax.numpy.zeros((3, 4)), jax.numpy.zeros(7, "bfloat16"), jax.numpy.ones((), "int32")]
    found = {digest(arrays)}
    for i, array in enumerate(arrays):
        for bit in range(8 * array.nbytes):
            changed = [np.array(a) for a in arrays]
            changed[i].reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
            found.add(digest(changed))
    assert len(found) == 1 + 8 * sum(a.nbytes for a in arrays)
    assert digest([np.asarray(a) for a in arrays]) == digest(arrays)


def test_a_digest_is_cheap() -> None:
    """Of 64 MiB in less than 100 ms of a core, with the best of many tries; a check every 100 steps is not noticed."""
    arrays = [np.ones(2**24, np.float32)]

    def seconds(call: Callable[[], Any]) -> float:
        began = time.thread_time()
        call()
        return time.thread_time() - began

    assert min(seconds(lambda: digest(arrays)) for _ in itertools.repeat(None, 20)) < 0.1

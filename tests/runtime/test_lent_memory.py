"""A worker gives the memory of a closed-over array back when the last program that reads it has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
import psutil

from flowml.arrays import ArraySpec
from flowml_runtime import wire
from flowml_runtime.transport.endpoint import Sender
from flowml_runtime.worker.keeping import Keeping

DEVICE = "worker:0/cpu:0"
ROWS = 64 * 2**18  # 64 MiB of float32


def until(found: Callable[[], bool]) -> bool:
    """Whether something becomes true within a minute."""
    deadline_s = time.monotonic() + 60
    while not found() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return found()


class Answers:
    """Takes the messages to the driver."""

    name = "worker:0"

    def __init__(self) -> None:
        self.came = threading.Event()

    def send(self, peer: str, message: wire.Wire, arrays: Any, timeout_s: float | None = None) -> None:
        self.came.set()


def test_memory_is_given_back_when_a_step_ends_after_the_value_was_dropped() -> None:
    process, answers = psutil.Process(), Answers()
    keeping = Keeping("worker:0", cast(Sender, answers), {DEVICE: jax.devices()[0]})
    piece = wire.BringPiece(name=1, device=DEVICE, whole=ArraySpec((ROWS,), "float32"), start=0)
    keeping.on_message("driver", piece, [np.ones(4 * ROWS, np.uint8)])
    reading = keeping.kept.find("driver", [1])
    keeping.on_message("driver", wire.Drop(names=(1,)), ())
    keeping.on_message("driver", wire.Recall(number=1, names=(2,)), ())
    assert answers.came.wait(60)  # what the drop asked for has been done
    full = process.memory_info().rss
    keeping.kept.leave(reading)
    del reading
    assert until(lambda: process.memory_info().rss < full - 2 * ROWS)
    keeping.close()

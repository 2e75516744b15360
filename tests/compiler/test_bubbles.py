"""The idle share of a pipeline, as the schedule and the estimate give it, against published and closed-form values.

The settings are those of Qi et al., Zero bubble pipeline parallelism (arXiv 2401.10241): the times of the forward pass,
of the backward pass for the input and for the weights, and of a hop, which does not block computation.
"""

from __future__ import annotations

import csv
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowml.devices import Device
from flowml.instructions import Recv, Run, Send
from flowml.lowering.schedule import TaskGroup, task_order
from flowml.placement.estimate import estimate
from flowml.placement.links import Link, Links
from flowml.plan import Message, Program, Task

YARDSTICKS = Path(os.environ.get("FLOWML_YARDSTICKS", Path(__file__).resolve().parents[3] / "shared" / "yardsticks"))
TABLE = YARDSTICKS / "zero_bubble.csv"

STATED = (
    # stages, microbatches, forward, backward for the input, for the weights, hop (all µs); bubble of 1F1B
    (8, 24, 18522, 18086, 9337, 601, 0.2431),
    (16, 128, 11325, 11308, 8109, 378, 0.1251),
)
"""Two rows of the table, so that the test runs without the file."""


def groups(stages: int) -> list[TaskGroup]:
    """A forward task for each stage, then the backward tasks in reverse. Task i makes value i from value i - 1."""
    devices = [*range(stages), *reversed(range(stages))]
    return [
        TaskGroup(i, f"worker:{stage:03}", i, 0, (), (i - 1,) if i else (), (i,)) for i, stage in enumerate(devices)
    ]


def step_seconds(stages: int, microbatches: int, forward_s: float, backward_s: float, hop_s: float, kind: str) -> float:
    """The estimate of one step whose tasks are in the order of the schedule."""
    tasks = groups(stages)
    durations = [forward_s] * stages + [backward_s] * stages
    crossing = [a.index for a, b in pairwise(tasks) if a.device != b.device]
    messages = [Message(tasks[i].device, tasks[i + 1].device, ()) for i in crossing]
    of = {task: number for number, task in enumerate(crossing)}
    programs: list[Program] = []
    for device, order in task_order(tasks, durations, microbatches, kind).items():
        code: list[Recv | Run | Send] = []
        for i, microbatch in order:
            if i - 1 in of:
                code.append(Recv(of[i - 1], (), microbatch))
            code.append(Run(i, (), (), microbatch))
            if i in of:
                code.append(Send(of[i], (), microbatch))
        programs.append(Program(device, tuple(code)))
    return estimate(
        programs,
        [Task(str(i), "xla", "", (), (), seconds=s) for i, s in enumerate(durations)],
        messages,
        {p.device: Device(p.device, dispatch_s=0) for p in programs},
        Links(Link(latency_s=hop_s)),
        0.0,
        {"inputs": (), "constants": ()},
    ).step_seconds


def bubble(stages: int, microbatches: int, forward: int, inputs: int, weights: int, hop: int) -> float:
    seconds = step_seconds(stages, microbatches, forward * 1e-6, (inputs + weights) * 1e-6, hop * 1e-6, "1f1b")
    return 1 - microbatches * (forward + inputs + weights) * 1e-6 / seconds


@pytest.mark.parametrize("row", STATED, ids=lambda row: f"{row[0]} stages, {row[1]} microbatches")
def test_the_bubble_of_1f1b_agrees_to_four_digits(row: tuple[int, int, int, int, int, int, float]) -> None:
    assert round(bubble(*row[:6]), 4) == row[6]


@pytest.mark.skipif(not TABLE.exists(), reason="the published table is not here")
def test_the_bubbles_of_the_whole_published_table_agree_to_four_digits() -> None:
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for row in rows:
        values = [int(row[f"{name}"]) for name in ("stages", "microbatches")]
        values += [int(row[f"{name}_us"]) for name in ("forward", "backward_input", "backward_weight", "hop")]
        assert round(bubble(*values), 4) == float(row["bubble_1f1b"]), row


@given(
    st.integers(2, 8), st.integers(0, 12), st.floats(0.001, 1), st.floats(0.001, 2), st.sampled_from(["1f1b", "gpipe"])
)
@settings(deadline=None, max_examples=60)
def test_without_hops_both_schedules_idle_for_one_pass_through_the_other_stages(
    stages: int, more: int, forward_s: float, backward_s: float, kind: str
) -> None:
    """A step takes (m + p - 1) (F + B): Narayanan et al., Efficient large-scale language model training, SC 2021."""
    microbatches = stages + more
    expected = (microbatches + stages - 1) * (forward_s + backward_s)
    assert step_seconds(stages, microbatches, forward_s, backward_s, 0.0, kind) == pytest.approx(expected)

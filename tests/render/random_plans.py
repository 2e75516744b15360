"""Random plans for property tests: any number of devices, tasks and edges between earlier and later tasks."""

from __future__ import annotations

from hypothesis import strategies as st

from flowml.instructions import Feed, Fetch, Instruction, Recv, Run, Send
from flowml.plan import ArraySpec, Estimate, Message, Output, Plan, Program, Task, Transfer

_VALUE = ArraySpec((8, 8), "float32")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Task i makes value i; each reads some earlier values, wherever those were made."""
    devices = [f"worker:{i}/cpu:0" for i in range(draw(st.integers(1, 5)))]
    count = draw(st.integers(1, 9))
    places = [draw(st.integers(0, len(devices) - 1)) for _ in range(count)]
    reads = [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(count)]
    tasks = tuple(
        Task(
            f"task{i}",
            "xla",
            f"k{i}",
            tuple(_VALUE for _ in reads[i]),
            (_VALUE,),
            (),
            (f"layer{i}",),
            1,
            1e6,
            1e3,
            1e-4,
        )
        for i in range(count)
    )
    code: list[list[Instruction]] = [[Feed((0,), (100,))] for _ in devices]
    messages: list[Message] = []
    for i, place in enumerate(places):
        code[place].append(Run(i, tuple(reads[i]) or (100,), (i,)))
        users = {places[j] for j in range(i + 1, count) if i in reads[j]} - {place}
        for other in sorted(users):
            transfer = Transfer(devices[place], devices[other], _VALUE.shape, _VALUE.dtype, _VALUE.nbytes, f"layer{i}")
            code[place].append(Send(len(messages), (i,)))
            code[other].append(Recv(len(messages), (i,)))
            messages.append(Message(devices[place], devices[other], (transfer,)))
    code[places[-1]].append(Fetch((0,), (count - 1,)))
    return Plan(
        name="random",
        devices=tuple(devices),
        programs=tuple(Program(d, tuple(c)) for d, c in zip(devices, code, strict=True)),
        tasks=tasks,
        messages=tuple(messages),
        executables={},
        inputs=(_VALUE,),
        input_names=("x",),
        outputs=(Output(_VALUE, "fetch", 0),),
        constants=(),
        estimate=Estimate(1e-3, dict.fromkeys(devices, 1000), sum(m.nbytes for m in messages), 1e-3),
    )

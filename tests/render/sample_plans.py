"""Plans made by hand, for the renderers: small, complete and independent of the compiler.

`pipeline_plan` is an inference of two stages; `training_plan` is two stages on each of four replicas, with
a different policy for every layer, `all_reduce_plan` the same with sums among replicas; `hostile_plan` is the
pipeline with every name chosen to break a format.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from msgspec.structs import replace

from flowml.home import Applies, Buffer
from flowml.instructions import Feed, Fetch, Free, Instruction, Push, Read, Recv, Run, Send
from flowml.plan import (
    ArraySpec,
    Choice,
    Constant,
    Estimate,
    Message,
    NodeView,
    Output,
    Part,
    Plan,
    Program,
    Reduction,
    StoreSpec,
    Task,
    Training,
    Transfer,
)
from flowml.policy import UNBOUNDED, AllReduce, Factors, Policy, Quorum, Ring

HOSTILE = """<script>alert('x')</script> "quoted" ]]> & {braces|} \\N \\L </style> <!--\nsecond line"""


def f32(*shape: int) -> ArraySpec:
    return ArraySpec(shape, "float32")


def transfer(source: str, destination: str, spec: ArraySpec, layer: str) -> Transfer:
    return Transfer(source, destination, spec.shape, spec.dtype, spec.nbytes, layer)


def pipeline_plan(
    names: tuple[str, str] = ("worker:0/cpu:0", "worker:1/cpu:0"),
    layers: tuple[str, str] = ("encoder", "decoder"),
    task_names: tuple[str, str] = ("encoder", "decoder"),
    *,
    name: str = "predict",
    single_device_seconds: float = 0.0093,
) -> Plan:
    """x -> encoder on the first device -> h, skip -> decoder on the second -> y."""
    image, h, skip, logits = f32(64, 784), f32(64, 512), f32(64, 128), f32(64, 10)
    weights = (f32(784, 512), f32(640, 10))
    first = Task(task_names[0], "xla", "k0", (image, weights[0]), (h, skip), (), (layers[0],), 6, 5.1e7, 2e6, 4.1e-3)
    second = Task(task_names[1], "xla", "k1", (h, skip, weights[1]), (logits,), (0,), (layers[1],), 4, 6e7, 2e5, 4.7e-3)
    message = Message(*names, (transfer(*names, h, layers[0]), transfer(*names, skip, layers[0])))
    programs = (
        Program(
            names[0],
            (
                Feed((0, 1), (0, 1)),
                Run(0, (0, 1), (2, 3)),
                Send(0, (2, 3)),
                Free((0, 2, 3)),
            ),
        ),
        Program(
            names[1],
            (
                Feed((2,), (0,)),
                Recv(0, (1, 2)),
                Run(1, (1, 2, 0), (3,)),
                Fetch((0,), (3,)),
                Free((0, 3)),
            ),
            ((4, 0),),
        ),
    )
    return Plan(
        name=name,
        devices=names,
        programs=programs,
        tasks=(first, second),
        messages=(message,),
        executables={"k0": b"0", "k1": b"1"},
        inputs=(image, *weights),
        input_names=("x", f"params[{layers[0]}]", f"params[{layers[1]}]"),
        outputs=(Output(logits, "fetch", 0), Output(image, "input", 0)),
        constants=(Constant(f32(2), b"\0" * 8),),
        estimate=Estimate(
            9.4e-3, dict(zip(names, (4_200_000, 900_000), strict=True)), message.nbytes, single_device_seconds
        ),
        choices=(
            Choice("one device", single_device_seconds, 4_600_000, "no transfers"),
            Choice("pipeline of 2", 9.4e-3, 4_200_000, f"cut after {layers[0]}", chosen=True),
            Choice("pipeline of 3", 1.21e-2, 4_100_000, "stage 2 would wait for the link"),
        ),
        notes=("a constant of 8 B lives on the second device",),
        nodes=(
            NodeView(0, "dot_general", layers[0], names[0], (), task_names[0]),
            NodeView(1, "dot_general", layers[1], names[1], (0,), task_names[1]),
        ),
    )


def hostile_plan() -> Plan:
    """Every name that reaches a picture breaks out of SVG, HTML or DOT if it is not escaped."""
    return pipeline_plan(
        (f"worker:0/{HOSTILE}", f"worker:1/{HOSTILE}"),
        (f"a {HOSTILE}", f"b {HOSTILE}"),
        (f"t0 {HOSTILE}", f"t1 {HOSTILE}"),
        name=HOSTILE,
    )


_ITEM, _MICROBATCHES = 32, 4
_SIZES = {
    "conv1": (f32(5, 5, 1, 8), f32(8)),
    "conv2": (f32(5, 5, 8, 16), f32(16)),
    "fc1": (f32(784, 512), f32(512)),
    "fc2": (f32(512, 10), f32(10)),
}


def _stores(replicas: tuple[tuple[str, str], ...]) -> tuple[StoreSpec, ...]:
    rules = {
        "conv1": (Policy(staleness=UNBOUNDED, every=4, apply="sum"), 0),
        "conv2": (Policy(staleness=UNBOUNDED, every=4, apply="sum"), 1),
        "fc1": (Policy(quorum=Quorum(0.75), payload=Factors()), 2),
        "fc2": (Policy(staleness=3), 3),
    }
    leaves = count()
    state = count()
    return tuple(_store(name, index, rule, replicas, leaves, state) for index, (name, rule) in enumerate(rules.items()))


def _store(
    name: str,
    index: int,
    rule: tuple[Policy, int],
    replicas: tuple[tuple[str, str], ...],
    leaves: Iterator[int],
    state: Iterator[int],
) -> StoreSpec:
    policy, home = rule
    specs = _SIZES[name]
    stage = 0 if name.startswith("conv") else 1
    rows = _ITEM // _MICROBATCHES
    payload = (f32(_MICROBATCHES, rows, 784), f32(_MICROBATCHES, rows, 512), f32(512)) if name == "fc1" else specs
    return StoreSpec(
        name=name,
        buffers=(
            *(
                Buffer(f"{name}/{n}", s, "parameter", next(leaves))
                for n, s in zip(("kernel", "bias"), specs, strict=True)
            ),
            *(Buffer(f"optimizer/{i}/{name}", s, "state", next(state)) for i, s in enumerate(specs + specs)),
        ),
        home=replicas[home][stage],
        readers=tuple(r[stage] for r in replicas),
        parts=(Part(stage, (0, 1), payload, factors=name == "fc1"),),
        policy=policy,
        applies=Applies(4, 4 + index),
    )


def _training_tasks(microbatch: int) -> tuple[Task, ...]:
    x, h = f32(microbatch, 28, 28, 1), f32(microbatch, 784)
    conv = _SIZES["conv1"] + _SIZES["conv2"]
    dense = _SIZES["fc1"] + _SIZES["fc2"]
    deltas = (f32(microbatch, 784), f32(microbatch, 512))
    applies = tuple(
        Task(f"apply {n}", "xla", f"apply-{n}", s + s + s, s + s + s, (), (n,), 12, 1e5) for n, s in _SIZES.items()
    )
    return (
        Task("forward", "xla", "f0", (x, *conv), (h,), (), ("conv1", "conv2"), 11, 1.8e7, 4e5, 1.2e-3),
        Task(
            "forward + backward", "xla", "f1", (h, *dense), (f32(), h, *deltas, f32(512), f32(512, 10), f32(10)), (),
            ("fc1", "fc2"), 34, 2.4e7, 2e6, 1.5e-3,
        ),
        Task("backward conv2", "xla", "b2", (x, h, *conv[2:]), (h, *conv[2:]), (), ("conv2",), 13, 2.2e7, 6e5, 1.1e-3),
        Task("backward conv1", "xla", "b1", (x, h, *conv[:2]), conv[:2], (), ("conv1",), 9, 0.9e7, 3e5, 0.7e-3),
        *applies,
    )  # fmt: skip


def _first_stage(down: int, up: int) -> tuple[Instruction, ...]:
    """1F1B with two stages: one forward ahead of the backward passes."""
    body: list[Instruction] = [Read(0, (0, 1), (0, 1)), Read(1, (0, 1), (2, 3))]

    def forward(m: int) -> None:
        body.extend(
            (
                Feed((0,), (10 + m,), m),
                Run(0, (10 + m, 0, 1, 2, 3), (20 + m,), m),
                Send(down, (20 + m,), m),
            )
        )

    def backward(m: int) -> None:
        body.extend((Recv(up, (30,), m), Run(2, (10 + m, 30, 2, 3), (31, 40, 41), m)))
        body.extend((Run(3, (10 + m, 31, 0, 1), (42, 43), m), Free((10 + m, 20 + m, 30, 31))))

    forward(0)
    for m in range(1, _MICROBATCHES):
        forward(m)
        backward(m - 1)
    backward(_MICROBATCHES - 1)
    return (*body, Push(1, 0, (40, 41)), Push(0, 0, (42, 43)))


def _second_stage(down: int, up: int) -> tuple[Instruction, ...]:
    body: list[Instruction] = [Read(2, (0, 1), (0, 1)), Read(3, (0, 1), (2, 3))]
    for m in range(_MICROBATCHES):
        body.append(Recv(down, (10,), m))
        body.append(Run(1, (10, 0, 1, 2, 3), (11, 12, 13, 14, 15, 16, 17), m))
        body.extend((Send(up, (12,), m), Fetch((0,), (11,), m)))
    return (*body, Push(3, 0, (16, 17)), Push(2, 0, (13, 14, 15)))


def training_plan(replicas: int = 4) -> Plan:
    """A conv net in two stages on each of `replicas` replicas, four microbatches, a policy for every layer."""
    grid = tuple((f"worker:{2 * r}/cpu:0", f"worker:{2 * r + 1}/cpu:0") for r in range(replicas))
    microbatch = _ITEM // _MICROBATCHES
    h = f32(microbatch, 784)
    messages: list[Message] = []
    programs: list[Program] = []
    for first, second in grid:
        down = len(messages)
        messages.append(Message(first, second, (transfer(first, second, h, "conv2"),)))
        messages.append(Message(second, first, (transfer(second, first, h, "fc1"),)))
        programs.append(Program(first, _first_stage(down, down + 1)))
        programs.append(Program(second, _second_stage(down, down + 1)))
    devices = tuple(p.device for p in programs)
    peak = {d: 1_900_000 if i % 2 == 0 else 8_600_000 for i, d in enumerate(devices)}
    return Plan(
        name="loss",
        devices=devices,
        programs=tuple(programs),
        tasks=_training_tasks(microbatch),
        messages=tuple(messages),
        executables={},
        inputs=(f32(microbatch, 28, 28, 1),),
        input_names=("image",),
        outputs=(Output(f32(), "fetch", 0),),
        constants=(),
        estimate=Estimate(1.9e-2, peak, _MICROBATCHES * sum(m.nbytes for m in messages), 6.9e-2),
        choices=(
            Choice("one device", 6.9e-2, 10_500_000),
            Choice("Pipeline(stages=2) x 4", 1.9e-2, 8_600_000, "cut after conv2", chosen=True),
        ),
        notes=("fc1 is pushed as factors: 164.0 KiB instead of 1.53 MiB",),
        training=Training(
            replicas=grid,
            stores=_stores(grid if replicas >= 4 else (grid * 4)[:4]),
            microbatches=_MICROBATCHES,
            item_size=_ITEM,
            batch_leaves=1,
            batch_specs=(f32(_ITEM, 28, 28, 1),),
            batch_paths=("image",),
            takes_rng=False,
            schedule="1f1b",
        ),
    )


def all_reduce_plan(replicas: int = 4) -> Plan:
    """As `training_plan`, with `conv1` and `fc2` added up among the replicas."""
    plan = training_plan(replicas)
    assert plan.training is not None
    grid = plan.training.replicas
    stores = list(plan.training.stores)
    for index, schedule, topology in ((0, "doubling", AllReduce()), (3, "ring", Ring())):
        store = stores[index]
        (part,) = store.parts
        homes = tuple(r[part.stage] for r in grid)
        workers = tuple(h.partition("/")[0] for h in homes)
        hosts = tuple(range(len(workers)))
        size = sum(s.nbytes for s in part.payload) // 4
        part = replace(part, payload=(f32(size),), reduction=Reduction(schedule, workers, hosts))
        stores[index] = replace(store, parts=(part,), home=homes[0], homes=homes, policy=Policy(topology))
    return replace(plan, training=replace(plan.training, stores=tuple(stores)))

"""Turns a plan into boxes and arrows without sizes or positions, which all drawings share.

A plan lists instructions, but a reader wants to see tasks and the data between them. `make_scene` walks each
device's program once and follows buffers from the instruction that fills them to those that use them. It keeps
one box for each task (with the number of its microbatches) and one arrow for each message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from flowml.instructions import Feed, Fetch, Read, Recv, Run, Send
from flowml.plan import ArraySpec, Message, Partition, Plan, Program, StoreSpec, Task
from flowml.policy.filtering import pushed_size
from flowml.render.units import bytes_text, flops_text, listed, plural, seconds_text

FEED, TASK, PYTHON, FETCH = "feed", "task", "python", "fetch"
MESSAGE, LOCAL = "message", "local"


@dataclass(frozen=True)
class Box:
    """A task, or what a device receives from the driver or sends to it. `order` is its position in the program.

    `short` is a one-word title for small boxes.
    """

    id: str
    kind: str
    title: str
    facts: tuple[str, ...]
    device: str
    order: int
    detail: str
    short: str = ""
    level: int = 0


@dataclass(frozen=True)
class Arrow:
    """Data that flows from one box to another: a message between devices, or a buffer within one."""

    source: str
    target: str
    kind: str
    nbytes: int
    label: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Card:
    """One device: its boxes and its total work. `homes` are the stores whose home it is."""

    device: str
    facts: tuple[str, ...]
    boxes: tuple[Box, ...]
    homes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cylinder:
    """A store: the home of a layer's parameters, and the policy that keeps them in step."""

    id: str
    name: str
    home: str
    policy: str
    facts: tuple[str, ...]
    stage: int
    detail: str


@dataclass(frozen=True)
class Scene:
    """Everything that a drawing shows. `grid` lists the devices of each replica by stage (empty without training)."""

    name: str
    headline: str
    cards: tuple[Card, ...]
    arrows: tuple[Arrow, ...]
    stores: tuple[Cylinder, ...] = ()
    grid: tuple[tuple[str, ...], ...] = ()

    @property
    def boxes(self) -> tuple[Box, ...]:
        return tuple(b for c in self.cards for b in c.boxes)


def make_scene(plan: Plan) -> Scene:
    """The boxes and arrows of `plan`."""
    fetched: dict[int, list[ArraySpec]] = {}
    for output in plan.outputs:
        if output.kind == FETCH:
            fetched.setdefault(output.index, []).append(output.spec)
    walks = [_Walk(plan, number, p, fetched) for number, p in enumerate(plan.programs)]
    for walk in walks:
        walk.run()
    arrows = [a for w in walks for a in w.arrows] + _message_arrows(plan, walks)
    levels = _levels([b for w in walks for b in w.boxes], arrows)
    training = plan.training
    homes: dict[str, list[str]] = {}
    for store in training.stores if training else ():
        for device in dict.fromkeys(store.copies):
            homes.setdefault(device, []).append(store.name)
    cards = tuple(_card(plan, w, p, levels, homes) for w, p in zip(walks, plan.partitions, strict=True))
    return Scene(
        name=plan.name,
        headline=headline(plan),
        cards=cards,
        arrows=tuple(arrows),
        stores=tuple(_cylinder(i, s) for i, s in enumerate(training.stores)) if training else (),
        grid=training.replicas if training else (),
    )


def headline(plan: Plan) -> str:
    """One line with the number of devices, stages and replicas, and the estimated time of a step."""
    parts = [plural(len(plan.programs), "device"), plural(len(plan.messages), "message")]
    if plan.training:
        stages = max((len(r) for r in plan.training.replicas), default=0)
        parts = [
            f"{plural(len(plan.training.replicas), 'replica')} × {plural(stages, 'stage')}",
            f"{plan.training.schedule}, {plural(plan.training.microbatches, 'microbatch', 'microbatches')}",
        ]
    parts.append(f"{seconds_text(plan.estimate.step_seconds)} a step")
    parts.append(f"{bytes_text(plan.estimate.transfer_bytes)} sent")
    return " · ".join(parts)


def spec_text(spec: ArraySpec) -> str:
    return f"{spec.dtype}[{','.join(map(str, spec.shape))}]"


def input_names(plan: Plan, slots: Iterable[int]) -> tuple[str, ...]:
    """The names of feed slots: arguments, or in training the leaves of the batch and the key."""
    names = plan.training.batch_paths if plan.training else plan.input_names
    spare = "key" if plan.training else "input"
    return tuple((names[s] or f"{spare} {s}") if s < len(names) else f"{spare} {s}" for s in slots)


def varies(store: StoreSpec) -> bool:
    """Whether filters make the size of a contribution depend on its values."""
    return any(not pushed_size(store.policy, p.payload, p.filtered)[1] for p in store.parts)


def push_text(store: StoreSpec) -> str:
    """The size of one contribution, and of the plain gradient if it differs."""
    pushed, plain = store.push_bytes, store.nbytes
    text = f"at most {bytes_text(pushed)}" if varies(store) else bytes_text(pushed)
    return text if pushed == plain else f"{text} (gradient {bytes_text(plain)})"


def home_text(store: StoreSpec) -> str:
    """The location of a store: one device, or a copy on every replica."""
    return f"all {len(store.homes)} replicas" if store.collective else store.home


@dataclass
class _Walk:
    """One pass over a device's program: finds the box or message that fills each buffer that a task uses.

    Only the first run of each task gives arrows, because the other microbatches repeat them.
    """

    plan: Plan
    number: int
    program: Program
    fetched: Mapping[int, Sequence[ArraySpec]]
    """The outputs that come from each fetch slot."""
    boxes: dict[str, Box] = field(default_factory=dict[str, Box])
    arrows: list[Arrow] = field(default_factory=list[Arrow])
    senders: dict[int, str] = field(default_factory=dict[int, str])
    receivers: dict[int, list[str]] = field(default_factory=dict[int, list[str]])

    def __post_init__(self) -> None:
        """Find the tasks without a box: those that add up gradients between microbatches or pack them."""
        stores = self.plan.training.stores if self.plan.training else ()
        self.housekeeping = {t for s in stores for p in s.parts for t in (p.accumulate, p.pack, p.finish)} - {None}
        self.runs = Counter(i.task for i in self.program.instructions if isinstance(i, Run))

    def run(self) -> None:
        origin: dict[int, str | int] = {}  # buffer -> the box that made it, or the message that brought it
        self._put_feed()
        for instruction in self.program.instructions:
            match instruction:
                case Feed(buffers=buffers):
                    origin.update(dict.fromkeys(buffers, self._id(FEED)))
                case Recv(message=message, buffers=buffers):
                    origin.update(dict.fromkeys(buffers, message))
                case Read(buffers=buffers):
                    for buffer in buffers:
                        origin.pop(buffer, None)
                case Run(task=task) if task in self.housekeeping:
                    pass
                case Run(task=task, inputs=inputs, outputs=outputs):
                    self._use(f"t{task}", inputs, self.plan.tasks[task].inputs, origin, partial(self._task_box, task))
                    origin.update(dict.fromkeys(outputs, self._id(f"t{task}")))
                case Send(message=message, buffers=buffers):
                    made = [o for b in buffers if isinstance(o := origin.get(b), str)]
                    if made:
                        self.senders.setdefault(message, made[-1])
                case Fetch(slots=slots, buffers=buffers):
                    self._use(
                        FETCH, buffers, [s for n in slots for s in self.fetched.get(n, ())], origin, self._fetch_box
                    )
                case _:
                    pass

    def _use(
        self,
        part: str,
        buffers: Sequence[int],
        specs: Sequence[ArraySpec],
        origin: Mapping[int, str | int],
        make: Callable[[], Box],
    ) -> None:
        if self._id(part) in self.boxes:
            return
        box = make()
        self.boxes[box.id] = box
        local: dict[str, int] = {}
        for position, buffer in enumerate(buffers):
            nbytes = specs[position].nbytes if position < len(specs) else 0
            match origin.get(buffer):
                case int(message):
                    self.receivers.setdefault(message, []).append(box.id)
                case str(source) if source != box.id:
                    local[source] = local.get(source, 0) + nbytes
                case _:
                    pass
        self.arrows += [Arrow(s, box.id, LOCAL, n, detail=bytes_text(n)) for s, n in local.items()]

    def _task_box(self, index: int) -> Box:
        task = self.plan.tasks[index]
        runs = self.runs[index]
        kind = PYTHON if task.kind == "python" else TASK
        box = self._box(f"t{index}", kind, task.name, _task_facts(task, runs), _task_detail(task, runs))
        return replace(box, short=", ".join(task.layers) or task.name)

    def _put_feed(self) -> None:
        slots = tuple(dict.fromkeys(s for i in self.program.instructions if isinstance(i, Feed) for s in i.slots))
        if slots:
            specs = self.plan.training.batch_specs if self.plan.training else self.plan.inputs
            names = input_names(self.plan, slots)
            total = bytes_text(sum(specs[s].nbytes for s in slots if s < len(specs)))
            box = self._box(FEED, FEED, listed(names, 2), (total,), "from the driver:\n" + "\n".join(names))
            self.boxes[box.id] = box

    def _fetch_box(self) -> Box:
        fetched = {s for i in self.program.instructions if isinstance(i, Fetch) for s in i.slots}
        slots = sorted(fetched & set(self.fetched)) or sorted(
            fetched
        )  # without the tokens of effects, if there is more
        names = tuple("loss" if self.plan.training and s == 0 else f"output {s}" for s in slots)
        title = names[0] if len(names) == 1 else f"outputs {listed(tuple(map(str, slots)), 3)}"
        total = sum(spec.nbytes for slot in slots for spec in self.fetched.get(slot, ()))
        facts = (bytes_text(total),) if total else ()
        return self._box(FETCH, FETCH, title, facts, "to the driver:\n" + "\n".join(names))

    def _box(self, part: str, kind: str, title: str, facts: tuple[str, ...], detail: str) -> Box:
        return Box(self._id(part), kind, title, facts, self.program.device, len(self.boxes), detail, title)

    def _id(self, part: str) -> str:
        return f"d{self.number}-{part}"


def _message_arrows(plan: Plan, walks: Sequence[_Walk]) -> list[Arrow]:
    """One labelled arrow for each message, and unlabelled arrows to other tasks that use its values."""
    arrows: list[Arrow] = []
    times = plan.training.microbatches if plan.training else 1
    senders = {index: box for w in walks for index, box in w.senders.items()}
    receivers: dict[int, list[str]] = {}
    for walk in walks:
        for index, boxes in walk.receivers.items():
            receivers.setdefault(index, []).extend(boxes)
    for index, message in enumerate(plan.messages):
        source = senders.get(index)
        targets = dict.fromkeys(receivers.get(index, ()))
        if source is not None:
            label = bytes_text(message.nbytes) + (f" × {times}" if times > 1 else "")
            detail = _message_detail(message, times)
            for target in targets:
                arrows.append(Arrow(source, target, MESSAGE, message.nbytes, label, detail))
                label = ""
    return arrows


def _levels(boxes: Sequence[str], arrows: Sequence[Arrow]) -> dict[str, int]:
    """The length of the longest path to each box. An arrow that closes a cycle (an accumulator) is ignored."""
    sources: dict[str, list[str]] = {b: [] for b in boxes}
    for arrow in arrows:
        sources[arrow.target].append(arrow.source)
    levels: dict[str, int] = {}
    for start in boxes:
        stack = [(start, iter(sources[start]))] if start not in levels else []
        open_boxes = {start}
        while stack:
            box, waiting = stack[-1]
            deeper = next((s for s in waiting if s not in levels and s not in open_boxes), None)
            if deeper is None:
                stack.pop()
                levels[box] = max((levels[s] + 1 for s in sources[box] if s in levels), default=0)
            else:
                open_boxes.add(deeper)
                stack.append((deeper, iter(sources[deeper])))
    return levels


def _card(
    plan: Plan,
    walk: _Walk,
    partition: Partition,
    levels: Mapping[str, int],
    homes: Mapping[str, Sequence[str]],
) -> Card:
    peak = plan.estimate.peak_bytes.get(partition.device)
    facts = [flops_text(partition.flops)]
    if peak is not None:
        facts.append(f"peak {bytes_text(peak)}")
    boxes = tuple(replace(b, level=levels[b.id]) for b in walk.boxes.values())
    return Card(partition.device, tuple(facts), boxes, tuple(homes.get(partition.device, ())))


def _task_facts(task: Task, runs: int) -> tuple[str, ...]:
    effort = [flops_text(task.flops)] if task.flops else []
    effort += [seconds_text(task.seconds)] if task.seconds else []
    times = f"{runs} × " if runs > 1 and effort else ""
    layers = ", ".join(task.layers)
    told = task.name == layers or task.name.endswith(f":{layers}")
    return tuple(f for f in ("" if told else layers, times + " · ".join(effort)) if f)


def _task_detail(task: Task, runs: int) -> str:
    lines = [
        f"{task.name}: {plural(task.nodes, 'node')}, runs {plural(runs, 'time')} a step",
        f"layers: {', '.join(task.layers) or 'none'}",
        f"{flops_text(task.flops)}, {bytes_text(task.nbytes)} touched, {seconds_text(task.seconds)} each",
        f"in: {listed(tuple(map(spec_text, task.inputs)), 8)}",
        f"out: {listed(tuple(map(spec_text, task.outputs)), 8)}",
    ]
    return "\n".join(lines)


def _message_detail(message: Message, times: int) -> str:
    values = [
        f"{t.layer or 'value'}: {spec_text(ArraySpec(t.shape, t.dtype))}, {bytes_text(t.nbytes)}"
        for t in message.transfers
    ]
    often = f", {times} times a step" if times > 1 else ""
    return "\n".join([f"{message.source} → {message.destination}{often}", *values])


def _cylinder(index: int, store: StoreSpec) -> Cylinder:
    stage = min((p.stage for p in store.parts), default=0)
    every = f" {store.policy.every.describe()}" if store.every > 1 else ""
    facts = (store.policy.describe(), f"push {push_text(store)}{every}", f"home {home_text(store)}")
    detail = "\n".join(
        [
            f"{store.name}: {bytes_text(store.nbytes)} in {plural(len(store.leaves), 'leaf', 'leaves')}",
            f"policy: {store.policy.describe()}",
            f"home: {home_text(store)}",
            f"read by: {listed(store.readers, 8)}",
            f"one contribution: {push_text(store)}",
            *store.paths[:12],
        ]
    )
    return Cylinder(f"s{index}", store.name, store.home, policy_kind(store), facts, stage, detail)


def policy_kind(store: StoreSpec) -> str:
    """One word for the policy of a store, for legends."""
    if any(p.factors for p in store.parts):
        return "factors"
    if store.every > 1:
        return "periodic"
    if store.policy.staleness == float("inf"):
        return "asynchronous"
    return "bounded" if store.policy.staleness > 0 else "synchronous"

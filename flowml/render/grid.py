"""Lays out a training plan: a row for each stage, a column for each replica, and the stores of a stage at the right.

Replicas do the same work, so the first shows its tasks in full and the others show only titles. Pushes and
publications of a stage share one bus instead of an arrow for each pair. Within a stage data goes down on the left
(forward) and up on the right (backward). A chart below shows when each device runs each task and microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flowml.plan import Plan
from flowml.render.drawing import (
    TINTS,
    Bar,
    Drawing,
    Path,
    PlacedBox,
    PlacedCard,
    PlacedStore,
    Rect,
    Words,
    bracket,
    elbow,
    text_width,
    weight,
)
from flowml.render.scene import FEED, FETCH, MESSAGE, Arrow, Box, Card, Scene
from flowml.render.timeline import timeline
from flowml.render.units import bytes_text, seconds_text

MARGIN = 28.0
_TOP = 146.0
_LEFT = 92.0
_PAD, _GAP, _MIDDLE, _COLUMN_GAP = 24.0, 12.0, 26.0, 24.0
_HEADER = 52.0
_ROW_GAP, _BUS = 64.0, 22.0
_WIDTH, _COMPACT_WIDTH = 186.0, 84.0
_STORE_WIDTH, _STORE_HEIGHT, _STORE_GAP = 236.0, 84.0, 14.0
_SHOWN_REPLICAS, _SHOWN_STORES = 6, 6
_BAR_HEIGHT, _CHART_WIDTH = 22.0, 900.0


@dataclass(frozen=True)
class _Cell:
    """One device's boxes: those of the column in which data goes down, and of the column in which it goes up."""

    card: Card
    down: tuple[Box, ...]
    up: tuple[Box, ...]
    compact: bool

    @property
    def width(self) -> float:
        return 2 * (_COMPACT_WIDTH if self.compact else _WIDTH) + _MIDDLE + 2 * _PAD

    @property
    def height(self) -> float:
        columns = (sum(_height(b, self.compact) + _GAP for b in column) for column in (self.down, self.up))
        return _HEADER + max(columns) + 6


def draw_grid(plan: Plan, scene: Scene) -> Drawing:
    """Place stages, replicas and stores of a training plan, and its timeline below."""
    builder = _Grid(plan, scene)
    builder.place()
    return builder.drawing()


def _height(box: Box, compact: bool) -> float:
    if compact:
        return 26.0
    return 42.0 if box.kind in (FEED, FETCH) else 34.0 + 16.0 * len(box.facts)


def _split(card: Card, scene: Scene, stage_of: Mapping[str, int], compact: bool) -> _Cell:
    """Split a card's tasks: from the first that receives from a later stage they go up, those before go down."""
    device_of = {b.id: b.device for b in scene.boxes}
    stage = stage_of[card.device]
    back = {a.target for a in scene.arrows if a.kind == MESSAGE and stage_of.get(device_of[a.source], -1) > stage}
    tasks = [b for b in card.boxes if b.kind not in (FEED, FETCH)]
    turn = next((i for i, b in enumerate(tasks) if b.id in back), (len(tasks) + 1) // 2)
    feeds = [b for b in card.boxes if b.kind == FEED]
    fetches = [b for b in card.boxes if b.kind == FETCH]
    return _Cell(card, (*feeds, *tasks[:turn], *fetches), tuple(tasks[turn:]), compact)


@dataclass
class _Grid:
    plan: Plan
    scene: Scene
    cards: list[PlacedCard] = field(default_factory=list[PlacedCard])
    placed: dict[str, PlacedBox] = field(default_factory=dict[str, PlacedBox])
    stores: list[PlacedStore] = field(default_factory=list[PlacedStore])
    paths: list[Path] = field(default_factory=list[Path])
    words: list[Words] = field(default_factory=list[Words])
    bars: list[Bar] = field(default_factory=list[Bar])
    crossings: dict[tuple[str, bool], list[Arrow]] = field(default_factory=dict[tuple[str, bool], list[Arrow]])
    rules: list[tuple[float, float, float, float]] = field(default_factory=list[tuple[float, float, float, float]])

    def __post_init__(self) -> None:
        grid = self.scene.grid
        self.shown = grid if len(grid) <= _SHOWN_REPLICAS else grid[: _SHOWN_REPLICAS - 1]
        self.stages = max((len(r) for r in grid), default=0)
        self.stage_of = {d: s for r in grid for s, d in enumerate(r)}
        by_device = {c.device: c for c in self.scene.cards}
        self.cells = [
            [_split(by_device[d], self.scene, self.stage_of, n > 0) for d in replica if d in by_device]
            for n, replica in enumerate(self.shown)
        ]
        self.store_rows = [[s for s in self.scene.stores if s.stage == stage] for stage in range(self.stages)]
        self.tints = self._tints()
        self.right = self.bottom = 0.0

    def _tints(self) -> dict[str, int]:
        """Colours; boxes with the same position and stage have the same colour in every replica."""
        order: dict[tuple[int, int], int] = {}
        tints: dict[str, int] = {}
        for replica in self.cells:
            for stage, cell in enumerate(replica):
                for box in cell.card.boxes:
                    if box.kind not in (FEED, FETCH):
                        tints[box.id] = order.setdefault((stage, box.order), len(order)) % TINTS
        return tints

    def place(self) -> None:
        heights = [
            max([c[s].height for c in self.cells if s < len(c)] + [self._stores_height(s)]) for s in range(self.stages)
        ]
        lefts = self._columns()
        hidden = len(self.scene.grid) - len(self.shown)
        store_x = self.right + (150.0 if hidden else 0.0) + 64.0
        y = _TOP
        for stage, height in enumerate(heights):
            self.words.append(Words(MARGIN, y + height / 2, f"stage {stage}", "heading"))
            for replica, cells in enumerate(self.cells):
                if stage < len(cells):
                    self._place_cell(cells[stage], Rect(lefts[replica], y, cells[stage].width, height))
            if hidden:
                more = Rect(self.right + 26, y, 118, height)
                self.words.append(Words(more.cx, more.cy, f"and {hidden:,} more", "muted", "middle"))
                self.words.append(Words(more.cx, more.cy + 16, "like these", "muted", "middle"))
            if self.store_rows[stage]:
                self._place_stores(stage, store_x, y, height)
            y += height + _ROW_GAP
        self.bottom = y - _ROW_GAP + _BUS + 8
        if self.scene.stores:
            self.right = store_x + _STORE_WIDTH
        for arrow in sorted(self.scene.arrows, key=lambda a: a.kind == MESSAGE):
            if arrow.source in self.placed and arrow.target in self.placed:
                self._arrow(arrow)
        self._label_crossings()
        self._chart()

    def _columns(self) -> list[float]:
        lefts: list[float] = []
        x = _LEFT
        for number, cells in enumerate(self.cells):
            lefts.append(x)
            width = max((c.width for c in cells), default=0.0)
            self.words.append(Words(x + width / 2, _TOP - _BUS - 12, f"replica {number}", "heading", "middle"))
            x += width + _COLUMN_GAP
        self.right = x - _COLUMN_GAP
        return lefts

    def _stores_height(self, stage: int) -> float:
        count = min(len(self.store_rows[stage]), _SHOWN_STORES)
        more = 22.0 if len(self.store_rows[stage]) > _SHOWN_STORES else 0.0
        return count * (_STORE_HEIGHT + _STORE_GAP) - (_STORE_GAP if count else 0.0) + more

    def _place_cell(self, cell: _Cell, at: Rect) -> None:
        self.cards.append(PlacedCard(cell.card, at))
        half = _COMPACT_WIDTH if cell.compact else _WIDTH
        left, right = at.x + _PAD, at.x + _PAD + half + _MIDDLE
        y = at.y + _HEADER
        for box in cell.down:
            height = _height(box, cell.compact)
            self._place_box(box, Rect(left, y, half if cell.up else at.w - 2 * _PAD, height), cell.compact)
            y += height + _GAP
        y = at.y + _HEADER + sum(_height(b, cell.compact) + _GAP for b in cell.up)
        for box in cell.up:
            height = _height(box, cell.compact)
            y -= height + _GAP
            self._place_box(box, Rect(right, y, half, height), cell.compact)

    def _place_box(self, box: Box, at: Rect, compact: bool) -> None:
        self.placed[box.id] = PlacedBox(box, at, self.tints.get(box.id, 0), compact)

    def _place_stores(self, stage: int, x: float, y: float, height: float) -> None:
        """Cylinders, and the bus that connects them to every device of the stage."""
        upwards = stage < self.stages / 2
        bus = y - _BUS if upwards else y + height + _BUS
        trunk = x - 26
        shown = self.store_rows[stage][:_SHOWN_STORES]
        top = y + (height - self._stores_height(stage)) / 2
        centres: list[float] = []
        for number, store in enumerate(shown):
            at = Rect(x, top + number * (_STORE_HEIGHT + _STORE_GAP), _STORE_WIDTH, _STORE_HEIGHT)
            self.stores.append(PlacedStore(store, at))
            centres.append(at.cy)
        if len(self.store_rows[stage]) > len(shown):
            rest = len(self.store_rows[stage]) - len(shown)
            below = top + len(shown) * (_STORE_HEIGHT + _STORE_GAP)
            self.words.append(Words(x + _STORE_WIDTH / 2, below + 8, f"and {rest} more", "muted", "middle"))
        cards = [c.at for c in self.cards if self.stage_of[c.card.device] == stage]
        edge = (lambda r: r.y) if upwards else (lambda r: r.bottom)
        far = centres[-1] if upwards else centres[0]
        detail = self._bus_detail(stage)
        self.paths.append(Path(elbow([(cards[0].cx, bus), (trunk, bus), (trunk, far)]), "bus", 2.4, detail))
        for card in cards:
            self.paths.append(Path(elbow([(card.cx, bus), (card.cx, edge(card))]), "stub", 1.8, detail))
        for store, centre in zip(shown, centres, strict=True):
            self.paths.append(Path(elbow([(trunk, centre), (x, centre)]), "stub", 1.8, store.detail, "", store.id))
        self.words.append(Words(x, bus + 4, self._bus_label(stage), "label"))

    def _bus_label(self, stage: int) -> str:
        return f"each replica pushes {bytes_text(self._pushed(stage))} a step"

    def _bus_detail(self, stage: int) -> str:
        return f"stage {stage}: every replica pushes to its stores, and reads what they publish"

    def _pushed(self, stage: int) -> float:
        stores = self.plan.training.stores if self.plan.training else ()
        return sum(s.part_bytes(p) / s.every for s in stores for p in s.parts if p.stage == stage)

    def _arrow(self, arrow: Arrow) -> None:
        source, target = self.placed[arrow.source], self.placed[arrow.target]
        if arrow.kind == MESSAGE:
            data, line = self._between_stages(arrow, source, target), weight(arrow.nbytes)
        else:
            data, line = self._within(source, target), 1.2
        if data:
            self.paths.append(Path(data, arrow.kind, line, arrow.detail, arrow.source, arrow.target))

    def _within(self, source: PlacedBox, target: PlacedBox) -> str:
        """A path to the next box of the column, or to the other column; a feed shows only its first use."""
        a, b = source.at, target.at
        if a.x != b.x:
            x1, x2 = (a.right, b.x) if a.x < b.x else (a.x, b.right)
            return "" if source.box.kind == FEED else f"M{x1},{a.cy}C{x2},{a.cy} {x1},{b.cy} {x2},{b.cy}"
        if abs(a.cy - b.cy) > (a.h + b.h) / 2 + _GAP + 2:
            return "" if source.box.kind == FEED else bracket(a.x, a.cy, b.x, b.cy, 9)
        return f"M{a.cx},{a.bottom}L{b.cx},{b.y}" if b.y > a.y else f"M{a.cx},{a.y}L{b.cx},{b.bottom}"

    def _between_stages(self, arrow: Arrow, source: PlacedBox, target: PlacedBox) -> str:
        """A path down along the left margin of the cards, or up along the right one; paths lie side by side."""
        a, b = source.at, target.at
        card = next(c.at for c in self.cards if c.card.device == source.box.device)
        downwards = b.y > a.y
        carried = self.crossings.setdefault((source.box.device, downwards), [])
        inset = 12 - 4 * (len(carried) % 3)
        carried.append(arrow)
        x = card.x + inset if downwards else card.right - inset
        start, end = (a.x, b.x) if downwards else (a.right, b.right)
        return elbow([(start, a.cy), (x, a.cy), (x, b.cy), (end, b.cy)], 7)

    def _label_crossings(self) -> None:
        """Label what crosses between stages of the first replica, with one line for each direction."""
        times = self.plan.training.microbatches if self.plan.training else 1
        for (device, downwards), arrows in self.crossings.items():
            if not self.shown or device not in self.shown[0]:
                continue
            sent = [a for a in arrows if a.label]
            many = f"{len(sent)} messages, " if len(sent) > 1 else ""
            text = many + bytes_text(sum(a.nbytes for a in sent)) + (f" × {times}" if times > 1 else "")
            at = next(c.at for c in self.cards if c.card.device == device)
            if downwards:
                self.words.append(Words(at.x + 20, at.bottom + _ROW_GAP / 2 + 4, text, "label"))
            else:
                self.words.append(Words(at.right - 20, at.y - _ROW_GAP / 2 + 4, text, "label", "end"))

    def _chart(self) -> None:
        """The timeline of the first replica."""
        replica = self.scene.grid[0] if self.scene.grid else ()
        runs = timeline(self.plan, replica)
        if not runs:
            return
        end_s = max(b.end_s for b in runs)
        left, top = _LEFT, self.bottom + 36
        width = max(self.right - left, _CHART_WIDTH)
        of = f"replica 0 of {len(self.scene.grid)}, " if len(self.scene.grid) > 1 else ""
        title = f"One step, estimated ({of}{seconds_text(end_s)}; the number is the microbatch)"
        self.words.append(Words(MARGIN, top - 16, title, "heading"))
        number = {d: f"d{i}" for i, d in enumerate(p.device for p in self.plan.programs)}
        for stage, device in enumerate(replica):
            y = top + stage * (_BAR_HEIGHT + 8)
            self.words.append(Words(MARGIN, y + 15, f"stage {stage}", "muted"))
            self.rules.append((left, y + _BAR_HEIGHT / 2, left + width, y + _BAR_HEIGHT / 2))
            for run in (r for r in runs if r.device == device):
                x, w = left + run.start_s / end_s * width, (run.end_s - run.start_s) / end_s * width
                task = self.plan.tasks[run.task]
                when = f"{seconds_text(run.start_s)} to {seconds_text(run.end_s)}"
                tint = self.tints.get(f"{number[device]}-t{run.task}", 0)
                at = Rect(x, y, max(w - 1, 1), _BAR_HEIGHT)
                detail = f"{task.name}, microbatch {run.microbatch}: {when}"
                self.bars.append(Bar(at, tint, str(run.microbatch), detail))
        self.bottom = top + len(replica) * (_BAR_HEIGHT + 8)
        self.right = max(self.right, left + width)

    def drawing(self) -> Drawing:
        words = (Words(MARGIN, 40, self.scene.name, "title"), Words(MARGIN, 62, self.scene.headline, "headline"))
        return Drawing(
            width=max(self.right, MARGIN + text_width(self.scene.headline, 13)) + MARGIN,
            height=self.bottom + 12,
            cards=tuple(self.cards),
            boxes=tuple(self.placed.values()),
            stores=tuple(self.stores),
            paths=tuple(self.paths),
            words=(*words, *self.words),
            bars=tuple(self.bars),
            rules=tuple(self.rules),
        )

"""The picture behind the formats: boxes, arrows, and when tasks run."""

from __future__ import annotations

from hypothesis import given, settings

from flowml.plan import Plan
from flowml.render.drawing import Rect, fit, text_width
from flowml.render.lanes import draw_lanes
from flowml.render.scene import FEED, MESSAGE, make_scene
from flowml.render.timeline import timeline
from tests.render import sample_plans
from tests.render.random_plans import plans


def test_one_box_a_task_and_one_arrow_a_message() -> None:
    scene = make_scene(sample_plans.training_plan())
    tasks = [b for b in scene.boxes if b.kind == "task"]
    assert len(tasks) == 4 * (3 + 1)
    messages = [a for a in scene.arrows if a.kind == MESSAGE]
    assert len(messages) == 8
    assert {a.label for a in messages} == {"24.5 KiB × 4"}


def test_stores_say_where_they_live_and_what_they_cost() -> None:
    scene = make_scene(sample_plans.training_plan())
    assert [(s.name, s.policy, s.stage) for s in scene.stores] == [
        ("conv1", "periodic", 0),
        ("conv2", "periodic", 0),
        ("fc1", "factors", 1),
        ("fc2", "bounded", 1),
    ]
    homes = {c.device: c.homes for c in scene.cards if c.homes}
    assert homes["worker:5/cpu:0"] == ("fc1",)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_arrows_go_down_to_later_levels(plan: Plan) -> None:
    scene = make_scene(plan)
    level = {b.id: b.level for b in scene.boxes}
    assert all(level[a.source] < level[a.target] for a in scene.arrows)
    reads = sum(1 for a in scene.arrows if a.kind == MESSAGE and a.label)
    assert reads == len(plan.messages)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_boxes_of_a_lane_lie_inside_it_and_apart(plan: Plan) -> None:
    drawing = draw_lanes(make_scene(plan))
    cards = {c.card.device: c.at for c in drawing.cards}
    for i, one in enumerate(drawing.boxes):
        assert _inside(one.at, cards[one.box.device])
        assert not any(_overlap(one.at, other.at) for other in drawing.boxes[i + 1 :])
    rows = {b.box.id: b.at.y for b in drawing.boxes}
    for arrow in make_scene(plan).arrows:
        assert rows[arrow.source] < rows[arrow.target]


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_task_runs_after_what_it_waits_for(plan: Plan) -> None:
    bars = {b.task: b for b in timeline(plan)}
    assert set(bars) == set(range(len(plan.tasks)))
    scene = make_scene(plan)
    task = {b.id: int(b.id.split("-t")[1]) for b in scene.boxes if "-t" in b.id}
    for arrow in scene.arrows:
        if arrow.source in task and arrow.target in task:
            assert bars[task[arrow.source]].end_s <= bars[task[arrow.target]].start_s


def test_timeline_overlaps_the_stages_of_a_pipeline() -> None:
    plan = sample_plans.training_plan()
    bars = timeline(plan, plan.training.replicas[0] if plan.training else ())
    assert len(bars) == 4 * (3 + 1)
    alone = sum(b.end_s - b.start_s for b in bars)
    assert max(b.end_s for b in bars) < alone


def test_a_plan_that_waits_for_ever_is_drawn_as_far_as_it_goes() -> None:
    plan = sample_plans.pipeline_plan()
    assert {b.task for b in timeline(plan, {plan.devices[1]})} == set()


def test_feeds_name_their_arguments() -> None:
    feeds = [b.title for b in make_scene(sample_plans.pipeline_plan()).boxes if b.kind == FEED]
    assert feeds == ["x, params[encoder]", "params[decoder]"]


def test_text_is_cut_to_the_width_it_has() -> None:
    assert fit("short", 200, 11) == "short"
    cut = fit("a very long name of a task that nobody can read", 80, 11)
    assert cut.endswith("…")
    assert text_width(cut, 11) <= 80


def _inside(inner: Rect, outer: Rect) -> bool:
    return outer.x <= inner.x and outer.y <= inner.y and inner.right <= outer.right and inner.bottom <= outer.bottom


def _overlap(a: Rect, b: Rect) -> bool:
    return a.x < b.right and b.x < a.right and a.y < b.bottom and b.y < a.bottom

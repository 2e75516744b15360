"""explain() says what was chosen and why; the text drawing lists what every device does."""

from __future__ import annotations

import re

import pytest

from flowml.plan import Choice
from flowml.render.text import draw_text, explain, why
from flowml.render.units import bytes_text, clip, flops_text, listed, plural, rate_text, seconds_text
from tests.render import sample_plans


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (12_864, "12.6 KiB"), (2**30, "1 GiB")],
)
def test_bytes(value: int, text: str) -> None:
    assert bytes_text(value) == text.replace(",", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"),
        (2e-9, "2 ns"),
        (1.2e-5, "12 µs"),
        (4.1e-3, "4.1 ms"),
        (59.94, "59.9 s"),
        (125.0, "2 min 5 s"),
        (float("inf"), "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds_text(value) == text


def test_small_words() -> None:
    assert flops_text(5.1e7) == "51 MFLOP"
    assert (rate_text(6.12e9), rate_text(float("inf"))) == ("6.12 GB/s", "by reference")
    assert (plural(1, "task"), plural(2, "leaf", "leaves")) == ("1 task", "2 leaves")
    assert listed(("a", "b", "c", "d"), 2) == "a, b and 2 more"
    assert clip("two\nlines and more", 9) == "two line…"


def test_explain_names_the_choice_the_alternatives_and_the_reason() -> None:
    text = explain(sample_plans.pipeline_plan())
    assert "→  pipeline of 2" in text
    assert "stage 2 would wait for the link" in text
    assert "one device would take 9.3 ms, but 4.39 MiB of memory where the chosen one takes 4.01 MiB." in text


def test_explain_says_what_replicas_add_up() -> None:
    plan = sample_plans.all_reduce_plan()
    text = explain(plan)
    assert re.search(r"\n  fc2 +sync, ring +all 4 replicas", text)
    stores = plan.training.stores if plan.training else ()
    doubling, ring = (stores[i].push_bytes for i in (0, 3))
    assert (
        f"  Replicas add up {bytes_text(doubling + ring)} a step in 2 buckets (1 by doubling, 1 by ring); "
        f"each worker sends {bytes_text((2 * doubling * 4 + 1.5 * ring * 4) / 8)} for that on average."
    ) in text
    assert "fc2 → the sum of all replicas  gradient" in draw_text(plan)
    assert "add up" not in explain(sample_plans.training_plan())


def test_explain_says_when_one_device_would_be_faster() -> None:
    slower = explain(sample_plans.pipeline_plan(single_device_seconds=0.008))
    assert "One device would be faster: 8 ms instead of 9.4 ms a step." in slower
    faster = explain(sample_plans.pipeline_plan(single_device_seconds=0.0188))
    assert "This plan is 2 times as fast as one device." in faster
    assert "One device would be faster" not in faster


def test_why_falls_back_to_the_note_of_the_faster_one() -> None:
    assert why((Choice("a", 1.0, 5, "too many devices"), Choice("b", 2.0, 5, chosen=True))) == (
        "a would take 1 s: too many devices."
    )
    assert why((Choice("b", 2.0, 5, chosen=True),)) == ""


def test_explain_gives_every_device_and_transfer_with_units() -> None:
    rows = [line.split() for line in explain(sample_plans.pipeline_plan()).splitlines()]
    assert ["worker:1/cpu:0", "1", "60", "MFLOP", "195", "KiB", "879", "KiB", "decoder"] in rows
    assert ["worker:0/cpu:0", "worker:1/cpu:0", "encoder", "float32[64,512]", "128", "KiB"] in rows


def test_explain_of_training_compares_what_is_pushed_with_the_gradient() -> None:
    text = explain(sample_plans.training_plan())
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "164 KiB (gradient 1.53 MiB)" in rows["fc1"]
    assert "async, every 4, sum" in rows["conv1"]
    assert "replica 3" in text
    assert "Each replica pushes 187 KiB a step; plain gradients would take 1.57 MiB." in text
    assert "of replica 0; the others send the same" in text


def test_draw_text_shares_one_listing_between_replicas() -> None:
    text = draw_text(sample_plans.training_plan())
    assert text.count("push   fc1") == 1
    assert "the same list, with its own peers, on worker:3/cpu:0, worker:5/cpu:0, worker:7/cpu:0" in text
    chart = text[text.index("Timeline") : text.index("\n\nworker")].splitlines()
    assert [line.split()[0] for line in chart[1:3]] == ["worker:0/cpu:0", "worker:1/cpu:0"]


def test_no_name_can_forge_a_line() -> None:
    plain, hostile = sample_plans.pipeline_plan(), sample_plans.hostile_plan()
    for draw in (explain, draw_text):
        assert draw(plain).count("\n") == draw(hostile).count("\n")

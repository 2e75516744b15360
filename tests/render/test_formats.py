"""SVG, HTML and DOT: well formed, complete, alone on their own, and safe whatever the names are."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from flowml.errors import FlowmlError
from flowml.plan import Plan
from flowml.render import draw_dot, draw_html, draw_svg, render
from tests.render import sample_plans
from tests.render.random_plans import plans

SVG = "{http://www.w3.org/2000/svg}"
PLANS = {
    "pipeline": sample_plans.pipeline_plan(),
    "training": sample_plans.training_plan(),
    "one replica": sample_plans.training_plan(1),
    "all-reduce": sample_plans.all_reduce_plan(),
    "many replicas": sample_plans.training_plan(20),
    "hostile": sample_plans.hostile_plan(),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


class _Page(HTMLParser):
    """Collects what a browser would see: elements with their attributes, and the text inside each."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag = self.inside[-1] if self.inside else ""
        self.text[tag] = self.text.get(tag, "") + data


@each_plan
def test_svg_is_well_formed_and_has_no_active_content(plan: Plan) -> None:
    root = ElementTree.fromstring(draw_svg(plan))
    tags = {e.tag.removeprefix(SVG) for e in root.iter()}
    assert tags <= {"svg", "title", "desc", "style", "defs", "marker", "path", "rect", "g", "text", "circle"}
    for element in root.iter():
        assert not any(name.startswith("on") or "href" in name for name in element.attrib)


def test_svg_shows_names_sizes_and_policies() -> None:
    text = " ".join(ElementTree.fromstring(draw_svg(PLANS["training"])).itertext())
    for expected in ("worker:7/cpu:0", "backward conv2", "24.5 KiB × 4", "fc1", "async ≤3", "stage 1", "replica 3"):
        assert expected in text
    assert "push 164 KiB (gradient 1.53 MiB)" in text


def test_many_replicas_are_summed_up() -> None:
    text = " ".join(ElementTree.fromstring(draw_svg(PLANS["many replicas"])).itertext())
    assert "and 15 more" in text
    assert "worker:8/cpu:0" in text
    assert "worker:38/cpu:0" not in text


@each_plan
def test_everything_lies_within_the_picture(plan: Plan) -> None:
    root = ElementTree.fromstring(draw_svg(plan))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        if "x" in element.attrib:
            assert 0 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height


def test_hostile_names_survive_as_text() -> None:
    tooltips = [e.text or "" for e in ElementTree.fromstring(draw_svg(PLANS["hostile"])).iter(f"{SVG}title")]
    assert any(sample_plans.HOSTILE in t for t in tooltips)


def test_what_xml_cannot_carry_is_replaced() -> None:
    plan = sample_plans.pipeline_plan(name="bell\x07 null\x00 half\ud800 end")
    assert ElementTree.fromstring(draw_svg(plan)).findtext(f"{SVG}title") == "bell\ufffd null\ufffd half\ufffd end"


@each_plan
def test_html_stands_alone_under_its_own_policy(plan: Plan) -> None:
    page = _Page(draw_html(plan))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert tags.count("style") == 1
    assert not {"link", "img", "iframe", "object", "embed", "base", "a"} & set(tags)
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("src", "href", "style") for name in attributes)
    policy = next(a["content"] or "" for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.text[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_html_shows_hostile_names_as_text_only() -> None:
    page = _Page(draw_html(PLANS["hostile"]))
    assert "<script>alert('x')</script>" in page.text["td"]
    assert "alert('x')" not in page.text["script"]


def test_a_store_with_a_copy_for_each_replica_is_shown_as_such() -> None:
    plan = PLANS["all-reduce"]
    text = " ".join(ElementTree.fromstring(draw_svg(plan)).itertext())
    assert "home all 4 replicas" in text
    assert "all 4 replicas" in _Page(draw_html(plan)).text["td"]


def test_html_has_every_table() -> None:
    text = _Page(draw_html(PLANS["training"])).text
    for title in ("Layers and their policies", "Devices", "Tasks", "Transfers", "Notes"):
        assert title in text["h2"]
    assert "float32[8,784]" in text["td"]


@each_plan
def test_dot_keeps_names_inside_quotes(plan: Plan) -> None:
    source = draw_dot(plan)
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', source, flags=re.S)
    assert '"' not in outside.replace('""', "")
    assert "alert" not in outside
    assert "=<" not in outside
    assert outside.count("{") == outside.count("}")


def test_dot_ties_stores_to_stages_by_one_point_each() -> None:
    source = draw_dot(PLANS["training"])
    assert source.count("shape=cylinder") == 4
    assert len(re.findall(r"-> bus\d", source)) == 8
    assert len(re.findall(r"bus\d -> s\d", source)) == 4
    assert len(re.findall(r"subgraph cluster_device\d+", source)) == 8
    assert source.count("24.5 KiB × 4") == 8


@settings(max_examples=25, deadline=None)
@given(plans())
def test_any_plan_can_be_drawn(plan: Plan) -> None:
    ElementTree.fromstring(draw_svg(plan))
    assert draw_dot(plan).count(" -> ") >= len(plan.messages)
    assert plan.explain().startswith("random: ")


def test_drawings_do_not_change_from_run_to_run() -> None:
    for draw in (draw_svg, draw_html, draw_dot):
        assert draw(sample_plans.training_plan()) == draw(sample_plans.training_plan())


@pytest.mark.parametrize(
    ("suffix", "start"), [("svg", "<svg"), ("html", "<!DOCTYPE html>"), ("dot", "digraph"), ("txt", "predict")]
)
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str, start: str) -> None:
    written = PLANS["pipeline"].render(tmp_path / f"g.{suffix.upper()}")
    assert written == tmp_path / f"g.{suffix.upper()}"
    assert written.read_text(encoding="utf-8").startswith(start)


def test_half_a_character_in_a_name_is_no_reason_to_fail(tmp_path: Path) -> None:
    for suffix in ("svg", "html", "dot", "txt"):
        sample_plans.pipeline_plan(name="half\ud800").render(tmp_path / f"g.{suffix}")


def test_another_suffix_names_the_four(tmp_path: Path) -> None:
    with pytest.raises(FlowmlError, match=r"g\.png.*\.svg, \.dot, \.txt, \.html"):
        render(PLANS["pipeline"], tmp_path / "g.png")


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FlowmlError, match=r"cannot write the drawing .*no/such/g.svg: No such file"):
        render(PLANS["pipeline"], tmp_path / "no" / "such" / "g.svg")

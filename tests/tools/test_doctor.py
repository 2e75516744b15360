"""`flowml doctor` measures this machine."""

from __future__ import annotations

import json
import os

import flowml as fm
from flowml_runtime.links.cache import RememberedLinks
from flowml_runtime.links.table import HERE


def test_doctor_reports_measured_facts_as_json_and_remembers_the_links(flowml) -> None:
    report = json.loads(flowml("doctor", "--json", check=True).stdout)
    assert report["versions"]["flowml"] == fm.__version__
    assert report["machine"]["usable cores"] == len(os.sched_getaffinity(0))
    assert 0 < report["machine"]["available memory"] <= report["machine"]["memory"]
    assert "cpu:0" in report["devices"]
    assert report["links"]["memcpy"]["bytes_per_s"] > 1e8
    for link in ("loopback TCP", "shared memory", "gRPC"):
        assert report["links"][link]["bytes_per_s"] > 1e7
        assert 0 < report["links"][link]["round_trip_s"] < 0.1
    assert "dot" in report["programs"]
    for way in ("shared memory", "gRPC"):  # what clusters will start with
        link = RememberedLinks().find(HERE, HERE, way)
        assert link is not None
        assert link.bytes_per_s == report["links"][way]["bytes_per_s"]
        assert 2 * link.latency_s == report["links"][way]["round_trip_s"]


def test_doctor_is_readable_and_leaves_no_process(flowml, no_leaks) -> None:
    with no_leaks():
        done = flowml("doctor", check=True)
    assert "round trip" in done.stdout
    assert done.stderr == ""

"""Recorded jobs: a replay agrees with a naive simulation and with published results, and damaged files are refused.

The published results are those of StragglerAnalysis (Lin et al., Understanding stragglers in large model training using
what-if analysis, arXiv 2505.05713) for its job ST: 2 replicas of 4 stages, 32 recorded steps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowml as fm
from flowml.sim.traces import parse_operations

YARDSTICKS = Path(os.environ.get("FLOWML_YARDSTICKS", Path(__file__).resolve().parents[3] / "shared" / "yardsticks"))
TRACES = YARDSTICKS / "straggler_traces"
HEADER = "dp_rank,stage,rank,step,optype,start_ts,duration,seq_id,mc,mb_id"

Slot = tuple[int, str, int]
"""rank, kind, number"""


def transfer(slot: Slot, replicas: int) -> tuple[Any, ...] | None:
    """What the members of a transfer have in common."""
    rank, kind, number = slot
    stage, replica = divmod(rank, replicas)
    match kind:
        case "forward-send" | "backward-recv":
            return kind[:8].partition("-")[0], replica, stage, stage + 1, number
        case "forward-recv" | "backward-send":
            return kind[:8].partition("-")[0], replica, stage - 1, stage, number
        case "grads-reduce-scatter":
            return kind, stage
        case "optimizer-clip-main-grad":
            return (kind,)
        case _:
            return None


def program(rank: int, replicas: int, stages: int, microbatches: int) -> list[Slot]:
    """What a worker does in a step, one thing after another: all forward, all backward, then the update."""
    stage = rank // replicas
    first, last = stage == 0, stage == stages - 1
    kinds: list[tuple[str, int]] = []
    for m in range(microbatches):
        kinds += [] if first else [("forward-recv", m)]
        kinds += [("forward-compute", m)]
        kinds += [] if last else [("forward-send", m)]
    for m in range(microbatches):
        kinds += [] if last else [("backward-recv", m)]
        kinds += [("backward-compute", m)]
        kinds += [] if first else [("backward-send", m)]
    kinds += [("grads-reduce-scatter", 0), ("optimizer-clip-main-grad", 0), ("optimizer", 0)]
    return [(rank, kind, number) for kind, number in kinds]


class Job:
    """A job of random durations and its naive simulation: rounds over all workers until each has done all."""

    def __init__(self, replicas: int, stages: int, microbatches: int, seed: int, *, gap_s: float = 0.0) -> None:
        self.replicas = replicas
        self.rng = np.random.default_rng(seed)
        self.programs = [program(rank, replicas, stages, microbatches) for rank in range(replicas * stages)]
        self.gap_s = gap_s
        self.durations: dict[Any, float] = {}
        for slot in (slot for slots in self.programs for slot in slots):
            scale = 0.02 if transfer(slot, replicas) else 0.2
            self.durations.setdefault(self.key(slot), scale * (0.5 + self.rng.random()))

    def key(self, slot: Slot) -> Any:
        return transfer(slot, self.replicas) or slot

    def run(self, durations: Mapping[Any, float], gap_s: float = 0.0) -> dict[Slot, tuple[float, float]]:
        """The start and end of each slot."""
        times: dict[Slot, tuple[float, float]] = {}
        starts: dict[Slot, float] = {}
        done = [0] * len(self.programs)
        while any(n < len(slots) for n, slots in zip(done, self.programs, strict=True)):
            for rank, slots in enumerate(self.programs):
                if done[rank] == len(slots):
                    continue
                slot = slots[done[rank]]
                before = times[slots[done[rank] - 1]][1] if done[rank] else 0.0
                starts.setdefault(slot, before + gap_s * self.rng.random())
                together = [s for own in self.programs for s in own if self.key(s) == self.key(slot)]
                if all(s in starts for s in together):
                    times[slot] = (starts[slot], max(starts[s] for s in together) + durations[self.key(slot)])
                    done[rank] += 1
        return times

    def lines(self, step: int) -> list[str]:
        times = self.run(self.durations, self.gap_s)
        n = self.replicas
        return [
            f"{rank % n},{rank // n},{rank},{step},{kind},{begin!r},{end - begin!r},{number},-1,-1"
            for (rank, kind, number), (begin, end) in sorted(times.items(), key=lambda item: (item[0][0], item[1]))
        ]


def seconds(times: Mapping[Slot, tuple[float, float]]) -> float:
    return max(end for _, end in times.values())


def table(*jobs: Job) -> str:
    return "\n".join([HEADER, *(line for step, job in enumerate(jobs) for line in job.lines(step))]) + "\n"


def recording(*jobs: Job) -> fm.sim.Recording:
    return fm.sim.Recording(parse_operations(table(*jobs), "job.csv"))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([0.0, 0.001]))
@settings(deadline=None, max_examples=60)
def test_a_replay_gives_the_step_times_without_the_launch_gaps(
    replicas: int, stages: int, microbatches: int, seed: int, gap_s: float
) -> None:
    jobs = [Job(replicas, stages, microbatches, seed + i, gap_s=gap_s) for i in range(2)]
    expected = {step: seconds(job.run(job.durations)) for step, job in enumerate(jobs)}
    assert recording(*jobs).replay() == pytest.approx(expected, abs=1e-9)


@given(st.integers(2, 3), st.integers(2, 4), st.integers(1, 3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_what_if_agrees_with_a_simulation_of_the_changed_durations(
    replicas: int, stages: int, microbatches: int, seed: int
) -> None:
    job = Job(replicas, stages, microbatches, seed)
    found = recording(job)
    names = {"forward": "forward transfer", "backward": "backward transfer"}

    def ideal(chosen: Callable[[int], bool]) -> float:
        changed = {}
        for key, own in job.durations.items():
            slots = [s for slots in job.programs for s in slots if job.key(s) == key]
            kind = names.get(key[0], slots[0][1])
            changed[key] = max(found.ideal_s[kind] if chosen(rank) else own for rank, _, _ in slots)
        return seconds(job.run(changed))

    assert found.replay(lambda _: True)[0] == pytest.approx(ideal(lambda _: True), abs=1e-9)
    assert found.replay(lambda o: o.worker == 1)[0] == pytest.approx(ideal(lambda rank: rank == 1), abs=1e-9)
    last = stages - 1
    assert found.replay(lambda o: o.stage == last)[0] == pytest.approx(ideal(lambda r: r // replicas == last), abs=1e-9)


SMALL = f"""\
{HEADER}
0,0,0,7,forward-compute,0.0,1.0,0,0,0
0,0,0,7,forward-send,1.0,0.5,0,-1,-1
0,0,0,7,backward-recv,1.5,8.5,0,-1,-1
0,0,0,7,backward-compute,10.0,2.0,0,0,0
0,1,1,7,forward-recv,0.0,1.5,0,-1,-1
0,1,1,7,forward-compute,1.5,3.0,0,0,0
0,1,1,7,backward-compute,4.7,5.0,0,0,0
0,1,1,7,backward-send,9.7,0.3,0,-1,-1
"""


def test_a_job_that_a_person_can_follow() -> None:
    """Two stages: 1 s and 3 s forward, 2 s and 5 s backward, 0.5 s and 0.3 s to send; a gap of 0.2 s."""
    found = fm.sim.Recording(parse_operations(SMALL, "small.csv"))
    assert found.replay() == pytest.approx({7: 1 + 0.5 + 3 + 5 + 0.3 + 2})
    assert found.ideal_s["forward-compute"] == 2
    assert found.ideal_s["backward-compute"] == pytest.approx(3.5)
    assert found.replay(lambda _: True) == pytest.approx({7: 2 * (2 + 3.5) + 0.8})
    assert found.replay(lambda o: o.stage == 1) == pytest.approx({7: 1 + 0.5 + 2 + 3.5 + 0.3 + 2})
    assert found.slowdowns("stage") == pytest.approx({0: (2 + 3.5 + 1 + 2 + 0.8) / 11.8, 1: (8 + 5.5 + 0.8) / 11.8})
    assert found.compute_times() == (pytest.approx((11.0,)),)
    assert fm.sim.Recorded(found).seconds(0, 0, 0) == pytest.approx(11)


def test_a_computation_beside_a_transfer_does_not_wait_for_it() -> None:
    operations = [
        fm.sim.Operation(0, 0, 0, 0, "forward-compute", 0.0, 4.0),
        fm.sim.Operation(0, 0, 0, 0, "gather", 0.0, 1.0, transfer="gather"),
        fm.sim.Operation(0, 0, 0, 0, "backward-compute", 4.0, 5.0),
    ]
    found = fm.sim.Recording(operations)
    assert found.replay() == {0: 5.0}
    assert found.recovered(lambda o: o.kind == "gather") != 0  # NaN: nothing here is slower than its ideal


def damage(line: int, **fields: str) -> str:
    lines = SMALL.splitlines()
    values = dict(zip(HEADER.split(","), lines[line - 1].split(","), strict=True)) | fields
    return "\n".join([*lines[: line - 1], ",".join(values.values()), *lines[line:]]) + "\n"


DAMAGED = {
    "no column": (SMALL.replace("optype", "kind"), "job.csv, line 1: column 'optype' is missing"),
    "header alone": (HEADER + "\n", "job.csv, line 2: there is no row after the header; the file is cut short"),
    "half a line": (SMALL[: SMALL.rindex("0.3")], "job.csv, line 9: column 'seq_id' is missing; the line is cut short"),
    "no number": (damage(3, duration="long"), "job.csv, line 3, column 'duration': 'long' is not a number"),
    "negative": (damage(3, duration="-1"), "job.csv, line 3, column 'duration': '-1' is not a finite number"),
    "nan": (damage(4, start_ts="nan"), "job.csv, line 4, column 'start_ts': 'nan' is not a finite number"),
    "no worker": (damage(5, rank="-1"), "job.csv, line 5, column 'rank': '-1' is not a whole number of at least 0"),
    "no replica": (damage(5, dp_rank="-2"), "job.csv, line 5, column 'dp_rank': '-2' is not a whole number of"),
    "too far": (damage(5, step="1" + "0" * 20), "job.csv, line 5, column 'step': '1" + "0" * 20),
    "no integer": (damage(5, step="1.5"), "job.csv, line 5, column 'step': '1.5' is not a whole number"),
    "kind": (damage(2, optype="prefetch"), "job.csv, line 2, column 'optype': 'prefetch' is not a kind of operation"),
    "part": (damage(2, mc="1"), "job.csv, line 2, column 'mc': 1 is the second part"),
    "place": (
        damage(2, stage="1"),
        "column 'rank': worker 0 is stage 0 of replica 0 here, and another line contradicts",
    ),
    "twice": (damage(5, optype="forward-compute"), "line 5, column 'seq_id': forward-compute 0 of worker 0 in step 7"),
    "partner": (
        damage(9, seq_id="4"),
        "column 'optype': backward-recv 0 of worker 0 in step 7 has 0 of its 1 partners",
    ),
    "circle": (
        # Both sends first, then both receives, and each worker waits for its receive before it sends.
        f"{HEADER}\n0,0,0,0,backward-recv,0,1,0,-1,-1\n0,0,0,0,forward-send,1,1,0,-1,-1\n"
        "0,1,1,0,forward-recv,0,1,0,-1,-1\n0,1,1,0,backward-send,1,1,0,-1,-1\n",
        "column 'start_ts': backward transfer of worker 0 waits for itself",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_job_names_the_line_and_column(name: str) -> None:
    text, expected = DAMAGED[name]
    with pytest.raises(fm.TraceError) as caught:
        fm.sim.Recording(parse_operations(text, "job.csv"))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_job_that_is_cut_anywhere_is_refused() -> None:
    """Cut within a line or after one, and without any one of its lines.

    Only a file with all of one step and nothing of the next is a whole file, of a shorter job.
    """
    text, one = table(Job(2, 2, 1, 0), Job(2, 2, 1, 1)), table(Job(2, 2, 1, 0))
    whole = parse_operations(text, "job.csv")
    for length in {*range(0, text.rindex(","), 7)} - {*range(one.rindex(",") + 1, len(one) + 1)}:
        with pytest.raises(fm.TraceError):
            parse_operations(text[:length], "job.csv")
    lines = text.splitlines(keepends=True)
    for number in range(1, len(lines)):
        if number != len(one.splitlines()):
            with pytest.raises(fm.TraceError):
                parse_operations("".join(lines[:number]), "job.csv")
        with pytest.raises(fm.TraceError):
            parse_operations("".join([*lines[:number], *lines[number + 1 :]]), "job.csv")
    assert len(whole) == len(lines) - 1


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    for name, content, expected in (
        ("a.csv", b"\xff\xfe\x00", "a.csv, line 1: the bytes there are not text"),
        ("b.parquet", b"PAR1 and no more", "b.parquet"),
        ("c.json", b'{"traceEvents": [', "c.json, line 1, column 18"),
        ("d.json", b'{"other": 1}', "d.json is not a trace that flowml wrote"),
        ("e.json", b'{"traceEvents": []}', "e.json has no task"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(fm.TraceError) as caught:
            fm.sim.Recorded(tmp_path / name)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(fm.TraceError, match=r"nowhere.csv cannot be read: No such file"):
        fm.sim.Recording.read(tmp_path / "nowhere.csv")


def test_csv_and_parquet_give_the_same_job(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow reads and writes Parquet files")
    from pyarrow import csv, parquet

    (tmp_path / "job.csv").write_text(table(Job(2, 2, 2, 5)))
    parquet.write_table(csv.read_csv(tmp_path / "job.csv"), tmp_path / "job.parquet")
    assert fm.sim.Recording.read(tmp_path / "job.parquet") == fm.sim.Recording.read(tmp_path / "job.csv")
    whole = (tmp_path / "job.parquet").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:length])
        with pytest.raises(fm.TraceError, match=r"cut.parquet is not a whole Parquet file, or is damaged"):
            fm.sim.Recording.read(tmp_path / "cut.parquet")


@pytest.fixture(scope="module")
def published() -> tuple[fm.sim.Recording, dict[str, Any]]:
    if not (TRACES / "trace-ST.parquet").exists():
        pytest.skip("the published trace is not here; it belongs in ../shared/yardsticks or $FLOWML_YARDSTICKS")
    pytest.importorskip("pyarrow", reason="the published trace is a Parquet file")
    return fm.sim.Recording.read(TRACES / "trace-ST.parquet"), json.loads((TRACES / "result-ST.json").read_text())


def test_the_published_job_replays_within_one_percent(published: tuple[fm.sim.Recording, dict[str, Any]]) -> None:
    """A mean step takes 2.173 s as it was without launch gaps, and 1.843 s with everything ideal."""
    found, results = published
    as_it_was, ideal = found.replay(), found.replay(lambda _: True)
    assert fmean(as_it_was.values()) == pytest.approx(2.173, rel=0.01)
    assert fmean(ideal.values()) == pytest.approx(1.843, rel=0.01)
    for step, expected in results["step_t_nodelay"].items():
        assert as_it_was[int(step)] == pytest.approx(expected, rel=0.01)
    for step, expected in results["step_t_noblk"].items():
        assert ideal[int(step)] == pytest.approx(expected, rel=0.01)


def test_the_published_what_ifs_agree_within_one_percent(published: tuple[fm.sim.Recording, dict[str, Any]]) -> None:
    """The last stage costs 1.219 of the slowdown (without it the job beats its ideal), the worst worker 0.031."""
    found, results = published
    assert found.recovered(lambda o: o.stage == 3) == pytest.approx(1.219, rel=0.01)
    assert found.recovered(lambda o: o.worker == 7) == pytest.approx(0.0314, rel=0.01)
    assert max(found.slowdowns("worker").items(), key=lambda item: item[1])[0] == 7
    for file, chosen in (("ms-ST.json", lambda o: o.stage == 3), ("mw-ST.json", lambda o: o.worker == 7)):
        expected = json.loads((TRACES / file).read_text())
        assert fmean(found.replay(chosen).values()) == pytest.approx(expected["trem"], rel=0.01)
        alone = found.replay(lambda o, chosen=chosen: not chosen(o))
        assert fmean(alone.values()) == pytest.approx(expected["tadd"], rel=0.01)
    for by, name in (("stage", "blocking_decompose_by_stage"), ("replica", "blocking_decompose_by_dp_rank")):
        expected = {int(key): value for key, value in results[name].items()}
        assert found.slowdowns(by) == pytest.approx(expected, rel=0.01)
    kinds = results["blocking_decompose_by_optype"]
    assert {k: v for k, v in found.slowdowns("kind").items() if k in kinds} == pytest.approx(
        {k: v for k, v in kinds.items() if not k.endswith("pp-comm")}, rel=0.01
    )


def test_the_published_what_ifs_agree_in_each_step(published: tuple[fm.sim.Recording, dict[str, Any]]) -> None:
    """One stage or one replica keeps its durations and the rest is ideal: every step is within 1 %."""
    found, results = published
    best = found.replay(lambda _: True)
    for by, name in (("stage", "stage"), ("replica", "dp_rank")):
        for step, slowdowns in results[f"blocking_decompose_by_{name}_per_step"].items():
            for key, expected in slowdowns.items():
                alone = found.replay(lambda o, by=by, key=key: getattr(o, by) != int(key))[int(step)]
                assert alone / best[int(step)] == pytest.approx(expected, rel=0.01)


def test_times_of_a_trace_of_flowml(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """A trace has one time per worker and step: that of its tasks and of handing their results on."""
    f = fm.dataflow(lambda x: (x @ x).sum(), cluster=threads_cluster, placement={"*": "worker:1"})
    x = np.ones((64, 64), np.float32)
    f(x)
    with threads_cluster.trace(tmp_path / "t.json"):
        for _ in range(5):
            f(x)
    times = fm.sim.Recorded(tmp_path / "t.json").times_s
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [len(row) for row in times] == [5]
    busy = [(e["args"]["step"], e["dur"] / 1e6) for e in events if e.get("cat") in ("run", "fetch")]
    steps = sorted({step for step, _ in busy})
    assert times[0] == pytest.approx([sum(s for at, s in busy if at == step) for step in steps])
    assert fm.sim.Recorded(tmp_path / "t.json").seconds(0, 0, 7) == times[0][2]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("dur", -5.0, "a finite number of at least 0"),
        ("dur", math.nan, "a finite number of at least 0"),
        ("dur", math.inf, "a finite number of at least 0"),
        ("ts", math.inf, "a finite number"),
        ("ts", math.nan, "a finite number"),
    ],
)
def test_a_time_of_a_trace_that_makes_no_sense_is_named(tmp_path: Path, key: str, value: float, what: str) -> None:
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "worker:0"}},
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "worker:0/cpu:0"}},
    ]
    for step in range(2):
        arguments = {"step": step, "microbatch": 0}
        span = {"ph": "X", "pid": 0, "tid": 0, "name": "task0", "cat": "run", "ts": step, "dur": 1, "args": arguments}
        events.append(span | ({key: value} if step else {}))
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events}))
    with pytest.raises(fm.TraceError) as caught:
        fm.sim.Recorded(tmp_path / "t.json")
    assert f"t.json, traceEvents[3], '{key}': {value!r} is not {what} of microseconds" in str(caught.value)


def test_a_task_runs_on_in_the_push_that_needs_its_result_and_waits_do_not_count(tmp_path: Path) -> None:
    """Two programs whose steps have the same numbers, on two workers; times in the file are in microseconds."""
    lanes = ["worker:0/cpu:0", "worker:0/cpu:0 home", "worker:10/cpu:0", "worker:2/cpu:0"]
    events: list[dict[str, Any]] = []
    for pid, lane in enumerate(lanes):
        worker = lane.partition("/")[0]
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": worker}})
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": 0, "args": {"name": lane}})

    def span(pid: int, kind: str, name: str, step: int, at: float, dur: float) -> None:
        arguments = {"step": step, "microbatch": 0}
        events.append(
            {"ph": "X", "pid": pid, "tid": 0, "name": name, "cat": kind, "ts": at, "dur": dur, "args": arguments}
        )

    for program in range(2):
        for step in range(3):
            at = 1e5 * program + 1e4 * step
            span(0, "read", "store 0", step, at, 3000)
            span(0, "run", "task0", step, at + 3000, 100)
            span(0, "push", "store 0", step, at + 3100, 2000 + step)
            span(0, "push", "store 0", step, at + 6000, 1000 * program)
            span(1, "apply", "store 0", step, at + 6000, 500)
            span(2, "run", "task0", step, at, 700)
            span(3, "run", "task0", step, at, 400)
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events}))
    times = fm.sim.Recorded(tmp_path / "t.json").times_s
    first = [2.1e-3, 2.101e-3, 2.102e-3]
    assert times[0] == pytest.approx([*first, *(t + 1e-3 for t in first)])
    assert times[1:] == (pytest.approx((4e-4,) * 6), pytest.approx((7e-4,) * 6)), "worker 2 comes before worker 10"

"""`flowml simulate`: a script under virtual time, from the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import jax.numpy as jnp, numpy as np, optax
import flowml as fm

def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

trainer = fm.Trainer(loss, optax.sgd(0.1), replicas=4, policies=fm.policies.quorum(0.75))
source = {"x": np.ones((64, 4), np.float32), "y": np.ones(64, np.float32)}
result = trainer.fit({"w": jnp.zeros(4)}, source, batch_size=16, steps=int(sys.argv[1]))
print("loss", result.history[-1]["loss"])
"""


def flowml(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowml_tools.main", "simulate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_trains_in_virtual_time_and_its_fits_are_described(script: str) -> None:
    models = ("--workers", "4", "--compute", "constant:0.1", "--network", "1e-3,1e9", "--no-arithmetic")
    ended = flowml(*models, script, "20")
    assert ended.returncode == 0, ended.stderr
    first, *rest = ended.stdout.splitlines()
    found = re.fullmatch(r"20 steps of 4 replicas on 4 workers: (\S+) s of virtual time, (\S+) s a step; .*", first)
    assert found, first
    assert float(found[1]) == pytest.approx(20 * 0.102, rel=0.01)
    assert any(line.startswith("w ") and "quorum 0.75" in line for line in rest)
    assert any(line.startswith("work items of 4 examples: 6") for line in rest)
    assert rest[-1] == "loss nan"
    assert flowml(*models, script, "20").stdout == ended.stdout


def test_the_goodput_on_spot_machines_is_printed_side_by_side(script: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text('{"metadata": {"gap_seconds": 300}, "data": [0, 4, 4, 3, 1, 0, 2, 4]}')
    models = ("--workers", "4", "--compute", "constant:1", "--network", "1e-3,1e9", "--no-arithmetic")
    ended = flowml(*models, "--spot", f"{trace},20,5,10", script, "8")
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout[ended.stdout.index("on spot machines: ") :]
    rows = re.findall(r"^  (\S.*?) +(\S+) examples/s +(\d+)%$", told, flags=re.M)
    assert [name for name, _, _ in rows] == ["all machines", "synchronous restart", "elastic", "decoupled"]
    whole, restarted, elastic, decoupled = (float(rate) for _, rate, _ in rows)
    assert 0 < restarted < elastic < whole
    assert 0 < decoupled < whole


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (",0", "GAP_S=0; give seconds above 0"),
        (",20,-1", "NOTICE_S=-1; give seconds of at least 0"),
        (",20,30", "NOTICE_S=30 is longer than the interval GAP_S=20"),
        (",20,5,inf", "inf"),
    ],
)
def test_a_replay_that_makes_no_sense_is_refused_with_the_reason(script: str, given: str, reason: str) -> None:
    ended = flowml("--workers", "4", "--compute", "constant:1", "--spot", f"trace.json{given}", script, "1")
    assert ended.returncode == 2
    assert "argument --spot: " in ended.stderr and reason in ended.stderr.splitlines()[-1]
    assert "invalid spot value" not in ended.stderr


def test_a_record_may_count_the_machines_that_are_gone(script: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text('{"metadata": {"gap_seconds": 300}, "data": [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]}')
    models = ("--workers", "4", "--compute", "constant:1", "--network", "1e-3,1e9", "--no-arithmetic", "--spot")
    shares = {}
    for counts in ("", ",available", ",preempted"):
        ended = flowml(*models, f"{trace},20,5,10{counts}", script, "8")
        assert ended.returncode == 0, ended.stderr
        assert ("if it counts preempted machines, add ,preempted to --spot" in ended.stderr) == (not counts)
        assert len(ended.stderr.splitlines()) == (not counts)
        found = re.search(r"^  elastic .* (\d+)%$", ended.stdout, flags=re.M)
        assert found, ended.stdout
        shares[counts] = int(found[1])
    assert shares[""] == shares[",available"] < 50 < shares[",preempted"]


def test_a_record_of_more_machines_than_workers_says_what_to_give_the_command(script: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text('{"metadata": {"gap_seconds": 300}, "data": [4, 6, 4]}')
    ended = flowml("--workers", "4", "--compute", "constant:1", "--spot", str(trace), script, "1")
    assert ended.returncode == 1
    assert ended.stderr == (
        f"flowml: error: --spot: {trace} counts up to 6 machines, and the cluster has 4 workers; give --workers 6 or "
        "more, or a record of fewer machines\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--compute", "constant:1", "--seed=-1"), "'-1' is not a whole number of at least 0"),
        (("--compute", "weibull:1,2"), "names no model; there are constant, exponential, lognormal, pareto"),
        (("--compute", "lognormal:0.1"), "'0.1' is not 2 numbers, such as 0.1,0.3"),
        (("--compute", "constant:1", "--spot", "no.json,1,x"), "'1,x' is not 2 numbers, such as 30,5,10; only"),
        (("--compute", "constant:1", "--spot", "no.json,1,2,3,4"), "at most 3 numbers, and available or preempted"),
        (("--compute", "constant:1", "--spot", "/a/no.json,preempted"), "flowml: error: /a/no.json cannot be read"),
        (("--compute", "recorded:/a/no.parquet"), "/a/no.parquet cannot be read: No such file or directory; give the"),
        (("--compute", "constant:1", "--network", "regions:/a/no.csv"), "--network: /a/no.csv cannot be read"),
        (("--compute", "constant:1", "--spot", "no.json"), "no.json cannot be read"),
        (("--compute", "constant:-1"), "Constant"),
        (("--compute", "recorded:no.json"), "argument --compute: no.json cannot be read: No such file or directory"),
        (("--compute", "constant:1", "--stragglers", "0.5,0.1"), "argument --stragglers: Straggler: factor=0.5 makes"),
        (("--compute", "constant:1", "--network", "regions:no.csv"), "argument --network: no.csv cannot be read"),
        (("--compute", "constant:1", "--network", "fast"), "'fast' is not 2 numbers, such as 1e-3,60e6"),
        (("--compute", "constant:1", "--network=-1,2"), "argument --network: Network: latency_s=-1 makes no sense"),
    ],
)
def test_wrong_models_are_one_line(script: str, arguments: tuple[str, ...], text: str) -> None:
    ended = flowml("--workers", "4", *arguments, script, "1")
    assert ended.returncode in (1, 2)
    assert text in ended.stderr
    assert ended.stderr.startswith("flowml: error: ") and ended.stderr.count("\n") == 1


def test_recorded_times_stragglers_and_regions(script: str, tmp_path: Path) -> None:
    """The times of a recorded job, and two regions half of 200 ms apart: a step sends and receives, and so do the start
    and the end of the fit."""
    table, job = tmp_path / "table.csv", tmp_path / "job.csv"
    table.write_text("a,b,round_trip_or_delay_ms,gbit_per_s\nOslo,Rome,200,1\nOslo,Bern,400,1\nRome,Bern,400,1\n")
    job.write_text(
        "step,rank,dp_rank,stage,optype,seq_id,mc,start_ts,duration\n"
        "0,0,0,0,forward-compute,0,0,0,0.04\n0,0,0,0,backward-compute,0,0,0.04,0.06\n"
    )
    models = ("--workers", "4", "--compute", f"recorded:{job}", "--no-arithmetic")
    seconds = []
    for more in ((), ("--stragglers", "3,0.5"), ("--network", f"regions:{table}:Oslo=2,Rome=2")):
        ended = flowml(*models, *more, script, "10")
        assert ended.returncode == 0, ended.stderr
        found = re.match(r"10 steps of 4 replicas on 4 workers: (\S+) s of virtual time", ended.stdout)
        assert found, ended.stdout
        seconds.append(float(found[1]))
    assert seconds == pytest.approx([1.0, 3.0, 10 * 0.3 + 2 * 0.2], rel=0.05)


def test_options_may_follow_the_script_and_the_rest_goes_to_it(script: str) -> None:
    options = ("--workers", "4", "--compute=constant:0.1", "--no-arithmetic")
    after, before = flowml(script, *options, "2"), flowml(*options, script, "2")
    assert after.returncode == 0, after.stderr
    assert after.stdout == before.stdout
    assert "trace " in after.stdout, "the same seed gives the same trace"
    ended = flowml(script, "--workers", "4", "2")
    assert ended.returncode == 2
    assert f"flowml: error: give --compute MODEL, before {script} or directly after it" in ended.stderr


def test_a_script_that_trains_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nothing.py"
    path.write_text("print('done')\n")
    ended = flowml("--workers", "2", "--compute", "constant:1", str(path))
    assert ended.stdout == "done\n" and ended.returncode == 2
    assert (
        "has trained nothing on the simulated cluster; call fit() of an fm.Trainer without cluster=, and"
        in ended.stderr
    )


def test_advise_ranks_other_policies_after_each_fit(script: str) -> None:
    models = ("--workers", "4", "--compute", "constant:0.1", "--stragglers", "5,0.25", "--no-arithmetic", "--advise")
    ended = flowml(script, *models, "3")
    assert ended.returncode == 0, ended.stderr
    fit, _, text = ended.stdout.partition("\n\n")
    assert fit.startswith("3 steps of 4 replicas")
    assert text.startswith(
        "4 replicas, the time to 2,048 examples (128 steps of 16). A step of a replica computes 200 ms"
    )
    names = [line.split("  ")[0] for line in text.splitlines()]
    assert names.index("as given") < names.index("synchronous()")  # the script's quorum
    assert ended.stdout.rstrip().endswith("loss nan")
    assert ended.stderr == ""  # not a terminal: no line of progress

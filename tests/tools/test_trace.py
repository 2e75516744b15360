"""flowml trace: a run is recorded, and a recorded training run is told by its causes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_tools.main import main
from flowml_tools.trace import Told, story
from tests.tools.conftest import Flowml

SCRIPT = """
import jax.numpy as jnp, numpy as np, flowml as fm
if __name__ == "__main__":
    import sys
    f = fm.dataflow(lambda x: jnp.sin(x) * 2, placement={"*": "worker:0"})
    print(sys.argv[1], float(f(np.float32(0))))
"""


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


@pytest.fixture
def recorded(threads_cluster: fm.Cluster, tmp_path: Path) -> Path:
    """Two fits of two replicas."""
    path = tmp_path / "trace.json"
    source = {"x": np.ones((32, 4), np.float32)}
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2)
    with threads_cluster.trace(path):
        for seed in range(2):
            trainer.fit({"w": np.ones((4, 2), np.float32)}, source, batch_size=16, steps=2, seed=seed)
    return path


def test_a_story_tells_causes_before_their_effects(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--story", str(recorded)]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for sentence in (
        "begins the fit",
        "clock 0 is committed with all",
        "makes version 1 of store 0 from 2 contributions",
        "has finished clock 1 on stage 0 of replica 1",
        "the fit is over",
    ):
        assert text.count(sentence) >= 2, sentence  # once a fit
    seen: set[str] = set()
    told = [re.search(r"ms  (\S+)  .*?(?:\[after (\S+)\])?$", line) for line in lines]
    for found in told:
        assert found is not None
        event, cause = found.groups()
        assert cause is None or cause in seen, f"{event} is told before {cause}"
        seen.add(event)
    caused = [found for found in told if found and found[2]]
    assert len(caused) > 0.9 * len(lines) > 20
    assert len(seen) == len(lines)


def test_events_are_ordered_by_time_and_by_cause_where_clocks_disagree() -> None:
    told = [
        Told(1.0, "b#0.1", "a#0.1", "hears it"),
        Told(2.0, "a#0.1", "", "says it"),
        Told(0.5, "c#0.1", "", "is first"),
        Told(1.5, "b#0.2", "b#0.1", "goes on"),
    ]
    assert [re.search(r"ms  (\S+)", line)[1] for line in story(told)] == ["c#0.1", "a#0.1", "b#0.1", "b#0.2"]  # pyright: ignore


def test_a_script_is_recorded_with_its_arguments(tmp_path: Path, flowml: Flowml) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    assert "hello 0.0" in flowml("trace", "--workers", "1", script, "-o", out, "hello", check=True).stdout
    assert {e.get("cat") for e in json.loads(out.read_text())["traceEvents"]} >= {"run"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give a script and -o OUT.json"),
        (["FILE"], "say where to write"),
        (["--story", "missing.json"], "there is no file"),
        (["--story", "FILE"], "not a trace that flowml wrote"),
        (["--story", "FILE", "FILE"], "give it alone"),
        (["FILE", "-o", "/nowhere/out.json"], "does not exist"),
    ],
)
def test_wrong_calls_say_what_is_right(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    assert main(["trace", *(str(file) if a == "FILE" else a for a in arguments)]) == 2
    assert reason in capsys.readouterr().err

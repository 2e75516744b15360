"""`flowml viz` finds the function in a file and draws its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

MODEL = """
import flowml as fm
import jax
import jax.numpy as jnp

def f(x):
    with fm.device("worker:0"):
        y = jnp.sin(x)
    with fm.device("worker:1"):
        return y + 1

f_args = (jax.ShapeDtypeStruct((4,), "float32"),)

g = fm.dataflow(f)
g_args = f_args

def plan():
    return fm.compile(f, *f_args, devices=["worker:0", "worker:1"])

def needs(x): return x
constant = 3
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


@pytest.mark.parametrize("suffix", ["svg", "html", "dot", "txt"])
def test_viz_draws_a_function_with_example_arguments(flowml, model: Path, tmp_path: Path, suffix: str) -> None:
    done = flowml("viz", "model.py:f", "-o", f"g.{suffix}", check=True)
    assert done.stdout == f"g.{suffix}: 2 devices, 1 transfer\n"
    assert "worker:1/cpu:0" in (tmp_path / f"g.{suffix}").read_text()


def test_viz_draws_a_dataflow(flowml, model: Path, tmp_path: Path) -> None:
    assert flowml("viz", "model.py:g", "-o", "g.txt", check=True).stdout == "g.txt: 2 devices, 1 transfer\n"


def test_viz_draws_what_a_function_of_no_arguments_returns(flowml, model: Path, tmp_path: Path) -> None:
    flowml("viz", "model.py:plan", "-o", "g.dot", check=True)
    assert (tmp_path / "g.dot").read_text().startswith("digraph")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("model.py:absent", "it has f, g, needs, plan"),
        ("model.py:needs", "put examples beside it in 'model.py', as needs_args = (…,)"),
        ("model.py:constant", "'constant' in 'model.py' is a int, which has no plan"),
    ],
)
def test_viz_says_what_is_missing(flowml, model: Path, target: str, says: str) -> None:
    done = flowml("viz", target, "-o", "g.svg")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_viz_names_the_device_that_does_not_exist(flowml, model: Path) -> None:
    done = flowml("viz", "--workers", "1", "model.py:f", "-o", "g.svg")
    assert done.returncode == 2
    assert "flowml: error:" in done.stderr
    assert "worker:1" in done.stderr


def test_an_error_in_the_file_shows_the_files_own_traceback(flowml, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def g():\n    return 1 / 0\n\ng()\n")
    done = flowml("viz", "broken.py:g", "-o", "g.svg")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "flowml_tools" not in done.stderr

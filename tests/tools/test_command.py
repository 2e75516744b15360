"""The command as such: help, versions, and how mistakes are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flowml as fm
from flowml_tools.main import main
from tests.tools.conftest import environment

COMMANDS = ("run", "launch", "worker", "viz", "bench", "doctor")


HELP = """
import sys
from flowml_tools.main import main
try:
    main(["--help"])
finally:
    print("slow:", *{"grpc", "jax", "jaxlib", "optax"} & set(sys.modules), file=sys.stderr)
"""


def test_help_lists_the_commands_and_imports_nothing_that_is_slow() -> None:
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment())
    assert done.stderr == "slow:\n"
    assert all(f"\n    {command}" in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert "--traceback" in capsys.readouterr().out


def test_version(flowml) -> None:
    assert flowml("--version", check=True).stdout == f"flowml {fm.__version__}\n"


def write(folder: Path, name: str, text: str, mode: int = 0o644) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path


FAILURES: list[tuple[list[str], str]] = [
    (["launch", "--token-file", "no/token"], "cannot write the token file no/token"),
    (["coordinator", "--state", "open"], "name a folder that is there or can be made"),
]
"""Calls that say nothing wrong, of what cannot be done."""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *FAILURES,
        (["run", "missing.py"], "there is no file 'missing.py'"),
        (["run", "."], "'.' is a folder"),
        (["run", "--workers", "0", "x.py"], "0 is too few"),
        (["run", "--on", "nowhere", "x.py"], "'nowhere' is not HOST:PORT"),
        (["run", "--on", "127.0.0.1:1", "--workers", "2", "x.py"], "give one of them"),
        (["run", "--on", "127.0.0.1:1", "x.py"], "--token-file F names one"),
        (["run", "--on", "127.0.0.1:1", "--token-file", "none", "x.py"], "cannot read the token file none"),
        (["run", "--on", "127.0.0.1:1", "--token-file", "open", "x.py"], "chmod 600 open"),
        (["run", "--on", "127.0.0.1:1", "--token-file", "empty", "x.py"], "token file empty is empty"),
        (["run", "--on", "127.0.0.1:1", "--token-file", ".", "x.py"], "the token file . is a folder"),
        (["run", "--token-file", "open", "x.py"], "--token-file goes with --on"),
        (["run"], "arguments are required: FILE.py"),
        (["launch", "--orphan", "-1"], "give 0, or seconds above 0"),
        (["launch", "--tls-cert", "open"], "--tls-cert, --tls-key and --tls-ca belong together"),
        (["launch", "--tls-cert", "open", "--tls-key", "open", "--tls-ca", "none"], "--tls-ca 'none' is not a file"),
        (["worker", "127.0.0.1:1"], "--token-file F names one"),
        (["viz", "x.py", "-o", "g.svg"], "'x.py' is not FILE.py:FUNCTION"),
        (["viz", "x.py:f", "-o", "g.png"], "cannot draw 'g.png'"),
        (["viz", "x.py:f", "-o", "no/g.svg"], "the folder of 'no/g.svg' does not exist"),
        (["viz", "y.py:f", "-o", "g.svg"], "there is no file 'y.py'"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_a_call_that_fails_is_one_readable_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, "x.py", "")
    write(tmp_path, "open", "token\n")
    write(tmp_path, "empty", "", 0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWML_TOKEN_FILE", raising=False)
    try:
        status = main(arguments)
    except SystemExit as exit_info:  # argparse's own errors
        status = exit_info.code
    assert status == (1 if (arguments, says) in FAILURES else 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last
    assert "Error: " not in last, "of a kind that is not explained"
    assert says in last
    assert "ARGS" not in last


def test_traceback_shows_the_rest(flowml) -> None:
    done = flowml("run", "--traceback", "missing.py")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("flowml: error: there is no file")

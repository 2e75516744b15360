"""The command under parents that ignore or block signals: `nohup flowml … &`, cron, service managers."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_until
from tests.tools.conftest import COMMAND, environment
from tests.tools.test_clusters import read_until

# The children that these tests start change their own signals before exec, for which Python forks; JAX warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")


def start(folder: Path, *arguments: str, prepare: Callable[[], None]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=prepare,  # noqa: PLW1509  the test has no threads that matter to a child which only sets signals
    )


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def block_all() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def test_a_cluster_in_the_background_says_how_it_is_stopped(tmp_path: Path) -> None:
    with start(tmp_path, "launch", "-n", "1", prepare=ignore_interrupts) as process:
        said = read_until(process.stdout, f"`kill {process.pid}` stops it.")
        assert "Ctrl-C" not in said
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("prepare", [block_all, lambda: None], ids=["blocked", "as usual"])
def test_a_cluster_ends_in_order_by_each_signal(
    tmp_path: Path, number: signal.Signals, prepare: Callable[[], None]
) -> None:
    with start(tmp_path, "launch", "-n", "1", "--token-file", "t", prepare=prepare) as process:
        read_until(process.stdout, "Ctrl-C stops it.")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_nohup_is_heeded(tmp_path: Path) -> None:
    hangup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with start(tmp_path, "launch", "-n", "1", prepare=hangup) as process:
        read_until(process.stdout, "Ctrl-C stops it.")
        process.send_signal(signal.SIGHUP)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def test_a_script_in_the_background_ends_with_its_own_status(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(
        "import flowml as fm\nprint(fm.dataflow(lambda x: x + 1)(1.0))\nraise SystemExit(3)\n"
    )
    with start(tmp_path, "run", "--workers", "2", "s.py", prepare=ignore_interrupts) as process:
        assert process.communicate(timeout=60)[0] == "2.0\n"
        assert process.returncode == 3


@pytest.mark.parametrize("to_all", [True, False], ids=["of a terminal", "of kill"])
def test_an_interrupt_ends_all_processes_of_a_campaign_without_a_traceback(tmp_path: Path, *, to_all: bool) -> None:
    """Also of those that still import."""
    with start(tmp_path, "faults", "--seeds", "1000000", "--jobs", "2", prepare=lambda: None) as process:
        command = psutil.Process(process.pid)
        wait_until(lambda: len(command.children()) >= 2, "its processes have begun", 60)
        children = command.children(recursive=True)
        os.killpg(process.pid, signal.SIGINT) if to_all else process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + signal.SIGINT
        assert "Traceback" not in said
        assert psutil.wait_procs(children, timeout=10)[1] == []


def interrupt_early() -> None:
    """A Ctrl-C comes before the command's modules are imported."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a parent may ignore it; Python takes its own then
    signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_before_the_command_begins_ends_it_without_a_traceback(tmp_path: Path) -> None:
    with start(tmp_path, "launch", "-n", "1", prepare=interrupt_early) as process:
        said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ("", "")

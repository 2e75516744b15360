"""A cluster in the processes of containers, cron, service managers and notebooks, which differ from a terminal's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowml_runtime.links.cache import RememberedLinks, links_file
from tests.tools.conftest import COMMAND, environment

# The children that these tests start change their own signals before exec, for which Python forks; JAX warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

USE = """
import os, sys, socket
{before}
import numpy as np, flowml as fm
def net(x):
    with fm.layer("a"): h = x @ x
    with fm.layer("b"): return h @ x
def main(path):
    with fm.Cluster.local(workers=2, deadline_s=20, start_timeout_s=60) as cluster:
        f = fm.dataflow(net, placement=fm.Pipeline(stages=2))
        y = f(np.ones((4, 4), "f"))
        cluster.measure_links()
        with open(path, "w") as out:
            out.write(f"{{float(y[0, 0])}} {{len(cluster.pids)}}")
{after}
main({path!r})
"""


def use(
    tmp_path: Path,
    before: str = "",
    after: str = "",
    *,
    options: tuple[str, ...] = (),
    env: dict[str, str | None] | None = None,
    wrap: tuple[str, ...] = (),
    prepare: Callable[[], None] | None = None,
) -> None:
    """Run a program that uses a cluster; it must end well, and leave no process."""
    out = tmp_path / "said"
    code = USE.format(before=before, after=after, path=str(out))
    if options:  # which may keep Python from heeding PYTHONPATH
        code = f"import sys; sys.path[:] = {[p for p in sys.path if p]!r}\n{code}"
    changed = {**environment(), **(env or {})}
    done = subprocess.run(
        [*wrap, sys.executable, *options, "-c", code],
        env={k: v for k, v in changed.items() if v is not None},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        preexec_fn=prepare,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == "16.0 2", done.stderr


def test_without_a_home_and_without_a_passwd_entry(tmp_path: Path) -> None:
    nobody = "import pwd\ndef gone(*_): raise KeyError('no entry')\npwd.getpwuid = gone"
    use(tmp_path, nobody, env={"HOME": None, "XDG_CACHE_HOME": None})


def test_links_are_measured_again_where_nothing_can_be_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert links_file() is None
    assert RememberedLinks().find("a", "b", "gRPC") is None


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_with_standard_streams_closed(tmp_path: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    before = "" if len(closed) < 3 else "assert sys.stdout is None and sys.stderr is None"
    use(tmp_path, before, prepare=close)


def test_with_signals_ignored_and_blocked_by_the_parent(tmp_path: Path) -> None:
    def deaf() -> None:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})

    use(tmp_path, prepare=deaf)


def test_with_sigpipe_set_to_end_the_program(tmp_path: Path) -> None:
    use(tmp_path, "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)")


def test_with_a_handler_that_reaps_every_child(tmp_path: Path) -> None:
    reap = (
        "import signal\ndef reap(*_):\n    try:\n        while os.waitpid(-1, os.WNOHANG)[0]: pass\n"
        "    except ChildProcessError: pass\nsignal.signal(signal.SIGCHLD, reap)"
    )
    use(tmp_path, reap)


def test_in_a_folder_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    use(tmp_path, f"os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); sys.path.insert(0, '')")


def test_with_a_umask_that_takes_every_right(tmp_path: Path) -> None:
    (tmp_path / "said").touch()
    use(tmp_path, "os.umask(0o777)")


@pytest.mark.parametrize("folder", ["missing", "/proc"])
def test_without_a_temporary_folder(tmp_path: Path, folder: str) -> None:
    place = str(tmp_path / folder) if folder == "missing" else folder
    use(
        tmp_path,
        "import tempfile; tempfile._candidate_tempdir_list = lambda: [os.environ['TMPDIR']]",
        env={"TMPDIR": place},
    )


def test_without_any_folder_to_write_to(tmp_path: Path) -> None:
    refuse = "def refuse(*a, **k): raise FileNotFoundError('no usable temporary directory')"
    use(tmp_path, f"import tempfile\n{refuse}\ntempfile.mkdtemp = refuse")


@pytest.mark.parametrize("options", [("-O",), ("-I",), ("-E",), ("-S",), ("-OO", "-I")])
def test_with_options_of_the_interpreter(tmp_path: Path, options: tuple[str, ...]) -> None:
    use(tmp_path, options=options, env={"PYTHONHOME": "/nowhere"} if {"-I", "-E"} & {*options} else None)


def test_without_terminal_and_locale(tmp_path: Path) -> None:
    use(tmp_path, env={"TERM": None, "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})


def test_as_a_daemon_that_forked_twice(tmp_path: Path) -> None:
    out = tmp_path / "said"
    daemon = (
        "if os.fork():\n    os.wait(); sys.exit()\nos.setsid()\nif os.fork():\n    os._exit(0)\nos.chdir('/')\n"
        "for n in (0, 1, 2): os.close(n)"
    )
    code = USE.format(before=daemon, after="", path=str(out))
    subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=True)
    from tests.conftest import wait_until

    wait_until(lambda: out.exists() and out.read_text() == "16.0 2", "the daemon has its result", 60)


def test_inside_a_running_event_loop_and_its_threads(tmp_path: Path) -> None:
    inside = (
        "import asyncio\nplain = main\ndef main(path):\n    async def go():\n        plain(path)\n"
        "        await asyncio.to_thread(plain, path)\n    asyncio.run(go())"
    )
    use(tmp_path, after=inside)


def test_an_interpreter_that_does_not_know_itself_is_told_what_to_do(tmp_path: Path) -> None:
    code = USE.format(before="sys.executable = ''", after="", path=str(tmp_path / "said"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "sys.executable is empty, so no worker can be started" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict"])
def test_the_doctor_prints_what_the_terminal_can_show(encoding: str) -> None:
    env = {**environment(), "PYTHONIOENCODING": encoding, "LANG": "C", "TERM": "dumb"}
    done = subprocess.run([*COMMAND, "doctor"], env=env, capture_output=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert b"round trip" in done.stdout

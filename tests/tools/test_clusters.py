"""`flowml run`, `launch` and `worker`: real processes, stopped the way a user stops them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil
import pytest
import trustme

from flowml_runtime import wire
from flowml_runtime.environment.allocator import VARIABLE
from flowml_tools import run
from tests.tools.conftest import environment

DOUBLE = """
import sys
import flowml as fm, jax.numpy as jnp
double = fm.dataflow(lambda x: x * 2)
print(sys.argv[1:], __name__, float(double(jnp.float32(21))))
"""

WAITS = """
import threading
print("ready", flush=True)
while True:  # not in one go: a signal that comes just before Python goes to sleep would not wake it
    threading.Event().wait(0.1)
"""


@pytest.fixture
def script(tmp_path: Path):
    def write(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        return "script.py"

    return write


def read_until(stream: IO[str] | None, ending: str) -> str:
    """What `stream` says up to the line that starts with `ending`."""
    assert stream is not None
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if line.startswith(ending):
            return "".join(lines)
    raise AssertionError(f"ended without {ending!r}: {lines}")


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def interrupt(process: subprocess.Popen[str]) -> None:
    """What Ctrl-C in a terminal does: it reaches the command and everything that it started in its group."""
    os.killpg(process.pid, signal.SIGINT)


def assert_gone(processes: list[psutil.Process]) -> None:
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_run_gives_the_script_a_cluster_and_its_arguments(flowml, script) -> None:
    done = flowml("run", "--workers", "1", script(DOUBLE), "a", "--workers", "9", check=True)
    assert done.stdout == "['a', '--workers', '9'] __main__ 42.0\n"


def test_run_ends_with_the_scripts_own_status(flowml, script) -> None:
    assert flowml("run", "--workers", "1", script("raise SystemExit(7)")).returncode == 7


def test_run_shows_an_exception_of_the_script_as_python_does(flowml, script) -> None:
    done = flowml("run", "--workers", "1", script("def f():\n    return [][0]\nf()\n"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert done.stderr.splitlines()[-1] == "IndexError: list index out of range"
    assert "flowml_tools" not in done.stderr


def test_run_shows_an_error_of_flowml_as_one_line(flowml, script) -> None:
    text = "import flowml as fm\nfm.dataflow(lambda x: x + 1, placement={'*': 'worker:9'})(1.0)\n"
    done = flowml("run", "--workers", "1", script(text))
    assert done.returncode == 2
    assert re.fullmatch(r"flowml: error: .*worker:9.*\n", done.stderr)


AT_END = """
import atexit, sys
import jax.numpy as jnp
import flowml as fm

double = fm.dataflow(lambda x: x * 2, keep="*")
state = double(jnp.arange(3.0))
atexit.register(lambda: print("kept", state.fetch(), "called", double(state).fetch()))
sys.exit(7)
"""


@pytest.mark.parametrize("options", [("run", "--jit", "auto"), ("trace", "-o", "out.json")])
def test_what_a_script_does_at_its_end_has_the_cluster(flowml, script, options: tuple[str, ...]) -> None:
    command, *rest = options
    done = flowml(command, "--workers", "2", *rest, script(AT_END))
    assert (done.returncode, done.stdout) == (7, "kept [0. 2. 4.] called [0. 4. 8.]\n"), done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_run_takes_its_workers_with_it(start_flowml, script, stop: signal.Signals) -> None:
    process = start_flowml("run", "--workers", "2", script(WAITS))
    read_until(process.stdout, "ready")
    workers = tree(process)
    assert len(workers) >= 2
    interrupt(process) if stop == signal.SIGINT else process.send_signal(stop)
    assert process.wait(timeout=20) == (-stop if stop == signal.SIGKILL else 128 + stop)
    assert_gone(workers)
    if stop != signal.SIGKILL:
        assert "Traceback" not in process.stderr.read()


def launch(start_flowml, *options: str) -> tuple[subprocess.Popen[str], str, Path]:
    """A launched cluster: its process, address and token file."""
    process = start_flowml("launch", *options)
    said = read_until(process.stdout, "Ctrl-C stops it.")
    found = re.search(r"cluster at (\S+), token in (\S+)", said)
    assert found is not None
    return process, found[1], Path(found[2])


def test_a_launched_cluster_serves_scripts_and_takes_more_workers(flowml, start_flowml, script) -> None:
    launched, address, token_file = launch(start_flowml, "-n", "1")
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text().strip()
    options = ("--token-file", token_file)

    done = flowml("run", "--on", address, *options, script(DOUBLE), check=True)
    assert done.stdout == "[] __main__ 42.0\n"

    joined = start_flowml("worker", address, *options)
    read_until(joined.stdout, "joined")
    read_until(launched.stdout, "worker:1 has joined")
    for pid in (joined.pid, tree(launched)[0].pid):  # raw, as glibc takes the variable apart where it lies
        assert b"mmap_threshold" in Path(f"/proc/{pid}/environ").read_bytes()
    count = script("import flowml_runtime.cluster as c\nprint(len(c.current_cluster().devices))\n")
    assert flowml("run", "--on", address, *options, count, check=True).stdout == "2\n"

    processes = [psutil.Process(p.pid) for p in (launched, joined)] + tree(launched) + tree(joined)
    assert not any(token in " ".join(p.cmdline()) for p in processes)
    interrupt(launched)
    assert launched.wait(timeout=20) == 130
    assert "Traceback" not in launched.stderr.read()
    assert_gone(processes)
    assert not token_file.exists()


def coordinator(start_flowml, *options: str) -> tuple[subprocess.Popen[str], str, Path]:
    """A coordinator by itself: its process, address and token file."""
    process = start_flowml("coordinator", *options)
    found = re.search(r"cluster at (\S+), token in (\S+)", read_until(process.stdout, "Ctrl-C stops it."))
    assert found is not None
    return process, found[1], Path(found[2])


def test_a_coordinator_that_is_started_again_is_where_it_was_and_its_workers_go_on(
    flowml, start_flowml, script, tmp_path: Path
) -> None:
    first, address, token_file = coordinator(start_flowml, "--state", "state")
    assert token_file == tmp_path / "state" / "token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    worker = start_flowml("worker", address, "--token-file", token_file)
    read_until(worker.stdout, "joined as worker:0")
    for stop in (signal.SIGKILL, signal.SIGINT):
        first.send_signal(signal.SIGKILL) if stop == signal.SIGKILL else interrupt(first)
        first.wait(timeout=20)
        first, again, same = coordinator(start_flowml, "--state", "state")
        assert (again, same) == (address, token_file)
        done = flowml("run", "--on", address, "--token-file", token_file, script(DOUBLE), check=True)
        assert done.stdout == "[] __main__ 42.0\n"
    assert worker.poll() is None
    refused = flowml("coordinator", "--state", "state")
    assert (refused.returncode, "another coordinator uses it" in refused.stderr) == (1, True)


WAY = """
import flowml_runtime.cluster as c, flowml as fm, jax.numpy as jnp
print(c.current_cluster().links.between("worker:0", "worker:1").way)
print(float(fm.dataflow(lambda x: x + 1)(jnp.float32(1))))
"""


def test_how_arrays_travel_can_be_chosen_in_the_command(flowml, start_flowml, script) -> None:
    way = script(WAY)
    local = flowml("run", "--workers", "2", "--transport", "grpc", "--checksum", "--deadline", "77", way, check=True)
    assert local.stdout == "gRPC\n2.0\n"
    launched, address, token_file = launch(start_flowml, "-n", "2", "--transport", "grpc", "--no-checksum")
    options = ("--on", address, "--token-file", token_file)
    assert flowml("run", *options, way, check=True).stdout == "gRPC\n2.0\n"
    interrupt(launched)
    assert launched.wait(timeout=20) == 130


BEGINS_ANEW = """
import os
from flowml_runtime.environment import allocator
os.environ.pop(allocator.VARIABLE, None)  # as glibc does for interpreters with capabilities
print("begun", flush=True)
allocator.reexec()
print("goes on")
"""


def test_a_program_begins_anew_once() -> None:
    own = {k: v for k, v in environment().items() if k != VARIABLE}
    command = (sys.executable, "-c", BEGINS_ANEW)
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "begun\nbegun\ngoes on\n"


@pytest.mark.parametrize(
    ("option", "said"),
    [("0", "0 is not a valid time"), ("inf", "inf is not a valid time"), ("soon", "'soon' is not a number")],
)
def test_a_deadline_is_some_seconds(flowml, script, option: str, said: str) -> None:
    done = flowml("run", "--deadline", option, script(DOUBLE))
    assert done.returncode == 2
    assert said in done.stderr


def test_the_command_and_the_library_have_one_deadline() -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert parser.get_default("deadline") == wire.DEADLINE_S


def test_a_wrong_token_is_refused_in_one_line(flowml, start_flowml, script, tmp_path: Path) -> None:
    launched, address, _ = launch(start_flowml, "-n", "1")
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    wrong.chmod(0o600)
    done = flowml("run", "--on", address, "--token-file", wrong, script(DOUBLE))
    assert done.returncode == 1
    assert re.fullmatch(r"flowml: error: .*token.*\n", done.stderr)
    interrupt(launched)
    assert launched.wait(timeout=20) == 130


def test_launch_beyond_loopback_needs_tls(flowml) -> None:
    done = flowml("launch", "--bind", "0.0.0.0:0")
    assert done.returncode == 1
    assert "TLS" in done.stderr.splitlines()[-1]


def test_launch_writes_the_token_where_it_is_told(start_flowml, tmp_path: Path) -> None:
    process, _, token_file = launch(start_flowml, "-n", "1", "--token-file", "mine")
    assert token_file == Path("mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    interrupt(process)
    assert process.wait(timeout=20) == 130
    assert (tmp_path / "mine").exists()


def test_what_launch_prints_connects_with_tls_too(start_flowml, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    folder = tmp_path / "a folder"
    folder.mkdir()
    files = {name: folder / f"{name}.pem" for name in ("cert", "key", "ca")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    issued.private_key_pem.write_to_path(str(files["key"]))
    files["cert"].write_bytes(b"".join(p.bytes() for p in issued.cert_chain_pems))
    options = [text for name, path in files.items() for text in (f"--tls-{name}", str(path))]
    process = start_flowml("launch", "-n", "1", *options)
    said = read_until(process.stdout, "Ctrl-C stops it.")

    one_more = re.search(r"one more: +flowml (.*)", said)
    assert one_more is not None
    joined = start_flowml(*shlex.split(one_more[1]))
    read_until(joined.stdout, "joined")
    in_python = re.search(r"in Python: +(import .*)\n +(fm\..*)", said)
    assert in_python is not None
    code = f"{in_python[1]}\nprint(len({in_python[2]}.devices))"
    assert subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True, timeout=60) == "2\n"
    interrupt(process)
    assert process.wait(timeout=20) == 130


def test_a_worker_leaves_by_the_command_and_by_sigterm_and_ends_with_status_0(flowml, start_flowml) -> None:
    _, address, token_file = launch(start_flowml, "-n", "1")
    options = ("--token-file", token_file)
    for leaves in ("command", "sigterm"):
        joined = start_flowml("worker", address, *options)
        name = read_until(joined.stdout, "joined as").split()[2].rstrip(";")
        if leaves == "command":
            done = flowml("worker", address, *options, "--leave", name, check=True)
            assert done.stdout == f"{name} hands over what it does\n{name} has left\n"
        else:
            joined.terminate()
        assert joined.wait(20) == 0
    done = flowml("worker", address, *options, "--leave", "worker:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"flowml: error: 'worker:9' is not in the cluster, whose workers are worker:0\n", done.stderr)

"""Workers as processes of this machine: started, watched, and never left behind.

A zygote forks them (see `host.zygote`). The socket to it is also their lifeline: should this process be killed, the
kernel closes its end and all of them end. A thread watches the socket, so that a worker's death is known at once.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from flowml.errors import ClusterError
from flowml_runtime import service
from flowml_runtime.launch.spawning import Exited, Kill, Ready, Report, Request, Start, Started, hear
from flowml_runtime.worker import allocator
from flowml_runtime.worker.config import WorkerConfig

TERM_S = 3.0
"""How long workers have to end after they were asked; then they are killed."""

KILL_S = 5.0
LOG_LINES = 5
"""Lines of a worker's log that an error quotes."""

_reports = msgspec.json.Decoder(Report)


class LocalWorkers:
    """The worker processes of one owner. `on_exit(worker, reason)` is called when one ends before `close`."""

    def __init__(self, on_exit: Callable[[str, str], None]) -> None:
        self.pids: dict[str, int] = {}
        """Worker -> process, of those alive."""
        self._on_exit = on_exit
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._expected: set[str] = set()
        self._ready = False
        """Whether the zygote takes requests yet. Until it does it has started nothing, and is deaf to us."""
        self._closing = False
        self._cpu_s: dict[int, float] = {}
        """Process -> CPU time it had used when `works` last looked."""
        self._folder = Path(tempfile.mkdtemp(prefix="flowml-"))
        try:
            self._control, theirs = socket.socketpair()
            self._control.settimeout(None)
            with theirs, (self._folder / "zygote.log").open("wb") as log:
                self._zygote = subprocess.Popen(
                    [sys.executable, "-P", "-m", "flowml_runtime.launch.zygote", str(self._folder)],
                    stdin=theirs.fileno(),
                    stderr=log,
                    env={**allocator.environment(), "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
                    start_new_session=True,  # Ctrl-C at the terminal is the owner's to handle
                )
            self._handle = os.pidfd_open(self._zygote.pid)
            """Becomes readable when the zygote has ended."""
        except OSError as error:  # what has started sees its socket close, and ends
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ClusterError(f"cannot start workers: {error.strerror}") from None
        self._watcher = service.start("flowml-workers", self._watch, self._lose_all)

    def start(self, config: WorkerConfig) -> None:
        """Start one more worker. Returns at once; whether it comes up is the coordinator's to see."""
        with self._changed:
            self._expected.add(config.name)
        self._request(Start(config, str(self._log(config.name))))

    def close(self) -> None:
        """Ask the workers to end, then kill those that do not. None is left when this returns. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._ready:
            self._end_workers()
        else:
            self._zygote.kill()
        self._hang_up()
        try:
            self._zygote.wait(KILL_S)
        except subprocess.TimeoutExpired:
            self._zygote.kill()
            self._zygote.wait()
        self._watcher.join(KILL_S)
        self._control.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def works(self, worker: str) -> bool:
        """Whether a worker's process runs, or would if it got a core: since the last look, if there was one.

        False for one that is suspended, asleep or gone. To be asked several times: the first look only sees threads.
        """
        pid = self.pids.get(worker)
        if pid is None:
            return False
        try:
            process = psutil.Process(pid)
            if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE):
                return False
            used = sum(process.cpu_times()[:2])
            before, self._cpu_s[pid] = self._cpu_s.get(pid, used), used
            return used > before or _wants_core(pid)
        except (psutil.Error, OSError):
            return False

    def _end_workers(self) -> None:
        for number, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
            with self._changed:
                left = sorted(self._expected)
            for worker in left:
                self._request(Kill(worker, number))
            with self._changed:
                self._changed.wait_for(lambda: not self._expected, wait_s)

    def _request(self, request: Request) -> None:
        try:
            with self._lock:
                self._control.sendall(msgspec.json.encode(request) + b"\n")
        except OSError:
            return  # the zygote is gone, which the watcher reports for every worker

    def _hang_up(self) -> None:
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # hung up already

    def _watch(self) -> None:
        """Take in the zygote's reports. Its own end is seen by a pidfd: the workers keep its end of the socket open."""
        zygote = self._handle
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(zygote, select.POLLIN)
        buffer = b""
        while True:
            ready = {fd for fd, _ in poll.poll()}
            received = hear(self._control) if self._control.fileno() in ready else b""
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                with service.going_on("a report of the process that starts workers could not be taken in"):
                    self._take(_reports.decode(line))
            if not received:
                break
        self._lose_all(f"the process that starts workers has ended{_quoted(self._folder / 'zygote.log')}")

    def _lose_all(self, reason: str) -> None:
        """Nothing will be heard of any worker: hang up, which ends them."""
        os.close(self._handle)
        self._hang_up()
        for worker in sorted(self._expected):
            self._ended(worker, reason)

    def _take(self, report: Report) -> None:
        match report:
            case Ready():
                self._ready = True
            case Started(worker, pid):
                self.pids[worker] = pid
            case Exited(worker, status):
                how = f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"
                pid = self.pids.get(worker, 0)
                self._ended(worker, f"its process {pid} {how}{_quoted(self._log(worker))}")

    def _ended(self, worker: str, reason: str) -> None:
        self.pids.pop(worker, None)
        if not self._closing:
            self._on_exit(worker, reason)
        with self._changed:
            self._expected.discard(worker)
            self._changed.notify_all()

    def _log(self, worker: str) -> Path:
        return self._folder / f"{worker.replace(':', '-')}.log"


def _wants_core(pid: int) -> bool:
    """Whether a thread of the process runs, waits for a core or for a disk."""
    stats = (entry.read_text() for entry in Path(f"/proc/{pid}/task").glob("*/stat"))
    return any(stat.rpartition(")")[2].split()[0] in ("R", "D") for stat in stats)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _quoted(log: Path) -> str:
    """The end of a log, to follow a sentence."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "".join(["; its log ends with", *(f"\n    {line}" for line in lines[-LOG_LINES:])]) if lines else ""

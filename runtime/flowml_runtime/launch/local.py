"""Starts workers as processes of this machine, watches them, and ends all of them at the end.

A zygote forks them (see `launch.zygote`). The workers inherit the socket to it: if this process is killed, the kernel
closes its end of the socket, and all of them end. A thread watches the socket, so that a worker's end is known at once.
If the zygote is killed, its workers end too, and another one starts those that are needed again.
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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from flowml.errors import ClusterError
from flowml_runtime import service
from flowml_runtime.environment import allocator
from flowml_runtime.environment.processes import SUSPENDED, saves
from flowml_runtime.environment.streams import open_standard_streams
from flowml_runtime.launch.spawning import (
    Config,
    Exited,
    Kill,
    Listening,
    Ready,
    Rename,
    Report,
    Request,
    Start,
    Started,
    hear,
    save_s_of,
)
from flowml_runtime.protocol.membership import COORDINATOR

END_S = 1.0
"""How long workers may take to end after SIGINT. After that they are killed, unless they write a last checkpoint. At
SIGTERM they would hand over first."""
LOOK_S = 0.05
"""How often it looks whether they still write."""

KILL_S = 3.0
ASK_S = 5.0
"""How long the zygote may take to read a request. It is busy for a moment with each worker that it starts."""

LOG_LINES = 5
"""Number of lines of a worker's log that an error quotes."""

_SHARED = "compiled"
_STATE = "coordinator"
_STARTER = "the process that starts workers"
_reports = msgspec.json.Decoder(Report)


class LocalWorkers:
    """The worker processes of one owner, and its coordinator if that is one of them.

    `on_exit(name, pid, reason)` is called when one ends before `close`, and `on_listening(address)` when the
    coordinator can be joined.
    """

    def __init__(
        self, on_exit: Callable[[str, int, str], None], on_listening: Callable[[str], None] = lambda _: None
    ) -> None:
        self.pids: dict[str, int] = {}
        """Worker -> process id, for live workers."""
        self.coordinator = 0
        """The process id of the coordinator, or 0."""
        self._on_exit = on_exit
        self._on_listening = on_listening
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._expected: set[str] = set()
        self._logs: dict[str, Path] = {}
        self._ends: dict[str, int] = {}
        """Worker -> how many of its processes have ended."""
        self._displaced: Counter[str] = Counter()
        """Worker -> how many processes were started under its name, lost it to another, and are not reported yet."""
        self._save_s = 0.0
        """How long workers may take to write what would be lost with them."""
        self._ready = False
        """Whether the zygote reads requests. Before that it has started no worker and does not notice our end."""
        self._gone = False
        """Whether the zygote has ended."""
        self._closing = False
        open_standard_streams()
        self._folder = _log_folder()
        try:
            self._control, self._zygote, self._handle = self._begin()
        except OSError as error:
            self._remove_logs()
            raise ClusterError(f"cannot start workers: {error}") from None
        self._watcher = service.start("flowml-workers", self._watch, self._lose_all)

    def _begin(self) -> tuple[socket.socket, subprocess.Popen[bytes], int]:
        """Start a zygote: our end of its socket, its process, and a pidfd, which becomes readable when it has ended."""
        control, theirs = socket.socketpair()
        control.settimeout(None)
        with theirs:
            zygote = _start_zygote(self._folder, theirs)
        try:
            return control, zygote, os.pidfd_open(zygote.pid)
        except OSError:
            control.close()  # the zygote sees that, and ends
            raise

    def wait_ready(self, deadline_s: float) -> None:
        """Wait until workers can be started. Starting Python takes a second. `deadline_s` is of the monotonic clock.

        Raises ClusterError if it takes longer, or fails.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._gone, max(0.0, deadline_s - time.monotonic()))
        if not self._ready:
            how = "has ended" if self._gone else "was not ready in time; allow more with start_timeout_s="
            raise ClusterError(f"{_STARTER} {how}{_quoted(_log_file(self._folder, 'zygote'))}")

    def start(self, config: Config, deadline_s: float) -> None:
        """Start one more worker. The coordinator sees whether it joins. `deadline_s` is as in `wait_ready`.

        Raises ClusterError if the zygote is too busy with earlier workers to read the request in time, or has ended
        and cannot be started again.
        """
        if self._gone:
            raise ClusterError(f"{_STARTER} has ended{_quoted(_log_file(self._folder, 'zygote'))}")
        with self._changed:
            self._save_s = max(self._save_s, save_s_of(config))
            self._expected.add(config.name)
            log = self._logs[config.name] = _log_file(self._folder, config.name.replace(":", "-"))
        if not self._request(Start(config, str(log)), deadline_s - time.monotonic()):
            raise ClusterError(f"{config.name} could not be started in time; allow more with start_timeout_s=")

    @property
    def shared_folder(self) -> str:
        """A folder for the workers alone, which is removed at their end. "" if there is none."""
        return "" if self._folder is None else str(self._folder / _SHARED)

    @property
    def state_folder(self) -> str:
        """A folder for the coordinator alone, which is removed at the end. "" if there is none."""
        return "" if self._folder is None else str(self._folder / _STATE)

    def close(self) -> None:
        """Ask the workers to end, then kill those that do not. All have ended when this returns. Idempotent.

        Workers that keep fits without a driver write them first.
        """
        if self._closing:
            return
        self._closing = True
        if self._ready:
            self.kill_stopped()
            self._end_workers()
        else:
            self._zygote.kill()
        self._hang_up()
        try:
            self._zygote.wait(KILL_S)
        except subprocess.TimeoutExpired:
            for pid in filter(None, [*self.pids.values(), self.coordinator, self._zygote.pid]):
                with suppress(ProcessLookupError):  # the zygote is stuck, so it has not reaped them
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that a dead disk blocks cannot be killed
                self._zygote.wait(KILL_S)
        self._watcher.join(KILL_S)
        self._control.close()
        self._remove_logs()

    def kill_stopped(self) -> None:
        """Kill suspended workers: they can neither end on a request nor receive messages."""
        for worker, pid in list(self.pids.items()):
            with suppress(psutil.Error):
                if psutil.Process(pid).status() in SUSPENDED:
                    self._request(Kill(worker, signal.SIGKILL))

    def kill(self, worker: str, pid: int | None = None) -> bool:
        """Kill a worker, and return when its process has ended. False if no process has that name, or has it yet, or,
        with `pid`, if that one has it no longer."""
        with self._changed:
            ended = self._ends.get(worker, 0)
            if worker not in self._expected or pid not in (None, self.pids.get(worker, 0)):
                return False
            self._request(Kill(worker, signal.SIGKILL))
            self._changed.wait_for(lambda: self._ends.get(worker, 0) > ended, KILL_S)  # another may start at once
        return True

    def rename(self, worker: str, name: str) -> None:
        """The process of `worker` is now that of `name`, and one that still has that name is killed. Does not wait."""
        with self._changed:
            # A spare is a member before the report that its process was started has been read.
            self._changed.wait_for(lambda: worker in self.pids or worker not in self._expected, ASK_S)
            if worker not in self.pids:
                return
            if name in self._expected:
                self._request(Kill(name, signal.SIGKILL))
                self._displaced[name] += name not in self.pids
            self._request(Rename(worker, name))
            self._expected = self._expected - {worker} | {name}
            self._logs[name] = self._logs.pop(worker)
            self.pids[name] = self.pids.pop(worker)

    def _end_workers(self) -> None:
        began = time.monotonic()
        self._signal_all(signal.SIGINT)
        with self._changed:
            self._changed.wait_for(lambda: not self._expected, END_S)
            while any(map(saves, list(self.pids.values()))) and time.monotonic() < began + self._save_s:
                self._changed.wait(LOOK_S)
        self._signal_all(signal.SIGKILL)
        with self._changed:
            self._changed.wait_for(lambda: not self._expected, KILL_S)

    def _signal_all(self, number: int) -> None:
        with self._changed:
            left = sorted(self._expected)
        for worker in left:
            self._request(Kill(worker, number))

    def _request(self, request: Request, timeout_s: float = ASK_S) -> bool:
        """Send a request. False if the zygote does not read it in time; the zygote is then killed."""
        try:
            with self._lock:
                self._control.settimeout(max(timeout_s, 1e-3))
                self._control.sendall(msgspec.json.encode(request) + b"\n", socket.MSG_NOSIGNAL)
        except TimeoutError:
            self._zygote.kill()  # the request may be half sent; the watcher reports the end of every worker
            return False
        except OSError:
            pass  # the zygote has ended, which the watcher reports
        return True

    def _hang_up(self) -> None:
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # shut down already

    def _watch(self) -> None:
        """Read the zygote's reports. If it ends, all that it has started end with it, and another takes its place."""
        while True:
            self._hear()
            reason = f"{_STARTER} has ended{_quoted(_log_file(self._folder, 'zygote'))}"
            os.close(self._handle)
            if self._closing or not self._ready or not self._begin_again():
                break
            self._lose(reason)
        self._lose_all(reason)

    def _begin_again(self) -> bool:
        """Start another zygote in place of one that has ended."""
        try:
            control, zygote, handle = self._begin()
        except (OSError, ClusterError):
            return False
        self._hang_up()
        self._zygote.wait()  # no deadline: it has ended
        with self._lock, self._changed:
            if not self._closing:
                self._control.close()
                self._control, self._zygote, self._handle, self._ready = control, zygote, handle, False
                return True
        control.close()
        os.close(handle)
        zygote.kill()
        zygote.wait()  # no deadline: it was killed
        return False

    def _hear(self) -> None:
        """Read reports until the zygote ends. A pidfd shows that: the workers keep its end of the socket open."""
        zygote = self._handle
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(zygote, select.POLLIN)
        buffer = b""
        while True:
            ready = {fd for fd, _ in poll.poll()}  # no deadline: the kernel tells of the zygote's end
            received = hear(self._control) if self._control.fileno() in ready else b""
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                with service.going_on("a report of the process that starts workers could not be processed"):
                    self._take(_reports.decode(line))
            if not received:
                return

    def _lose_all(self, reason: str) -> None:
        """No more reports will come: shut the socket down, which ends the workers, and report the end of each."""
        self._hang_up()
        with self._changed:
            self._gone = True
            self._changed.notify_all()
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        """The workers have ended, with the socket to their zygote."""
        self._displaced.clear()
        for worker in sorted(self._expected):
            self._ended(worker, reason)

    def _take(self, report: Report) -> None:
        match report:
            case Ready():
                with self._changed:
                    self._ready = True
                    self._changed.notify_all()
            case Started(worker, pid) if worker == COORDINATOR:
                self.coordinator = pid
            case Started(worker, pid):
                with self._changed:
                    if not self._was_displaced(worker):
                        self.pids[worker] = pid
                    self._changed.notify_all()
            case Listening(address):
                self._on_listening(address)
            case Exited(worker, _, _, reason) if reason:
                with self._changed:
                    displaced = self._was_displaced(worker)
                if not displaced:
                    self._ended(worker, reason)
            case Exited(pid=pid) if pid not in (*self.pids.values(), self.coordinator):
                pass  # another process has its name by now
            case Exited(pid=pid, status=status):
                worker = next((name for name, its in self.pids.items() if its == pid), COORDINATOR)
                how = f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"
                self._ended(worker, f"its process {pid} {how}{_quoted(self._logs[worker])}")

    def _was_displaced(self, worker: str) -> bool:
        """Whether the first report of a process of `worker` is of one that has lost the name since it was asked for."""
        found = self._displaced[worker] > 0
        self._displaced[worker] -= found
        return found

    def _ended(self, worker: str, reason: str) -> None:
        pid = self.pids.pop(worker, 0)
        if worker == COORDINATOR:
            pid, self.coordinator = self.coordinator, 0
        with self._changed:  # first, because another may be started at once
            self._expected.discard(worker)
            self._ends[worker] = self._ends.get(worker, 0) + 1
            self._changed.notify_all()
        if not self._closing:
            self._on_exit(worker, pid, reason)

    def _remove_logs(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _log_folder() -> Path | None:
    """A new folder for logs and what workers share. None if no temporary folder is writable; then there are none."""
    for place in (None, os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm"):
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="flowml-", dir=place))
            folder.chmod(0o700)  # whatever the umask
            (folder / _SHARED).mkdir()
            return folder
    return None


def _log_file(folder: Path | None, name: str) -> Path:
    return Path(os.devnull) if folder is None else folder / f"{name}.log"


def _start_zygote(folder: Path | None, control: socket.socket) -> subprocess.Popen[bytes]:
    """Start the zygote. Raises ClusterError if no interpreter is known."""
    if not sys.executable:
        raise ClusterError(
            "sys.executable is empty, so no worker can be started from this program; use fm.Cluster.threads, or "
            "`flowml launch` and fm.Cluster.connect"
        )
    environment = dict(allocator.environment())
    if sys.flags.ignore_environment:  # python -E or -I: the workers ignore the same variables
        environment = {k: v for k, v in environment.items() if not k.startswith("PYTHON")}
    log = os.open(_log_file(folder, "zygote"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if folder is not None:
            os.fchmod(log, 0o600)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flowml_runtime.launch.zygote", str(folder or "")],
            stdin=control.fileno(),
            stderr=log,
            env={**environment, "PYTHONPATH": os.pathsep.join(_import_path())},
            start_new_session=True,  # the owner handles Ctrl-C at the terminal
        )
    finally:
        os.close(log)


def _import_path() -> Iterator[str]:
    """The absolute paths of `sys.path`, without relative paths if the current folder was deleted."""
    for entry in map(os.fspath, sys.path):
        try:
            yield os.path.abspath(entry)
        except FileNotFoundError:
            continue


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _quoted(log: Path) -> str:
    """The last line of a log, as the continuation of an error's sentence, and the lines before it below."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    if not lines:
        return ""
    before = "".join(f"\n    {line}" for line in lines[-LOG_LINES:-1])
    return f"; its log ends with {lines[-1].strip()!r}" + (before and f"\n  The lines before:{before}")

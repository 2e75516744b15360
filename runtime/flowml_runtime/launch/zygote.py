"""Starts the workers of one machine quickly: it imports their modules once, then forks one process for each.

Importing JAX takes most of a worker's start, and this part is the same for all workers. The zygote imports everything
and starts nothing: no thread, no XLA backend, no gRPC channel. This makes a fork of it safe. Every child then sets its
cores and starts XLA itself.

The owner and the zygote communicate over a socket. All children inherit the zygote's end and none the owner's. When
the owner ends, in any way, the kernel closes the owner's end, and the zygote and all children notice it. The zygote
waits for every child and kills those that do not end in time.
"""

from __future__ import annotations

import gc
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, replace
from typing import NoReturn

import msgspec

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_given = os.environ.get(_BLAS_THREADS)
os.environ[_BLAS_THREADS] = "1"  # OpenBLAS starts a pool when it is loaded, and a fork would break it

import numpy as np  # noqa: E402

from flowml.errors import FlowmlError  # noqa: E402
from flowml_runtime import service  # noqa: E402
from flowml_runtime.environment.processes import call_process, saves  # noqa: E402
from flowml_runtime.environment.streams import open_standard_streams  # noqa: E402
from flowml_runtime.interrupts import Terminated, heeding_interrupts  # noqa: E402
from flowml_runtime.launch.spawning import (  # noqa: E402
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
from flowml_runtime.membership.process import CoordinatorConfig, serve_coordinator  # noqa: E402
from flowml_runtime.protocol.membership import COORDINATOR  # noqa: E402
from flowml_runtime.worker.kept_fits import KeptFits  # noqa: E402
from flowml_runtime.worker.leaving import heed_notice  # noqa: E402
from flowml_runtime.worker.process import LOST_COORDINATOR, serve  # noqa: E402
from flowml_runtime.worker.training import host as host_of_training  # noqa: E402

if _given is None:
    del os.environ[_BLAS_THREADS]
else:
    os.environ[_BLAS_THREADS] = _given

CANNOT_START = 71
"""Exit status of a worker whose process the system cannot start: EX_OSERR."""

_IMPORTED = host_of_training
"""A worker needs it when it first trains. Imported here, it is imported once for all of them."""

ORPHANS_S = 2.0
"""How long workers may take to end after their owner has ended. Those that write a last checkpoint may finish it."""
LOOK_S = 0.05
"""How often it looks whether they still write."""

_requests = msgspec.json.Decoder(Request)


@dataclass(frozen=True)
class _Child:
    worker: str
    pid: int
    handle: int
    """A pidfd, which becomes readable when the child has ended."""
    save_s: float
    """How long it may take to write what would be lost with it."""


def main(folder: str) -> None:
    """Serve the owner, whose socket is stdin, until it closes its end. Then end all workers and remove the logs."""
    open_standard_streams()
    for number in (signal.SIGCHLD, signal.SIGPIPE):  # if SIGCHLD is ignored, children cannot be waited for
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # signals that the owner blocked are not blocked here
    control = socket.socket(fileno=os.dup(0))
    control.settimeout(None)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    call_process("flowml:zygote")
    gc.collect()
    gc.freeze()  # keeps common memory shared: the garbage collector does not write to it
    children: dict[int, _Child] = {}
    try:
        owner = os.pidfd_open(os.getppid())  # forks of the owner may hold its end of the socket open
        _tell(control, Ready())
        _serve(control, owner, children)
    finally:  # also after an error: no worker and no log is left
        _end(children)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _end(children: dict[int, _Child]) -> None:
    for child in children.values():  # at once, not after notice; a coordinator would tell that the cluster was closed
        os.kill(child.pid, signal.SIGKILL if child.worker == COORDINATOR else signal.SIGINT)
    began = time.monotonic()
    for child in children.values():
        wait_s = max(0.0, began + ORPHANS_S - time.monotonic())
        while not select.select([child.handle], [], [], wait_s)[0]:
            if time.monotonic() > began + child.save_s or not saves(child.pid):
                os.kill(child.pid, signal.SIGKILL)
                break
            wait_s = LOOK_S
        os.waitpid(child.pid, 0)


def _serve(control: socket.socket, owner: int, children: dict[int, _Child]) -> None:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(owner, select.POLLIN)
    buffer = b""
    while True:
        for handle, _ in poll.poll():  # no deadline: the zygote sleeps until its owner or a worker ends, or asks
            if handle == owner:
                return
            child = children.get(handle)
            if child is not None:
                poll.unregister(handle)
                del children[handle]
                os.close(handle)
                status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
                _tell(control, Exited(child.worker, child.pid, status))
                continue
            received = hear(control)
            if not received:
                return
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                started = _obey(_requests.decode(line), control, children)
                if started is not None:
                    poll.register(started.handle, select.POLLIN)
                    children[started.handle] = started


def _obey(request: Request, control: socket.socket, children: dict[int, _Child]) -> _Child | None:
    match request:
        case Kill(worker, number):
            for child in children.values():
                if child.worker == worker:
                    os.kill(child.pid, number)  # not reaped yet, so the pid is still this child's
            return None
        case Rename(worker, name):
            for handle, child in children.items():
                if child.worker == worker:
                    children[handle] = replace(child, worker=name)
            return None
        case Start(config, log):
            try:
                return _start(config, log, control, list(children))
            except OSError as error:  # no more processes, descriptors or memory: only this worker fails
                _tell(control, Exited(config.name, 0, CANNOT_START, f"its process cannot be started: {error.strerror}"))
                return None


def _start(config: Config, log: str, control: socket.socket, inherited: list[int]) -> _Child:
    """Fork a worker. If that is not possible, raises OSError and leaves no process."""
    pid = os.fork()
    if pid == 0:
        _be_worker(config, log, control, inherited)
    try:
        child = _Child(config.name, pid, os.pidfd_open(pid), save_s_of(config))
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _tell(control, Started(config.name, pid))
    return child


def _tell(control: socket.socket, report: Report) -> None:
    try:
        control.sendall(msgspec.json.encode(report) + b"\n", socket.MSG_NOSIGNAL)
    except OSError:
        return  # the owner has ended; the next read shows it


def _be_worker(config: Config, log: str, control: socket.socket, inherited: list[int]) -> NoReturn:
    """Run the worker in the child process. Never returns to the zygote's loop."""
    status, kept = 1, list[KeptFits]()
    try:
        for handle in inherited:
            os.close(handle)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        if log != os.devnull:
            os.fchmod(2, 0o600)  # whatever the umask
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        call_process(f"flowml:{config.name}")
        np.random.seed()  # otherwise all workers would draw the same numbers
        signal.signal(signal.SIGINT, _stop)
        heed_notice()
        service.start("flowml-lifeline", lambda: _end_with(control, kept, save_s_of(config)), service.end_process)
        with heeding_interrupts():
            if isinstance(config, CoordinatorConfig):
                reason = serve_coordinator(config, lambda address: _tell(control, Listening(address)))
            else:
                reason = serve(config, keeps=kept.append)
        if reason:
            print(reason, file=sys.stderr)
        status = LOST_COORDINATOR if reason else 0
    except SystemExit:
        status = 0
    except FlowmlError as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for fits in kept:
            fits.finish(save_s_of(config))  # if the worker was ending already, SIGINT has interrupted this
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stop(number: int, frame: object) -> NoReturn:
    raise Terminated(number)


def _end_with(control: socket.socket, kept: list[KeptFits], save_s: float) -> None:
    """End this process when its owner ends, at once or when the fits that it has `kept` without a driver are saved."""
    poll = select.poll()
    poll.register(control, select.POLLRDHUP)  # not POLLIN: incoming data is for the zygote
    poll.poll()  # no deadline: the kernel tells of the end of the owner
    for fits in kept:
        fits.finish(save_s)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])

"""Simulates with several processes. Each has some of the workers, with a clock of its own.

Let L be the least latency of a link between two processes, and t the time of the first event of all. What happens from
t on sends messages that arrive at t + L or later. So each process lets its events of the window [t, t + L) happen
without word of the others; then they exchange messages (Chandy and Misra, 1979). Windows here are half as long. So a
process need not have what others sent in the window before, only in the one before that, and waits less for them.
Meanwhile process 0 can do something else.

Process 0 is that of the driver, with the last of the workers. It forks the others when a run begins, so that they
have the plan without a copy, and ends them with the run. They compute nothing with JAX: only runs without arithmetic
are divided. `partition` says which runs are, and how.
"""

from __future__ import annotations

import math
import os
import pickle
import select
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

from flowml.errors import FlowmlError, SimulationError
from flowml_runtime.sim.heap import Clock
from flowml_runtime.sim.pages import HugePages
from flowml_runtime.sim.post import Here, Mail, to_driver
from flowml_runtime.sim.world import World

Make = Callable[[Clock, Here, Callable[..., None]], World]
"""Makes the workers of one process. The last argument takes messages to the driver."""

_Order = tuple[int, float, list[bytes]]
"""A window to let happen, as in `Here.open`."""
_Answer = tuple[float, dict[int, Mail]]
"""At the end of a window: as `Here.take`."""


_OPEN = 4
"""More messages than ever wait to be read: process 0 gives two orders at most before it takes an answer."""


class _Line:
    """One end of the connection of two processes. A sender does not wait until the other reads: the bytes are in files
    in memory, which take turns, and the pipe says how many they are. A pipe alone holds less than the messages of a
    window, and a process that computes does not read."""

    def __init__(self, pipe: Connection, written: Sequence[int], read: Sequence[int]) -> None:
        self._pipe, self._written, self._read = pipe, written, read
        self._sent = self._got = 0

    @staticmethod
    def pair() -> tuple[_Line, _Line]:
        """Both ends."""
        there, back = ([_file() for _ in range(_OPEN)] for _ in range(2))
        mine, theirs = Pipe()
        return _Line(mine, there, back), _Line(theirs, back, there)

    def send(self, message: object) -> None:
        data = pickle.dumps(message)
        os.pwrite(self._written[self._sent % _OPEN], data, 0)
        self._sent += 1
        self._pipe.send_bytes(str(len(data)).encode())

    def receive(self) -> Any:
        size = int(self._pipe.recv_bytes())
        data = os.pread(self._read[self._got % _OPEN], size, 0)
        self._got += 1
        return pickle.loads(data)

    def fileno(self) -> int:
        """What can be read when a message has come."""
        return self._pipe.fileno()

    def close(self, *, files: bool = True) -> None:
        """Close this end, and the files that both have."""
        self._pipe.close()
        for file in (*self._written, *self._read) if files else ():
            os.close(file)


def _file() -> int:
    """A file in memory, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("flowml-simulation")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Team:
    """The processes of a run, as process 0 sees them. Its `world` has the workers that are in that."""

    def __init__(
        self,
        make: Make,
        driver: Callable[..., None],
        firsts: Sequence[int],
        numbers: Mapping[str, int],
        lookahead: float,
    ) -> None:
        """`firsts` are the numbers of the first workers of the shares. `lookahead` is L."""
        self._lookahead = lookahead
        self._window = 0
        self._owed = 0
        """The windows of which the other processes have not said yet what they send."""
        self._flying = math.inf
        """When the first message arrives that the other processes got with the newest window."""
        self._meets = False
        """Whether the processes exchange messages. If an interrupt ends that, none knows what others wait for."""
        self.waits = True
        """Whether to wait for processes that are not as far, because there is nothing else to do."""
        self._pids: list[int] = []
        self._lines: list[_Line] = []
        self._come = select.poll()
        """Which lines have a message."""
        self._clock = clock = Clock()
        clock.until, clock.meet, clock.ready = 0.0, self._meet, self._ready
        for index in range(1, len(firsts)):
            self._fork(make, Here(Clock(), index, firsts, numbers))
        self._here = Here(clock, 0, firsts, numbers)
        clock.tidy = HugePages().tidy
        self.world = make(clock, self._here, driver)
        self._here.join(numbers, self.world.nodes, driver)

    def _fork(self, make: Make, here: Here) -> None:
        mine, theirs = _Line.pair()
        with warnings.catch_warnings():  # of threads, such as those of XLA, which the other process does not need
            warnings.simplefilter("ignore")
            sys.stdout.flush()
            pid = os.fork()
        if pid == 0:
            try:
                for line in self._lines:
                    line.close()
                mine.close(files=False)
                _serve(theirs, make, here)
            finally:
                os._exit(1)
        theirs.close(files=False)
        self._pids.append(pid)
        self._lines.append(mine)
        self._come.register(mine, select.POLLIN)

    def _ready(self) -> bool:
        return self.waits or self._owed < 2 or len(self._come.poll(0)) == len(self._lines)

    def _meet(self) -> bool:
        """Exchange messages with the other processes, and begin the next window. Returns whether there is one."""
        self._meets = True
        going_on = self._exchange()
        self._meets = False
        return going_on

    def _exchange(self) -> bool:
        own = self._here.take()
        mail: list[list[bytes]] = [[] for _ in range(len(self._lines) + 1)]
        answers = self._answers() if self._owed == 2 else []  # at first there is nothing to do in the others
        least, flying = self._flying, math.inf
        for first, found in (own, *answers):
            least = min(least, first)
            for to, (arrives, data) in found.items():
                mail[to].append(data)
                flying = min(flying, arrives if to else math.inf)
        if least == math.inf:
            return False
        until = min(least + self._lookahead, max(least, self._clock.until) + self._lookahead / 2)
        until = max(until, math.nextafter(least, math.inf))
        self._window, self._flying = self._window + 1, flying
        for line, arrived in zip(self._lines, mail[1:], strict=True):
            self._send(line, (self._window, until, arrived))
        self._owed += 1
        self._here.open(self._window, until, mail[0])
        return True

    def _answers(self) -> list[_Answer]:
        self._owed -= 1
        return [self._receive(number) for number in range(len(self._lines))]

    def _send(self, line: _Line, order: _Order | tuple[float, int]) -> None:
        try:
            line.send(order)
        except OSError:
            self._end_all()
            raise SimulationError(_GONE) from None

    def _receive(self, number: int) -> Any:
        try:
            answer = self._lines[number].receive()
        except (OSError, EOFError):
            self._end_all()
            raise SimulationError(_GONE) from None
        if isinstance(answer, BaseException):
            self._end_all()
            raise answer
        return answer

    def end(self) -> None:
        """The run is over now. Ends the other processes, and counts their events until now."""
        if not self._lines:
            return
        try:
            if self._meets:
                return
            while self._owed:
                self._answers()
            for line in self._lines:
                self._send(line, self._clock.place)
            for number in range(len(self._lines)):
                self._clock.add(*self._receive(number))
        finally:
            self._end_all()

    def _end_all(self) -> None:
        lines, self._lines = self._lines, []
        pids, self._pids = self._pids, []
        for line in lines:
            line.close()  # at which the process ends
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


_GONE = (
    "a process of the simulation has ended; if it was killed, memory may be short: simulate fewer workers, or give "
    "SimulatedCluster(jobs=1), which takes less"
)


def _serve(line: _Line, make: Make, here: Here) -> NoReturn:
    """Let windows happen as process 0 says, until the run is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends process 0, and that ends this one
    clock = here.clock
    clock.tidy = HugePages().tidy
    try:
        world = make(clock, here, to_driver)
        here.join(world.numbers, world.nodes, to_driver)
        while True:
            order: _Order | tuple[float, int] = line.receive()  # no deadline: the process ends with process 0
            if len(order) == 3:
                here.open(*order)
                clock.go_on(_always)
                line.send(here.take())
            else:
                line.send(clock.counted(*order))
    except (EOFError, OSError):
        os._exit(0)
    except BaseException as error:
        line.send(_told(error))
        os._exit(1)


def _always() -> bool:
    return True


def _told(error: BaseException) -> BaseException:
    """An error as process 0 raises it."""
    if isinstance(error, FlowmlError):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:  # it does not survive that
            pass
    where = "".join(traceback.format_exception(error))
    return SimulationError(f"a process of the simulation has failed with {type(error).__name__}: {error}\n\n{where}")

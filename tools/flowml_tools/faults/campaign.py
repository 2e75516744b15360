"""Runs the cases of many seeds, and says of each whether it kept every promise.

The invariants of all machines are checked after every event, and the history of the run at its end. A `Finding` prints
the command that repeats it, and the last events before it.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from flowml_runtime.protocol.errors import ensure
from flowml_tools.faults.cases import Case
from flowml_tools.faults.checker import check
from flowml_tools.faults.world import World

COMMAND = "flowml faults --seed"
_CHUNK = 50
"""The seeds that a process runs at a time, and after which it collects garbage."""


@dataclass(frozen=True)
class Finding:
    """What a run of a case broke. `story` has its events in sentences."""

    case: Case
    violations: tuple[str, ...]
    story: tuple[str, ...]

    def report(self, events: int = 30) -> str:
        """What was run, what broke, the last events, and how to repeat it."""
        broken = [f"  {text}" for text in self.violations[:10]]
        told = "breaks a promise" if broken else "keeps every promise"
        lines = (
            f"seed {self.case.seed} {told}; run it again with: {COMMAND} {self.case.seed}",
            str(self.case),
            *(["broken:", *broken] if broken else []),
            "last events:",
            *self.story[-events:],
        )
        return "\n".join(lines)


def run(case: Case, *, always: bool = False) -> Finding | None:
    """Run one case. Returns what it broke; None if nothing, unless `always`."""
    world = case.world()
    found: list[str] = []
    try:
        world.go()
        check_rest(world)
    except Exception as error:  # a fault that is looked for may show as any error
        found.append(f"{type(error).__name__}: {error}")
    for history in world.histories.values():
        try:
            found += check(history)
        except Exception as error:  # a history that a fault cut short may say too little
            found.append(f"the history cannot be checked: {type(error).__name__}: {error}")
    return Finding(case, tuple(found), world.history.story()) if found or always else None


def campaign(
    seeds: Sequence[int], seconds: float = float("inf"), jobs: int = 1
) -> Iterator[tuple[int, Finding | None]]:
    """Run the cases of these seeds in so many processes, and stop when the time is over. Each seed with what it broke,
    in order; with several processes the last ones that there was time for may have gaps."""
    end = time.time() + seconds
    if jobs == 1:
        yield from _run_all(seeds, end)
        return
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            with _deaf_children():
                results = pool.map(_run_chunk, chunks, [end] * len(chunks))
            for found in results:
                yield from found
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_children() -> Generator[None]:
    """Processes that are started in the block ignore Ctrl-C, which is for all of a group: they would print tracebacks.
    This process heeds it at the end of the block. A mask alone would not do: another thread would get the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a process that is started inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if noted and callable(handler):
        handler(noted[0], None)


def _run_chunk(seeds: Sequence[int], end: float) -> list[tuple[int, Finding | None]]:
    return list(_run_all(seeds, end))


def _run_all(seeds: Sequence[int], end: float) -> Iterator[tuple[int, Finding | None]]:
    """Run these seeds until `end`, in seconds since the epoch.

    Garbage is collected between runs only, and what was there before is left alone. Collections in a run go through all
    that lives in it and free little.
    """
    collects = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        for number, seed in enumerate(seeds, 1):
            if time.time() >= end:
                return
            yield seed, run(Case.of(seed))
            if number % _CHUNK == 0:
                gc.collect()
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def check_rest(world: World) -> None:
    """The run has ended, and nothing is left of it on workers that live."""
    ended = world.driver.ended
    if not ended:
        ensure(world.driver.machine.over, "the run has come to rest before its end")
        ensure(sorted(world.driver.final) == list(range(len(world.terms.stores))), "the value of a store has not come")
    kept = (
        {}
        if not world.simulation.payloads
        else {
            handle: who
            for history in world.histories.values()
            for who, handle, _ in history.given()
            if handle in world.simulation.payloads and not world.is_dead(who)
        }
    )
    ensure(not kept, f"workers keep payloads: {kept}")
    for name, node in world.nodes.items():
        if not world.is_dead(name):
            ensure(not node.stages, f"{name} keeps stages {sorted(node.stages)}")
            left = [key for key in node.told if not world.terms.stores[key[0]].sites_decide]  # of steps left out
            ensure(ended or not left, f"{name} keeps what others told it: {sorted(left)}")

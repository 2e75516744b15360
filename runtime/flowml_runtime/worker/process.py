"""Runs a worker's process from its configuration to its end.

`serve` pins the process to its cores before XLA starts, because XLA sizes its thread pools by them. It then joins the
cluster and runs a `Worker` until the coordinator is lost or the process is stopped. Then the last checkpoints of fits
without a driver are written. The configuration holds the token,
so it is passed through a pipe and never through arguments or the environment.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

from flowml_runtime import wire
from flowml_runtime.environment.machine import cores, memory_bytes
from flowml_runtime.environment.spread import Spread, threads
from flowml_runtime.execution.future import wait_heeding_signals
from flowml_runtime.execution.programs import ExecutableCache, JaxDevice
from flowml_runtime.membership.etcd_log import address_of
from flowml_runtime.membership.member import Membership, passing_name, spare_name
from flowml_runtime.membership.process import tls_of
from flowml_runtime.transport.addresses import bind_towards
from flowml_runtime.transport.ending import Ends
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from flowml_runtime.worker.compile_cache import share_compilations
from flowml_runtime.worker.config import WorkerConfig
from flowml_runtime.worker.kept_fits import KeptFits
from flowml_runtime.worker.leaving import Departure, GiveNotice
from flowml_runtime.worker.worker import Worker

LOST_COORDINATOR = 1
"""Exit status of a worker whose coordinator is lost. A supervisor may start the worker again."""

SWITCH_INTERVAL_S = 5e-4
"""How long a thread may keep the interpreter while others wait. Python's default, 5 ms, is as long as a small step."""


def serve(
    config: WorkerConfig,
    joined: Callable[[str], None] = lambda _: None,
    keeps: Callable[[KeptFits], None] = lambda _: None,
    waits: Callable[[str], None] = lambda _: None,
) -> str:
    """Run a worker until the coordinator is lost; returns the reason, or "" if it has left after notice. Calls `joined`
    with its name, before that `keeps` with what it keeps of fits, and `waits` with the reason if it cannot join yet.

    Raises ClusterError if the cluster cannot be joined. At `GiveNotice` in this thread the worker hands over first; at
    a second one, and after any other exception (SystemExit from a signal handler, KeyboardInterrupt), it leaves the
    cluster at once.
    """
    everywhere = cores()
    if config.cores:
        os.sched_setaffinity(0, config.cores)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    before = threads()
    devices = _devices(config)
    turns = share_compilations(config, Spread(everywhere, threads() - before))
    hosted = _Hosted()
    towards = address_of(config.coordinator)
    endpoint = GrpcEndpoint(
        passing_name(),
        config.token,
        bind=bind_towards(towards),
        tls=tls_of(config.tls),
        shared_memory=config.shared_memory,
        checksum=config.checksum,
        apart_from=towards,
    )
    on_message = hosted.on_message
    if config.ending is not None:
        ends = Ends(config.ending)
        ends.watch_sent(endpoint)
        on_message = ends.watch_taken(on_message)
    membership = Membership(
        endpoint,
        config.coordinator,
        on_message,
        hosted.on_lost,
        on_members=hosted.on_members,
        on_end=hosted.end,
        on_replace=hosted.on_replace,
    )
    try:
        infos = _describe(config, devices)
        if config.spare:
            name = _take_place(config, membership, hosted, infos, joined, waits)
            if not name:
                return hosted.reason
        else:
            patience: dict[str, Any] = {"patience_s": config.patience_s, "on_wait": waits}
            name = membership.join(config.name, infos, python=config.python, **patience)
        named = {f"{name}/{info.name}": device for info, device in zip(infos, devices, strict=True)}
        hosted.name = name
        own: dict[str, Any] = {"cache": ExecutableCache(turns), "orphan_s": config.orphan_s}
        hosted.worker = Worker(name, named, endpoint, python=config.python, **own)
        keeps(hosted.worker.kept_fits)
        endpoint.on_sent = hosted.worker.traffic.sent
        hosted.ready.set()
        hosted.departure = Departure(lambda: hosted.worker is None or hosted.worker.idle, hosted.go, config.notice_s)
        hosted.on_members(membership.members)  # notice may have been given for it already
        joined(name)
        _wait(hosted, membership)
    finally:
        if hosted.worker is not None:
            hosted.worker.kept_fits.finish(config.notice_s, cut_off=bool(hosted.reason))
        membership.leave(hosted.last or "its process was stopped")
        endpoint.close()
    return hosted.reason


def _take_place(
    config: WorkerConfig,
    membership: Membership,
    hosted: _Hosted,
    devices: tuple[wire.DeviceInfo, ...],
    joined: Callable[[str], None],
    waits: Callable[[str], None],
) -> str:
    """Wait as a spare for a place, and take it. Returns the worker's name, or "" if the coordinator is lost."""
    spare = membership.join(config.name or spare_name(), patience_s=config.patience_s, on_wait=waits)
    joined(spare)
    while True:
        wait_heeding_signals(hosted.asked)
        asked = hosted.place
        if hosted.over.is_set() or asked is None:
            return ""
        hosted.asked.clear()
        _move_to(dict(config.places).get(asked.worker, ()))
        name = membership.become(asked, devices, python=config.python)
        if name != spare:
            return name


def _move_to(own: tuple[int, ...]) -> None:
    """Move all threads of this process to the cores of the worker whose place it takes."""
    if own:
        for thread in threads():
            with suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, own)


def _wait(hosted: _Hosted, membership: Membership) -> None:
    """Wait until the worker ends. A signal may have it hand over first."""
    while True:
        try:
            wait_heeding_signals(hosted.over)
            return
        except GiveNotice:
            if not hosted.depart():
                raise
            membership.give_notice(hosted.name)


READY_S = 60.0
"""How long a message may wait until its worker has been made."""


class _Hosted:
    """Holds the worker, which can be made only when its name is known. Messages that arrive earlier wait for it."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.name = "this worker"
        self.ready = threading.Event()
        self.over = threading.Event()
        self.reason = ""
        self.asked = threading.Event()
        """Set when a spare is to take a place, or the coordinator is lost."""
        self.place: wire.Replace | None = None
        self.last = ""
        """What others are told when it leaves after notice."""
        self.departure: Departure | None = None

    def on_message(self, peer: str, message: wire.Wire, arrays: list[Any]) -> None:
        if self.worker is None:
            self.ready.wait(READY_S)
        if self.worker is not None:
            self.worker.on_message(peer, message, arrays)

    def on_lost(self, peer: str, reason: str) -> None:
        if self.worker is not None:
            self.worker.on_lost(peer, reason)

    def on_replace(self, asked: wire.Replace) -> None:
        self.place = asked
        self.asked.set()

    def on_members(self, members: tuple[wire.Member, ...]) -> None:
        if any(m.worker == self.name and m.leaving for m in members):
            self.depart()

    def depart(self) -> bool:
        """The worker has given notice. False if it had before, or has not joined."""
        if self.worker is None or self.departure is None or not self.departure.begin():
            return False
        self.worker.kept_fits.leave()
        return True

    def go(self, reason: str) -> None:
        self.last = reason
        self.over.set()

    def end(self, reason: str) -> None:
        self.reason = f"{self.name} ends: its coordinator was lost: {reason}"
        self.over.set()
        self.asked.set()


def _devices(config: WorkerConfig) -> list[JaxDevice]:
    """Start XLA, and return the devices to offer."""
    jax.config.update("jax_platforms", config.platform)
    if config.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", config.devices)
    return jax.local_devices()[: config.devices]


def _describe(config: WorkerConfig, devices: list[JaxDevice]) -> tuple[wire.DeviceInfo, ...]:
    memory = (config.memory_bytes or memory_bytes()) // len(devices)
    share = (config.core_share or len(cores())) / len(devices)
    return tuple(
        wire.DeviceInfo(name=f"{d.platform}:{i}", platform=d.platform, memory_bytes=_memory(d, memory), cores=share)
        for i, d in enumerate(devices)
    )


def _memory(device: JaxDevice, share: int) -> int:
    stats: dict[str, int] = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return stats.get("bytes_limit", share)

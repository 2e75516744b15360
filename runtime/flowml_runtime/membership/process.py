"""Runs a coordinator in a process of its own, which may end and be started again with the same state.

The state is a folder, or a place in etcd: the log, and in it the address. The token comes from the starter, through a
pipe or a file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from flowml.errors import ClusterError
from flowml_runtime.execution.future import wait_heeding_signals
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.membership.etcd import is_etcd
from flowml_runtime.membership.etcd_log import EtcdLog
from flowml_runtime.membership.log import Log, RosterLog
from flowml_runtime.protocol.membership import TIMEOUT_S
from flowml_runtime.transport.addresses import advertised_host
from flowml_runtime.transport.ending import Ending
from flowml_runtime.transport.security import TLS, new_token, split_address, write_token

BIND_S = 10.0
"""How long to try to listen at the address of the predecessor, which another process may have for a moment."""

AGAIN_S = 0.1


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The configuration of a coordinator process. `ends_cluster`: when it is stopped, the cluster ends with it."""

    bind: str
    token: str
    state: str
    name: str = "coordinator"
    tls: tuple[str, str, str] | None = None
    shared_memory: bool = True
    checksum: bool | None = None
    lost_after_s: float = TIMEOUT_S
    ends_cluster: bool = True
    reserved: int = 0
    """The port that its starter keeps for it, for a `bind` with port 0 and a log without an address."""
    ending: Ending | None = None
    """For tests: where its process ends."""

    def __repr__(self) -> str:
        return f"CoordinatorConfig(bind={self.bind!r}, state={self.state!r})"  # no token in logs


def serve_coordinator(config: CoordinatorConfig, listening: Callable[[str], None] = lambda _: None) -> str:
    """Run a coordinator until it fails; returns the reason. Calls `listening` with its address.

    Raises ClusterError if the state or the address cannot be used. After any exception in this thread (SystemExit from
    a signal handler, KeyboardInterrupt) it closes.
    """
    log: Log = EtcdLog(config.state) if is_etcd(config.state) else RosterLog(Path(config.state))
    over, reason = threading.Event(), [""]

    def fail(why: str) -> None:
        reason[0] = why
        over.set()

    try:
        host = _listen(config, log, fail)
    except BaseException:
        log.close()
        raise
    stopped = ""
    try:
        listening(host.address)
        wait_heeding_signals(over)
    except BaseException:
        stopped = "the cluster was closed" if config.ends_cluster else ""
        raise
    finally:
        host.close(stopped)
    return reason[0]


def token_in(folder: Path) -> Path:
    """The file with the token of the state in a folder, which is made if it is missing. Raises ClusterError."""
    path = folder / "token"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            write_token(path, new_token())
    except OSError as error:
        why = f"the coordinator's state cannot be in {folder}: {error.strerror}"
        raise ClusterError(f"{why}; name a folder that is there or can be made") from None
    return path


def tls_of(files: tuple[str, str, str] | None) -> TLS | None:
    return TLS(*map(Path, files)) if files else None


def coordinator_of(config: CoordinatorConfig, **options: Any) -> CoordinatorHost:
    """A coordinator of this process. The state is not used: give `log`. Raises ClusterError as `CoordinatorHost`."""
    return CoordinatorHost(
        config.bind,
        config.token,
        tls_of(config.tls),
        shared_memory=config.shared_memory,
        checksum=config.checksum,
        timeout_s=config.lost_after_s,
        ending=config.ending,
        **options,
    )


def _listen(config: CoordinatorConfig, log: Log, on_failure: Callable[[str], None]) -> CoordinatorHost:
    """A coordinator at the address in the log, if its port is not given. One whose log is in etcd is found there, at
    whatever address it is, and another that is suspended may still have the earlier one."""
    bind, earlier = config.bind, "" if is_etcd(config.state) else log.about("address")
    host, port = split_address(bind)
    if not port and earlier and split_address(earlier)[0] == host:
        bind = earlier
    elif not port:
        bind = f"{bind.rpartition(':')[0]}:{config.reserved}"
    deadline = time.monotonic() + (BIND_S if bind == earlier else 0.0)
    while True:
        try:
            found = coordinator_of(structs.replace(config, bind=bind), log=log, on_failure=on_failure)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)
            continue
        log.note("address", found.address)
        if is_etcd(config.state):
            log.note("at", f"{advertised_host(config.bind)}:{split_address(found.address)[1]}")
        return found

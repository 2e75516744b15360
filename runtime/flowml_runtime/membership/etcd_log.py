"""Keeps the records of a coordinator in etcd, so that another machine can go on as the same coordinator.

One process at a time has the log: the one that has made the key `holder`. The key is bound to a lease, which is kept as
long as the process lives, so that another may have it soon after the process was killed, suspended or cut off. Each
write is a transaction that etcd refuses unless the key is still the one of this process. Its revision is the fencing
number: a holder that was suspended and wakes up can write nothing. A coordinator whose write is refused tells nobody,
and ends.

    holder             who has the log, bound to a lease
    about/NAME         a fact, such as the address at which the holder listens
    records/NUMBER     the records, in order
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from flowml.errors import ClusterError
from flowml_runtime import service
from flowml_runtime.membership.etcd import Etcd, Place, is_etcd
from flowml_runtime.membership.log import FORMAT, MOST_RECORDS
from flowml_runtime.protocol.roster import Record, Roster

LEASE_S = 5
"""How long after its end another process may have the log."""
AGAIN_S = 0.25
_MOST_CHANGES = 100
"""In a transaction. etcd allows 128."""
_records = msgspec.json.Decoder(Record)


class EtcdLog:
    """The log of one coordinator, in etcd. Its methods may be called from any thread."""

    def __init__(self, address: str, lease_s: int = LEASE_S) -> None:
        """Waits until no other process has the log. Raises ClusterError if etcd or the log cannot be used."""
        self._place = Place.of(address)
        self._etcd = Etcd(self._place)
        self._me = uuid.uuid4().hex
        self._lease_s = lease_s
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._lost: Callable[[str], None] = lambda _: None
        self._wrong = ""
        self._revision = self._acquire()
        self._kept_at = time.monotonic()
        self._keeper = service.start("flowml-etcd-lease", self._keep, self._lose)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> int:
        """Make the key `holder`, once no other process has it. Returns its revision."""
        self._lease = self._etcd.grant(self._lease_s)
        while True:
            if self._etcd.commit(("holder", 0), [("holder", self._me.encode())], lease=self._lease):
                break
            if self._etcd.created("holder")[0] == self._me:  # it was made, and the answer was lost
                break
            if not self._etcd.keep(self._lease):
                self._lease = self._etcd.grant(self._lease_s)
            time.sleep(AGAIN_S)
        value, revision = self._etcd.created("holder")
        if value != self._me:
            raise ClusterError(f"the coordinator's log {self._place.address} was lost while it was opened; start again")
        return revision

    def _open(self) -> None:
        found = self.about("format")
        if found not in ("", str(FORMAT)):
            raise ClusterError(
                f"the coordinator's log {self._place.address} has format {found}, and this flowml reads format "
                f"{FORMAT}; use the flowml that wrote it"
            )
        self.note("format", str(FORMAT))
        try:
            rows = [(key, _records.decode(value)) for key, value in self._etcd.read("records/", below=True)]
            self.roster = Roster(record for _, record in rows)
            """What the records gave when the log was opened."""
        except (msgspec.MsgspecError, KeyError) as error:
            raise ClusterError(
                f"the coordinator's log {self._place.address} is damaged: {service.named(error)}; remove it, and start "
                "the workers again"
            ) from None
        self._next = int(rows[-1][0].rpartition("/")[2]) + 1 if rows else 0
        if len(rows) > MOST_RECORDS:
            self._commit([self.roster.whole()], clear=("records/", f"records/{self._next:012d}"))

    def watch(self, lost: Callable[[str], None]) -> None:
        """Call `lost` once with the reason when this process does not have the log any more."""
        with self._lock:
            self._lost = lost
        if self._wrong:
            self._lose(self._wrong)

    def append(self, records: Sequence[Record]) -> None:
        """Returns when etcd has them. Raises ClusterError if another process has the log, or etcd does not answer."""
        for first in range(0, len(records), _MOST_CHANGES):
            self._commit(records[first : first + _MOST_CHANGES])

    def about(self, name: str) -> str:
        """A fact that `note` has written, or ""."""
        return self._etcd.get(f"about/{name}")

    def note(self, name: str, value: str) -> None:
        """Returns when etcd has the fact. Raises ClusterError as `append`."""
        self._write([(f"about/{name}", value.encode())])

    def next_incarnation(self, now: int) -> int:
        """A number that is later than any that this has returned: `now`, unless the clock went back."""
        later = max(now, int(self.about("incarnation") or 0) + 1)
        self.note("incarnation", str(later))
        return later

    def close(self) -> None:
        """Leave the log to another process. Idempotent."""
        if self._over.is_set():
            return
        self._over.set()
        with suppress(ClusterError):  # it is free when its lease is over
            self._etcd.commit(("holder", self._revision), [], clear=("holder", "holder\0"))

    def _commit(self, records: Sequence[Record], *, clear: tuple[str, str] | None = None) -> None:
        with self._lock:
            rows = [(f"records/{self._next + i:012d}", msgspec.json.encode(r)) for i, r in enumerate(records)]
            self._write(rows, clear=clear)
            self._next += len(rows)

    def _write(self, rows: Sequence[tuple[str, bytes]], *, clear: tuple[str, str] | None = None) -> None:
        if not self._etcd.commit(("holder", self._revision), rows, clear=clear):
            raise ClusterError(
                f"the coordinator's log {self._place.address} belongs to another coordinator by now: this one was "
                "suspended or could not reach etcd; nothing was written"
            )

    def _keep(self) -> None:
        """Keep the lease. If etcd is away for longer than it lasts, another process may have the log."""
        while not self._over.wait(self._lease_s / 5):
            try:
                there = self._etcd.keep(self._lease)
            except ClusterError as error:
                if time.monotonic() - self._kept_at > self._lease_s:
                    return self._lose(str(error))
                continue
            if not there:
                return self._lose(f"its lease in etcd is over, and another coordinator may have {self._place.address}")
            self._kept_at = time.monotonic()
        return None

    def _lose(self, reason: str) -> None:
        with self._lock:
            lost, self._lost, self._wrong = self._lost, lambda _: None, reason
        if not self._over.is_set():
            lost(reason)


def finder(coordinator: str) -> Callable[[], str]:
    """Says at which address a coordinator listens now, which is given by it or by its place in etcd. It raises
    ClusterError if none has begun there."""
    if not is_etcd(coordinator):
        return lambda: coordinator
    place = Place.of(coordinator)
    etcd = Etcd(place)

    def find() -> str:
        found = etcd.get("about/at")
        if not found:
            raise ClusterError(f"no coordinator has begun at {place.address}; start `flowml coordinator --state` there")
        return found

    return find


def address_of(coordinator: str) -> str:
    """The address of a coordinator that is given by it, or by its place in etcd."""
    return finder(coordinator)()

"""Keeps the records of a coordinator in an SQLite database, so that another process can go on as the same coordinator.

The database is in WAL mode. A record is on disk before `append` returns (`synchronous=FULL`), and the records of one
call are there together or not at all. The process that has the log open is the only one: SQLite's lock is held until it
closes the log, or ends, in any way.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec

from flowml.errors import ClusterError
from flowml_runtime import service
from flowml_runtime.protocol.roster import Record, Roster

FORMAT = 1
MOST_RECORDS = 1024
"""A longer log is replaced by one record when it is opened."""

_FILE = "coordinator.sqlite"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, record BLOB NOT NULL)",
)
_records = msgspec.json.Decoder(Record)


class Log(Protocol):
    """The log of one coordinator: that of a folder, or one in etcd (`etcd_log`)."""

    roster: Roster

    def append(self, records: Sequence[Record]) -> None: ...
    def about(self, name: str) -> str: ...
    def note(self, name: str, value: str) -> None: ...
    def next_incarnation(self, now: int) -> int: ...
    def watch(self, lost: Callable[[str], None]) -> None:
        """Call `lost` with the reason when this process does not have the log any more."""
        ...

    def close(self) -> None: ...


class RosterLog:
    """The log of one coordinator, in a folder of its own. Its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Raises ClusterError if the log cannot be used, or another process uses it."""
        self._path = folder / _FILE
        self._lock = threading.Lock()
        with self._explained():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        # Exclusive first: then the lock is held from the first access on, and no shared memory file is needed.
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        with self._transaction():
            for table in _TABLES:
                self._db.execute(table)
            found = self.about("format")
            if found not in ("", str(FORMAT)):
                raise ClusterError(
                    f"the coordinator's log {self._path} has format {found}, and this flowml reads format {FORMAT}; "
                    "use the flowml that wrote it"
                )
            self._set("format", str(FORMAT))
            self.roster = Roster(self._read())
            """What the records gave when the log was opened."""
            (number,) = self._db.execute("SELECT count(*) FROM records").fetchone()
            if number > MOST_RECORDS:
                self._db.execute("DELETE FROM records")
                self._insert([self.roster.whole()])

    def _read(self) -> list[Record]:
        with closing(self._db.execute("SELECT record FROM records ORDER BY number")) as rows:
            return [_records.decode(record) for (record,) in rows]

    def append(self, records: Sequence[Record]) -> None:
        """Returns when they are on disk. Raises ClusterError if they cannot be written."""
        with self._explained(), self._transaction():
            self._insert(records)

    def about(self, name: str) -> str:
        """A fact that `note` has written, or ""."""
        row = self._db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return "" if row is None else row[0]

    def note(self, name: str, value: str) -> None:
        """Returns when the fact is on disk. Raises ClusterError if it cannot be written."""
        with self._explained(), self._transaction():
            self._set(name, value)

    def next_incarnation(self, now: int) -> int:
        """A number that is later than any that this has returned: `now`, unless the clock went back."""
        with self._explained(), self._transaction():
            later = max(now, int(self.about("incarnation") or 0) + 1)
            self._set("incarnation", str(later))
        return later

    def watch(self, lost: Callable[[str], None]) -> None:
        """Nothing: the process has the log until it ends."""

    def close(self) -> None:
        self._db.close()

    def _set(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))

    def _insert(self, records: Sequence[Record]) -> None:
        rows = [(msgspec.json.encode(record),) for record in records]
        self._db.executemany("INSERT INTO records (record) VALUES (?)", rows)

    @contextmanager
    def _transaction(self) -> Generator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a failed COMMIT may have ended it
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Generator[None]:
        """Raise ClusterError, with the fix, for errors of SQLite, of the file system and of damaged records."""
        try:
            yield
        except sqlite3.OperationalError as error:
            busy = "locked" in str(error)
            fix = "another coordinator uses it; stop that one" if busy else "make room, or give another folder"
            raise ClusterError(f"the coordinator's log {self._path} cannot be used: {error}; {fix}") from None
        except (sqlite3.DatabaseError, msgspec.MsgspecError, KeyError) as error:
            raise ClusterError(
                f"the coordinator's log {self._path} is damaged: {service.named(error)}; remove it, and start the "
                "workers again"
            ) from None
        except OSError as error:
            why = f"the coordinator's log {self._path} cannot be used: {error.strerror}"
            raise ClusterError(f"{why}; name a folder that is there or can be made") from None

"""A store in a file of this machine: SQLite in WAL mode, for any number of processes here.

Leases are measured by the clock that counts from the machine's boot, and goes on in its sleep; the wall clock may be
set at will. A lease of an earlier boot gets its whole length once more: nobody knows how long the machine was off.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lb.control.files import boot_id
from lb.rollout.stores.base import (
    Entries,
    Entry,
    Holder,
    Lease,
    Locked,
    StoreError,
    end_of_prefix,
    fenced,
    next_token,
    one_line,
    refuse_key,
    refuse_lock,
    refuse_prefix,
    refuse_txn,
    refuse_version,
)

SCHEMA_VERSION = 1
BUSY_SECONDS = 10.0
"""So long others may be writing."""
LOOK_SECONDS = 0.1
"""So often a watch looks at what other processes wrote."""
_SCHEMA = """
CREATE TABLE entries (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL, version INTEGER NOT NULL);
CREATE INDEX entries_by_version ON entries (version);
CREATE TABLE revision (number INTEGER NOT NULL);
CREATE TABLE locks (
    name TEXT PRIMARY KEY NOT NULL,
    token INTEGER NOT NULL,
    owner TEXT NOT NULL,
    seconds REAL NOT NULL,
    since REAL NOT NULL,
    boot TEXT NOT NULL,
    deadline REAL
);
INSERT INTO revision VALUES (1);
"""


class _Lock(NamedTuple):
    """A row. `since`: by the wall clock; `deadline`: by that of this boot, None: it was released."""

    token: int
    owner: str
    seconds: float
    since: float
    deadline: float | None


def since_boot() -> float:
    """Seconds, with those that the machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SQLiteStore:
    """Owns a connection, which threads use in turn. The file is 0600; a directory that is not there yet, 0700."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = since_boot,
        wall: Callable[[], float] = time.time,
        boot: str | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        """Raises StoreError."""
        self._path = Path(path).absolute()
        self._clock, self._wall = clock, wall
        self._boot = boot_id() if boot is None else boot
        self._busy_seconds = busy_seconds
        self._changed = threading.Condition()
        self._is_closed = False
        try:
            _make_file(self._path)
            self._connection = self._connected()
        except OSError as error:
            raise self._error(error.strerror or str(error)) from None
        except sqlite3.Error as error:
            raise self._error(error) from None

    def get(self, key: str) -> Entry | None:
        refuse_key(key)
        with self._using() as connection:
            row = connection.execute("SELECT key, value, version FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else Entry(*row)

    def list(self, prefix: str) -> Entries:
        refuse_prefix(prefix)
        return self._changed_after(prefix, 0)

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        refuse_txn(lease, compares, puts, deletes)
        with self._writing() as connection:
            if lease is not None:
                self._require(connection, lease)
            for key, version in compares.items():
                row = connection.execute("SELECT version FROM entries WHERE key = ?", (key,)).fetchone()
                if (0 if row is None else row[0]) != version:
                    return None
            (revision,) = connection.execute("SELECT number FROM revision").fetchone()
            if not puts and not deletes:
                return int(revision)
            revision += 1
            connection.execute("UPDATE revision SET number = ?", (revision,))
            rows = [(key, bytes(value), revision) for key, value in puts.items()]
            connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
            connection.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in deletes])
        with self._changed:
            self._changed.notify_all()
        return int(revision)

    def watch(self, prefix: str, after: int, timeout: float) -> Entries:
        refuse_prefix(prefix)
        refuse_version(f"watch {prefix}", after)
        deadline = time.monotonic() + timeout
        while True:
            found = self._changed_after(prefix, after)
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            with self._changed:
                self._changed.wait(min(left, LOOK_SECONDS))

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        refuse_lock(name, owner, seconds)
        with self._writing() as connection:
            last, now = self._row(connection, name), self._clock()
            holder = self._holder(last)
            if holder is not None:
                raise Locked(name, holder)
            token = next_token(0 if last is None else last.token, self._wall())
            row = (name, token, owner, seconds, self._wall(), self._boot, now + seconds)
            connection.execute("INSERT OR REPLACE INTO locks VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return Lease(name, owner, token, seconds)

    def renew(self, lease: Lease) -> None:
        with self._writing() as connection:
            row = self._require(connection, lease)
            deadline = self._clock() + row.seconds
            connection.execute("UPDATE locks SET deadline = ? WHERE name = ?", (deadline, lease.name))

    def release(self, lease: Lease) -> None:
        refuse_key(lease.name)
        with self._writing() as connection:
            row = self._row(connection, lease.name)
            if row is not None and row.token == lease.token:
                connection.execute("UPDATE locks SET deadline = NULL WHERE name = ?", (lease.name,))

    def holder(self, name: str) -> Holder | None:
        refuse_key(name)
        with self._using() as connection:
            return self._holder(self._row(connection, name))

    def close(self) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
            self._connection.close()

    # --- locks ------------------------------------------------------------------------------------------------------

    def _row(self, connection: sqlite3.Connection, name: str) -> _Lock | None:
        select = "SELECT token, owner, seconds, since, deadline FROM locks WHERE name = ?"
        found = connection.execute(select, (name,)).fetchone()
        return None if found is None else _Lock(*found)

    def _holder(self, row: _Lock | None) -> Holder | None:
        if row is None or row.deadline is None:
            return None
        left = row.deadline - self._clock()
        return Holder(row.owner, row.token, row.since, self._wall() + left) if left > 0 else None

    def _require(self, connection: sqlite3.Connection, lease: Lease) -> _Lock:
        """Raises Fenced."""
        refuse_key(lease.name)
        row = self._row(connection, lease.name)
        holder = self._holder(row)
        if row is None or holder is None or row.token != lease.token:
            raise fenced(lease, holder)
        return row

    # --- the file ---------------------------------------------------------------------------------------------------

    def _changed_after(self, prefix: str, after: int) -> Entries:
        select = "SELECT key, value, version FROM entries WHERE key >= ? AND key < ? AND version > ? ORDER BY key"
        with self._using() as connection:
            return [Entry(*row) for row in connection.execute(select, (prefix, end_of_prefix(prefix), after))]

    def _connected(self) -> sqlite3.Connection:
        """Raises StoreError, sqlite3.Error."""
        connection = sqlite3.connect(
            self._path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            self._become_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")  # on the disk when it is answered
            with self._transaction(connection):
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _SCHEMA.split(";\n"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                if version in (0, SCHEMA_VERSION):
                    self._adopt(connection)
            if version not in (0, SCHEMA_VERSION):
                text = f"its schema is {version}, and this release knows {SCHEMA_VERSION}"
                raise StoreError(f"store {self._path}: {text}; use the release that wrote it, or another file")
        except BaseException:
            connection.close()
            raise
        return connection

    def _adopt(self, connection: sqlite3.Connection) -> None:
        """Leases of an earlier boot, or of a clock that was never ours, are of now."""
        now = self._clock()
        connection.execute(
            "UPDATE locks SET boot = ?, deadline = ? + seconds "
            "WHERE deadline IS NOT NULL AND (boot != ? OR deadline - ? > seconds)",
            (self._boot, now, self._boot, now),
        )

    def _become_wal(self, connection: sqlite3.Connection) -> None:
        """Two that begin at once: this change does not wait for others, whatever the timeout."""
        deadline = time.monotonic() + self._busy_seconds
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                with self._changed:
                    self._changed.wait(LOOK_SECONDS)
                continue
            if mode != "wal":
                raise StoreError(f"store {self._path}: cannot be in WAL mode ({mode}); take a local file system")
            return

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """For this thread alone."""
        if not self._changed.acquire(timeout=2 * self._busy_seconds):
            raise self._error("other calls to it do not end")
        try:
            if self._is_closed:
                raise self._error("was closed")
            yield self._connection
        except sqlite3.Error as error:
            raise self._error(error) from None
        finally:
            self._changed.release()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._using() as connection, self._transaction(connection):
            yield connection

    @contextlib.contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the first one is told
                    connection.execute("ROLLBACK")
            raise

    def _error(self, why: object) -> StoreError:
        remedy = "see that the file can be written, or move a broken one away"
        return StoreError(f"store {self._path}: {one_line(why)}; {remedy}")


def _make_file(path: Path) -> None:
    """Raises OSError, StoreError."""
    if not path.parent.is_dir():
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
    if not os.path.lexists(path):
        # It gets its name when it is closed: closing it later would drop SQLite's locks in this process
        # (https://www.sqlite.org/howtocorrupt.html, 2.2).
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(fd)
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.unlink(temporary)
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"store {path}: is no file; name the file itself")
    if status.st_mode & 0o077:
        raise StoreError(f"store {path}: others may read or write it; chmod 600 it")

"""A store in one SQLite file, for the processes of one machine: WAL, every transaction durable when it returns.

Leases are timed by the clock that goes on over suspends and that nobody can set (CLOCK_BOOTTIME), together with the id
of this boot: a lease of an earlier boot has ended.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from lb.rollout.stores.base import Entry, Holder, Lease, Locked, StoreError, check_keys, check_txn, fenced

BUSY_SECONDS = 10.0
WATCH_SECONDS = 0.1
_SCHEMA = """
create table if not exists entries (key text primary key, value blob not null, version integer not null);
create index if not exists entries_by_version on entries (version);
create table if not exists locks (
    name text primary key, owner text not null, token integer not null,
    boot text not null, ends real not null, since real not null, until real not null, is_held integer not null
);
create table if not exists counters (name text primary key, value integer not null);
insert or ignore into counters values ('version', 0);
"""


class SQLiteStore:
    """Owns its connection. For several threads, one at a time."""

    def __init__(self, path: str | Path) -> None:
        """Opens the file, or makes it (0600, in a directory of 0700). Raises StoreError."""
        self._path = Path(path)
        self._mutex = threading.RLock()
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            self._database = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            with self._errors():
                self._database.execute("pragma journal_mode = wal")
                self._database.execute("pragma synchronous = full")
                self._database.executescript(_SCHEMA)
        except OSError as error:
            raise StoreError(f"store {path}: {(error.strerror or str(error)).lower()}") from None

    def close(self) -> None:
        self._database.close()

    def get(self, key: str) -> Entry | None:
        check_keys([key])
        with self._errors():
            row = self._database.execute("select key, value, version from entries where key = ?", (key,)).fetchone()
        return None if row is None else Entry(*row)

    def entries(self, prefix: str) -> list[Entry]:
        check_keys([prefix])
        with self._errors():
            rows = self._database.execute(
                "select key, value, version from entries where substr(key, 1, ?) = ? order by key",
                (len(prefix), prefix),
            )
            return [Entry(*row) for row in rows]

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        check_txn(lease, compares, puts, deletes)
        with self._writing() as run:
            if lease is not None and not self._is_held(lease):
                raise fenced(lease)
            for key, version in compares.items():
                row = run("select version from entries where key = ?", (key,)).fetchone()
                if (0 if row is None else row[0]) != version:
                    return None
            (version,) = run("update counters set value = value + 1 where name = 'version' returning value").fetchone()
            for key, value in puts.items():
                run("insert or replace into entries values (?, ?, ?)", (key, value, version))
            for key in deletes:
                run("delete from entries where key = ?", (key,))
        return int(version)

    def watch(self, prefix: str, after: int, timeout: float) -> list[Entry]:
        """SQLite tells nobody: it is looked for now and then."""
        deadline = time.monotonic() + timeout
        while True:
            found = [one for one in self.entries(prefix) if one.version > after]
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(min(WATCH_SECONDS, max(0.0, deadline - time.monotonic())))

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        check_keys([name])
        with self._writing() as run:
            holder = self._holder(name)
            if holder is not None:
                raise Locked(name, holder)
            row = run("select token from locks where name = ?", (name,)).fetchone()
            token = 1 if row is None else row[0] + 1
            now = time.time()
            ends = time.clock_gettime(time.CLOCK_BOOTTIME) + seconds
            run(
                "insert or replace into locks values (?, ?, ?, ?, ?, ?, ?, 1)",
                (name, owner, token, _boot_id(), ends, now, now + seconds),
            )
        return Lease(name, owner, token, seconds)

    def renew(self, lease: Lease) -> None:
        with self._writing() as run:
            if not self._is_held(lease):
                raise fenced(lease)
            ends = time.clock_gettime(time.CLOCK_BOOTTIME) + lease.seconds
            until = time.time() + lease.seconds
            run("update locks set ends = ?, until = ? where name = ?", (ends, until, lease.name))

    def release(self, lease: Lease) -> None:
        with self._writing() as run:
            run("update locks set is_held = 0 where name = ? and token = ?", (lease.name, lease.token))

    def holder(self, name: str) -> Holder | None:
        check_keys([name])
        with self._errors():
            return self._holder(name)

    # --- within -----------------------------------------------------------------------------------------------------

    def _holder(self, name: str) -> Holder | None:
        row = self._database.execute(
            "select owner, token, since, until from locks where name = ? and is_held and boot = ? and ends > ?",
            (name, _boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME)),
        ).fetchone()
        return None if row is None else Holder(*row)

    def _is_held(self, lease: Lease) -> bool:
        holder = self._holder(lease.name)
        return holder is not None and holder.token == lease.token

    @contextlib.contextmanager
    def _writing(self) -> Iterator[type]:
        with self._errors():
            self._database.execute("begin immediate")
            try:
                yield self._database.execute  # type: ignore[misc]
            except BaseException:
                self._database.execute("rollback")
                raise
            self._database.execute("commit")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._mutex:
                yield
        except sqlite3.Error as error:
            raise StoreError(f"store {self._path}: {error}") from None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

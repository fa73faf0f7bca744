"""The store in a file: clocks, boots, restarts, and what becomes of bad files and full disks."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff.errors import ExitCode, UsageError
from lb.rollout.stores import Fenced, Locked, SQLiteStore, StoreError, open_store
from lb.rollout.stores.base import next_token
from lb.rollout.stores.sqlite import SCHEMA_VERSION


class Clocks:
    """Of a machine, which a test sets."""

    def __init__(self) -> None:
        self.since_boot, self.wall, self.boot = 1000.0, 1_700_000_000.0, "first"

    def open(self, path: Path) -> SQLiteStore:
        return SQLiteStore(path, clock=lambda: self.since_boot, wall=lambda: self.wall, boot=self.boot)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dir" / "store.db"


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_nobody_else_can_read_it(path: Path) -> None:
    with contextlib.closing(SQLiteStore(path)) as store:
        store.txn(store.lock("shop", "alice", 60), {}, {"a": b"1"})
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        names = {one.name for one in path.parent.iterdir()}
        assert names == {"store.db", "store.db-wal", "store.db-shm"}
        assert {stat.S_IMODE((path.parent / name).stat().st_mode) for name in names} == {0o600}
    assert [one.name for one in path.parent.iterdir()] == ["store.db"]


def test_what_is_answered_is_on_the_disk(path: Path) -> None:
    with contextlib.closing(SQLiteStore(path)) as store:
        (synchronous,) = store._connection.execute("PRAGMA synchronous").fetchone()
        (mode,) = store._connection.execute("PRAGMA journal_mode").fetchone()
    assert (synchronous, mode) == (2, "wal")


def test_a_lease_ends_by_the_time_since_boot_whatever_the_wall_clock_does(path: Path, clocks: Clocks) -> None:
    with contextlib.closing(clocks.open(path)) as store:
        lease = store.lock("shop", "alice", 30)
        for step in (-1e9, 1e9, 86400.0, -3600.0):
            clocks.wall += step
            store.renew(lease)
            with pytest.raises(Locked) as locked:
                store.lock("shop", "bob", 30)
            assert locked.value.holder.until == clocks.wall + 30
            assert store.txn(lease, {}, {"a": b""}) is not None
        clocks.since_boot += 29.9
        assert store.txn(lease, {}, {"a": b""}) is not None
        clocks.since_boot += 0.1
        with pytest.raises(Fenced):
            store.txn(lease, {}, {"a": b""})
        assert store.lock("shop", "bob", 30).token > lease.token


def test_tokens_grow_when_the_wall_clock_goes_back_and_are_beyond_those_of_a_lost_file(
    path: Path, clocks: Clocks
) -> None:
    with contextlib.closing(clocks.open(path)) as store:
        first = store.lock("shop", "alice", 30)
        store.release(first)
        clocks.wall -= 1e6
        second = store.lock("shop", "alice", 30)
        assert second.token == first.token + 1
    clocks.wall += 1e6 + 60
    with contextlib.closing(clocks.open(path.with_name("other.db"))) as other:
        assert other.lock("shop", "alice", 30).token > second.token


@pytest.mark.parametrize("wall", [float("nan"), float("inf"), -1e300, 1e300])
def test_a_clock_gone_mad_makes_no_token_that_cannot_be(wall: float) -> None:
    assert 5 < next_token(5, wall) < 2**63


def test_a_boot_gives_a_lease_its_length_again_once(path: Path, clocks: Clocks) -> None:
    with contextlib.closing(clocks.open(path)) as store:
        lease = store.lock("shop", "alice", 30)
        gone = store.lock("blog", "alice", 30)
        store.release(gone)
    clocks.boot, clocks.since_boot = "second", 5.0
    for _ in range(3):  # opened again and again, it still ends
        with contextlib.closing(clocks.open(path)) as store:
            with pytest.raises(Locked):
                store.lock("shop", "bob", 30)
            assert store.holder("blog") is None
            clocks.since_boot += 9
            assert store.txn(lease, {}, {"a": b""}) is not None
    clocks.since_boot += 3
    with contextlib.closing(clocks.open(path)) as store:
        with pytest.raises(Fenced):
            store.txn(lease, {}, {"a": b""})
        store.lock("shop", "bob", 30)


def test_a_restart_of_the_process_that_keeps_it_changes_nothing(path: Path, clocks: Clocks) -> None:
    with contextlib.closing(clocks.open(path)) as store:
        lease = store.lock("shop", "alice", 30)
        version = store.txn(lease, {}, {"a": b"1"})
    with contextlib.closing(clocks.open(path)) as store:
        assert store.get("a") == ("a", b"1", version)
        store.renew(lease)
        assert store.txn(lease, {"a": version or 0}, {"a": b"2"}) == (version or 0) + 1


WRITER = """
import sys
from lb.rollout.stores import open_store
store = open_store(sys.argv[1])
lease = store.lock("shop", "alice", 3600)
for number in range(1_000_000):
    version = store.txn(lease, {}, {f"pair/{one}": b"%d" % number for one in "ab"})
    print(number, version, flush=True)
"""


def test_after_kill_9_all_that_was_answered_is_there_and_nothing_by_halves(path: Path) -> None:
    url = f"sqlite:{path}"
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        heard = [writer.stdout.readline() for _ in range(50)]
        writer.kill()
        heard += writer.stdout.readlines()
    number, version = (int(word) for word in heard[-1].split())
    with contextlib.closing(open_store(url)) as store:
        one, other = store.list("pair/")
        assert (one.value, one.version) == (other.value, other.version)
        assert int(one.value) - number == one.version - version
        assert one.version >= version
        with pytest.raises(Locked, match="alice"):
            store.lock("shop", "bob", 60)


def test_many_may_open_a_new_file_at_once(path: Path) -> None:
    opened: list[SQLiteStore] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        opened.append(SQLiteStore(path))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = [store.lock(f"lock{number}", "x", 60).token for number, store in enumerate(opened)]
    assert len(tokens) == 8
    for store in opened:
        store.close()


# --- bad files ------------------------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    with pytest.raises(StoreError, match=match) as error:
        SQLiteStore(path)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message
    assert error.value.exit_code == ExitCode.FAILED


def test_what_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a text of somebody else's\n" * 1000)
    path.chmod(0o600)
    before = path.read_bytes()
    refused(path, "file is not a database")
    assert path.read_bytes() == before
    path.chmod(0o644)
    refused(path, "chmod 600")
    refused(tmp_path, "is no file")
    (tmp_path / "link").symlink_to(path)
    refused(tmp_path / "link", "is no file")
    refused(path / "below", "Not a directory|File exists")


def test_a_file_of_a_later_release_is_refused(path: Path) -> None:
    SQLiteStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    refused(path, "its schema is 2, and this release knows 1")


def test_a_damaged_file_is_told_in_one_line(path: Path) -> None:
    with contextlib.closing(SQLiteStore(path)) as store:
        lease = store.lock("shop", "alice", 3600)
        for number in range(20):
            store.txn(lease, {}, {f"key{number}": os.urandom(4096)})
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(StoreError, match="malformed") as error, contextlib.closing(SQLiteStore(path)) as store:
        store.list("")
    assert "move a broken one away" in error.value.message


@pytest.fixture
def limited() -> Iterator[None]:
    """No file may become larger than this, as on a full disk: a real write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_what_was_there_stays(path: Path, limited: None) -> None:
    with contextlib.closing(SQLiteStore(path)) as store:
        lease = store.lock("shop", "alice", 3600)
        version = store.txn(lease, {}, {"a": b"1"})
        with pytest.raises(StoreError, match="see that the file can be written"):
            store.txn(lease, {}, {"a": b"2", "b": b"x" * 500_000})
        assert store.list("") == [("a", b"1", version)]
        assert store.txn(lease, {"a": version or 0}, {"a": b"2"}) is not None


def test_a_file_that_another_process_does_not_let_go_of_is_an_error_in_time(path: Path) -> None:
    SQLiteStore(path).close()
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
        contextlib.closing(SQLiteStore(path, busy_seconds=0.2)) as store,
    ):
        other.execute("BEGIN IMMEDIATE")
        assert store.get("a") is None  # readers do not wait
        with pytest.raises(StoreError, match="database is locked"):
            store.lock("shop", "alice", 60)
        other.execute("ROLLBACK")
        assert store.lock("shop", "alice", 60).owner == "alice"


def test_threads_share_one_store(path: Path) -> None:
    with contextlib.closing(SQLiteStore(path)) as store:
        lease = store.lock("shop", "alice", 3600)
        versions: list[int | None] = []

        def work(name: str) -> None:
            for number in range(10):
                versions.append(store.txn(lease, {}, {f"{name}/{number}": b""}))
                store.renew(lease)

        threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(versions)) == 40
        assert len(store.list("")) == 40


# --- URLs -----------------------------------------------------------------------------------------------------------


def test_a_path_is_relative_to_what_names_it(tmp_path: Path) -> None:
    store = open_store("sqlite:state/store.db", near=str(tmp_path))
    store.close()
    assert (tmp_path / "state" / "store.db").is_file()


@pytest.mark.parametrize("url", ["", "sqlite:", "balancer", "redis://h", "/path", "etcd:h"])
def test_what_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected balancer, sqlite:PATH or etcd://"):
        open_store(url)


def test_by_default_leases_are_measured_by_the_clock_that_goes_on_in_sleep(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(SQLiteStore(path)) as store:
        lease = store.lock("shop", "alice", 1000)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        store.renew(lease)
        real = time.clock_gettime(time.CLOCK_BOOTTIME)
        monkeypatch.setattr(time, "clock_gettime", lambda clock: real + 1e6 if clock == time.CLOCK_BOOTTIME else 0.0)
        with pytest.raises(Fenced):
            store.renew(lease)

"""Files: whole at any moment, private, durable where they must be; and what comes of bad ones."""

from __future__ import annotations

import logging
import resource
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lb.control import store as store_module
from lb.control.files import boot_id, run_id, write_atomically
from lb.control.store import Store
from lb.control.stored import (
    FRESH_SECONDS,
    MEMORY_NAME,
    OVERRIDES_NAME,
    Memory,
    fingerprint,
    initial_table,
)
from lb.core.compose import Record
from lb.core.model import Backend, Balancer, Check, Service
from lb.core.overrides import Overrides, StateChange
from lb.core.standing import CheckedHealth, Health
from lb.core.table import Table
from lb.core.wire import TABLE_NAME
from tests.unit.lb_harness import endpoint, run

IDENTITY = "shop/blue/b1@10.0.0.1:80#1"
DRAINED = Overrides(states={"shop/blue/b1": StateChange(state="drain", at=1.0, configured="10.0.0.1:80")})


def balancer(check: Check | None = None) -> Balancer:
    pools = {"blue": (Backend(name="b1", address="10.0.0.1:80"),)}
    return Balancer(
        name="edge", services=(Service(name="shop", listen=(":80",), pools=pools, active="blue", check=check),)
    )


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file may grow, as on a full disk: a real write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_is_saved_is_there_after_a_restart_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    async def test() -> None:
        directory = tmp_path / "some" / "state"
        store = Store(directory)
        assert store.load() == Overrides()
        store.save(DRAINED)
        assert store.problem is None
        assert Store(directory).load() == DRAINED
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / OVERRIDES_NAME).stat().st_mode) == 0o600
        assert [one.name for one in directory.iterdir()] == [OVERRIDES_NAME]

    run(test)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, no_room: None) -> None:
    path = tmp_path / "file"
    path.touch()
    inode = path.stat().st_ino
    with pytest.raises(OSError, match="File too large"):
        write_atomically(path, b"x" * 10_000, is_durable=True)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_ino == inode


def test_without_room_it_is_tried_again_until_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "FIRST_RETRY_SECONDS", 0.01)
    caplog.set_level(logging.INFO, logger="handoff.lb")

    async def test() -> None:
        store = Store(tmp_path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            store.save(DRAINED)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert store.problem == f"{tmp_path / OVERRIDES_NAME}: File too large"
        await store.until_saved()
        assert store.problem is None
        assert Store(tmp_path).load() == DRAINED
        assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]

    run(test)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"states": {"a": 1}}', "\xff", "[" * 100_000])
def test_overrides_that_cannot_be_used_are_put_aside_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    async def test() -> None:
        (tmp_path / OVERRIDES_NAME).write_bytes(text.encode("latin-1"))
        table = initial_table(balancer(), 1, tmp_path, tmp_path)
        assert endpoint(table, "blue/b1").is_eligible
        assert Store(tmp_path).load() == Overrides()
        assert "starting without it" in caplog.text
        assert (tmp_path / f"{OVERRIDES_NAME}.bad").read_bytes() == text.encode("latin-1")

    run(test)


def memory(age_seconds: float = 0.0, boot: str | None = None, base: Balancer | None = None) -> Memory:
    return Memory(
        boot=boot_id() if boot is None else boot,
        run=run_id(),
        generation=1,
        base=fingerprint(base or balancer(Check())),
        applied=None,
        written_at=time.monotonic() - age_seconds,
        wall_offset=0.0,
        records={IDENTITY: Record(checked=CheckedHealth(Health.UP))},
        ejections={},
        leaving={},
        answers={},
    )


@pytest.mark.parametrize(
    ("known", "is_eligible"),
    [(memory(), True), (memory(FRESH_SECONDS + 60), False), (memory(boot="another"), False), (None, False)],
    ids=["fresh", "old", "of another boot", "none"],
)
def test_the_first_table_has_the_health_that_is_known_and_awaits_the_rest(
    tmp_path: Path, known: Memory | None, is_eligible: bool
) -> None:
    if known is not None:
        (tmp_path / MEMORY_NAME).write_bytes(msgspec.json.encode(known))
    table = initial_table(balancer(Check()), 2, tmp_path, tmp_path)
    one = endpoint(table, "blue/b1")
    assert (table.generation, table.revision) == (2, 0)
    assert (one.is_eligible, one.is_awaited) == (is_eligible, not is_eligible)


def test_the_first_table_has_the_overrides(tmp_path: Path) -> None:
    (tmp_path / OVERRIDES_NAME).write_bytes(msgspec.json.encode(DRAINED))
    assert not endpoint(initial_table(balancer(), 1, tmp_path, tmp_path), "blue/b1").is_eligible


def test_a_relay_worker_that_is_started_again_has_the_last_table_of_its_own_configuration_only(tmp_path: Path) -> None:
    last = Table(generation=1, revision=9, routes={})
    (tmp_path / TABLE_NAME).write_bytes(msgspec.json.encode(last))
    (tmp_path / MEMORY_NAME).write_bytes(msgspec.json.encode(memory()))
    assert initial_table(balancer(Check()), 1, tmp_path, tmp_path) == last
    assert initial_table(balancer(Check()), 2, tmp_path, tmp_path).routes.keys() == {"shop"}
    assert initial_table(balancer(), 1, tmp_path, tmp_path).routes.keys() == {"shop"}


@pytest.mark.parametrize("name", [TABLE_NAME, MEMORY_NAME])
def test_bad_files_in_the_runtime_directory_are_said_and_count_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / name).write_text('{"boot": 1, "routes"')
    table = initial_table(balancer(Check()), 1, tmp_path, tmp_path)
    assert endpoint(table, "blue/b1").is_awaited
    assert f"{tmp_path / name} cannot be used" in caplog.text
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert initial_table(balancer(Check()), 1, tmp_path, tmp_path) == table
